"""Many messages of one transaction: few statements, and each message as it was given."""

from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, event

from celery_outbox.storage.rows import row_of
from celery_outbox.storage.store import Store
from tests.contract.conftest import Database
from tests.contract.test_outgoing import NOW, claim, envelope, ids, stored


def _stage(store: Store, count: int, **changes: Any) -> list[str]:
    labels = [f"{number:04}" for number in range(count)]
    with store.engine.begin() as connection:
        store.stage(connection, [row_of(envelope(label, **changes)) for label in labels])
    return labels


@pytest.mark.parametrize("count", [1, 2, 20, 21, 99, 100, 101, 245])
def test_each_is_stored_once_and_in_order(store: Store, count: int) -> None:
    labels = _stage(store, count, due_at=None)
    assert [row["task_id"] for row in stored(store)] == labels
    batch = claim(store, limit=count)
    assert ids(batch) == labels
    assert [row.envelope for row in batch.rows] == [envelope(label) for label in labels]


def test_each_has_its_own_values(store: Store) -> None:
    given = [
        envelope("a", due_at=NOW, ordering_key="k", body=b""),
        envelope("b", expires_at=NOW, body=b"\x00"),
        envelope("c %s %(key)s $1 :x"),
    ]
    with store.engine.begin() as connection:
        store.stage(connection, [row_of(each) for each in given])
    assert [row.envelope for row in claim(store).rows] == given


def test_bodies_of_many_megabytes(store: Store, database: Database) -> None:
    if database.name in ("mysql", "mariadb"):
        pytest.skip("its packets are limited: see max_allowed_packet")
    _stage(store, 30, body=b"x" * 2_000_000)
    assert claim(store, limit=30).rows[29].envelope == envelope("0029", body=b"x" * 2_000_000)


def test_few_statements_which_listeners_see(store: Store, database: Database) -> None:
    if database.name != "postgresql":
        return
    seen: list[str] = []
    event.listen(
        store.engine, "before_cursor_execute", lambda _c, _u, statement, *_: seen.append(statement)
    )
    _stage(store, 100)
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
