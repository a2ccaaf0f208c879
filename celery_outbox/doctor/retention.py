"""Whether the inbox remembers for longer than the broker can deliver again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from celery_outbox.doctor.finding import Finding, error, fine, warning
from celery_outbox.inbox.redelivery import redelivery_window

if TYPE_CHECKING:
    from celery_outbox.plugin import Outbox

__all__ = ["check_retention", "check_time_limits"]


def check_retention(outbox: Outbox) -> Iterator[Finding]:
    """The inbox's retention is at least twice the broker's redelivery window."""
    retention = outbox.config.inbox_retention_seconds
    window = redelivery_window(outbox.app, outbox.config)
    if window is None:
        yield fine(
            f"this broker delivers nothing again by a clock; the inbox keeps {retention:g} s"
        )
        return
    says = (
        f"the inbox remembers for {retention:g} s, and the broker may deliver again after "
        f"{window.seconds:g} s by {window.reason}"
    )
    advice = "Make outbox_inbox_retention_seconds longer: a duplicate that it forgot is executed."
    if retention <= window.seconds:
        yield error(says, advice)
    elif retention < 2 * window.seconds:
        yield warning(says, advice + " A message that is delivered again may have to wait, too.")
    else:
        yield fine(says)


def check_time_limits(outbox: Outbox) -> Iterator[Finding]:
    """No task may run for longer than the broker waits for its acknowledgement."""
    window = redelivery_window(outbox.app, outbox.config)
    limits = {
        name: limit
        for name, task in outbox.app.tasks.items()
        if (limit := task.time_limit or outbox.app.conf.task_time_limit) is not None
        and not name.startswith("celery.")
    }
    slow = {n: limit for n, limit in limits.items() if window and limit >= window.seconds}
    if window is not None and slow:
        some = ", ".join(sorted(slow)[:3])
        yield warning(
            f"{len(slow)} task(s) may run for longer than {window.seconds:g} s ({window.reason}), such "
            f"as {some}: the broker delivers them again while they run, or closes the channel",
            "Raise the broker's timeout above the longest task_time_limit.",
        )
    else:
        yield fine("no task's time limit is longer than the broker waits for it")
