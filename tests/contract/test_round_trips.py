"""A claim goes to PostgreSQL with BEGIN, and an outcome with COMMIT; both are prepared."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from psycopg import pq
from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.exc import (
    DataError,
    IntegrityError,
    InternalError,
    OperationalError,
    ProgrammingError,
)

from celery_outbox.errors import TransactionLost
from celery_outbox.storage.store import Handled, Store
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


def commit(store: Store, connection: Connection, key: str = "k", outcome: str = "of k") -> None:
    with store.recording(connection, key, "SUCCESS", outcome, forget=False):
        connection.commit()


def outcome_of(store: Store, key: str = "k") -> str | None:
    with store.engine.connect() as connection:
        handled = store.handled(connection, key)
        return None if handled is None else handled.outcome


def prepared(connection: Connection) -> set[str]:
    names = text("SELECT name FROM pg_prepared_statements WHERE name LIKE 'celery_outbox_%'")
    return set(connection.execute(names).scalars())


class Trace:
    """What libpq has sent and got on a connection."""

    def __init__(self, connection: Connection, path: Path) -> None:
        self._pgconn = of_driver(connection).pgconn
        self._path = path

    @contextmanager
    def taken(self) -> Iterator[None]:
        with self._path.open("w") as file:
            self._pgconn.trace(file.fileno())
            self._pgconn.set_trace_flags(pq.Trace.SUPPRESS_TIMESTAMPS)
            yield
            self._pgconn.untrace()

    @property
    def sent_before_an_answer(self) -> str:
        sent, answer, _ = self._path.read_text().partition("\nB\t")
        assert answer
        return sent


def test_both_are_sent_before_anything_is_answered(store: Store, tmp_path: Path) -> None:
    with store.engine.connect() as connection:
        trace = Trace(connection, tmp_path / "trace")
        with trace.taken():
            assert claim(store, connection)
    sent = trace.sent_before_an_answer
    assert ("BEGIN" in sent, "INSERT INTO inbox" in sent) == (True, True)


def test_they_are_parsed_once(store: Store, tmp_path: Path) -> None:
    with store.engine.connect() as connection:
        for key in ("first", "second"):
            trace = Trace(connection, tmp_path / key)
            with trace.taken():
                assert claim(store, connection, key)
                commit(store, connection, key)
            parsed = (tmp_path / key).read_text().count("\tParse\t")
            # BEGIN and COMMIT are parsed each time.
            assert parsed == (4 if key == "first" else 2)
        assert len(prepared(connection)) == 2
    assert (outcome_of(store, "first"), outcome_of(store, "second")) == ("of k", "of k")


def test_nothing_is_prepared_where_the_app_forbids_it(store: Store) -> None:
    """As it must behind some poolers."""
    engine = create_engine(store.engine.url, connect_args={"prepare_threshold": None})
    with engine.connect() as connection:
        for key in ("first", "second"):
            assert claim(store, connection, key)
            commit(store, connection, key)
        assert prepared(connection) == set()
    assert outcome_of(store, "second") == "of k"
    engine.dispose()


@pytest.mark.parametrize("statement", ["DISCARD ALL", "DEALLOCATE ALL"])
def test_what_is_prepared_may_be_gone(store: Store, statement: str) -> None:
    with store.engine.connect() as connection:
        for number in range(3):
            assert claim(store, connection, f"{number}")
            commit(store, connection, f"{number}")
            of_driver(connection).autocommit = True
            of_driver(connection).execute(statement)
            of_driver(connection).autocommit = False
        # It does without when it has seen that.
        assert prepared(connection) == set()
        connection.rollback()
    assert [outcome_of(store, f"{number}") for number in range(3)] == ["of k"] * 3


def test_what_is_prepared_may_be_gone_at_the_commit(store: Store) -> None:
    """Then nothing is committed, and the next delivery does without."""
    with store.engine.connect() as connection:
        assert claim(store, connection, "before")
        commit(store, connection, "before")
        assert claim(store, connection)
        connection.execute(text("DEALLOCATE ALL"))
        with pytest.raises(OperationalError, match="a prepared statement is gone"):
            commit(store, connection)
        connection.rollback()
        assert not is_claimed(store)
        assert claim(store, connection)
        connection.execute(text("DEALLOCATE ALL"))
        commit(store, connection)
    assert outcome_of(store) == "of k"


def test_another_client_of_a_pooler_may_have_prepared_it(store: Store) -> None:
    with store.engine.connect() as connection, store.engine.connect() as other:
        assert claim(store, other, "other")
        commit(store, other, "other")
        for name in prepared(other):
            connection.execute(text(f"PREPARE {name} AS SELECT 1"))
        connection.commit()
        assert claim(store, connection)
        commit(store, connection)
    assert outcome_of(store) == "of k"


def test_it_is_in_a_transaction(store: Store) -> None:
    with store.engine.connect() as connection:
        assert claim(store, connection)
        connection.rollback()
        assert not is_claimed(store)
        assert claim(store, connection)
        assert not claim(store, connection)
        connection.commit()
    assert is_claimed(store)


@pytest.mark.parametrize("logged", [False, True])
def test_sqlalchemy_has_a_part_in_it_where_it_logs_statements(
    store: Store, caplog: pytest.LogCaptureFixture, logged: bool
) -> None:
    seen: list[str] = []
    engine = create_engine(store.engine.url, logging_name="seen")
    event.listen(
        engine, "before_cursor_execute", lambda _c, _u, statement, *_: seen.append(statement)
    )
    level = "INFO" if logged else "WARNING"
    with caplog.at_level(level, "sqlalchemy.engine.Engine.seen"), engine.begin() as connection:
        assert claim(store, connection)
        assert not claim(store, connection)
    expected = ["INSERT INTO inbox"] * (2 if logged else 1)
    assert [each.split(" (")[0] for each in seen] == expected
    assert caplog.text.count("INSERT INTO inbox") == (2 if logged else 0)
    assert is_claimed(store)
    engine.dispose()


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


def test_an_outcome_goes_out_with_its_commit(store: Store, tmp_path: Path) -> None:
    with store.engine.connect() as connection:
        assert claim(store, connection)
        trace = Trace(connection, tmp_path / "trace")
        with trace.taken():
            commit(store, connection)
        assert "commit" not in vars(of_driver(connection))
    sent = trace.sent_before_an_answer
    assert ("UPDATE inbox" in sent, "COMMIT" in sent) == (True, True)
    assert outcome_of(store) == "of k"


def test_who_hears_of_the_commit_may_still_write(store: Store) -> None:
    def write(connection: Connection) -> None:
        store.receive(connection, "written by a listener", "t", "id")

    event.listen(store.engine, "commit", write)
    with store.engine.connect() as connection:
        assert claim(store, connection)
        commit(store, connection)
        assert (
            connection.execute(text("SELECT count(DISTINCT xmin::text) FROM inbox")).scalar() == 1
        )
    event.remove(store.engine, "commit", write)
    assert (is_claimed(store), is_claimed(store, "written by a listener")) == (True, True)


def test_without_its_claim_nothing_is_committed(store: Store) -> None:
    with store.engine.connect() as connection:
        assert claim(store, connection)
        assert claim(store, connection, "other")
        connection.execute(text("DELETE FROM inbox WHERE key = 'k'"))
        with pytest.raises(TransactionLost):
            commit(store, connection)
        connection.rollback()
        assert not is_claimed(store, "other")
        assert claim(store, connection)
        commit(store, connection)
    assert outcome_of(store) == "of k"


def deferred(store: Store, body: str) -> None:
    """Let the database check something at COMMIT."""
    with store.engine.begin() as connection:
        connection.execute(text("CREATE TABLE checked (id integer)"))
        connection.exec_driver_sql(
            f"CREATE FUNCTION check_late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body}; "
            "RETURN NULL; END $$"
        )
        connection.execute(
            text(
                "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON checked DEFERRABLE INITIALLY DEFERRED "
                "FOR EACH ROW EXECUTE FUNCTION check_late()"
            )
        )


@pytest.fixture
def no_deferred_check(store: Store) -> Iterator[None]:
    yield
    with store.engine.begin() as connection:
        connection.execute(text("DROP TABLE checked"))
        connection.execute(text("DROP FUNCTION check_late"))


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("RAISE EXCEPTION SQLSTATE '23505'", IntegrityError),
        # What an outcome without its row fails for.
        ("PERFORM 1 / 0", DataError),
    ],
)
@pytest.mark.usefixtures("no_deferred_check")
def test_what_the_commit_itself_is_refused_for(
    store: Store, body: str, error: type[Exception]
) -> None:
    deferred(store, body)
    with store.engine.connect() as connection:
        assert claim(store, connection)
        connection.execute(text("INSERT INTO checked VALUES (1)"))
        with pytest.raises(error):
            commit(store, connection)
        connection.rollback()
        assert claim(store, connection)
        commit(store, connection)
    assert outcome_of(store) == "of k"


def test_after_an_error_that_was_swallowed_nothing_is_committed(store: Store) -> None:
    with store.engine.connect() as connection:
        assert claim(store, connection)
        with suppress(ProgrammingError):
            connection.execute(text("SELECT * FROM nowhere"))
        with pytest.raises(InternalError, match="current transaction is aborted"):
            commit(store, connection)
        connection.rollback()
    assert not is_claimed(store)


def test_a_connection_that_was_ended_before_the_commit(store: Store) -> None:
    with store.engine.connect() as connection, store.engine.connect() as other:
        assert claim(store, connection)
        end = text("SELECT pg_terminate_backend(:pid, 10000)")
        other.execute(end, {"pid": of_driver(connection).info.backend_pid})
        with pytest.raises(OperationalError) as caught:
            commit(store, connection)
    assert caught.value.connection_invalidated
    assert not is_claimed(store)


@pytest.mark.parametrize("name", ["\x00", "a\x00b"])
def test_names_that_the_database_can_not_hold(store: Store, name: str) -> None:
    with store.engine.connect() as connection:
        with pytest.raises(DataError, match="NUL"):
            claim(store, connection, name)
        assert claim(store, connection)
        with pytest.raises(DataError, match="NUL"):
            commit(store, connection, outcome=name)
        connection.rollback()
    assert not is_claimed(store)


def test_an_outcome_of_any_length_and_kind(store: Store) -> None:
    with store.engine.connect() as connection:
        for number, outcome in enumerate(["", "ä☃ $1 %s '", "x" * 3_000_000, None]):
            assert claim(store, connection, f"{number}")
            with store.recording(connection, f"{number}", "FAILURE", outcome, forget=False):
                connection.commit()
            assert store.handled(connection, f"{number}") == Handled(
                f"{number}", "FAILURE", outcome
            )
            connection.rollback()


def test_a_time_limit_that_strikes_in_the_commit(store: Store) -> None:
    """Whether it was one, nobody knows; the connection is not used again."""
    with store.engine.begin() as other:
        other.execute(text("LOCK TABLE outbox"))
        connection = store.engine.connect()
        assert claim(store, connection)

        connection.exec_driver_sql(
            "CREATE FUNCTION pg_temp.wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "LOCK TABLE outbox; RETURN NULL; END $$"
        )
        connection.execute(text("CREATE TEMP TABLE waiting (id integer)"))
        connection.execute(
            text(
                "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON waiting DEFERRABLE INITIALLY DEFERRED "
                "FOR EACH ROW EXECUTE FUNCTION pg_temp.wait()"
            )
        )
        connection.execute(text("INSERT INTO waiting VALUES (1)"))
        with meanwhile(strike), pytest.raises(Struck):
            commit(store, connection)
        assert of_driver(connection).closed
        connection.close()
