"""A signature applied twice is meant twice, and a message delivered twice is meant once."""

from collections.abc import Callable
from typing import Any

import pytest
from celery import chain, chord, group

from tests.journeys.making import Making
from tests.journeys.site import Site, new_tag


@pytest.fixture(scope="module")
def site(module_sites: Making) -> Site:
    """A site whose relay is the test."""
    site = module_sites("amqp")
    site.worker("--concurrency=2")
    return site


def _twice(site: Site, signature: Any) -> list[dict[str, Any]]:
    signature.freeze()
    site.send(signature)
    site.send(signature)
    return site.rows()


def test_one_frozen_signature_applied_twice(site: Site) -> None:
    tag = new_tag()
    rows = _twice(site, site.step(tag))
    assert len({row["task_id"] for row in rows}) == 1
    site.insert_again(rows)
    site.relay_all()
    site.wait_effects(tag, ["done", "done"])
    site.wait_quiet()
    assert site.effects(tag) == ["done", "done"]


def test_both_retry(site: Site) -> None:
    tag = new_tag()
    _twice(site, site.task("retrying").s(tag=tag, times=2))
    while len(site.effects(tag)) < 2:
        site.relay_all()
    site.wait_quiet()
    assert site.effects(tag) == ["try 2", "try 2"]
    assert site.runs(tag) == sorted(["try 0", "try 1", "try 2"] * 2)


def test_both_are_replaced(site: Site) -> None:
    tag = new_tag()
    _twice(site, site.task("replaced").s(tag=tag))
    while len(site.effects(tag)) < 4:
        site.relay_all()
    site.wait_quiet()
    assert site.effects(tag) == ["host", "host", "replacement", "replacement"]


def test_a_stock_task_that_is_delivered_again_sends_the_same(site: Site) -> None:
    """The next step of its chain has a frozen id, and is one execution however often it is sent."""
    tag = new_tag()
    step = site.step(tag, "next")
    step.freeze()
    for _ in range(2):
        site.task("plain").apply_async(kwargs={"tag": tag}, chain=[step])
    while len(site.effects(tag)) < 3 or not site.is_quiet():
        site.relay_all()
    assert site.effects(tag) == ["next", "plain", "plain"]


def _single(site: Site, tag: str) -> Any:
    return site.task("total").s(tag=tag)


def _chain(site: Site, tag: str) -> Any:
    return chain(_single(site, tag), site.task("step").si(tag=tag, name="total"))


def _group(site: Site, tag: str) -> Any:
    return group([_single(site, tag), _single(site, tag)], app=site.app)


def _chord(site: Site, tag: str) -> Any:
    part = site.task("step").si(tag=tag, name="total")
    return chord([part, part.clone()], site.task("step").si(tag=tag, name="total"), app=site.app)


@pytest.mark.parametrize(("body", "totals"), [(_single, 1), (_chain, 2), (_group, 2), (_chord, 3)])
def test_one_frozen_chord_applied_twice(
    site: Site, body: Callable[[Site, str], Any], totals: int
) -> None:
    tag = new_tag()
    signature = chord(
        [site.step(tag, "part"), site.step(tag, "part")], body(site, tag), app=site.app
    )
    signature.freeze()
    for applied in (1, 2):
        site.send(signature)
        while len(site.effects(tag)) < applied * (2 + totals):
            site.relay_all()
        site.wait_quiet()
    assert site.effects(tag) == sorted(["part"] * 4 + ["total"] * 2 * totals)
