"""Runs: when each entry of celery beat ran last, so that a run and its message are one commit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, Engine, Table, insert, select, update
from sqlalchemy.exc import IntegrityError

__all__ = ["Run", "Runs"]


@dataclass(frozen=True, slots=True)
class Run:
    """The last run of an entry. Before the first, `last_run_at` is when the entry was first seen."""

    name: str
    last_run_at: datetime
    count: int


class Runs:
    """The last run of each entry of the schedule."""

    def __init__(self, engine: Engine, table: Table) -> None:
        self._engine = engine
        self._table = table

    def all(self) -> dict[str, Run]:
        """Return the last run of each entry that was ever seen."""
        table = self._table
        with self._engine.connect() as connection:
            rows = connection.execute(select(table.c.name, table.c.last_run_at, table.c.run_count))
            return {row.name: Run(*row) for row in rows}

    def remember(self, runs: Iterable[Run]) -> None:
        """Store those whose entries are new; another beat may have stored them already."""
        known = self.all()
        for run in runs:
            if run.name in known:
                continue
            new = insert(self._table).values(
                name=run.name, last_run_at=run.last_run_at, run_count=run.count
            )
            try:
                with self._engine.begin() as connection:
                    connection.execute(new)
            except IntegrityError:
                if run.name not in self.all():
                    raise

    def advance(self, connection: Connection, run: Run) -> bool:
        """Record the next run in the caller's transaction; False if another beat has taken it.

        Of several that try at once the database lets one pass, after the others have waited for it.
        """
        table = self._table
        mine = (table.c.name == run.name) & (table.c.run_count == run.count - 1)
        values = {"last_run_at": run.last_run_at, "run_count": run.count}
        return connection.execute(update(table).where(mine).values(values)).rowcount == 1
