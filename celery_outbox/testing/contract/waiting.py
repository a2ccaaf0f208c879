"""Who waits for whom: the app's inserts for nobody, and nobody of the outbox for the app's inserts.

A statement that has to wait for a lock fails here after a second (`Database.impatient`), or at once
(`Database.never_waits`).
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, update

from celery_outbox.storage.administration import Administration, Selection
from celery_outbox.storage.rows import row_of
from celery_outbox.storage.store import Settlement, Store
from celery_outbox.testing.contract.database import Database
from celery_outbox.testing.contract.incoming import age, receive
from celery_outbox.testing.contract.outgoing import claim, envelope, ids, numbers, stage

KEYS = [chr(ord("a") + number // 10) + str(number % 10) for number in range(60)]


@contextmanager
def at_the_commit(engine: Engine, action: Callable[[], object]) -> Iterator[None]:
    """Let something happen while the next transaction is about to commit, with all its locks."""
    happened: list[bool] = []

    def listen(_connection: Any) -> None:
        if not happened:
            happened.append(True)
            action()

    event.listen(engine, "commit", listen)
    try:
        yield
    finally:
        event.remove(engine, "commit", listen)
    assert happened


@pytest.fixture
def app(store: Store, database: Database) -> Iterator[Store]:
    """The app's connections: never those of the transaction that is about to commit."""
    if not database.several_writers:
        pytest.skip("one writer at a time")
    engine = create_engine(store.engine.url, connect_args=database.impatient)
    yield Store(engine, store.tables)
    engine.dispose()


def insert_everywhere(app: Store) -> None:
    """Send in a transaction, before, between and behind the keys that are there; receive as well."""
    for key in ("", *KEYS, "zz"):
        stage(app, f"{key}+")
        assert receive(app, f"{key}+")
    stage(app, "+", ordering_key="k")


@pytest.mark.parametrize("stored", [0, 1, 5, 6, 40])
@pytest.mark.parametrize("ordering_key", [None, "k"])
def test_an_insert_does_not_wait_for_a_claim(
    store: Store, app: Store, stored: int, ordering_key: str | None
) -> None:
    """P4. With nothing to claim, with less than it would take, with as much and with more."""
    if stored:
        stage(store, *KEYS[:stored], ordering_key=ordering_key)
    with at_the_commit(store.engine, lambda: insert_everywhere(app)):
        claim(store, 5)


@pytest.mark.parametrize("outcome", ["confirmed", "kept", "retried", "released", "dead"])
def test_an_insert_does_not_wait_for_a_settlement(store: Store, app: Store, outcome: str) -> None:
    """P4."""
    stage(store, *KEYS[:40])
    batch = claim(store, 20)
    rows = numbers(batch)
    settlement = {
        "confirmed": Settlement(confirmed=rows),
        "kept": Settlement(kept=dict.fromkeys(rows, 9.0)),
        "retried": Settlement(retried=dict.fromkeys(rows, (9.0, "late"))),
        "released": Settlement(released=rows),
        "dead": Settlement(dead=dict.fromkeys(rows, "late")),
    }[outcome]
    with at_the_commit(store.engine, lambda: insert_everywhere(app)):
        assert store.settle(batch, settlement) == 0


def test_an_insert_does_not_wait_for_a_prune(store: Store, app: Store) -> None:
    """P4, P12."""
    for key in KEYS[:20]:
        receive(store, key)
    age(store, days=8)
    for key in KEYS[20:30]:
        receive(store, key)
    with at_the_commit(store.engine, lambda: insert_everywhere(app)):
        assert store.prune_inbox(86400) == 20


def test_an_insert_does_not_wait_for_a_task_that_is_about_to_commit(
    store: Store, app: Store
) -> None:
    """P4. Its transaction is the app's, with the locks of the app's isolation level."""
    stage(store, *KEYS[:20])
    with store.engine.connect() as connection, connection.begin():
        assert store.receive(connection, f"{KEYS[3]}:0:0:", "t", KEYS[3])
        store.stage(connection, [row_of(envelope("child"))])
        store.record(connection, f"{KEYS[3]}:0:0:", "SUCCESS", None, forget=True)
        assert store.forget(connection, "nobody") == 0
        insert_everywhere(app)


def test_an_insert_does_not_wait_for_an_operator(store: Store, app: Store) -> None:
    """P4, P18."""
    administration = Administration(store.engine, store.tables)
    stage(store, *KEYS[:40])
    with at_the_commit(store.engine, lambda: insert_everywhere(app)):
        assert next(administration.cancel(Selection(task_ids=KEYS[:20]))) == 20


@pytest.fixture
def slow(store: Store, app: Store) -> Iterator[None]:
    """A transaction of the app has sent, a task has begun, and neither ends before the test."""
    with app.engine.connect() as connection, connection.begin():
        app.stage(connection, [row_of(envelope("slow")), row_of(envelope("slower"))])
        assert app.receive(connection, "slow", "t", "slow")
        yield


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_relay_does_not_wait_for_the_app(store: Store, count: int) -> None:
    """P5, P6: small tables are read from end to end, if the database likes."""
    stage(store, *KEYS[:count])
    batch = claim(store)
    assert ids(batch) == KEYS[:count]
    assert store.renew(batch, 60) == count
    assert store.settle(batch, Settlement(released=numbers(batch))) == 0
    batch = claim(store)
    assert store.settle(batch, Settlement(confirmed=numbers(batch))) == 0
    for key in KEYS[:count]:
        receive(store, key)
    with store.engine.begin() as connection:
        for key in KEYS[:count]:
            inbox = store.tables.inbox
            old = update(inbox).where(inbox.c.key == key)
            connection.execute(old.values(handled_at=store.dialect.after(-100)))
    assert store.prune_inbox(50) == count


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("count", [1, 3, 40])
def test_an_operator_does_not_wait_for_the_app(store: Store, count: int) -> None:
    """P18."""
    administration = Administration(store.engine, store.tables)
    stage(store, *KEYS[:count])
    batch = claim(store)
    store.settle(batch, Settlement(dead=dict.fromkeys(numbers(batch), "x")))
    assert sum(administration.replay()) == count
    assert sum(administration.cancel(Selection(task_ids=KEYS))) == count


@pytest.mark.parametrize("senders", [1, 4])
def test_inserts_under_load_never_wait(store: Store, database: Database, senders: int) -> None:
    """P4, measured: a single connection has no patience at all, while two relays are at work.

    Of several the inserts may wait for one another, for a moment: where a page of InnoDB splits, the
    lock of a row that is not committed yet is handed on to the gap (`lock_rec_inherit_to_gap`), unless
    its transaction is READ COMMITTED, as the relay's are.
    """
    if database.never_waits is None:
        pytest.skip("it can't be told to wait for no time")
    patience = database.never_waits if senders == 1 else database.impatient
    engine = create_engine(store.engine.url, connect_args=patience)
    app = Store(engine, store.tables)
    relays = [Store(create_engine(store.engine.url), store.tables) for _ in range(2)]
    over = threading.Event()
    errors: list[BaseException] = []
    relayed: list[str] = []

    def noting(run: Callable[..., None], *args: Any) -> threading.Thread:
        def noted() -> None:
            try:
                run(*args)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=noted)
        thread.start()
        return thread

    def insert(name: str) -> None:
        for number in range(600 // senders):
            stage(app, *(f"{name}{number}-{part}" for part in range(1 + number % 4)))
            receive(app, f"{name}{number}")

    def relay(store: Store) -> None:
        while True:
            was_over = over.is_set()
            batch = claim(store, 50)
            confirmed, released = numbers(batch)[::2], numbers(batch)[1::2]
            store.settle(batch, Settlement(confirmed=confirmed, released=released))
            relayed.extend(row.task_id for row in batch.rows if row.id in set(confirmed))
            store.prune_inbox(0.0, chunk=5)
            if was_over and not batch.rows:
                return

    relaying = [noting(relay, store) for store in relays]
    inserting = [noting(insert, name) for name in "abcd"[:senders]]
    for thread in inserting:
        thread.join()
    over.set()
    for thread in relaying:
        thread.join()
    for each in (app, *relays):
        each.engine.dispose()
    assert [str(error)[:600] for error in errors] == []
    sent = senders * sum(1 + number % 4 for number in range(600 // senders))
    assert len(relayed) == len(set(relayed)) == sent
