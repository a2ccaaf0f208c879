"""Whether durable tasks are acknowledged when they should be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from celery_outbox.checks import check_task
from celery_outbox.doctor.finding import Finding, error, fine
from celery_outbox.errors import ConfigurationError
from celery_outbox.inbox.task import DurableTask

if TYPE_CHECKING:
    from celery_outbox.plugin import Outbox

__all__ = ["check_durable_tasks"]


def check_durable_tasks(outbox: Outbox) -> Iterator[Finding]:
    """Durable tasks are acknowledged after their commit, and requeued when their worker is lost."""
    count, wrong = 0, 0
    for task in outbox.app.tasks.values():
        if not isinstance(task, DurableTask):
            continue
        count += 1
        try:
            check_task(task)
        except ConfigurationError as exc:
            wrong += 1
            yield error(str(exc), "Take that out; workers refuse to start with it.")
    if not wrong:
        yield fine(f"{count} durable task(s) are acknowledged after their commit")
