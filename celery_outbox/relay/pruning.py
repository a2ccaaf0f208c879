"""Pruning: old rows are deleted about once a minute, by each relay and by workers of local queues."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable

from celery_outbox import events
from celery_outbox.config import Config
from celery_outbox.storage.relays import Relays
from celery_outbox.storage.store import Store

__all__ = ["Pruning"]

logger = logging.getLogger("celery_outbox.relay")

_EVERY_SECONDS = 60.0
_CHUNK = 1000
#: For how long a relay that was lost is remembered, with its last error.
_REMEMBERED_SECONDS = 24 * 3600.0


class Pruning:
    """Deletes in chunks what is older than its retention: inbox rows, dead letters, lost relays.

    Each chunk is a short transaction. After `longest_seconds` only one of each table is begun; the rest
    follows the next time. Raises SQLAlchemy's errors when the database is away.
    """

    def __init__(
        self, store: Store, config: Config, longest_seconds: float = _EVERY_SECONDS / 2
    ) -> None:
        self._store = store
        self._config = config
        self._longest_seconds = longest_seconds
        self._relays = Relays(store.engine, store.tables)
        # Processes that started together must not prune together.
        self._next = time.monotonic() + random.random() * _EVERY_SECONDS

    def keep(self) -> None:
        """Prune, if it is time to."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _EVERY_SECONDS
            self._prune(now + self._longest_seconds)

    def _prune(self, ends: float) -> None:
        config, store = self._config, self._store
        inbox_retention = config.inbox_retention_seconds
        self._in_chunks(ends, "inbox", lambda: store.prune_inbox(inbox_retention, _CHUNK))
        retention = config.dead_letter_retention_seconds
        if retention is not None:
            dead = self._in_chunks(
                ends, "dead_letter", lambda: store.prune_dead_letters(retention, _CHUNK)
            )
            if dead:
                logger.warning(
                    "%d dead letter(s) deleted: older than outbox_dead_letter_retention_seconds=%g",
                    dead,
                    retention,
                )
        self._in_chunks(ends, "relay", lambda: self._relays.forget(_REMEMBERED_SECONDS, _CHUNK))

    @staticmethod
    def _in_chunks(ends: float, table: str, prune: Callable[[], int]) -> int:
        """Prune while chunks are full, and there is time."""
        total = 0
        while True:
            count = prune()
            total += count
            if count < _CHUNK or time.monotonic() >= ends:
                break
        if total:
            events.emit(events.PRUNED, table=table, count=total)
        return total
