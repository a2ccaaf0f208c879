"""Many messages of one transaction on PostgreSQL: in few statements, by cursors of the app's kind."""

from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, create_engine, event, text

from celery_outbox.storage.rows import row_of
from celery_outbox.storage.store import Store
from celery_outbox.testing.contract.database import Database
from celery_outbox.testing.contract.inserting import stage_many
from celery_outbox.testing.contract.outgoing import claim, envelope, ids

ROWS = [row_of(envelope(label)) for label in ("a", "b")]


@pytest.fixture
def outbox_contract_database(postgresql_url: str) -> Database:
    """PostgreSQL alone."""
    return Database.at(postgresql_url)


def test_few_statements_which_listeners_see(store: Store) -> None:
    seen: list[str] = []
    event.listen(
        store.engine, "before_cursor_execute", lambda _c, _u, statement, *_: seen.append(statement)
    )
    stage_many(store, 100)
    assert len([each for each in seen if each.startswith("INSERT INTO")]) == 1


class Cursor(psycopg.ClientCursor[Any]):
    """An app's own kind."""


def _kind(connection: Connection) -> Any:
    return connection.connection.dbapi_connection.cursor_factory  # type: ignore[union-attr]


def handle(store: Store, connection: Connection, key: str) -> None:
    """Claim an execution, twice, and record its outcome."""
    assert store.receive(connection, key, "t", key)
    assert not store.receive(connection, key, "t", key)
    store.record(connection, key, "SUCCESS", f"of {key}", forget=False)


def test_a_connection_keeps_its_kind_of_cursor(store: Store) -> None:
    with store.engine.begin() as connection:
        before = _kind(connection)
        store.stage(connection, ROWS)
        handle(store, connection, "first")
        assert _kind(connection) is before
    engine = create_engine(store.engine.url, connect_args={"cursor_factory": Cursor})
    with engine.begin() as connection:
        store.stage(connection, ROWS)
        handle(store, connection, "second")
        assert _kind(connection) is Cursor
    engine.dispose()
    assert ids(claim(store)) == ["a", "b", "a", "b"]


def test_a_connection_whose_schemas_are_translated(store: Store) -> None:
    """As apps with a schema for each tenant do."""
    with store.engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA tenant"))
        connection.execute(text("CREATE TABLE tenant.outbox (LIKE outbox INCLUDING ALL)"))
        connection.execute(text("CREATE TABLE tenant.inbox (LIKE inbox INCLUDING ALL)"))
    translated = store.engine.execution_options(schema_translate_map={None: "tenant"})
    with translated.begin() as connection:
        store.stage(connection, ROWS)
        handle(store, connection, "third")
    with store.engine.connect() as connection:
        outcomes = connection.execute(text("SELECT key, outcome FROM tenant.inbox"))
        assert outcomes.all() == [("third", "of third")]
        found = connection.execute(text("SELECT task_id FROM tenant.outbox ORDER BY id"))
        assert found.scalars().all() == ["a", "b"]
    assert not claim(store).rows
