"""Relay: claim, publish, settle, pause."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event

from sqlalchemy.exc import InterfaceError, InternalError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_outbox import events
from celery_outbox.config import Config
from celery_outbox.envelope import Envelope
from celery_outbox.relay.outcome import Confirmed, Outcome, Refused, Undecided, backoff
from celery_outbox.relay.publishers import Publisher
from celery_outbox.storage.store import Batch, Claimed, Settlement, Store

__all__ = ["Relay", "Tally"]

logger = logging.getLogger("celery_outbox.relay")

#: The longest pause while the broker or the database is away.
_LONGEST_PAUSE = 15.0
#: The pauses between two tries to settle, the first and the longest.
_SHORTEST_PAUSE = 0.05
_LONGEST_SETTLE_PAUSE = 2.0
_PRUNE_EVERY = 60.0
_PRUNE_CHUNK = 1000


@dataclass(frozen=True, slots=True)
class Tally:
    """What one pass of the relay did, in messages."""

    claimed: int = 0
    confirmed: int = 0
    retried: int = 0
    dead: int = 0
    #: Given back because the broker was away.
    released: int = 0
    #: Settled too late: the lease was over, and another relay has them.
    lost: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.claimed + other.claimed,
            self.confirmed + other.confirmed,
            self.retried + other.retried,
            self.dead + other.dead,
            self.released + other.released,
            self.lost + other.lost,
        )


class Relay:
    """Moves envelopes from the outbox to the broker. Any number of relays may run at once."""

    def __init__(self, store: Store, publisher: Publisher, config: Config) -> None:
        self._store = store
        self._publisher = publisher
        self._config = config
        self._troubles = 0
        self._next_prune = time.monotonic() + random.random() * _PRUNE_EVERY

    def once(self) -> Tally:
        """Move one batch. Claims nothing while the broker is away.

        Raises SQLAlchemy's errors when the database is away. If it does not come back before the
        lease is over, what was published is published again: at most one batch twice.
        """
        try:
            self._publisher.open()
        except Exception as exc:
            self._broker_is_away(exc)
            return Tally()
        claimed_at = time.monotonic()
        batch = self._store.claim(self._config.batch_size, self._config.lease_seconds)
        if not batch.rows:
            self._troubles = 0
            return Tally()
        events.emit(events.CLAIMED, count=len(batch.rows))
        outcomes = self._publish(batch)
        events.emit(events.PUBLISHED, count=len(outcomes))
        settlement = self._settlement(batch, outcomes)
        lost = self._settle(batch, settlement, claimed_at + self._config.lease_seconds)
        if lost:
            logger.warning("the lease of %d message(s) was over: another relay has them", lost)
            events.emit(events.LEASE_LOST, count=lost)
        tally = Tally(
            claimed=len(batch.rows),
            confirmed=len(settlement.confirmed) + len(settlement.kept),
            retried=len(settlement.retried),
            dead=len(settlement.dead),
            released=len(settlement.released),
            lost=lost,
        )
        events.emit(events.SETTLED, tally=tally)
        return tally

    def drain(self, seconds: float | None = None) -> Tally:
        """Move batches until nothing is available, the broker is away, or the time is over."""
        deadline = None if seconds is None else time.monotonic() + seconds
        total = Tally()
        while True:
            tally = self.once()
            total += tally
            if not tally.claimed or tally.released:
                return total
            if deadline is not None and time.monotonic() >= deadline:
                return total

    def run(self, stop: Event) -> None:
        """Move batches until `stop` is set; the batch in hand is settled first."""
        while not stop.is_set():
            try:
                tally = self.once()
                self.keep_house()
            except SQLAlchemyError as exc:
                self._troubles += 1
                logger.error("the database is away: %s", exc)
                tally = Tally()
            except Exception:
                # Nothing that we know of; but what it is must not end the relay for all messages.
                self._troubles += 1
                logger.exception("a batch was not ended, and will be taken again after its lease")
                self._publisher.close()
                tally = Tally()
            # A full page is followed at once.
            if tally.claimed < self._config.batch_size or tally.released:
                stop.wait(self._pause())
        self.close()

    def keep_house(self) -> None:
        """Prune the inbox, in chunks, about once a minute."""
        if time.monotonic() < self._next_prune:
            return
        self._next_prune = time.monotonic() + _PRUNE_EVERY
        while self._store.prune_inbox(self._config.inbox_retention_seconds, _PRUNE_CHUNK) == (
            _PRUNE_CHUNK
        ):
            pass

    def close(self) -> None:
        """Drop the connection to the broker."""
        self._publisher.close()

    def _publish(self, batch: Batch) -> dict[int, Outcome]:
        assert batch.now is not None
        readable: Sequence[tuple[int, Envelope]] = [
            (row.id, row.envelope.at(batch.now)) for row in batch.rows if row.envelope is not None
        ]
        return self._publisher.publish(readable)

    def _settle(self, batch: Batch, settlement: Settlement, lease_ends: float) -> int:
        """Settle, again and again while the database is away and the lease is not over."""
        pause = _SHORTEST_PAUSE
        failed = False
        while True:
            try:
                lost = self._store.settle(batch, settlement)
            except (OperationalError, InterfaceError, InternalError, PoolTimeout) as exc:
                if time.monotonic() + pause >= lease_ends:
                    raise
                failed = True
                logger.error("the database is away, with %d to settle: %s", len(batch.rows), exc)
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_SETTLE_PAUSE)
            else:
                # Within the lease nobody else had them: it is the first try that took effect.
                return 0 if failed else lost

    def _settlement(self, batch: Batch, outcomes: dict[int, Outcome]) -> Settlement:
        settlement = Settlement(unreadable_after_seconds=self._config.backoff_cap_seconds)
        undecided: str | None = None
        for row in batch.rows:
            if row.envelope is None:
                # By a newer version, most likely; its own relays will take it.
                settlement.unreadable[row.id] = row.error or "unreadable"
                logger.error("%s", row.error)
                continue
            outcome = outcomes[row.id]
            match outcome:
                case Confirmed():
                    self._confirm(settlement, batch, row)
                case Refused(error):
                    self._refuse(settlement, row, error)
                case Undecided(error):
                    undecided = error
                    settlement.released.append(row.id)
        if undecided is not None:
            self._broker_is_away(undecided)
        else:
            self._troubles = 0
        return settlement

    def _confirm(self, settlement: Settlement, batch: Batch, row: Claimed) -> None:
        assert row.envelope is not None
        assert batch.now is not None
        expires_at = row.envelope.expires_at
        expired = expires_at is not None and expires_at <= batch.now
        if self._config.keep_until_handled and row.envelope.keep and not expired:
            # The longer it has waited for a worker, the longer it is left alone.
            age = (batch.now - row.created_at).total_seconds()
            settlement.kept[row.id] = max(self._config.redeliver_after_seconds, age)
        else:
            settlement.confirmed.append(row.id)

    def _refuse(self, settlement: Settlement, row: Claimed, error: str) -> None:
        if row.attempts >= self._config.max_attempts:
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
                row.attempts,
                base=self._config.backoff_base_seconds,
                cap=self._config.backoff_cap_seconds,
            )
            settlement.retried[row.id] = (pause, error)
            logger.warning(
                "%s[%s] was not taken, again in %.1f s: %s", row.task, row.task_id, pause, error
            )

    def _broker_is_away(self, error: object) -> None:
        self._troubles += 1
        logger.error("the broker is away: %s", error)
        events.emit(events.BROKER_AWAY, error=str(error))

    def _pause(self) -> float:
        if not self._troubles:
            return self._config.poll_seconds
        return min(_LONGEST_PAUSE, self._config.poll_seconds * 2.0 ** min(self._troubles, 16))
