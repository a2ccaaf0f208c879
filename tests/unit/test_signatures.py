"""Every task in a canvas is found, in signatures and in what a message holds of them."""

import json
from typing import Any

import pytest
from celery import Celery, chain, chord, group

from celery_outbox.outbox.signatures import tasks_of

app = Celery("canvas", broker="memory://", set_as_current=False)
a, b, c, d = (app.signature(name) for name in "abcd")

CANVASES: list[tuple[Any, str]] = [
    (a, "a"),
    (chain(a, b, app=app), "ab"),
    (group([a, b], app=app), "ab"),
    (chord([a, b], c, app=app), "abc"),
    (chord((each for each in (a, b)), c, app=app), "abc"),
    (chord(group([a, b], app=app), chain(c, d, app=app), app=app), "abcd"),
    (chord([a, chain(b, c, app=app)], chord([a, b], d, app=app), app=app), "abcabd"),
]


@pytest.mark.parametrize(("canvas", "names"), CANVASES, ids=[names for _, names in CANVASES])
def test_all_of_them(canvas: Any, names: str) -> None:
    assert "".join(tasks_of(canvas)) == names
    assert "".join(tasks_of(json.loads(json.dumps(canvas)))) == names
