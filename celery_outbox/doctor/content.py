"""Whether workers of this app can read what is stored."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kombu.serialization import prepare_accept_content, registry
from sqlalchemy import select

from celery_outbox.doctor.finding import Finding, error, fine, warning
from celery_outbox.envelope import FORMAT

if TYPE_CHECKING:
    from celery_outbox.plugin import Outbox

__all__ = ["check_content", "check_serializers", "check_tasks"]

#: How many of the oldest and of the newest messages of a table are looked at.
_SAMPLE = 1000


def check_serializers(outbox: Outbox) -> Iterator[Finding]:
    """What this app writes, tasks and results, it also accepts."""
    conf = outbox.app.conf
    accepted = _accepted(conf.accept_content)
    wrong: list[tuple[str, str]] = []
    written = {task.serializer for task in outbox.app.tasks.values() if task.serializer}
    for name in sorted(written | {conf.task_serializer}):
        if _content_type(name) not in accepted:
            wrong.append((f"tasks are written as {name!r}", "accept_content"))
    results = _accepted(conf.result_accept_content or conf.accept_content)
    if _content_type(conf.result_serializer) not in results:
        wrong.append(
            (f"results are written as {conf.result_serializer!r}", "result_accept_content")
        )
    for says, setting in wrong:
        yield error(
            f"{says}, which {setting} does not accept: workers of this app refuse them",
            f"Add it to {setting}, or choose another serializer.",
        )
    if not wrong:
        yield fine("what this app writes it also accepts")


def check_content(outbox: Outbox) -> Iterator[Finding]:
    """The content types of what is stored are accepted, and its form is known to this release."""
    accepted = _accepted(outbox.app.conf.accept_content)
    refused: Counter[str] = Counter()
    newer = 0
    looked = 0
    for row in _sample(outbox):
        looked += 1
        try:
            message = json.loads(row.message)
            is_newer = message["format"] > FORMAT
            content_type = message["content_type"]
        except (KeyError, TypeError, ValueError):
            newer += 1
            continue
        newer += is_newer
        if content_type not in accepted:
            refused[content_type] += 1
    for content_type, count in sorted(refused.items()):
        yield error(
            f"{count} of {looked} stored message(s) are of type {content_type}, which accept_content "
            "does not accept: workers would refuse and drop them",
            "Accept it until they are gone, or cancel them; accept pickle from nobody whom you would "
            "not let run code.",
        )
    if newer:
        yield warning(
            f"{newer} of {looked} stored message(s) are in a form that this release does not know",
            "A newer celery_outbox wrote them, and its relays take them: upgrade here as well.",
        )
    if not refused and not newer:
        yield fine(f"{looked} stored message(s) looked at: workers can read them")


def check_tasks(outbox: Outbox) -> Iterator[Finding]:
    """The tasks of what is stored are known to this app."""
    known = set(outbox.app.tasks) | {"task-sent"}
    unknown = Counter(row.task for row in _sample(outbox) if row.task not in known)
    if unknown:
        some = ", ".join(f"{name} ({count})" for name, count in unknown.most_common(5))
        yield warning(
            f"messages are stored of tasks that this app does not have: {some}",
            "If no other app's workers have them, workers drop them: was a task renamed, or is its "
            "module not in `include`?",
        )
    else:
        yield fine("the tasks of what is stored are known to this app")


def _accepted(names: Any) -> set[str]:
    return set(prepare_accept_content(names) or ())


def _content_type(name: str) -> str:
    """The content type of a serializer by name; a content type stands for itself."""
    encoder = registry._encoders.get(name)
    return str(encoder.content_type) if encoder is not None else name


def _sample(outbox: Outbox) -> Iterator[Any]:
    """Rows of both tables: the oldest and the newest, none twice."""
    with outbox.engine.connect() as connection:
        for table in (outbox.tables.outbox, outbox.tables.dead_letter):
            columns = select(table.c.id, table.c.task, table.c.message)
            seen: set[int] = set()
            for order in (table.c.id.asc(), table.c.id.desc()):
                for row in connection.execute(columns.order_by(order).limit(_SAMPLE)).all():
                    if row.id not in seen:
                        seen.add(row.id)
                        yield row
