"""LocalStore: the messages of local queues, which workers take straight from the database."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, case, delete, func, insert, select, update

from celery_outbox.envelope import Envelope
from celery_outbox.storage.dialects import dialect_for
from celery_outbox.storage.notifications import Listener, channel_of, may_notify
from celery_outbox.storage.rows import envelope_of
from celery_outbox.storage.tables import HIGHEST_PRIORITY, Tables

__all__ = ["Delivery", "LocalStore"]


@dataclass(frozen=True, slots=True)
class Delivery:
    """A queued message that a consumer has taken: `envelope`, or the `error` why it can't be read.

    `number` counts its deliveries, this one included. If `is_dead` it is not taken, but has become a
    dead letter, with the `error`: it was delivered too often.
    """

    id: int
    number: int
    queue: str
    task: str
    task_id: str
    envelope: Envelope | None
    error: str | None = None
    is_dead: bool = False


class LocalStore:
    """The local queues of one outbox.

    A row is a queued message. It is taken under a lease, which its consumer renews; when the lease is
    over the row is there for the next consumer. With `notifies`, a commit tells those who `listen`,
    where the database can. `put` runs in its caller's transaction; every other method is a short
    transaction of its own.
    """

    def __init__(self, engine: Engine, tables: Tables, *, notifies: bool = True) -> None:
        self.engine = engine
        self.tables = tables
        self.dialect = dialect_for(engine.dialect.name)
        self._channel = channel_of(tables.local.fullname)
        self._notifies = notifies

    def listen(self) -> Listener | None:
        """Hear of messages that are put from now on; None where the database tells nobody."""
        return self.dialect.listen(self.engine, self._channel)

    def put(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Queue messages in the caller's transaction: they are there when it commits.

        A row is what `celery_outbox.storage.rows.row_of` gives, with ``queue`` and ``priority``.
        """
        channel = self._channel if self._notifies and may_notify(connection) else None
        self.dialect.insert(connection, self.tables.local, rows, channel)

    def take(
        self,
        queues: Sequence[str],
        limit: int,
        *,
        token: str,
        lease_seconds: float,
        max_attempts: int,
        handled: Sequence[int] = (),
    ) -> list[Delivery]:
        """Take up to `limit` messages that are due, the most urgent ones first, and drop the handled.

        Those that were delivered `max_attempts` times before become dead letters. All in one
        transaction. Of queues that are equally urgent each has its turn: their order is
        drawn anew each time.
        """
        order = random.sample(queues, len(queues))
        wanted = [
            (queue, priority) for priority in range(HIGHEST_PRIORITY, -1, -1) for queue in order
        ]
        with (
            self.dialect.transaction(self.engine) as connection,
            self.dialect.without_waiting(connection),
        ):
            if handled:
                self._drop(connection, handled, token)
            rows = (
                self.dialect.take(
                    connection,
                    self.tables.local,
                    wanted=wanted,
                    limit=limit,
                    lease_seconds=lease_seconds,
                    token=token,
                )
                if limit > 0 and wanted
                else []
            )
            dead = {row.id: _death(row) for row in rows if row.attempts > max_attempts}
            self._bury(connection, [row for row in rows if row.id in dead], dead)
        rows = sorted(rows, key=lambda row: (-row.priority, row.id))
        return [_delivery(row, dead.get(row.id)) for row in rows]

    def _bury(self, connection: Connection, rows: Sequence[Any], errors: Mapping[int, str]) -> None:
        """Move rows that were just taken to the dead letters."""
        dead = self.tables.dead_letter
        for row in rows:
            values = {name: value for name, value in row._mapping.items() if name in dead.c}
            values |= {"id": -row.id, "attempts": row.attempts - 1}
            values |= {"last_error": errors[row.id], "died_at": self.dialect.now()}
            connection.execute(insert(dead).values(values))
        if rows:
            self.dialect.delete(connection, self.tables.local.c.id, list(errors))

    def drop(self, ids: Sequence[int], token: str) -> int:
        """Delete messages that are handled; return how many were still ours."""
        with self.dialect.transaction(self.engine) as connection:
            return self._drop(connection, ids, token)

    def _drop(self, connection: Connection, ids: Sequence[int], token: str) -> int:
        local = self.tables.local
        return self.dialect.delete(connection, local.c.id, ids, local.c.lease_token == token)

    def give_back(
        self,
        ids: Sequence[int],
        token: str,
        after_seconds: float = 0.0,
        *,
        error: str | None = None,
    ) -> int:
        """End our lease of messages that are not handled; return how many were still ours.

        Without an `error` the delivery does not count: nothing was wrong with the message.
        """
        local = self.tables.local
        ours = self.dialect.among(local.c.id, ids) & (local.c.lease_token == token)
        back = update(local).where(ours)
        back = back.values(lease_token=None, available_at=self.dialect.after(after_seconds))
        if error is None:
            back = back.values(attempts=local.c.attempts - 1)
        else:
            back = back.values(last_error=error)
        with self.dialect.transaction(self.engine) as connection:
            return connection.execute(back).rowcount

    def renew(self, ids: Sequence[int], token: str, lease_seconds: float) -> set[int]:
        """Begin our lease anew; return those that are ours still."""
        local = self.tables.local
        ours = self.dialect.among(local.c.id, ids) & (local.c.lease_token == token)
        renewed = update(local).where(ours)
        renewed = renewed.values(available_at=self.dialect.after(lease_seconds))
        with self.dialect.transaction(self.engine) as connection:
            connection.execute(renewed)
            return set(connection.execute(select(local.c.id).where(ours)).scalars())

    def size(self, queue: str) -> int:
        """Return how many messages of a queue wait to be taken, those of later included."""
        local = self.tables.local
        mine = (local.c.queue == queue) & ~self._taken()
        with self.engine.connect() as connection:
            found = select(func.count()).select_from(local).where(mine)
            return int(connection.execute(found).scalar_one())

    def purge(self, queue: str) -> int:
        """Delete what waits in a queue; return how much it was. What is taken stays."""
        local = self.tables.local
        mine = (local.c.queue == queue) & ~self._taken()
        with self.dialect.transaction(self.engine) as connection:
            return connection.execute(delete(local).where(mine)).rowcount

    def counts(self) -> dict[str, dict[str, int]]:
        """Return for each queue how many messages are due, scheduled, and taken."""
        local = self.tables.local
        taken = self._taken()
        later = ~taken & (local.c.available_at > self.dialect.now())
        counted = select(
            local.c.queue,
            func.count(case((~taken & ~later, 1))),
            func.count(case((later, 1))),
            func.count(case((taken, 1))),
        ).group_by(local.c.queue)
        with self.engine.connect() as connection:
            return {
                queue: {"due": due, "scheduled": scheduled, "taken": held}
                for queue, due, scheduled, held in connection.execute(counted)
            }

    def lags(self) -> dict[str, float]:
        """Return for each queue with messages that are due how long the oldest of them has waited."""
        local, now = self.tables.local.c, self.dialect.now()
        since = func.min(local.available_at).label("available_at")
        oldest = select(local.queue, since, now.label("now")).where(local.available_at <= now)
        with self.engine.connect() as connection:
            rows = connection.execute(oldest.group_by(local.queue)).all()
        return {row.queue: (row.now - row.available_at).total_seconds() for row in rows}

    def _taken(self) -> Any:
        local = self.tables.local
        return local.c.lease_token.is_not(None) & (local.c.available_at > self.dialect.now())


def _delivery(row: Any, death: str | None) -> Delivery:
    known = (row.id, row.attempts, row.queue, row.task, row.task_id)
    if death is not None:
        return Delivery(*known, envelope=None, error=death, is_dead=True)
    return Delivery(*known, *envelope_of(row))


def _death(row: Any) -> str:
    why = "" if row.last_error is None else f"; the last time: {row.last_error}"
    return f"delivered {row.attempts - 1} times and never handled{why}"
