"""Tables: outbox, local queues, inbox, dead letters, beat, relays, version, in SQLAlchemy Core."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    event,
    insert,
)

from celery_outbox.envelope import KEY_LENGTH
from celery_outbox.storage.types import Body, Id, LongText, UTCDateTime, name_of_length

__all__ = ["HIGHEST_PRIORITY", "NAME_LENGTH", "VERSION", "Tables", "UTCDateTime"]

#: The version of the tables. A release that changes them raises it, and reads the one before.
VERSION = 1

#: Task names, ids and destinations are shown to operators only; longer ones are cut.
NAME_LENGTH = 255

#: The most urgent priority of a message in a local queue; the least urgent is 0.
HIGHEST_PRIORITY = 9

#: InnoDB has transactions; letters of all scripts, told apart by their bytes.
_ON_MYSQL = {"engine": "InnoDB", "charset": "utf8mb4", "collate": "utf8mb4_bin"}
_OPTIONS: dict[str, Any] = {
    f"{name}_{key}": value for name in ("mysql", "mariadb") for key, value in _ON_MYSQL.items()
}


class Tables:
    """The tables of one outbox, in the user's own `metadata` if given, so that Alembic sees them.

    `prefix` stands before each table's name; `schema` is the database schema.
    """

    def __init__(
        self, metadata: MetaData | None = None, *, schema: str | None = None, prefix: str = ""
    ) -> None:
        # Not `metadata or …`: an empty MetaData of the user's must still be taken.
        self.metadata = MetaData() if metadata is None else metadata

        def table(name: str, *columns: Any, **options: Any) -> Table:
            return Table(
                prefix + name, self.metadata, *columns, schema=schema, **_OPTIONS, **options
            )

        def stored_message() -> list[Column[Any]]:
            return [
                # What tells one execution of a task from another; the inbox has the same key.
                Column("key", name_of_length(KEY_LENGTH), nullable=False),
                Column("task", name_of_length(NAME_LENGTH), nullable=False),
                Column("task_id", name_of_length(NAME_LENGTH), nullable=False),
                Column("destination", name_of_length(NAME_LENGTH), nullable=False),
                # Messages with the same one leave in the order of their ids, one after the other.
                Column("ordering_key", name_of_length(KEY_LENGTH)),
                Column("body", Body, nullable=False),
                Column("message", LongText, nullable=False),
                Column("created_at", UTCDateTime, nullable=False),
                # The eta: not before. NULL: at once.
                Column("due_at", UTCDateTime),
                Column("expires_at", UTCDateTime),
                Column("attempts", Integer, nullable=False, default=0),
                Column("last_error", LongText),
            ]

        #: A row is a message that waits. No status: its state is `available_at` and the lease.
        self.outbox = table(
            "outbox",
            Column("id", Id, primary_key=True, autoincrement=True),
            *stored_message(),
            # When the next relay may take the row: due time, end of the lease, end of the backoff.
            Column("available_at", UTCDateTime, nullable=False),
            Column("lease_token", String(36)),
            # Set where a published envelope is kept until it is handled.
            Column("published_at", UTCDateTime),
            # Without it SQLite gives an empty table's ids again, and a dead letter keeps its row's.
            sqlite_autoincrement=True,
        )
        #: A row is a message of a local queue, which workers take from here. No relay sees it.
        self.local = table(
            "outbox_local",
            Column("id", Id, primary_key=True, autoincrement=True),
            Column("queue", name_of_length(NAME_LENGTH), nullable=False),
            Column("priority", Integer, nullable=False),
            *stored_message(),
            # When the next worker may take the row: due time, end of the lease.
            Column("available_at", UTCDateTime, nullable=False),
            Column("lease_token", String(36)),
            # A worker that lost its lease must not delete what has got the same id since.
            sqlite_autoincrement=True,
        )
        self.inbox = table(
            "inbox",
            Column("key", name_of_length(KEY_LENGTH), primary_key=True),
            Column("task", name_of_length(NAME_LENGTH), nullable=False),
            Column("task_id", name_of_length(NAME_LENGTH), nullable=False),
            Column("state", String(16), nullable=False),
            # The encoded outcome, for duplicates (see `celery_outbox.inbox.outcome`).
            Column("outcome", LongText),
            Column("handled_at", UTCDateTime, nullable=False),
        )
        self.dead_letter = table(
            "outbox_dead_letter",
            Column("id", Id, primary_key=True, autoincrement=False),
            *stored_message(),
            Column("died_at", UTCDateTime, nullable=False),
            # Of a local queue's message, whose id is that of its row with a minus: the tables have
            # numbers of their own.
            Column("queue", name_of_length(NAME_LENGTH)),
            Column("priority", Integer),
        )
        #: When each entry of beat ran last (`celery_outbox.beat`).
        self.beat = table(
            "outbox_beat",
            Column("name", name_of_length(NAME_LENGTH), primary_key=True),
            Column("last_run_at", UTCDateTime, nullable=False),
            Column("run_count", Integer, nullable=False),
        )
        #: Which relays were seen alive, and how they fare (`celery_outbox.storage.relays`).
        self.relay = table(
            "outbox_relay",
            Column("id", String(36), primary_key=True),
            Column("host", name_of_length(NAME_LENGTH), nullable=False),
            Column("pid", Integer, nullable=False),
            Column("started_at", UTCDateTime, nullable=False),
            Column("seen_at", UTCDateTime, nullable=False),
            Column("confirmed", BigInteger, nullable=False),
            Column("dead", BigInteger, nullable=False),
            Column("lost", BigInteger, nullable=False),
            Column("per_second", Float, nullable=False),
            Column("last_error", LongText),
            Column("last_error_at", UTCDateTime),
        )
        self.version = table(
            "outbox_schema", Column("version", Integer, primary_key=True, autoincrement=False)
        )
        event.listen(self.version, "after_create", self._write_version)
        outbox = self.outbox.c
        _partial_index(
            f"ix_{prefix}outbox_available",
            outbox.available_at,
            outbox.id,
            where=outbox.ordering_key.is_(None),
        )
        _partial_index(
            f"ix_{prefix}outbox_ordered",
            outbox.ordering_key,
            outbox.id,
            where=outbox.ordering_key.is_not(None),
        )
        Index(f"ix_{prefix}outbox_key", outbox.key)
        queued = self.local.c
        Index(
            f"ix_{prefix}outbox_local_available",
            *(queued.queue, queued.priority, queued.available_at, queued.id),
        )
        Index(f"ix_{prefix}inbox_handled", self.inbox.c.handled_at)
        Index(f"ix_{prefix}outbox_dead_letter_died", self.dead_letter.c.died_at)

    def _write_version(self, _table: Table, connection: Connection, **_: Any) -> None:
        """Also when it is the app that creates its metadata's tables."""
        connection.execute(insert(self.version).values(version=VERSION))

    def all(self) -> list[Table]:
        """Return the tables in the order in which they are created."""
        return [
            self.outbox,
            self.local,
            self.inbox,
            self.dead_letter,
            self.beat,
            self.relay,
            self.version,
        ]


def _partial_index(name: str, *columns: Column[Any], where: ColumnElement[bool]) -> Index:
    """Make an index of the rows that fulfil `where`; of all rows where the database knows no such."""
    return Index(name, *columns, postgresql_where=where, sqlite_where=where, mssql_where=where)
