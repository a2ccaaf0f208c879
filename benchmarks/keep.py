"""Table `keep`: could the kept row of the outbox be the proof that a task was handled?

What a task's transaction asks of the database, without Celery: one row of its own, and what tells a
duplicate from a first delivery. Each connection works through messages of its own.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from celery import Celery
from sqlalchemy import Connection, Engine, create_engine, text

from benchmarks.figures import Contender, measure, print_table
from celery_outbox import Outbox
from celery_outbox.envelope import Envelope
from celery_outbox.storage.rows import row_of
from celery_outbox.storage.store import Store

TITLE = "keep: the database's part of a task, without a stored result"
CONNECTIONS = 4

Handle = Callable[[Store, Connection, str], bool]


def table(database_url: str, _broker_url: str, *, quick: bool) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    messages, rounds = (500, 3) if quick else (4_000, 7)
    engine = create_engine(database_url, pool_size=CONNECTIONS)
    outbox = Outbox(Celery("keep", set_as_current=False), engine, prefix="keep_")
    outbox.create_schema()
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE keep_effects (id serial PRIMARY KEY, key varchar)"))
    keys = [f"{number:032x}:0:0:" for number in range(messages)]
    ways: dict[str, tuple[Handle, bool]] = {
        "inbox row, nothing kept": (partial(_with_inbox, forget=False), False),
        "inbox row, kept row deleted": (partial(_with_inbox, forget=True), True),
        "kept row alone is the proof": (_with_kept_row, True),
    }
    figures = measure(
        [
            Contender(
                name,
                messages,
                partial(_handle_all, outbox.store, handle, keys),
                partial(_fill, outbox.store, keys if kept else []),
            )
            for name, (handle, kept) in ways.items()
        ],
        rounds,
    )
    engine.dispose()
    today = figures[1]
    rows = [[f.name, f"{f.rate:,.0f}", f"{f.times_as_fast_as(today):.2f}"] for f in figures]
    print_table(TITLE, ["", "tasks/s", "x kept row deleted"], rows)
    return {"messages": messages, "figures": [figure.as_json() for figure in figures]}


def _with_inbox(store: Store, connection: Connection, key: str, *, forget: bool) -> bool:
    if not store.receive(connection, key, "shop.notify", "id"):
        return False
    _take_effect(connection, key)
    store.record(connection, key, "SUCCESS", None, forget=forget)
    return True


def _with_kept_row(store: Store, connection: Connection, key: str) -> bool:
    if not store.forget(connection, key):
        return False
    _take_effect(connection, key)
    return True


def _take_effect(connection: Connection, key: str) -> None:
    connection.execute(text("INSERT INTO keep_effects (key) VALUES (:key)"), {"key": key})


def _fill(store: Store, keys: Sequence[str]) -> None:
    """Empty the tables, and keep a message for each key."""
    with store.engine.begin() as connection:
        connection.execute(text("TRUNCATE keep_effects, keep_inbox, keep_outbox"))
        if keys:
            rows = [dict(row_of(_envelope(key))) for key in keys]
            store.stage(connection, rows)
    _vacuum(store.engine)


def _vacuum(engine: Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE keep_outbox"))


def _envelope(key: str) -> Envelope:
    return Envelope(
        task="shop.notify",
        task_id=key.partition(":")[0],
        key=key,
        body=b"x" * 200,
        is_text=False,
        content_type="application/json",
        content_encoding="utf-8",
        priority=0,
        headers={"id": key},
        properties={"delivery_mode": 2},
        exchange="",
        routing_key="celery",
        mandatory=True,
    )


def _handle_all(store: Store, handle: Handle, keys: Sequence[str]) -> None:
    def work(own: Sequence[str]) -> None:
        with store.engine.connect() as connection:
            for key in own:
                with connection.begin():
                    assert handle(store, connection, key)

    threads = [
        threading.Thread(target=work, args=[keys[n::CONNECTIONS]]) for n in range(CONNECTIONS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
