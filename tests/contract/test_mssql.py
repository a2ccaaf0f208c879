"""SQL Server, as far as it can be shown without one.

Every public method of `celery_outbox.storage` that talks to a database is called on SQLAlchemy's mssql
dialect; what it would send to a server is parsed by sqlglot, which knows T-SQL and nothing of
SQLAlchemy. Where a server is named (`CELERY_OUTBOX_TEST_MSSQL_URL`), the whole contract is run on it
besides.
"""

import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from importlib import import_module
from typing import Any

import pytest
import sqlglot
from sqlalchemy import Engine
from sqlglot import exp

from celery_outbox import storage
from celery_outbox.errors import ConfigurationError
from celery_outbox.local.message import queued
from celery_outbox.storage import schema
from celery_outbox.storage.administration import Administration, Selection
from celery_outbox.storage.dialects import dialect_for
from celery_outbox.storage.local import LocalStore
from celery_outbox.storage.relays import Relays
from celery_outbox.storage.rows import row_of
from celery_outbox.storage.runs import Run, Runs
from celery_outbox.storage.store import Batch, Claimed, FreshestFirst, Settlement, Store
from celery_outbox.storage.tables import Tables
from celery_outbox.testing.contract.outgoing import envelope
from tests.support.fake_mssql import Asked, fake_engine
from tests.support.record import used

NOON = datetime(2026, 11, 24, 12, tzinfo=timezone.utc)
BATCH = Batch("token", NOON, [Claimed(7, 1, "t", "i", "d", NOON, None)])
EVERY = Selection(
    ids=[1], task_ids=["a"], state="outgoing", task="shop.*", destination="d", error="x%",
    older_than_seconds=5,
)  # fmt: skip
SETTLEMENT = Settlement(
    confirmed=[1, 2],
    kept={3: 9.0},
    retried={4: (9.5, "x")},
    dead={5: "x"},
    released=[6],
    postponed={7: (5.0, "x")},
)


@pytest.fixture
def changes() -> int:
    """How many rows each statement has changed."""
    return 1


@pytest.fixture
def server(changes: int) -> Iterator[tuple[Engine, Asked]]:
    engine, asked = fake_engine(changes)
    used(str(engine.url))
    yield engine, asked
    engine.dispose()


def store_of(engine: Engine) -> Store:
    return Store(engine, Tables(schema="messaging", prefix="x_"))


def with_connection(method: str, *args: Any, **options: Any) -> Callable[[Any], object]:
    def call(store: Any) -> object:
        with store.engine.begin() as connection:
            return getattr(store, method)(connection, *args, **options)

    return call


def recording(store: Store) -> None:
    with (
        store.engine.connect() as connection,
        store.recording(connection, "k", "SUCCESS", "x", forget=True),
    ):
        connection.commit()


ROWS = [row_of(envelope("a")), row_of(envelope("b", ordering_key="k"))]
LOCAL = queued(envelope("c"), "emails", hold_scheduled=True)

STORE: Mapping[str, Callable[[Store], object]] = {
    "stage": with_connection("stage", [*ROWS, LOCAL]),
    "stage_alone": lambda store: store.stage_alone(ROWS[0]),
    "claim": lambda store: store.claim(5, 60),
    "renew": lambda store: store.renew(BATCH, 60),
    "seconds_until_available": lambda store: store.seconds_until_available(),
    "settle": lambda store: store.settle(BATCH, SETTLEMENT),
    "receive": with_connection("receive", "k", "t", "i"),
    "handled": with_connection("handled", "k"),
    "record": with_connection("record", "k", "SUCCESS", "x", forget=True),
    "recording": recording,
    "forget": with_connection("forget", "k"),
    "prune_inbox": lambda store: store.prune_inbox(86400.5),
    "prune_dead_letters": lambda store: store.prune_dead_letters(86400.5),
    "counts": lambda store: store.counts(),
}

ADMINISTRATION: Mapping[str, Callable[[Administration], object]] = {
    "now": lambda admin: admin.now(),
    "counts": lambda admin: admin.counts(),
    "counts_by": lambda admin: admin.counts_by("task"),
    "messages": lambda admin: admin.messages(EVERY, 5),
    "dead_letters": lambda admin: admin.dead_letters(Selection(task="t"), 5),
    "how_many": lambda admin: admin.how_many(EVERY),
    "how_many_to_republish": lambda admin: admin.how_many_to_republish(),
    "how_many_to_reschedule": lambda admin: admin.how_many_to_reschedule(EVERY, NOON),
    "handled": lambda admin: admin.handled(keys=["k"], task_id="i"),
    "leases": lambda admin: admin.leases(),
    "errors": lambda admin: admin.errors(),
    "clear": lambda admin: [next(admin.clear(what)) for what in ("incoming", "dead", "outgoing")],
    "cancel": lambda admin: next(admin.cancel(EVERY)),
    "discard": lambda admin: next(admin.discard(Selection(error="x"))),
    "replay": lambda admin: next(admin.replay()),
    "republish": lambda admin: next(admin.republish()),
    "release": lambda admin: next(admin.release(ends_within_seconds=5)),
    "reschedule": lambda admin: next(admin.reschedule(EVERY, NOON)),
    "prune": lambda admin: next(admin.prune(5)),
    "prune_dead_letters": lambda admin: next(iter(admin.prune_dead_letters(5)), None),
}

RUNS: Mapping[str, Callable[[Runs], object]] = {
    "all": lambda runs: runs.all(),
    "remember": lambda runs: runs.remember([Run("new", NOON, 0)]),
    "advance": lambda runs: _advance(runs),
}

RELAYS: Mapping[str, Callable[[Relays], object]] = {
    "seen": lambda relays: relays.seen("r", has_failed=True, host="h", pid=7, last_error="x"),
    "all": lambda relays: relays.all(),
    "gone": lambda relays: relays.gone("r"),
    "forget": lambda relays: relays.forget(86400.5, 5),
}

LOCAL_STORE: Mapping[str, Callable[[LocalStore], object]] = {
    "put": with_connection("put", [LOCAL]),
    "take": lambda local: local.take(
        ["a", "b"], 5, token="t", lease_seconds=9.5, max_attempts=0, handled=[1, 2]
    ),
    "drop": lambda local: local.drop([1, 2], "t"),
    "give_back": lambda local: local.give_back([1, 2], "t", 9.5),
    "renew": lambda local: local.renew([1, 2], "t", 9.5),
    "size": lambda local: local.size("a"),
    "purge": lambda local: local.purge("a"),
    "counts": lambda local: local.counts(),
    "lags": lambda local: local.lags(),
}

#: Each class that talks to the database, and how each of its public methods is called.
CALLS: Mapping[type, Mapping[str, Callable[[Any], object]]] = {
    Store: STORE,
    FreshestFirst: {"claim": lambda store: _claim_freshest(store)},
    Administration: ADMINISTRATION,
    Runs: RUNS,
    Relays: RELAYS,
    LocalStore: LOCAL_STORE,
}
#: They have nothing to say where the database has no notifications.
SILENT = {"listen", "notify"}


def _advance(runs: Runs) -> bool:
    with runs._engine.begin() as connection:
        return runs.advance(connection, Run("x", NOON, 1))


def _claim_freshest(store: FreshestFirst) -> Batch:
    store.wanted = 5
    return store.claim(5, 60)


def check(statements: list[str]) -> None:
    """Parse statements: each by itself, to its last word, into something that sqlglot understands."""
    assert statements
    for statement in statements:
        for part in sqlglot.parse(statement, read="tsql"):
            assert part is not None
            understood = not isinstance(part, exp.Command) or re.match(
                r"(EXEC|SET IDENTITY_INSERT)\b", part.sql("tsql"), re.IGNORECASE
            )
            assert understood, statement


def of_the_storage() -> set[type]:
    """Return the classes that are made with an engine."""
    modules = [
        import_module(found.name)
        for found in pkgutil.iter_modules(storage.__path__, f"{storage.__name__}.")
    ]
    return {
        kind
        for module in modules
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if kind.__module__ == module.__name__ and "engine" in inspect.signature(kind).parameters
    }


def test_every_method_is_called_here() -> None:
    assert CALLS.keys() == of_the_storage()
    for kind, calls in CALLS.items():
        methods = {name for name, found in vars(kind).items() if callable(found) and name[0] != "_"}
        assert set(calls) == methods - SILENT, kind


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        pytest.param(kind, method, id=f"{kind.__name__}.{method}")
        for kind, calls in CALLS.items()
        for method in calls
    ],
)
def test_each_statement_is_t_sql(server: tuple[Engine, Asked], kind: type, method: str) -> None:
    engine, asked = server
    tables = store_of(engine).tables
    CALLS[kind][method](kind(engine, tables.beat if kind is Runs else tables))
    check(asked)


@pytest.mark.parametrize("changes", [0])
def test_a_relays_first_sign_of_life_is_t_sql(server: tuple[Engine, Asked]) -> None:
    engine, asked = server
    RELAYS["seen"](Relays(engine, store_of(engine).tables))
    assert [statement.split()[0] for statement in asked] == ["UPDATE", "INSERT"]
    check(asked)


@pytest.mark.parametrize("dialect", ["mssql", "mysql", "mariadb"])
def test_the_script_is_understood(dialect: str) -> None:
    """P18."""
    script = schema.script(Tables(prefix="x_"), dialect)
    parsed = sqlglot.parse(script, read="tsql" if dialect == "mssql" else "mysql")
    kinds = [type(part) for part in parsed if part is not None]
    assert kinds.count(exp.Create) == 13
    assert kinds.count(exp.Insert) == 1
    assert len(kinds) == 14


def test_a_claim_locks_what_it_takes_and_passes_over_what_is_locked(
    server: tuple[Engine, Asked],
) -> None:
    """P6."""
    engine, asked = server
    assert len(store_of(engine).claim(5, 60).rows) == 2
    _, in_order, others = asked
    for statement in (in_order, others):
        assert "WITH (UPDLOCK, ROWLOCK, READPAST, READCOMMITTEDLOCK)" in statement
        assert "OUTPUT inserted.id" in statement
        assert "sysutcdatetime()" in statement
    assert others.count("READPAST") == 2
    assert "SELECT TOP" in others


def test_what_is_deleted_is_looked_up(server: tuple[Engine, Asked]) -> None:
    engine, asked = server
    store_of(engine).settle(BATCH, Settlement(confirmed=list(range(3000))))
    (statement,) = asked
    assert "WITH (ROWLOCK, FORCESEEK)" in statement
    assert "openjson(?)" in statement


def test_who_does_not_get_the_lock_does_not_receive(server: tuple[Engine, Asked]) -> None:
    """P13: asked for without waiting, after the transaction has begun and before the row."""
    engine, asked = server
    STORE["receive"](store_of(engine))
    first, lock, insert = asked
    assert first.startswith("SELECT TOP")
    assert "sp_getapplock" in lock
    assert "@LockOwner = 'Transaction'" in lock
    assert insert.startswith("INSERT INTO")


def test_a_database_without_row_versions_is_refused(
    server: tuple[Engine, Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = server
    with pytest.raises(ConfigurationError, match="READ_COMMITTED_SNAPSHOT ON"):
        dialect_for("mssql").check(engine)
