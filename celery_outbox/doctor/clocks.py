"""Whether this machine and the database agree on the time."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

from sqlalchemy import select

from celery_outbox.doctor.finding import Finding, error, fine, warning

if TYPE_CHECKING:
    from celery_outbox.plugin import Outbox

__all__ = ["check_clocks"]

#: Differences in seconds: what a countdown may show, and what makes messages expire unsent.
_NOTICED, _HARMFUL = 1.0, 30.0


def check_clocks(outbox: Outbox) -> Iterator[Finding]:
    """This machine's clock is the database's, as far as one question tells.

    The database's decides when a message is due, this machine's has written the ``eta``.
    """
    with outbox.engine.connect() as connection:
        connection.execute(select(1))
        before = datetime.now(timezone.utc)
        theirs = connection.execute(select(outbox.store.dialect.now())).scalar_one()
        after = datetime.now(timezone.utc)
    # The transaction has begun before: PostgreSQL's now() is the time of its first statement.
    ahead = max((before - theirs).total_seconds(), 0.0)
    behind = max((theirs - after).total_seconds(), 0.0)
    apart, where = (ahead, "ahead of") if ahead >= behind else (behind, "behind")
    asking = after - before
    apart = max(0.0, apart - asking / timedelta(seconds=1))
    says = f"this machine's clock is {apart:.1f} s {where} the database's"
    advice = (
        "Let both machines keep their time by NTP: messages with an eta, a countdown or an expiry go "
        "out too early or too late by as much."
    )
    if apart > _HARMFUL:
        yield error(says, advice)
    elif apart > _NOTICED:
        yield warning(says, advice)
    else:
        yield fine("this machine's clock and the database's agree to the second")
