"""Whether the database answers, takes what an app and a relay write, and has the right tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sqlalchemy import delete, insert, inspect, select
from sqlalchemy.exc import DBAPIError

from celery_outbox.doctor.finding import Finding, error, fine, warning
from celery_outbox.errors import ConfigurationError, SchemaError
from celery_outbox.storage import schema

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from celery_outbox.plugin import Outbox

__all__ = ["check_database", "check_schema", "check_writing"]

#: What no message has for a key, or a task for a name.
_PROBE = "celery-outbox-doctor"


def check_database(outbox: Outbox) -> Iterator[Finding]:
    """The database can be asked."""
    place = outbox.engine.url.render_as_string(hide_password=True)
    try:
        outbox.store.dialect.check(outbox.engine)
        with outbox.engine.connect() as connection:
            connection.execute(select(1))
    except ConfigurationError as exc:
        yield error(str(exc), "Mend what it says; without the database nothing can be sent.")
        return
    except DBAPIError as exc:
        yield error(
            f"{place} can't be asked: {exc.orig}",
            "Is the server there, and the URL right? Durable tasks can't be sent until it answers.",
        )
        return
    yield fine(f"{place} answers")


def check_schema(outbox: Outbox) -> Iterator[Finding]:
    """Tables, columns, version and indexes are those of this release."""
    try:
        schema.compare(outbox.engine, outbox.tables)
    except SchemaError as exc:
        yield error(str(exc), "Create or migrate the tables: `celery -A <your app> outbox schema`.")
        return
    inspector = inspect(outbox.engine)
    absent: list[str] = []
    for table in outbox.tables.all():
        there = {str(index["name"]) for index in inspector.get_indexes(table.name, table.schema)}
        absent += sorted({str(index.name) for index in table.indexes} - there)
    if absent:
        yield warning(
            f"indexes are missing: {', '.join(absent)}",
            "Create them (`celery -A <your app> outbox storage script` has the statements): without "
            "them each claim reads the whole table.",
        )
        return
    count = len(outbox.tables.all())
    yield fine(f"{count} tables and their indexes are there, in version {schema.VERSION}")


def check_writing(outbox: Outbox) -> Iterator[Finding]:
    """A message, a delivery and a dead letter can be written and deleted; nothing of it is kept."""
    try:
        with outbox.engine.connect() as connection, connection.begin() as transaction:
            _write(outbox, connection)
            transaction.rollback()
    except DBAPIError as exc:
        yield error(
            f"a message can't be stored: {exc.orig}",
            "Give the user of this URL the right to select, insert, update and delete in the "
            "outbox's tables; on a replica, use the primary's URL.",
        )
        return
    yield fine("a message, a delivery and a dead letter were written and rolled back")


def _write(outbox: Outbox, connection: Connection) -> None:
    store, tables = outbox.store, outbox.tables
    now = store.dialect.now()
    message = {
        "key": _PROBE,
        "task": _PROBE,
        "task_id": _PROBE,
        "destination": _PROBE,
        "body": b"",
        "message": "{}",
        "created_at": now,
        "attempts": 0,
    }
    connection.execute(insert(tables.outbox).values(**message, available_at=now))
    store.receive(connection, _PROBE, _PROBE, _PROBE)
    store.record(connection, _PROBE, "FAILURE", None, forget=True)
    connection.execute(delete(tables.inbox).where(tables.inbox.c.key == _PROBE))
    connection.execute(insert(tables.dead_letter).values(id=-1, **message, died_at=now))
    connection.execute(delete(tables.dead_letter).where(tables.dead_letter.c.id == -1))
