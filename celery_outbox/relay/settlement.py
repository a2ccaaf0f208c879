"""What becomes of the rows of a batch, by what the broker made of their messages."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from datetime import datetime

from typing_extensions import assert_never

from celery_outbox import events
from celery_outbox.config import Config
from celery_outbox.relay.breaker import Breakers, backoff
from celery_outbox.relay.outcome import (
    Confirmed,
    Outcome,
    Refused,
    Stalled,
    Undecided,
    UnderWay,
    Unknown,
)
from celery_outbox.storage.store import Claimed, Settlement

__all__ = ["settlement_of"]

logger = logging.getLogger("celery_outbox.relay")


def settlement_of(
    rows: Sequence[Claimed],
    outcomes: Mapping[int, Outcome],
    now: datetime,
    config: Config,
    destinations: Breakers,
) -> Settlement:
    """Turn outcomes into a settlement; `now` is the database's time of the claim.

    Rows that are still under way are left out. `destinations` learns which of them take messages.
    """
    settlement = Settlement()
    stalled: list[tuple[Claimed, Stalled]] = []
    slow: set[str] = set()
    taking: set[str] = set()
    for row in rows:
        if row.envelope is None:
            # By a newer version, most likely; its own relays will take it.
            error = row.error or "unreadable"
            logger.error("%s", error)
            settlement.postponed[row.id] = (config.backoff_cap_seconds, error)
            continue
        outcome = outcomes[row.id]
        match outcome:
            case Confirmed():
                taking.add(row.destination)
                _confirm(settlement, row, now, config)
            case Refused(error):
                _refuse(settlement, row, error, config)
            case Stalled():
                stalled.append((row, outcome))
            case Undecided() | Unknown():
                settlement.released.append(row.id)
            case UnderWay():
                slow.add(row.destination)
            case _:
                assert_never(outcome)
    for destination in taking:
        destinations.succeeded(destination)
    for destination in slow - taking:
        destinations.failed(destination, "its messages are not confirmed yet")
    # After those that were confirmed: a queue that was filled by them is full all the same.
    for row, outcome in stalled:
        _postpone(settlement, row, outcome, destinations)
    return settlement


def _confirm(settlement: Settlement, row: Claimed, now: datetime, config: Config) -> None:
    assert row.envelope is not None
    expires_at = row.envelope.expires_at
    expired = expires_at is not None and expires_at <= now
    if config.keep_until_handled and row.envelope.keep and not expired:
        # The longer it has waited for a worker, the longer it is left alone.
        age = (now - row.created_at).total_seconds()
        settlement.kept[row.id] = max(config.redeliver_after_seconds, age)
    else:
        settlement.confirmed.append(row.id)


def _refuse(settlement: Settlement, row: Claimed, error: str, config: Config) -> None:
    if row.attempts >= config.max_attempts:
        settlement.dead[row.id] = error
        logger.error(
            "%s[%s] is a dead letter after %d attempts: %s",
            row.task,
            row.task_id,
            row.attempts,
            error,
        )
        events.emit(events.DEAD, task=row.task, task_id=row.task_id, error=error)
    else:
        pause = backoff(
            row.attempts, base=config.backoff_base_seconds, cap=config.backoff_cap_seconds
        )
        settlement.retried[row.id] = (pause, error)
        logger.warning(
            "%s[%s] was not taken, again in %.1f s: %s", row.task, row.task_id, pause, error
        )


def _postpone(
    settlement: Settlement, row: Claimed, outcome: Stalled, destinations: Breakers
) -> None:
    pause = destinations.seconds_left(row.destination)
    if outcome.tried and not pause:
        pause = destinations.failed(row.destination, outcome.error)
        logger.warning(
            "%s takes nothing, again in %.1f s: %s", row.destination, pause, outcome.error
        )
        events.emit(events.STALLED, destination=row.destination, error=outcome.error)
    # Spread, so that they don't come back all in one batch.
    settlement.postponed[row.id] = (pause * (1 + random.random() / 4), outcome.error)
