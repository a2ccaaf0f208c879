"""WakeUp: what an idle relay waits for."""

from __future__ import annotations

import logging
import random
import select
import socket
import time
from contextlib import suppress
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from celery_outbox.storage.notifications import Listener
from celery_outbox.storage.store import Store

__all__ = ["WakeUp"]

logger = logging.getLogger("celery_outbox.relay")

#: The first pause after some work, as a share of the longest.
_SHORTEST_SHARE = 1 / 16
#: How much longer the pauses may be where notifications are known to arrive.
_WITH_NOTIFICATIONS = 25
#: How often it is tried out whether they arrive, and how long one may take.
_PROOF_SECONDS = 60.0
_ARRIVAL_SECONDS = 1.0


class WakeUp:
    """Waits until a commit is told of, somebody in this process calls `wake`, or time is over.

    PostgreSQL tells of commits, if nothing between it and us swallows that (a pooler in transaction
    mode does). So it is tried out, now and then, with a notification of our own; while that does not
    arrive, the outbox is polled: soon after the last message, and then less and less often.
    """

    def __init__(self, store: Store, poll_seconds: float, *, listens: bool) -> None:
        self._store = store
        self._poll_seconds = poll_seconds
        self._listens = listens
        self._idle = 0
        self._listener: Listener | None = None
        self._is_proven = False
        self._next_proof = 0.0
        self._inside, self._outside = socket.socketpair()
        for end in (self._inside, self._outside):
            end.setblocking(False)

    def wake(self) -> None:
        """End the wait, from any thread or signal handler of this process."""
        # Full: it will wake up anyway. Closed: nobody waits any more.
        with suppress(BlockingIOError, OSError):
            self._outside.send(b"w")

    def worked(self) -> None:
        """There was something to do: more may follow soon."""
        self._idle = 0

    def wait(self) -> None:
        """Wait for work, for as long as it is safe not to look.

        Raises SQLAlchemy's errors when the database is away.
        """
        self._prove()
        if not self._is_proven:
            share = min(1.0, _SHORTEST_SHARE * 2.0**self._idle)
            self._idle += 1
            # Relays that started together must not ask together.
            self.sleep(self._poll_seconds * share * random.uniform(0.75, 1.25))
            return
        longest = self._poll_seconds * _WITH_NOTIFICATIONS * random.uniform(0.75, 1.25)
        due = self._store.seconds_until_available()
        if due is not None:
            # A row may be available and not ours to take: another relay is at it.
            longest = min(longest, due if due > 0 else self._poll_seconds)
        self.sleep(longest)

    def sleep(self, seconds: float) -> None:
        """Wait for `seconds`, or until `wake` is called or a commit is told of."""
        ends: list[Any] = [self._inside]
        if self._listener is not None:
            ends.append(self._listener)
        ready, _, _ = select.select(ends, [], [], seconds)
        if self._inside in ready:
            with suppress(BlockingIOError):
                self._inside.recv(4096)
        if self._listener is not None and self._listener in ready:
            self._heard()

    def close(self) -> None:
        """Stop listening, and waiting."""
        self._stop_listening()
        for end in (self._inside, self._outside):
            end.close()

    def _prove(self) -> None:
        """Find out whether notifications arrive, if it is time to."""
        if not self._listens or time.monotonic() < self._next_proof:
            return
        self._next_proof = time.monotonic() + _PROOF_SECONDS
        if self._listener is None:
            self._listener = self._store.listen()
            if self._listener is None:
                self._listens = False
                return
        self._store.notify()
        arrived = False
        deadline = time.monotonic() + _ARRIVAL_SECONDS
        while not arrived and (left := deadline - time.monotonic()) > 0:
            select.select([self._listener], [], [], left)
            arrived = self._heard()
            if self._listener is None:
                return
        if arrived != self._is_proven or not arrived:
            logger.log(
                logging.INFO if arrived else logging.WARNING,
                "notifications of the database %s",
                "arrive" if arrived else "do not arrive (a pooler?): the outbox is polled",
            )
        self._is_proven = arrived
        if not arrived:
            self._stop_listening()

    def _heard(self) -> bool:
        assert self._listener is not None
        try:
            return self._listener.heard()
        except SQLAlchemyError as exc:
            logger.warning("notifications of the database have ended: %s", exc)
            self._stop_listening()
            self._next_proof = 0.0
            return False

    def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        self._is_proven = False
        if listener is not None:
            listener.close()
