"""Administration: what operators read from the tables, and change in them.

What changes rows goes in chunks, each a short transaction, and yields how many rows each has changed:
what was yielded is committed, whatever becomes of the rest. Rows under a live lease are a relay's:
only `Administration.release` touches them. The condition that chooses a row is in the statement that
changes it, so that a relay that comes in between wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Engine,
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
from celery_outbox.storage.store import Store
from celery_outbox.storage.tables import Tables

__all__ = ["EVERYTHING", "STATES", "Administration", "Selection"]

CHUNK = 1000

#: The states of a row of the outbox, as `Store.counts` names them.
STATES = ("outgoing", "scheduled", "in_flight", "published")

Row = dict[str, Any]
Change = Callable[[Connection, Sequence[Any]], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which messages: those for which all holds that is given. All of it reaches SQL as parameters.

    `task` and `destination` are names, or begin one and end with ``*``.
    """

    #: By row id or by task id; with both, what has one of either.
    ids: Sequence[int] | None = None
    task_ids: Sequence[str] | None = None
    state: str | None = None
    task: str | None = None
    destination: str | None = None
    #: Part of the last error, whatever its case.
    error: str | None = None
    #: Stored (a dead letter: buried) at least so many seconds ago.
    older_than_seconds: float | None = None


EVERYTHING = Selection()


class Administration:
    """The tables of one outbox, as its operators see them."""

    def __init__(self, engine: Engine, tables: Tables) -> None:
        self.engine = engine
        self.tables = tables
        self.dialect = dialect_for(engine.dialect.name)

    # Conditions

    def _leased(self) -> ColumnElement[bool]:
        outbox = self.tables.outbox.c
        return and_(outbox.lease_token.is_not(None), outbox.available_at > self.dialect.now())

    def _state(self) -> ColumnElement[str]:
        """The state of a row of the outbox."""
        outbox = self.tables.outbox.c
        return case(
            (self._leased(), literal("in_flight")),
            (outbox.published_at.is_not(None), literal("published")),
            (outbox.due_at > self.dialect.now(), literal("scheduled")),
            else_=literal("outgoing"),
        )

    def _in(self, *states: str) -> ColumnElement[bool]:
        return self._state().in_(states)

    def _selected(self, table: Table, selection: Selection) -> ColumnElement[bool]:
        columns = table.c
        conditions: list[ColumnElement[bool]] = [true()]
        if selection.ids is not None or selection.task_ids is not None:
            by_id = columns.id.in_(selection.ids or ())
            conditions.append(or_(by_id, columns.task_id.in_(selection.task_ids or ())))
        if selection.state is not None:
            conditions.append(self._in(selection.state))
        if selection.task is not None:
            conditions.append(_named(columns.task, selection.task))
        if selection.destination is not None:
            conditions.append(_named(columns.destination, selection.destination))
        if selection.error is not None:
            conditions.append(columns.last_error.icontains(selection.error, autoescape=True))
        if selection.older_than_seconds is not None:
            since = columns.died_at if "died_at" in columns else columns.created_at
            conditions.append(since <= self.dialect.after(-selection.older_than_seconds))
        return and_(*conditions)

    # Reading

    def now(self) -> datetime:
        """Return the database's time."""
        with self.engine.connect() as connection:
            return connection.execute(select(self.dialect.now())).scalar_one()

    def counts_by(self, column: str) -> dict[str, dict[str, int]]:
        """Return how many messages are in each state, by ``task`` or ``destination``."""
        outbox, dead, inbox = self.tables.outbox, self.tables.dead_letter, self.tables.inbox
        found: dict[str, dict[str, int]] = {}
        state = self._state().label("state")
        with self.engine.connect() as connection:
            stored = select(outbox.c[column].label("name"), state).subquery()
            rows = connection.execute(
                select(stored.c.name, stored.c.state, func.count()).group_by(
                    stored.c.name, stored.c.state
                )
            )
            for name, where, count in rows:
                found.setdefault(name, {})[where] = count
            for table, where in ((dead, "dead"), (inbox, "incoming")):
                if column not in table.c:
                    continue
                grouped = select(table.c[column], func.count()).group_by(table.c[column])
                for name, count in connection.execute(grouped):
                    found.setdefault(name, {})[where] = count
        return dict(sorted(found.items()))

    def outgoing(self, selection: Selection = EVERYTHING, limit: int | None = None) -> list[Row]:
        """Return rows of the outbox, the oldest first, with their ``state`` and the time ``now``."""
        return self._rows(
            self.tables.outbox,
            selection,
            limit,
            self._state().label("state"),
            self.dialect.now().label("now"),
        )

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
        found = select(*columns, *more).where(self._selected(table, selection))
        if limit is not None:
            found = found.limit(limit)
        with self.engine.connect() as connection:
            rows = connection.execute(found.order_by(table.c.id))
            return [dict(row._mapping) for row in rows]

    def how_many(self, selection: Selection = EVERYTHING, *, dead: bool = False) -> int:
        """Return how many messages there are, in the outbox or among the dead letters."""
        table = self.tables.dead_letter if dead else self.tables.outbox
        return self._count(table, self._selected(table, selection))

    def how_many_to_republish(self, selection: Selection = EVERYTHING) -> int:
        """Return how many messages `republish` would change."""
        return self._count(self.tables.outbox, self._to_republish(selection))

    def how_many_to_reschedule(self, selection: Selection, due_at: datetime) -> int:
        """Return how many messages `reschedule` would change, if all can be read."""
        return self._count(self.tables.outbox, self._to_reschedule(selection, due_at))

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
        """Return the leases, live and over: ``token``, ``messages``, ``ends_at`` and ``is_over``."""
        outbox = self.tables.outbox.c
        ends_at = func.max(outbox.available_at)
        grouped = (
            select(
                outbox.lease_token.label("token"),
                func.count().label("messages"),
                ends_at.label("ends_at"),
                case((ends_at <= self.dialect.now(), true()), else_=false()).label("is_over"),
            )
            .where(outbox.lease_token.is_not(None))
            .group_by(outbox.lease_token)
            .order_by(ends_at)
        )
        with self.engine.connect() as connection:
            return [dict(row._mapping) for row in connection.execute(grouped)]

    def errors(self, limit: int = 5, length: int = 200) -> list[Row]:
        """Return the most frequent last errors: ``error``, ``messages`` and ``dead`` ones of them."""
        counted: dict[str, Row] = {}
        with self.engine.connect() as connection:
            for table, is_dead in ((self.tables.outbox, False), (self.tables.dead_letter, True)):
                error = func.substring(table.c.last_error, 1, length).label("error")
                cut = select(error).where(table.c.last_error.is_not(None)).subquery().c.error
                for text, count in connection.execute(select(cut, func.count()).group_by(cut)):
                    row = counted.setdefault(text, {"error": text, "messages": 0, "dead": 0})
                    row["messages"] += count
                    row["dead"] += count if is_dead else 0
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
        states: Iterable[str] = ("outgoing", "scheduled"),
        chunk: int = CHUNK,
    ) -> Iterator[int]:
        """Delete messages of the outbox that no relay has claimed."""
        outbox = self.tables.outbox
        condition = and_(self._selected(outbox, selection), self._in(*states), ~self._leased())
        return self._delete(outbox.c.id, condition, chunk)

    def discard(self, selection: Selection = EVERYTHING, *, chunk: int = CHUNK) -> Iterator[int]:
        """Delete dead letters."""
        dead = self.tables.dead_letter
        return self._delete(dead.c.id, self._selected(dead, selection), chunk)

    def replay(self, selection: Selection = EVERYTHING, *, chunk: int = CHUNK) -> Iterator[int]:
        """Put dead letters back into the outbox, due now, under their old ids, with no attempt counted.

        A chunk moves in one transaction.
        """
        outbox, dead = self.tables.outbox, self.tables.dead_letter
        condition = self._selected(dead, selection)
        names = [
            column.name
            for column in dead.c
            if column.name in outbox.c and column.name not in ("attempts", "last_error")
        ]
        values: Mapping[str, Any] = {"attempts": literal(0), "available_at": self.dialect.now()}

        def move(connection: Connection, keys: Sequence[Any]) -> int:
            # The insert comes first: on SQLite it is what begins the transaction. From then on the rows
            # are nobody else's, so that it is the same rows that are deleted.
            chosen = and_(dead.c.id.in_(keys), condition)
            rows = select(*(dead.c[name] for name in names), *values.values()).where(chosen)
            connection.execute(insert(outbox).from_select([*names, *values], rows))
            return self.dialect.delete(connection, dead.c.id, keys, condition)

        return self._in_chunks(dead.c.id, condition, move, chunk)

    def republish(self, selection: Selection = EVERYTHING, *, chunk: int = CHUNK) -> Iterator[int]:
        """Make published messages that are kept until they are handled due now."""
        values = {"available_at": self.dialect.now()}
        return self._update(self._to_republish(selection), values, chunk)

    def _to_republish(self, selection: Selection) -> ColumnElement[bool]:
        # Others are due already.
        later = self.tables.outbox.c.available_at > self.dialect.now()
        return and_(self._selected(self.tables.outbox, selection), self._in("published"), later)

    def release(
        self,
        *,
        token: str | None = None,
        ends_within_seconds: float | None = None,
        chunk: int = CHUNK,
    ) -> Iterator[int]:
        """Give claimed messages back: those whose lease is over; or of one lease, or of all that end
        within so many seconds, live as they may be.

        The attempt stays counted, for the message may be what has ended its relay. A relay that lives
        after all finds its lease lost, and the messages are published twice.
        """
        outbox = self.tables.outbox
        now, available = self.dialect.now(), outbox.c.available_at
        condition: ColumnElement[bool] = outbox.c.lease_token.is_not(None)
        if token is not None:
            condition = and_(condition, outbox.c.lease_token == token)
        elif ends_within_seconds is not None:
            condition = and_(condition, available <= self.dialect.after(ends_within_seconds))
        else:
            condition = and_(condition, available <= now)
        # A message that waits already has waited since then: the lag does not shrink.
        at_once = case((available > now, now), else_=available)
        return self._update(condition, {"lease_token": None, "available_at": at_once}, chunk)

    def _update(
        self, condition: ColumnElement[bool], values: Mapping[str, Any], chunk: int
    ) -> Iterator[int]:
        outbox = self.tables.outbox

        def write(connection: Connection, keys: Sequence[Any]) -> int:
            changed = update(outbox).where(outbox.c.id.in_(keys), condition)
            return connection.execute(changed.values(**values)).rowcount

        return self._in_chunks(outbox.c.id, condition, write, chunk)

    def reschedule(
        self, selection: Selection, due_at: datetime, *, chunk: int = CHUNK
    ) -> Iterator[int]:
        """Let scheduled messages be due at another time; their ``eta`` says so to the worker, too.

        Passed over is what would have expired by then, and what can't be read: a newer version wrote
        it, or it is of Celery's protocol 1, which has the eta in the body.
        """
        outbox, condition = self.tables.outbox, self._to_reschedule(selection, due_at)

        def write(connection: Connection, keys: Sequence[Any]) -> int:
            changed = 0
            columns = [column for column in outbox.c if column.name != "body"]
            rows = connection.execute(select(*columns).where(outbox.c.id.in_(keys)))
            for row in rows.all():
                message = _with_eta(dict(row._mapping), due_at)
                if message is None:
                    continue
                moved = update(outbox).where(outbox.c.id == row.id, condition)
                values = {"message": message, "due_at": due_at, "available_at": due_at}
                changed += connection.execute(moved.values(**values)).rowcount
            return changed

        return self._in_chunks(outbox.c.id, condition, write, chunk)

    def _to_reschedule(self, selection: Selection, due_at: datetime) -> ColumnElement[bool]:
        outbox = self.tables.outbox
        lives = or_(outbox.c.expires_at.is_(None), outbox.c.expires_at > due_at)
        return and_(self._selected(outbox, selection), self._in("scheduled"), lives)

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


def _named(column: Column[str], pattern: str) -> ColumnElement[bool]:
    if not pattern.endswith("*"):
        return column == pattern
    # Not LIKE, which is blind to case on SQLite.
    beginning = pattern[:-1]
    return func.substring(column, 1, len(beginning)) == beginning


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
