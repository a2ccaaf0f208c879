"""Holding: the messages that one consumer has in hand."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from threading import Event, Lock, Thread
from weakref import ref

from sqlalchemy.exc import SQLAlchemyError

from celery_outbox import events
from celery_outbox.storage.local import Delivery, LocalStore

__all__ = ["Holding"]

logger = logging.getLogger("celery_outbox.local")

#: How often the keeper looks whether there is something to do, in seconds.
_TICK = 0.1


class Holding:
    """Messages taken under one lease, until they are handled or given back.

    Whoever takes and says what is handled is told by `changed` that there may be room for more.

    A thread, the keeper, renews the lease while its worker may be busy with a task. What is handled is
    deleted with the next take, in one transaction for many; if none follows, the keeper does it. So a
    worker that dies may have handled what is still there: it is delivered again, as a broker would.

    Any thread may say that a message is handled; one alone takes.
    """

    def __init__(
        self,
        store: LocalStore,
        lease_seconds: float,
        max_attempts: int,
        *,
        changed: Callable[[], None],
        keep_house: Callable[[], None],
    ) -> None:
        self._store = store
        self._lease_seconds = lease_seconds
        self._max_attempts = max_attempts
        self._changed = changed
        self._keep_house = keep_house
        self._token = _token()
        self._held: set[int] = set()
        self._handled: list[int] = []
        self._handled_since = 0.0
        self._lock = Lock()
        self._closed = Event()
        self._keeper: Thread | None = None

    def take(self, queues: Sequence[str], limit: int) -> list[Delivery]:
        """Take messages, and delete those that are handled.

        Returns nothing if another writer keeps the database busy. Raises SQLAlchemy's errors when it
        is away.
        """
        handled = self._collect()
        if not handled and (limit <= 0 or not queues):
            return []
        try:
            taken = self._store.take(
                queues,
                limit,
                token=self._token,
                lease_seconds=self._lease_seconds,
                max_attempts=self._max_attempts,
                handled=handled,
            )
        except SQLAlchemyError as exc:
            self._put_back(handled)
            if self._store.dialect.is_busy(exc):
                return []
            raise
        for delivery in taken:
            if delivery.is_dead:
                _tell_of_death(delivery)
        taken = [delivery for delivery in taken if not delivery.is_dead]
        if taken:
            with self._lock:
                self._held.update(delivery.id for delivery in taken)
            self._keep()
            events.emit(events.TAKEN, count=len(taken))
        if handled:
            events.emit(events.DROPPED, count=len(handled))
        return taken

    def handled(self, row: int) -> None:
        """A message is handled: it may be deleted."""
        with self._lock:
            self._held.discard(row)
            if not self._handled:
                self._handled_since = time.monotonic()
            self._handled.append(row)
        if self._closed.is_set():
            self._drop()
        self._changed()

    def give_back(self, row: int, after_seconds: float = 0.0, *, error: str | None = None) -> None:
        """A message is for another consumer. If the database is away it is when the lease is over.

        With an `error` the delivery counts: too many of those, and it is a dead letter.
        """
        with self._lock:
            self._held.discard(row)
        try:
            self._store.give_back([row], self._token, after_seconds, error=error)
        except SQLAlchemyError as exc:
            logger.error("a message could not be given back, its lease will end: %s", exc)
        self._changed()

    def close(self) -> None:
        """Delete what is handled, and give the rest back. If the database is away, leases will end."""
        self._closed.set()
        self._drop()
        with self._lock:
            held, self._held = sorted(self._held), set()
        if held:
            try:
                self._store.give_back(held, self._token)
            except SQLAlchemyError as exc:
                logger.error("%d messages could not be given back: %s", len(held), exc)

    def _collect(self) -> list[int]:
        with self._lock:
            handled, self._handled = self._handled, []
        return handled

    def _put_back(self, handled: list[int]) -> None:
        with self._lock:
            self._handled = [*handled, *self._handled]

    def _drop(self) -> None:
        if handled := self._collect():
            try:
                self._store.drop(handled, self._token)
                events.emit(events.DROPPED, count=len(handled))
            except SQLAlchemyError as exc:
                self._put_back(handled)
                logger.error("%d handled messages are not deleted yet: %s", len(handled), exc)

    # The keeper

    def _keep(self) -> None:
        if self._keeper is None:
            self._keeper = Thread(
                target=_keep,
                args=(ref(self), self._closed),
                name="celery-outbox-lease",
                daemon=True,
            )
            self._keeper.start()

    def look_after(self, renewed_at: float) -> float:
        """Do what is due now; return when the lease was renewed last."""
        now = time.monotonic()
        try:
            self._keep_house()
        except SQLAlchemyError as exc:
            logger.error("old rows are not pruned yet: %s", exc)
        if self._handled and now - self._handled_since > _TICK:
            self._drop()
        if now - renewed_at < self._lease_seconds / 3:
            return renewed_at
        with self._lock:
            held = sorted(self._held)
        if held:
            try:
                renewed = self._store.renew(held, self._token, self._lease_seconds)
            except SQLAlchemyError as exc:
                logger.error("the lease of %d messages is not renewed: %s", len(held), exc)
                return renewed_at
            self._lose(set(held) - renewed)
        return now

    def _lose(self, rows: set[int]) -> None:
        with self._lock:
            lost = rows & self._held
            self._held -= lost
        if lost:
            logger.warning("the lease of %d message(s) was over: others may have them", len(lost))
            events.emit(events.LEASE_LOST, count=len(lost))


def _tell_of_death(delivery: Delivery) -> None:
    logger.error("%s[%s] is a dead letter: %s", delivery.task, delivery.task_id, delivery.error)
    events.emit(
        events.DEAD, task=delivery.task, task_id=delivery.task_id, error=str(delivery.error)
    )


def _token() -> str:
    """Return a new lease token, of 36 characters at most, that tells operators whose it is."""
    # Of a long name the end: there a container's differs from its neighbours'.
    place = f"{os.getpid()}@{socket.gethostname()[-17:]}"
    return f"{place[:25]}:{secrets.token_hex(5)}"


def _keep(holding: ref[Holding], closed: Event) -> None:
    renewed_at = time.monotonic()
    while not closed.wait(_TICK):
        # Weak: what a broken connection held must not be renewed for ever.
        here = holding()
        if here is None:
            return
        renewed_at = here.look_after(renewed_at)
        del here
