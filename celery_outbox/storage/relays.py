"""Relays: which were seen alive, as each of them writes it down now and then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, delete, insert, select, update

from celery_outbox.storage.dialects import dialect_for
from celery_outbox.storage.tables import NAME_LENGTH, Tables

__all__ = ["ALIVE_SECONDS", "Relays", "SeenRelay"]

#: How long a relay may be silent, which gives a sign of life every ten seconds if it can.
ALIVE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class SeenRelay:
    """A relay as it was when it was seen last, by the database's clock."""

    id: str
    host: str
    pid: int
    started_at: datetime
    seen_at: datetime
    #: For how long it has not been seen.
    silent_seconds: float
    #: Messages, since it started.
    confirmed: int
    dead: int
    lost: int
    #: Messages that the broker has confirmed, per second, between its last two signs of life.
    per_second: float
    last_error: str | None
    last_error_at: datetime | None

    @property
    def is_alive(self) -> bool:
        """Whether it was seen lately. A relay that was stopped or killed is not, after a minute."""
        return self.silent_seconds < ALIVE_SECONDS


class Relays:
    """The signs of life of one outbox's relays."""

    def __init__(self, engine: Engine, tables: Tables) -> None:
        self._engine = engine
        self._table = tables.relay
        self._dialect = dialect_for(engine.dialect.name)

    def seen(self, relay_id: str, *, has_failed: bool, **values: Any) -> None:
        """Write a sign of life: the columns of the relay's row; `has_failed` dates the last error."""
        table, now = self._table, self._dialect.now()
        values["host"] = str(values["host"])[:NAME_LENGTH]
        written: Mapping[str, Any] = {**values, "seen_at": now}
        if has_failed:
            written = {**written, "last_error_at": now}
        with self._engine.begin() as connection:
            changed = update(table).where(table.c.id == relay_id).values(**written)
            if not connection.execute(changed).rowcount:
                connection.execute(insert(table).values(id=relay_id, started_at=now, **written))

    def all(self) -> list[SeenRelay]:
        """Return those that were seen, the latest first."""
        table = self._table
        with self._engine.connect() as connection:
            rows = connection.execute(
                select(table, self._dialect.now().label("now")).order_by(table.c.seen_at.desc())
            ).all()
        return [
            SeenRelay(
                id=row.id,
                host=row.host,
                pid=row.pid,
                started_at=row.started_at,
                seen_at=row.seen_at,
                silent_seconds=max(0.0, (row.now - row.seen_at).total_seconds()),
                confirmed=row.confirmed,
                dead=row.dead,
                lost=row.lost,
                per_second=row.per_second,
                last_error=row.last_error,
                last_error_at=row.last_error_at,
            )
            for row in rows
        ]

    def gone(self, relay_id: str) -> None:
        """Forget a relay that has ended as it should."""
        with self._engine.begin() as connection:
            connection.execute(delete(self._table).where(self._table.c.id == relay_id))

    def forget(self, silent_seconds: float, chunk: int) -> int:
        """Forget up to `chunk` relays that were not seen for so long; return how many."""
        table = self._table
        old = (
            select(table.c.id)
            .where(table.c.seen_at < self._dialect.after(-silent_seconds))
            .limit(chunk)
        )
        with self._engine.begin() as connection:
            ids = connection.execute(self._dialect.skip_locked(old)).scalars().all()
            if not ids:
                return 0
            return connection.execute(delete(table).where(table.c.id.in_(ids))).rowcount
