"""Relay: claim, publish, settle, pause."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from threading import Event

from sqlalchemy.exc import InterfaceError, InternalError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_outbox import events
from celery_outbox.config import Config
from celery_outbox.envelope import Envelope
from celery_outbox.relay.breaker import Breaker, Breakers
from celery_outbox.relay.housekeeping import Housekeeping
from celery_outbox.relay.outcome import Outcome, Stalled, Undecided, UnderWay
from celery_outbox.relay.publishers import Publisher
from celery_outbox.relay.settlement import settlement_of
from celery_outbox.relay.wakeup import WakeUp
from celery_outbox.storage.store import Batch, Claimed, Settlement, Store

__all__ = ["Relay", "Tally"]

logger = logging.getLogger("celery_outbox.relay")

#: The longest pause while the broker or the database is away.
_LONGEST_PAUSE = 15.0
#: The pauses between two tries to settle, the first and the longest.
_SHORTEST_PAUSE = 0.05
_LONGEST_SETTLE_PAUSE = 2.0


@dataclass(frozen=True, slots=True)
class Tally:
    """What one pass of the relay did, in messages."""

    claimed: int = 0
    confirmed: int = 0
    retried: int = 0
    dead: int = 0
    #: Given back because the broker was away.
    released: int = 0
    #: Left alone for a while, because their destination takes nothing, or they can't be read.
    postponed: int = 0
    #: Settled too late: the lease was over, and another relay has them.
    lost: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.claimed + other.claimed,
            self.confirmed + other.confirmed,
            self.retried + other.retried,
            self.dead + other.dead,
            self.released + other.released,
            self.postponed + other.postponed,
            self.lost + other.lost,
        )


@dataclass(slots=True)
class _Held:
    """A batch under our lease, which lasts until `ends` of the monotonic clock at least."""

    batch: Batch
    ends: float
    #: The rows that wait for the broker's answer.
    open: list[Claimed] = field(default_factory=list)


class Relay:
    """Moves envelopes from the outbox to the broker. Any number of relays may run at once."""

    def __init__(self, store: Store, publisher: Publisher, config: Config) -> None:
        self._store = store
        self._publisher = publisher
        self._config = config
        self._broker = Breaker(base=config.poll_seconds, cap=_LONGEST_PAUSE)
        self._database = Breaker(base=config.poll_seconds, cap=_LONGEST_PAUSE)
        self._destinations = Breakers(
            base=config.backoff_base_seconds, cap=config.backoff_cap_seconds
        )
        #: What is published now, what was claimed meanwhile, and what is still under way.
        self._current: _Held | None = None
        self._next: _Held | None = None
        self._late: list[_Held] = []
        self._wake_up: WakeUp | None = None
        self._house = Housekeeping(store, config)

    def once(self) -> Tally:
        """Move one batch. Claims nothing while the broker is away.

        Raises SQLAlchemy's errors when the database is away. If it does not come back before the
        lease is over, what was published is published again: at most one batch twice.
        """
        return self._move(follows=False)

    def _move(self, *, follows: bool) -> Tally:
        """Move one batch; with `follows`, claim the next one while the broker works on it."""
        try:
            self._publisher.open()
        except Exception as exc:
            self._broker_is_away(exc)
            return self._settle_late() + self._give_back_next()
        tally = self._settle_late()
        held = self._take()
        if held is None:
            if not self._late:
                self._broker.succeeded()
            return tally
        rows = held.batch.rows
        events.emit(events.CLAIMED, count=len(rows), rows=rows)
        self._current, self._follows = held, follows
        try:
            outcomes = self._publish(held)
        finally:
            self._current = None
        events.emit(events.PUBLISHED, count=len(outcomes), rows=rows, outcomes=outcomes)
        tally += self._settle(held, rows, outcomes)
        events.emit(events.SETTLED, tally=tally)
        if any(isinstance(outcome, Undecided) for outcome in outcomes.values()):
            tally += self._give_back_next()
        return tally

    def drain(self, seconds: float | None = None) -> Tally:
        """Move batches until nothing is available, the broker is away, or the time is over."""
        deadline = time.monotonic() + (math.inf if seconds is None else seconds)
        total = Tally()
        while True:
            tally = self._move(follows=time.monotonic() < deadline)
            total += tally
            is_over = time.monotonic() >= deadline and self._next is None
            if not tally.claimed or tally.released or is_over:
                break
        return total + self._give_back_next() + self._await_late()

    def run(self, stop: Event) -> None:
        """Move batches until `stop` is set and `wake` is called; the batch in hand is settled first."""
        self._wake_up = wake_up = WakeUp(
            self._store, self._config.poll_seconds, listens=self._config.notify
        )
        try:
            while not stop.is_set():
                self._go_on(stop, wake_up)
            self.end()
            self._house.end()
        finally:
            wake_up.close()
            self.close()

    def wake(self) -> None:
        """Let a `run` that waits look at once, from any thread or signal handler of this process."""
        if self._wake_up is not None:
            self._wake_up.wake()

    def _go_on(self, stop: Event, wake_up: WakeUp) -> None:
        """One round of `run`."""
        try:
            tally = self._move(follows=True)
            self.keep_house()
            if tally.claimed:
                wake_up.worked()
            is_idle = not tally.claimed and not self._broker.seconds_left
            if is_idle and not stop.is_set():
                wake_up.sleep(_SHORTEST_PAUSE) if self._late else wake_up.wait()
            self._database.succeeded()
        except SQLAlchemyError as exc:
            logger.error("the database is away: %s", exc)
            self._house.failed(f"the database is away: {exc}")
            self._database.failed()
        except Exception:
            # Nothing that we know of; but what it is must not end the relay for all messages.
            logger.exception("a batch was not ended, and will be taken again after its lease")
            self._publisher.close()
            self._broker.failed()
        while not stop.is_set() and (
            pause := max(self._broker.seconds_left, self._database.seconds_left)
        ):
            stop.wait(pause)

    def end(self) -> None:
        """Settle what is still under way, and give back what was not begun."""
        try:
            self._give_back_next()
            self._await_late()
        except SQLAlchemyError as exc:
            logger.error("the database is away, and other relays wait for our leases: %s", exc)

    def _await_late(self) -> Tally:
        """Settle what is still under way; the publisher gives it up after the confirm timeout."""
        total = Tally()
        while self._late:
            total += self._settle_late()
            if self._late:
                time.sleep(_SHORTEST_PAUSE)
        return total

    def keep_house(self) -> None:
        """Prune the tables and give a sign of life, when it is time to."""
        self._house.keep()

    @property
    def pause(self) -> float:
        """For how many seconds the broker, which was away, is not to be asked again."""
        return self._broker.seconds_left

    @property
    def is_waiting(self) -> bool:
        """Whether something is still under way, which the next `once` settles if it is answered."""
        return bool(self._late)

    def forget_failures(self) -> None:
        """Ask broker, database and destinations again at once, as if none had ever failed."""
        self._broker.succeeded()
        self._database.succeeded()
        self._destinations.clear()

    def close(self) -> None:
        """Drop the connection to the broker."""
        self._publisher.close()

    # Claim

    def _take(self) -> _Held | None:
        """Return the batch that was claimed meanwhile, if it is still ours, or a new one."""
        held, self._next = self._next, None
        return held if held is not None and self._renewed(held) else self._claim()

    def _claim(self) -> _Held | None:
        """Take the next batch; what is still under way counts as part of it."""
        places = self._config.batch_size - sum(len(held.open) for held in self._late)
        if places < 1:
            return None
        seconds = self._config.lease_seconds
        ends = time.monotonic() + seconds
        batch = self._store.claim(places, seconds)
        return _Held(batch, ends) if batch.rows else None

    def _meanwhile(self) -> bool:
        """What is to do while the broker works: claim the next page, and keep the leases.

        The publisher calls it now and then, and stops publishing at False: another relay has taken
        what is left.
        """
        assert self._current is not None
        try:
            if self._follows and self._next is None:
                self._follows = False
                if len(self._current.batch.rows) >= self._config.batch_size:
                    self._next = self._claim()
            if self._next is not None and not self._renewed(self._next):
                self._next = None
            return self._renewed(self._current)
        except SQLAlchemyError as exc:
            logger.error("the database is away, with a batch in hand: %s", exc)
            return True

    def _renewed(self, held: _Held) -> bool:
        """Prolong a lease of which half is over; False if it was lost."""
        seconds = self._config.lease_seconds
        now = time.monotonic()
        if held.ends - now > seconds / 2:
            return True
        # Fewer than there were, though not none: workers have handled kept ones already.
        if not self._store.renew(held.batch, seconds):
            logger.warning("the lease of a batch was over: another relay has it")
            return False
        held.ends = now + seconds
        return True

    def _give_back_next(self) -> Tally:
        """Release the batch that was claimed and not begun."""
        held, self._next = self._next, None
        if held is None:
            return Tally()
        rows = held.batch.rows
        lost = self._write(held, Settlement(released=[row.id for row in rows]))
        return Tally(claimed=len(rows), released=len(rows), lost=lost)

    # Publish

    def _publish(self, held: _Held) -> dict[int, Outcome]:
        """Publish what can be read, and whose destination is not left alone."""
        assert held.batch.now is not None
        outcomes: dict[int, Outcome] = {}
        ready: list[tuple[int, Envelope]] = []
        for row in held.batch.rows:
            if row.envelope is None:
                continue
            if self._destinations.seconds_left(row.destination):
                error = self._destinations.error(row.destination)
                outcomes[row.id] = Stalled(error, tried=False)
            else:
                ready.append((row.id, row.envelope.at(held.batch.now)))
        return outcomes | self._publisher.publish(ready, self._meanwhile)

    # Settle

    def _settle(self, held: _Held, rows: Sequence[Claimed], outcomes: dict[int, Outcome]) -> Tally:
        """Write what became of `rows`; remember those that are still under way."""
        assert held.batch.now is not None
        settlement = settlement_of(rows, outcomes, held.batch.now, self._config, self._destinations)
        held.open = [row for row in rows if isinstance(outcomes.get(row.id), UnderWay)]
        if held.open and held not in self._late:
            self._late.append(held)
        away = [each.error for each in outcomes.values() if isinstance(each, Undecided)]
        if away:
            self._broker_is_away(away[0])
        else:
            self._broker.succeeded()
        lost = self._write(held, settlement)
        confirmed = len(settlement.confirmed) + len(settlement.kept)
        self._house.count(confirmed=confirmed, dead=len(settlement.dead), lost=lost)
        return Tally(
            claimed=len(rows),
            confirmed=confirmed,
            retried=len(settlement.retried),
            dead=len(settlement.dead),
            released=len(settlement.released),
            postponed=len(settlement.postponed),
            lost=lost,
        )

    def _settle_late(self) -> Tally:
        """Settle what the broker has answered since."""
        if not self._late:
            return Tally()
        total = Tally()
        outcomes = self._publisher.late()
        for held in tuple(self._late):
            answered = {row.id: outcomes[row.id] for row in held.open if row.id in outcomes}
            still = [row for row in held.open if row.id not in answered]
            if answered:
                rows = [row for row in held.open if row.id in answered]
                total += replace(self._settle(held, rows, answered), claimed=0)
            held.open = still
        self._late = [held for held in self._late if held.open]
        return total

    def _write(self, held: _Held, settlement: Settlement) -> int:
        """Settle, again and again while the database is away and the lease is not over."""
        if not len(settlement):
            return 0
        pause = _SHORTEST_PAUSE
        failed = False
        while True:
            try:
                lost = self._store.settle(held.batch, settlement)
                break
            except (OperationalError, InterfaceError, InternalError, PoolTimeout) as exc:
                if time.monotonic() + pause >= held.ends:
                    raise
                failed = True
                logger.error("the database is away, with %d to settle: %s", len(settlement), exc)
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_SETTLE_PAUSE)
        if failed:
            # Within the lease nobody else had them: it is the first try that took effect.
            return 0
        if lost:
            logger.warning("the lease of %d message(s) was over: another relay has them", lost)
            events.emit(events.LEASE_LOST, count=lost)
        return lost

    def _broker_is_away(self, error: object) -> None:
        self._broker.failed()
        logger.error("the broker is away: %s", error)
        self._house.failed(f"the broker is away: {error}")
        events.emit(events.BROKER_AWAY, error=str(error))

    _follows = False
