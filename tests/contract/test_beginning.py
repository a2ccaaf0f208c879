"""The claim of an execution goes to PostgreSQL together with the BEGIN of its transaction."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from psycopg import pq
from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.exc import OperationalError, ProgrammingError

from celery_outbox.storage.store import Store
from celery_outbox.testing.contract.database import Database


@pytest.fixture
def outbox_contract_database(postgresql_url: str) -> Database:
    """PostgreSQL alone."""
    return Database.at(postgresql_url)


class Struck(Exception):
    """As a soft time limit is raised: by a signal, wherever the code is."""


def strike() -> None:
    raise Struck


@contextmanager
def meanwhile(action: Callable[[], object], seconds: float = 0.2) -> Iterator[None]:
    """Do something while the block waits."""
    before = signal.signal(signal.SIGALRM, lambda *_: action())
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def claim(store: Store, connection: Connection, key: str = "k") -> bool:
    return store.receive(connection, key, "t", key)


def is_claimed(store: Store, key: str = "k") -> bool:
    with store.engine.connect() as connection:
        return store.handled(connection, key) is not None


def of_driver(connection: Connection) -> Any:
    return connection.connection.dbapi_connection


def test_both_are_sent_before_anything_is_answered(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    with store.engine.connect() as connection, path.open("w") as trace:
        pgconn = of_driver(connection).pgconn
        pgconn.trace(trace.fileno())
        pgconn.set_trace_flags(pq.Trace.SUPPRESS_TIMESTAMPS)
        assert claim(store, connection)
        pgconn.untrace()
        sent, answer, _ = path.read_text().partition("\nB\t")
    assert answer
    assert ("BEGIN" in sent, "INSERT INTO inbox" in sent) == (True, True)


def test_it_is_in_a_transaction(store: Store) -> None:
    with store.engine.connect() as connection:
        assert claim(store, connection)
        connection.rollback()
        assert not is_claimed(store)
        assert claim(store, connection)
        assert not claim(store, connection)
        connection.commit()
    assert is_claimed(store)


def test_listeners_see_it(store: Store) -> None:
    seen: list[str] = []
    event.listen(
        store.engine, "before_cursor_execute", lambda _c, _u, statement, *_: seen.append(statement)
    )
    with store.engine.begin() as connection:
        claim(store, connection)
    assert [each.split(" (")[0] for each in seen] == ["INSERT INTO inbox"]


@pytest.mark.parametrize("level", ["SERIALIZABLE", "REPEATABLE READ", "READ COMMITTED"])
def test_it_keeps_the_isolation_level(store: Store, level: str) -> None:
    engine = create_engine(store.engine.url, isolation_level=level)
    with engine.begin() as connection:
        assert claim(store, connection)
        shown = connection.exec_driver_sql("SHOW transaction_isolation").scalar_one()
    assert shown == level.lower()
    engine.dispose()


def test_without_transactions(store: Store) -> None:
    engine = create_engine(store.engine.url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        assert claim(store, connection)
        assert is_claimed(store)
    engine.dispose()


def test_names_that_are_not_plain(store: Store) -> None:
    with store.engine.begin() as connection:
        assert store.receive(connection, "schlüssel", "tâche\t'x' $1 %s", "id")
    assert is_claimed(store, "schlüssel")


def test_an_error_leaves_the_connection_usable(store: Store) -> None:
    with store.engine.begin() as connection:
        connection.execute(text("ALTER TABLE inbox RENAME TO away"))
    with store.engine.connect() as connection:
        pid = of_driver(connection).info.backend_pid
        with pytest.raises(ProgrammingError, match='relation "inbox" does not exist'):
            claim(store, connection)
        with pytest.raises(Exception, match="current transaction is aborted"):
            connection.execute(text("SELECT 1"))
        connection.rollback()
        connection.execute(text("ALTER TABLE away RENAME TO inbox"))
        connection.commit()
        assert claim(store, connection)
        assert of_driver(connection).info.backend_pid == pid


def test_a_connection_that_was_ended_before(store: Store) -> None:
    """It is found out at once, as with any statement."""
    with store.engine.connect() as connection, store.engine.connect() as other:
        end = text("SELECT pg_terminate_backend(:pid, 10000)")
        other.execute(end, {"pid": of_driver(connection).info.backend_pid})
        with pytest.raises(OperationalError) as caught:
            claim(store, connection)
    assert caught.value.connection_invalidated
    with store.engine.connect() as connection:
        assert claim(store, connection)


def test_a_connection_that_is_ended_meanwhile(store: Store) -> None:
    with store.engine.begin() as other:
        other.execute(text("LOCK TABLE inbox"))
        with store.engine.connect() as connection:
            pid = of_driver(connection).info.backend_pid
            end = partial(other.execute, text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
            with meanwhile(end), pytest.raises(OperationalError) as caught:
                claim(store, connection)
    assert caught.value.connection_invalidated


def test_a_time_limit_that_strikes_meanwhile(store: Store) -> None:
    """Nobody takes the answer that is still to come for the one to the next statement."""
    with store.engine.begin() as other:
        other.execute(text("LOCK TABLE inbox"))
        connection = store.engine.connect()
        with meanwhile(strike), pytest.raises(Struck):
            claim(store, connection)
        assert of_driver(connection).closed
        with pytest.raises(OperationalError, match="the connection is closed"):
            connection.close()
    with store.engine.begin() as connection:
        assert claim(store, connection)
