"""Selection: which messages an operator means, and in which state a message is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Column, ColumnElement, Table, and_, case, func, literal, or_, true

from celery_outbox.storage.dialects.base import Dialect
from celery_outbox.storage.tables import Tables

__all__ = ["EVERYTHING", "LOCAL_STATES", "STATES", "Conditions", "Selection"]

#: The states of a row of the outbox, as `Store.counts` names them.
STATES = ("outgoing", "scheduled", "in_flight", "published")
#: The states of a row of a local queue, as `LocalStore.counts` names them.
LOCAL_STATES = ("due", "scheduled", "taken")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which messages: those for which all holds that is given. All of it reaches SQL as parameters.

    `task` and `destination` are names, or begin one and end with ``*``.
    """

    #: By row id (of the outbox), by row id of a local queue, or by task id; what has one of them.
    ids: Sequence[int] | None = None
    local_ids: Sequence[int] | None = None
    task_ids: Sequence[str] | None = None
    state: str | None = None
    task: str | None = None
    #: Where it was sent to; of a local queue also the queue itself.
    destination: str | None = None
    #: Part of the last error, whatever its case.
    error: str | None = None
    #: Stored (a dead letter: buried) at least so many seconds ago.
    older_than_seconds: float | None = None

    @property
    def has_ids(self) -> bool:
        """Whether messages are named, which may be none at all."""
        return any(each is not None for each in (self.ids, self.local_ids, self.task_ids))


EVERYTHING = Selection()


class Conditions:
    """Conditions on the rows of one outbox's tables."""

    def __init__(self, tables: Tables, dialect: Dialect) -> None:
        self._tables = tables
        self._dialect = dialect

    def states(self, table: Table) -> tuple[str, ...]:
        """The states in which a row of the table can be."""
        return LOCAL_STATES if table is self._tables.local else STATES

    def leased(self, table: Table) -> ColumnElement[bool]:
        """Whether a relay or worker holds it."""
        return and_(table.c.lease_token.is_not(None), table.c.available_at > self._dialect.now())

    def state(self, table: Table) -> ColumnElement[str]:
        """The state of a row of the outbox, or of a local queue."""
        columns, now = table.c, self._dialect.now()
        if table is self._tables.local:
            return case(
                (self.leased(table), literal("taken")),
                (columns.available_at > now, literal("scheduled")),
                else_=literal("due"),
            )
        return case(
            (self.leased(table), literal("in_flight")),
            (columns.published_at.is_not(None), literal("published")),
            (columns.due_at > now, literal("scheduled")),
            else_=literal("outgoing"),
        )

    def is_in(self, table: Table, *states: str) -> ColumnElement[bool]:
        """Whether it is in one of these states."""
        return self.state(table).in_(states)

    def selected(self, table: Table, selection: Selection) -> ColumnElement[bool]:
        """Whether it is meant."""
        columns = table.c
        conditions: list[ColumnElement[bool]] = [true()]
        if selection.has_ids:
            by_id = self._has_id(table, selection)
            conditions.append(or_(by_id, columns.task_id.in_(selection.task_ids or ())))
        if selection.state is not None:
            conditions.append(self.is_in(table, selection.state))
        if selection.task is not None:
            conditions.append(_named(columns.task, selection.task))
        if (destination := selection.destination) is not None:
            places = [columns[name] for name in ("destination", "queue") if name in columns]
            conditions.append(or_(*(_named(place, destination) for place in places)))
        if selection.error is not None:
            conditions.append(columns.last_error.icontains(selection.error, autoescape=True))
        if selection.older_than_seconds is not None:
            since = columns.died_at if "died_at" in columns else columns.created_at
            conditions.append(since <= self._dialect.after(-selection.older_than_seconds))
        return and_(*conditions)

    def _has_id(self, table: Table, selection: Selection) -> ColumnElement[bool]:
        ids, local_ids = selection.ids or (), selection.local_ids or ()
        if table is self._tables.dead_letter:
            return table.c.id.in_([*ids, *(-each for each in local_ids)])
        return table.c.id.in_(local_ids if table is self._tables.local else ids)


def _named(column: Column[str], pattern: str) -> ColumnElement[bool]:
    if not pattern.endswith("*"):
        return column == pattern
    # Not LIKE, which is blind to case on SQLite.
    beginning = pattern[:-1]
    return func.substring(column, 1, len(beginning)) == beginning
