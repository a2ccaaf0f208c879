"""Many messages of one transaction on PostgreSQL: in few statements, by cursors of the app's kind."""

from typing import Any

from sqlalchemy import Connection, create_engine, event

from celery_outbox.storage.rows import row_of
from celery_outbox.storage.store import Store
from celery_outbox.testing.contract.database import Database
from celery_outbox.testing.contract.inserting import stage_many
from celery_outbox.testing.contract.outgoing import claim, envelope, ids


def test_few_statements_which_listeners_see(store: Store, database: Database) -> None:
    if database.name != "postgresql":
        return
    seen: list[str] = []
    event.listen(
        store.engine, "before_cursor_execute", lambda _c, _u, statement, *_: seen.append(statement)
    )
    stage_many(store, 100)
    assert len([each for each in seen if each.startswith("INSERT INTO")]) == 1


def test_a_connection_keeps_its_kind_of_cursor(store: Store, database: Database) -> None:
    if database.name != "postgresql":
        return
    import psycopg

    class Cursor(psycopg.ClientCursor[Any]):
        pass

    def kind(connection: Connection) -> Any:
        return connection.connection.dbapi_connection.cursor_factory  # type: ignore[union-attr]

    rows = [row_of(envelope(label)) for label in ("a", "b")]
    with store.engine.begin() as connection:
        before = kind(connection)
        store.stage(connection, rows)
        assert kind(connection) is before
    engine = create_engine(store.engine.url, connect_args={"cursor_factory": Cursor})
    with engine.begin() as connection:
        store.stage(connection, rows)
        assert kind(connection) is Cursor
    engine.dispose()
    assert ids(claim(store)) == ["a", "b", "a", "b"]
