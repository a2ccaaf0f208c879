"""Administration: what operators read from the tables, and change in them.

What changes rows goes in chunks, each a short transaction, and yields how many rows each has changed:
what was yielded is committed, whatever becomes of the rest. Rows under a live lease are a relay's:
only `Administration.release` touches them. The condition that chooses a row is in the statement that
changes it, so that a relay that comes in between wins. What is said of relays holds of the workers that
take messages of local queues: to operators those are messages like others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Engine,
    Insert,
    Table,
    and_,
    case,
    false,
    func,
    insert,
    literal,
    or_,
    select,
    true,
    update,
)

from celery_outbox.envelope import Envelope
from celery_outbox.errors import EnvelopeError
from celery_outbox.storage.dialects import dialect_for
from celery_outbox.storage.selection import (
    EVERYTHING,
    LOCAL_STATES,
    STATES,
    Conditions,
    Selection,
)
from celery_outbox.storage.store import Store
from celery_outbox.storage.tables import Tables

__all__ = ["EVERYTHING", "LOCAL_STATES", "STATES", "Administration", "Selection"]

CHUNK = 1000

Row = dict[str, Any]
Change = Callable[[Connection, Sequence[Any]], int]


class Administration:
    """The tables of one outbox, as its operators see them."""

    def __init__(self, engine: Engine, tables: Tables) -> None:
        self.engine = engine
        self.tables = tables
        self.dialect = dialect_for(engine.dialect.name)
        self._conditions = Conditions(tables, self.dialect)

    def _holding(self, *states: str) -> list[Table]:
        """The tables whose messages can be in these states; without states, the two with messages."""
        tables = (self.tables.outbox, self.tables.local)
        if not states:
            return list(tables)
        return [each for each in tables if set(self._conditions.states(each)) & set(states)]

    def _meant(self, selection: Selection) -> list[Table]:
        return self._holding(*([] if selection.state is None else [selection.state]))

    # Reading

    def now(self) -> datetime:
        """Return the database's time."""
        with self.engine.connect() as connection:
            return connection.execute(select(self.dialect.now())).scalar_one()

    def counts(self) -> dict[str, int]:
        """Return how many messages are in each state, of relays and of local queues."""
        found = dict.fromkeys((*STATES, *LOCAL_STATES, "dead", "incoming"), 0)
        for _, state, count in self._counted(literal("")):
            found[state] = found.get(state, 0) + count
        found["dead"] = self._count(self.tables.dead_letter, true())
        found["incoming"] = self._count(self.tables.inbox, true())
        return found

    def counts_by(self, column: str) -> dict[str, dict[str, int]]:
        """Return how many messages are in each state, by ``task`` or ``destination``."""
        dead, inbox = self.tables.dead_letter, self.tables.inbox
        found: dict[str, dict[str, int]] = {}
        for name, state, count in self._counted(column):
            states = found.setdefault(name, {})
            states[state] = states.get(state, 0) + count
        with self.engine.connect() as connection:
            for table, where in ((dead, "dead"), (inbox, "incoming")):
                if column not in table.c:
                    continue
                grouped = select(table.c[column], func.count()).group_by(table.c[column])
                for name, count in connection.execute(grouped):
                    found.setdefault(name, {})[where] = count
        return dict(sorted(found.items()))

    def _counted(self, by: str | ColumnElement[str]) -> Iterator[tuple[str, str, int]]:
        """How many messages of each table have the same value and state."""
        for table in self._holding():
            name = table.c[by] if isinstance(by, str) else by
            state = self._conditions.state(table).label("state")
            stored = select(name.label("name"), state).subquery().c
            counted = select(stored.name, stored.state, func.count())
            with self.engine.connect() as connection:
                rows = connection.execute(counted.group_by(stored.name, stored.state)).all()
            yield from ((row[0], row[1], row[2]) for row in rows)

    def messages(self, selection: Selection = EVERYTHING, limit: int | None = None) -> list[Row]:
        """Return messages, the oldest first, with their ``state`` and the time ``now``.

        Those with a ``queue`` are of that local queue, the others of the outbox.
        """
        now = self.dialect.now().label("now")
        found = [
            row
            for table in self._meant(selection)
            for row in self._rows(
                table, selection, limit, self._conditions.state(table).label("state"), now
            )
        ]
        return sorted(found, key=lambda row: row["created_at"])[:limit]

    def dead_letters(
        self, selection: Selection = EVERYTHING, limit: int | None = None
    ) -> list[Row]:
        """Return dead letters, the oldest first."""
        now = self.dialect.now().label("now")
        return self._rows(self.tables.dead_letter, selection, limit, now)

    def _rows(
        self,
        table: Table,
        selection: Selection,
        limit: int | None,
        *more: ColumnElement[Any],
    ) -> list[Row]:
        # The body is the user's own, and may be large.
        columns = [column for column in table.c if column.name != "body"]
        found = select(*columns, *more).where(self._conditions.selected(table, selection))
        if limit is not None:
            found = found.limit(limit)
        with self.engine.connect() as connection:
            order = [table.c[name] for name in ("died_at", "id") if name in table.c]
            rows = connection.execute(found.order_by(*order))
            return [dict(row._mapping) for row in rows]

    def how_many(self, selection: Selection = EVERYTHING, *, dead: bool = False) -> int:
        """Return how many messages there are, or how many dead letters."""
        tables = [self.tables.dead_letter] if dead else self._meant(selection)
        return sum(
            self._count(table, self._conditions.selected(table, selection)) for table in tables
        )

    def how_many_to_republish(self, selection: Selection = EVERYTHING) -> int:
        """Return how many messages `republish` would change."""
        return self._count(self.tables.outbox, self._to_republish(selection))

    def how_many_to_reschedule(self, selection: Selection, due_at: datetime) -> int:
        """Return how many messages `reschedule` would change, if all can be read."""
        return sum(
            self._count(table, self._to_reschedule(table, selection, due_at))
            for table in self._holding("scheduled")
        )

    def _count(self, table: Table, condition: ColumnElement[bool]) -> int:
        counted = select(func.count()).select_from(table).where(condition)
        with self.engine.connect() as connection:
            return connection.execute(counted).scalar_one()

    def handled(self, *, keys: Sequence[str] = (), task_id: str | None = None) -> list[Row]:
        """Return what the inbox says of executions, by their keys or their task id."""
        inbox = self.tables.inbox
        columns = [column for column in inbox.c if column.name != "outcome"]
        wanted = or_(inbox.c.key.in_(keys), inbox.c.task_id == task_id)
        with self.engine.connect() as connection:
            rows = connection.execute(select(*columns).where(wanted).order_by(inbox.c.handled_at))
            return [dict(row._mapping) for row in rows]

    def leases(self) -> list[Row]:
        """Return leases, live and over: ``token``, ``holder``, ``messages``, ``ends_at``, ``is_over``.

        The holder is a ``relay``, or a ``worker`` that takes messages of local queues.
        """
        return [lease for table in self._holding() for lease in self._leases_in(table)]

    def _leases_in(self, table: Table) -> list[Row]:
        ends_at = func.max(table.c.available_at)
        grouped = (
            select(
                table.c.lease_token.label("token"),
                literal("worker" if table is self.tables.local else "relay").label("holder"),
                func.count().label("messages"),
                ends_at.label("ends_at"),
                case((ends_at <= self.dialect.now(), true()), else_=false()).label("is_over"),
            )
            .where(table.c.lease_token.is_not(None))
            .group_by(table.c.lease_token)
            .order_by(ends_at)
        )
        with self.engine.connect() as connection:
            return [dict(row._mapping) for row in connection.execute(grouped)]

    def errors(self, limit: int = 5, length: int = 200) -> list[Row]:
        """Return the most frequent last errors: ``error``, ``messages`` and ``dead`` ones of them."""
        counted: dict[str, Row] = {}
        with self.engine.connect() as connection:
            for table in (*self._holding(), self.tables.dead_letter):
                error = func.substring(table.c.last_error, 1, length).label("error")
                cut = select(error).where(table.c.last_error.is_not(None)).subquery().c.error
                for text, count in connection.execute(select(cut, func.count()).group_by(cut)):
                    row = counted.setdefault(text, {"error": text, "messages": 0, "dead": 0})
                    row["messages"] += count
                    row["dead"] += count if table is self.tables.dead_letter else 0
        return sorted(counted.values(), key=lambda row: (-row["messages"], row["error"]))[:limit]

    # Changing

    def _in_chunks(
        self, key: Column[Any], condition: ColumnElement[bool], change: Change, chunk: int
    ) -> Iterator[int]:
        """Change the rows that are there now and meet the condition; each is looked at once."""
        with self.engine.connect() as connection:
            last = connection.execute(select(func.max(key))).scalar_one()
        if last is None:
            return
        first: Any = None
        while True:
            page = select(key).where(condition, key <= last).order_by(key).limit(chunk)
            if first is not None:
                page = page.where(key > first)
            with self.dialect.transaction(self.engine) as connection:
                keys = connection.execute(self.dialect.skip_locked(page)).scalars().all()
                if not keys:
                    return
                changed = change(connection, keys)
            yield changed
            if len(keys) < chunk:
                return
            first = keys[-1]

    def _delete(
        self, key: Column[Any], condition: ColumnElement[bool], chunk: int
    ) -> Iterator[int]:
        def remove(connection: Connection, keys: Sequence[Any]) -> int:
            return self.dialect.delete(connection, key, keys, condition)

        return self._in_chunks(key, condition, remove, chunk)

    def clear(self, what: str, *, chunk: int = CHUNK) -> Iterator[int]:
        """Delete everything that is in a state, also ``incoming`` (the inbox) and ``dead``."""
        if what == "incoming":
            return self._delete(self.tables.inbox.c.key, true(), chunk)
        if what == "dead":
            return self.discard(chunk=chunk)
        return self.cancel(EVERYTHING, states=(what,), chunk=chunk)

    def cancel(
        self,
        selection: Selection,
        *,
        states: Iterable[str] = ("outgoing", "scheduled", "due"),
        chunk: int = CHUNK,
    ) -> Iterator[int]:
        """Delete messages that no relay and no worker has claimed."""
        conditions, states = self._conditions, tuple(states)
        for table in self._holding(*states):
            condition = and_(
                conditions.selected(table, selection),
                conditions.is_in(table, *states),
                ~conditions.leased(table),
            )
            yield from self._delete(table.c.id, condition, chunk)

    def discard(self, selection: Selection = EVERYTHING, *, chunk: int = CHUNK) -> Iterator[int]:
        """Delete dead letters."""
        dead = self.tables.dead_letter
        return self._delete(dead.c.id, self._conditions.selected(dead, selection), chunk)

    def replay(self, selection: Selection = EVERYTHING, *, chunk: int = CHUNK) -> Iterator[int]:
        """Put dead letters back into the outbox, or into their local queue: due now, under their old
        ids, with no attempt counted.

        A chunk moves in one transaction.
        """
        outbox, local, dead = self.tables.outbox, self.tables.local, self.tables.dead_letter
        condition = self._conditions.selected(dead, selection)

        def move(connection: Connection, keys: Sequence[Any]) -> int:
            # The inserts come first: on SQLite one is what begins the transaction. From then on the
            # rows are nobody else's, so that it is the same rows that are deleted.
            chosen = and_(dead.c.id.in_(keys), condition)
            of_relays = and_(chosen, dead.c.queue.is_(None))
            connection.execute(self._put_back(outbox, dead.c.id, of_relays))
            of_workers = and_(chosen, dead.c.queue.is_not(None))
            connection.execute(self._put_back(local, -dead.c.id, of_workers))
            return self.dialect.delete(connection, dead.c.id, keys, condition)

        return self._in_chunks(dead.c.id, condition, move, chunk)

    def _put_back(
        self, table: Table, row_id: ColumnElement[int], condition: ColumnElement[bool]
    ) -> Insert:
        dead = self.tables.dead_letter
        values: dict[str, Any] = {
            column.name: column for column in dead.c if column.name in table.c
        }
        del values["last_error"]
        values |= {"id": row_id, "attempts": literal(0), "available_at": self.dialect.now()}
        rows = select(*values.values()).where(condition)
        return insert(table).from_select([*values], rows)

    def republish(self, selection: Selection = EVERYTHING, *, chunk: int = CHUNK) -> Iterator[int]:
        """Make published messages that are kept until they are handled due now."""
        values = {"available_at": self.dialect.now()}
        return self._update(self.tables.outbox, self._to_republish(selection), values, chunk)

    def _to_republish(self, selection: Selection) -> ColumnElement[bool]:
        outbox, conditions = self.tables.outbox, self._conditions
        # Others are due already.
        later = outbox.c.available_at > self.dialect.now()
        published = conditions.is_in(outbox, "published")
        return and_(conditions.selected(outbox, selection), published, later)

    def release(
        self,
        *,
        token: str | None = None,
        ends_within_seconds: float = 0.0,
        workers_end_within_seconds: float = 0.0,
        chunk: int = CHUNK,
    ) -> Iterator[int]:
        """Give claimed messages back: those whose lease is over; or of one lease, or of all that end
        within so many seconds (relays' and workers'), live as they may be.

        The attempt stays counted, for the message may be what has ended its relay. A relay that lives
        after all finds its lease lost, and the messages are published twice.
        """
        now = self.dialect.now()
        for table in self._holding():
            available, is_local = table.c.available_at, table is self.tables.local
            within = workers_end_within_seconds if is_local else ends_within_seconds
            condition: ColumnElement[bool] = table.c.lease_token.is_not(None)
            if token is not None:
                condition = and_(condition, table.c.lease_token == token)
            else:
                condition = and_(condition, available <= self.dialect.after(within))
            # A message that waits already has waited since then: the lag does not shrink.
            at_once = case((available > now, now), else_=available)
            values = {"lease_token": None, "available_at": at_once}
            yield from self._update(table, condition, values, chunk)

    def _update(
        self,
        table: Table,
        condition: ColumnElement[bool],
        values: Mapping[str, Any],
        chunk: int,
    ) -> Iterator[int]:
        def write(connection: Connection, keys: Sequence[Any]) -> int:
            changed = update(table).where(table.c.id.in_(keys), condition)
            return connection.execute(changed.values(**values)).rowcount

        return self._in_chunks(table.c.id, condition, write, chunk)

    def reschedule(
        self, selection: Selection, due_at: datetime, *, chunk: int = CHUNK
    ) -> Iterator[int]:
        """Let scheduled messages be due at another time; their ``eta`` says so to the worker, too.

        Passed over is what would have expired by then, and what can't be read: a newer version wrote
        it, or it is of Celery's protocol 1, which has the eta in the body.
        """
        for table in self._holding("scheduled"):
            condition = self._to_reschedule(table, selection, due_at)
            write = partial(self._write_eta, table, condition, due_at)
            yield from self._in_chunks(table.c.id, condition, write, chunk)

    def _write_eta(
        self,
        table: Table,
        condition: ColumnElement[bool],
        due_at: datetime,
        connection: Connection,
        keys: Sequence[Any],
    ) -> int:
        changed = 0
        columns = [column for column in table.c if column.name != "body"]
        rows = connection.execute(select(*columns).where(table.c.id.in_(keys)))
        for row in rows.all():
            message = _with_eta(dict(row._mapping), due_at)
            if message is None:
                continue
            moved = update(table).where(table.c.id == row.id, condition)
            values = {"message": message, "due_at": due_at, "available_at": due_at}
            changed += connection.execute(moved.values(**values)).rowcount
        return changed

    def _to_reschedule(
        self, table: Table, selection: Selection, due_at: datetime
    ) -> ColumnElement[bool]:
        lives = or_(table.c.expires_at.is_(None), table.c.expires_at > due_at)
        scheduled = self._conditions.is_in(table, "scheduled")
        return and_(self._conditions.selected(table, selection), scheduled, lives)

    def prune(self, retention_seconds: float, *, chunk: int = CHUNK) -> Iterator[int]:
        """Delete inbox rows that are older than the retention."""
        store = Store(self.engine, self.tables)
        while count := store.prune_inbox(retention_seconds, chunk):
            yield count

    def prune_dead_letters(self, retention_seconds: float, *, chunk: int = CHUNK) -> Iterator[int]:
        """Delete dead letters that are older than the retention."""
        store = Store(self.engine, self.tables)
        while count := store.prune_dead_letters(retention_seconds, chunk):
            yield count


def _with_eta(row: Mapping[str, Any], due_at: datetime) -> str | None:
    """The message with another eta; None if it is not known how to change it."""
    try:
        envelope = Envelope.load(
            row["message"],
            task=row["task"],
            task_id=row["task_id"],
            key=row["key"],
            body=b"",
            due_at=row["due_at"],
            expires_at=row["expires_at"],
        )
    except EnvelopeError:
        return None
    if "eta" not in envelope.headers:  # protocol 1 has it in the body
        return None
    return replace(envelope, headers={**envelope.headers, "eta": due_at.isoformat()}).dump()
