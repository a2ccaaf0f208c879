"""Time: what is stored moves into the past, as if time had gone on."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from celery.utils.time import maybe_iso8601
from kombu.utils.json import dumps, loads
from sqlalchemy import select, update

from celery_outbox.plugin import Outbox
from celery_outbox.storage.tables import UTCDateTime

__all__ = ["Time"]

#: The times in a message's headers, which a worker obeys.
_HEADERS = ("eta", "expires")


class Time:
    """Lets time pass for the rows that are stored: schedules, backoffs, leases, retentions.

    No clock is touched, neither the database's nor Python's: every time in the outbox's tables moves
    back, and so do ``eta`` and ``expires`` in the messages themselves.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def now(self) -> datetime:
        """Return the database's time, time zone aware."""
        query = select(self._outbox.store.dialect.now().label("now"))
        with self._outbox.engine.connect() as connection:
            now: datetime = connection.execute(query).scalar_one()
        return now

    def travel(
        self, delta: timedelta | None = None, *, to: datetime | None = None, **units: float
    ) -> None:
        """Let time pass: a timedelta, its units (``hours=2``), or up to a moment (``to=``).

        Only what is committed is moved, and only forwards in time.
        """
        if (to is not None) + (delta is not None) + bool(units) != 1:
            raise TypeError("say how far with one of: a timedelta, hours=… (and so on), to=…")
        if to is not None:
            if to.tzinfo is None:
                raise ValueError(f"{to} has no time zone")
            delta = to - self.now()
        passed = timedelta(**units) if delta is None else delta
        if passed < timedelta(0):
            raise ValueError(f"time goes forwards only, not by {passed}")
        tables = self._outbox.tables
        with self._outbox.engine.begin() as connection:
            for table in tables.all():
                times = [column for column in table.c if isinstance(column.type, UTCDateTime)]
                if not times:
                    continue
                identity = next(iter(table.primary_key.columns))
                for row in connection.execute(select(table)).mappings().all():
                    values: dict[str, Any] = {
                        column.name: row[column.name] - passed
                        for column in times
                        if row[column.name] is not None
                    }
                    if "message" in table.c:
                        values["message"] = _moved(row["message"], passed)
                    connection.execute(
                        update(table).where(identity == row[identity.name]).values(values)
                    )


def _moved(message: str, passed: timedelta) -> str:
    data = loads(message)
    headers = data.get("headers") or {}
    for name in _HEADERS:
        moment = headers.get(name)
        if isinstance(moment, str):
            headers[name] = (maybe_iso8601(moment) - passed).isoformat()
        elif isinstance(moment, datetime):
            headers[name] = moment - passed
        else:
            continue
    return str(dumps(data))
