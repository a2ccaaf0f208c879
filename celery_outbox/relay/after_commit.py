"""FastPath: the process that sent a message publishes it after the commit, from a thread of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import NamedTuple
from weakref import ref

from sqlalchemy import Connection
from sqlalchemy.engine import RootTransaction
from sqlalchemy.exc import SQLAlchemyError

from celery_outbox import events
from celery_outbox.relay.breaker import Breaker
from celery_outbox.relay.loop import Relay
from celery_outbox.storage.store import FreshestFirst, Store

__all__ = ["FastPath"]

logger = logging.getLogger("celery_outbox.relay")

#: How many transactions may wait for the thread. Beyond that, what is sent is left to the relays.
_MOST = 1000
#: A thread that has not looked at what it was told for so long is slow, stuck, or was never run.
_BEHIND_AFTER = 1.0
#: How long a transaction may stay open after its insert before the relays are left to find its rows.
_OPEN_FOR = 5.0
#: The pauses between two looks at transactions that are open, the first and the longest.
_SHORTEST_LOOK = 0.0005
_LONGEST_LOOK = 0.05
_LOOKS = 8
#: The pauses after the database was away.
_SHORTEST_PAUSE = 0.5
_LONGEST_PAUSE = 15.0
#: How long the connections are kept while nothing is sent.
_IDLE_AFTER = 30.0
#: How long the end of the process waits for the batch in hand.
_PATIENCE = 5.0


class _Told(NamedTuple):
    """An insert: the transaction that it is part of, how many rows, and when."""

    transaction: ref[RootTransaction]
    rows: int
    at: float

    def is_over(self) -> bool:
        transaction = self.transaction()
        return transaction is None or not transaction.is_active


class FastPath:
    """Publishes what this process has stored, as soon as its transaction is over.

    It is told of each insert, and waits for the end of that transaction. Then it is a relay: it claims
    as many rows as were inserted, under a lease, publishes and settles them. What it is told is a hint
    and no more, for the claim sees what is committed and nothing else. What it does not get to is
    not leased, and is any relay's: after a crash, while the broker is away, when it is told more than
    it can do.

    The thread starts with the first insert, in each process anew. Its connections to the database and
    the broker are its own: `make_store` and `make_relay` are called there.
    """

    def __init__(
        self, make_store: Callable[[], FreshestFirst], make_relay: Callable[[Store], Relay]
    ) -> None:
        self._make_store = make_store
        self._make_relay = make_relay
        #: What a forked child has inherited: never used, and never closed, for it is the parent's.
        self._inherited: list[object] = []
        self._is_off = False
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._told: SimpleQueue[_Told | None] = SimpleQueue()
        self._open: list[_Told] = []
        self._thread: Thread | None = None
        self._starting = Lock()
        self._relay: Relay | None = None
        self._store: FreshestFirst | None = None
        self._is_connected = False
        self._looked_at = 0.0
        self._paused_until = 0.0
        self._database = Breaker(base=_SHORTEST_PAUSE, cap=_LONGEST_PAUSE)

    # In the threads that send

    def takes(self, connection: Connection, count: int) -> bool:
        """Take note of `count` rows that are about to be inserted in the connection's transaction.

        Never waits. False: they are left to the relays, which may want to be woken.
        """
        transaction = connection.get_transaction()
        if transaction is None:
            return False
        now = time.monotonic()
        if self._told.empty():
            self._looked_at = now
        if self._is_off or now < self._paused_until or self._is_behind(now):
            events.emit(events.LEFT_TO_RELAY, count=count)
            return False
        self._told.put(_Told(ref(transaction), count, now))
        return self._is_running() or self._start()

    def _is_behind(self, now: float) -> bool:
        if self._told.qsize() + len(self._open) >= _MOST:
            return True
        return not self._told.empty() and now - self._looked_at > _BEHIND_AFTER

    def _is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _start(self) -> bool:
        if not self._starting.acquire(blocking=False):
            return True  # another thread is at it
        try:
            if not self._is_running():
                thread = Thread(target=self._run, name="celery-outbox-after-commit", daemon=True)
                thread.start()
                self._thread = thread
        except RuntimeError:
            # The interpreter ends, or the system has no thread left.
            self._is_off = True
            return False
        finally:
            self._starting.release()
        return True

    def stop(self, timeout: float = _PATIENCE) -> None:
        """End the batch in hand and what is committed, or leave it to the relays after `timeout`."""
        self._is_off = True
        thread = self._thread
        if thread is not None and thread.is_alive():
            self._told.put(None)
            thread.join(timeout)

    def resume(self) -> None:
        """Work again after `stop`."""
        if not self._is_running():
            self._begin_anew()
        self._is_off = False

    def forget(self) -> None:
        """In a forked child: begin anew. The thread, its locks and its connections are the parent's."""
        self._inherited.append((self._relay, self._store, self._told, self._open))
        if self._store is not None:
            self._store.engine.dispose(close=False)
        self._begin_anew()

    # In the thread

    def _run(self) -> None:
        try:
            self._store = self._make_store()
            self._relay = relay = self._make_relay(self._store)
        except Exception:
            self._is_off = True
            logger.exception("nothing is published after the commit: the relays do it")
            return
        try:
            is_told_to_stop = False
            while not is_told_to_stop:
                is_told_to_stop = self._listen(relay)
                # What has committed is published, also at the end; what is open then is left.
                self._publish(relay, self._committed())
            relay.end()
        finally:
            self._disconnect(relay)

    def _listen(self, relay: Relay) -> bool:
        """Wait until there is something to do: an insert, an open transaction. True: told to stop."""
        pause = _IDLE_AFTER if self._is_connected else None
        if relay.is_waiting:
            pause = _LONGEST_LOOK
        if self._open and self._told.empty():
            # Late by a part of what the commit takes at most.
            waited = time.monotonic() - self._open[-1].at
            pause = min(max(_SHORTEST_LOOK, waited / _LOOKS), _LONGEST_LOOK)
        try:
            told = self._told.get(timeout=pause)
            while told is not None:
                self._open.append(told)
                told = self._told.get(block=False)
            return True
        except Empty:
            self._looked_at = time.monotonic()
            if pause == _IDLE_AFTER and not self._open:
                self._disconnect(relay)
            return False

    def _disconnect(self, relay: Relay) -> None:
        """A connection that is not in use is cut by others, who tell nobody, and costs the servers."""
        assert self._store is not None
        relay.close()
        self._store.engine.dispose()
        self._is_connected = False

    def _committed(self) -> int:
        """Return how many rows are in transactions that have ended since the last look."""
        count = 0
        still_open = []
        oldest = time.monotonic() - _OPEN_FOR
        for told in self._open:
            if told.is_over():
                count += told.rows
            elif told.at > oldest:
                still_open.append(told)
            else:
                events.emit(events.LEFT_TO_RELAY, count=told.rows)
        self._open = still_open
        return count

    def _publish(self, relay: Relay, count: int) -> None:
        """Publish up to `count` rows, and settle what was still under way."""
        assert self._store is not None
        if not count and not relay.is_waiting:
            return
        self._is_connected = True
        try:
            is_claimed = True
            while is_claimed and not self._pause(relay):
                self._store.wanted = count
                tally = relay.once()
                # What is not there was rolled back, or a relay has it.
                is_claimed = 0 < tally.claimed < count
                count -= tally.claimed
            self._database.succeeded()
        except SQLAlchemyError as exc:
            logger.error("the database is away: %s", exc)
            self._database.failed()
        except Exception:
            logger.exception("a batch was not ended, and will be taken again after its lease")
            relay.close()
            self._database.failed()
        if pause := self._pause(relay):
            self._paused_until = time.monotonic() + pause
            if count > 0:
                events.emit(events.LEFT_TO_RELAY, count=count)

    def _pause(self, relay: Relay) -> float:
        """For how many seconds everything is left to the relays."""
        return max(relay.pause, self._database.seconds_left)
