"""Housekeeping: what a relay does besides relaying: prune the tables, and give signs of life."""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid

from sqlalchemy.exc import SQLAlchemyError

from celery_outbox.config import Config
from celery_outbox.relay.pruning import Pruning
from celery_outbox.storage.relays import Relays
from celery_outbox.storage.store import Store

__all__ = ["SIGN_OF_LIFE_SECONDS", "Housekeeping"]

logger = logging.getLogger("celery_outbox.relay")

#: How often a relay writes that it lives, at most.
SIGN_OF_LIFE_SECONDS = 10.0


class Housekeeping:
    """Prunes, and tells how the relay fares, every ten seconds.

    Raises SQLAlchemy's errors when the database is away.
    """

    def __init__(self, store: Store, config: Config) -> None:
        self._pruning = Pruning(store, config)
        self._relays = Relays(store.engine, store.tables)
        self._id = str(uuid.uuid4())
        self._confirmed = self._dead = self._lost = 0
        self._error: str | None = None
        self._has_failed = False
        self._told = 0
        self._told_at = time.monotonic()
        self._is_written = False
        self._next_sign = 0.0

    def count(self, *, confirmed: int, dead: int, lost: int) -> None:
        """Add what was settled."""
        self._confirmed += confirmed
        self._dead += dead
        self._lost += lost

    def failed(self, error: object) -> None:
        """Remember the last error, of the broker or the database."""
        self._error, self._has_failed = str(error)[:2000], True

    def keep(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        if now >= self._next_sign:
            self._next_sign = now + SIGN_OF_LIFE_SECONDS
            self._give_sign(now)
        self._pruning.keep()

    def end(self) -> None:
        """The relay has ended as it should: it is not missed. An absent database is no matter."""
        if self._is_written:
            try:
                self._relays.gone(self._id)
            except SQLAlchemyError as exc:
                logger.info("relay: its end could not be written down: %s", exc)

    def _give_sign(self, now: float) -> None:
        seconds = max(now - self._told_at, 0.001)
        confirmed, has_failed = self._confirmed, self._has_failed
        self._relays.seen(
            self._id,
            has_failed=has_failed,
            host=socket.gethostname(),
            pid=os.getpid(),
            confirmed=confirmed,
            dead=self._dead,
            lost=self._lost,
            per_second=(confirmed - self._told) / seconds,
            last_error=self._error,
        )
        self._is_written, self._has_failed = True, False
        self._told, self._told_at = confirmed, now
