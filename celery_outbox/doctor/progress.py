"""Whether messages get on: relays make progress, nothing is dead, the inbox and the outbox agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sqlalchemy import func, select

from celery_outbox.doctor.finding import Finding, error, fine, warning
from celery_outbox.observability.figures import read_figures

if TYPE_CHECKING:
    from celery_outbox.plugin import Outbox

__all__ = ["check_dead_letters", "check_kept", "check_lag"]

#: How long a message may wait for a relay before nobody would call it progress, in seconds.
LAG_SECONDS = 60.0


def check_lag(outbox: Outbox, longest_seconds: float = LAG_SECONDS) -> Iterator[Finding]:
    """No message that is due has waited long for a relay."""
    figures = read_figures(outbox.store)
    if figures.lag_seconds > longest_seconds:
        yield error(
            f"a message that is due has waited for {figures.lag_seconds:.0f} s, and "
            f"{figures.messages['outgoing']} wait in all",
            "Is a relay running (beat with a worker, `outbox relay`, outbox_relay_in_worker), and does "
            "it log errors? If it is busy, run another one.",
        )
    else:
        yield fine(f"{figures.messages['outgoing']} message(s) wait, none for long")


def check_dead_letters(outbox: Outbox) -> Iterator[Finding]:
    """No message was given up."""
    counted = select(func.count()).select_from(outbox.tables.dead_letter)
    with outbox.engine.connect() as connection:
        dead = connection.execute(counted).scalar_one()
    if dead:
        yield warning(
            f"{dead} dead letter(s): refused for good, or delivered again and again in vain",
            "See `outbox dead-letters list`, mend what the errors say, then replay or discard them.",
        )
    else:
        yield fine("no dead letters")


def check_kept(outbox: Outbox) -> Iterator[Finding]:
    """What is kept until a worker has handled it was not handled already."""
    kept, inbox = outbox.tables.outbox, outbox.tables.inbox
    handled = (
        select(func.count())
        .select_from(kept.join(inbox, kept.c.key == inbox.c.key))
        .where(kept.c.published_at.is_not(None))
    )
    with outbox.engine.connect() as connection:
        count = connection.execute(handled).scalar_one()
    if count:
        yield warning(
            f"{count} message(s) are kept and sent again, though they were handled",
            "outbox_keep_until_handled has to be the same for relays and workers: set it for both.",
        )
    else:
        yield fine("no message is kept that was handled")
