"""Table `scale`: several relays on one table, many rows that wait or are scheduled, an old snapshot.

A claim takes 500 rows. The rows have bodies of 300 B, and are written by the database itself. The app's
inserts go on while the relays work; a lock that they would wait for is seen in pg_stat_activity.
"""

import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from threading import Event, Thread
from typing import Any

from celery import Celery
from sqlalchemy import Engine, create_engine, text

from benchmarks.figures import chart, print_table
from benchmarks.reference import empty_queue
from celery_outbox import Outbox, durable_task
from celery_outbox.storage.store import Settlement

QUEUE = "bench"
PREFIX = "scale_"
BATCH = 500
RELAYS = (1, 2, 4)
TITLE = "scale: claims of 500 rows, their settlement, and several relays on one table"

#: One stored message, as many times over: each a microsecond after the one before, `age` ago.
_COPIES = text(
    f"""
    INSERT INTO {PREFIX}outbox
        (key, task, task_id, destination, body, message, attempts, created_at, available_at)
    SELECT key || n, task, task_id, destination, body, message, 0, stored, stored
    FROM {PREFIX}template, generate_series(1, :count) AS n,
        LATERAL (SELECT now() + make_interval(secs => :age) + n * interval '1 microsecond') AS t(stored)
    """
)


def table(database_url: str, broker_url: str, *, quick: bool) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    waiting, scheduled, claims = (50_000, 20_000, 20) if quick else (10_000_000, 1_000_000, 200)
    outbox = _prepared(database_url, broker_url)
    rows: list[list[str]] = []
    report: dict[str, Any] = {
        "waiting": waiting,
        "scheduled": scheduled,
        "claims": [],
        "relays": [],
    }

    def claims_of(name: str, count: int = claims) -> None:
        figures = _claims(outbox, count)
        report["claims"].append({"name": name, **figures})
        rows.append([name, *(f"{figures[each]:.1f}" for each in ("claim_ms", "settle_ms"))])

    _load(outbox, BATCH * (claims + 1))
    claims_of(f"{BATCH * claims:,} rows wait")
    _load(outbox, waiting, scheduled)
    claims_of(f"{waiting:,} rows wait, {scheduled:,} are scheduled")
    with _old_snapshot(outbox.engine):
        for part in range(1, 4):
            claims_of(f"... behind an old snapshot, after {part * claims} claims")
    print_table(TITLE, ["", "claim, ms", "settle, ms"], rows)
    for count in RELAYS[:2] if quick else RELAYS:
        report["relays"].append(_relays(outbox, database_url, broker_url, count, quick=quick))
    _print_relays(report["relays"])
    report["charts"] = _charts(report)
    return report


def _charts(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        chart(
            "A claim of 500 rows",
            "ms, median",
            [(each["name"], each["claim_ms"], "ours") for each in report["claims"]],
            digits=1,
        ),
        chart(
            "Several relays on one table",
            "messages/s",
            [
                (f"{each['relays']} relay(s)", each["messages_per_second"], "ours")
                for each in report["relays"]
            ],
        ),
    ]


def _print_relays(relays: list[dict[str, Any]]) -> None:
    print_table(
        "several relays: processes on one table; the app inserts one row a transaction meanwhile",
        ["", "messages/s", "twice", "inserts", "insert, ms", "p99", "lock waits"],
        [
            [
                f"{each['relays']} relay(s)",
                f"{each['messages_per_second']:,.0f}",
                f"{each['twice']}",
                f"{each['inserts']:,}",
                f"{each['insert_ms']:.1f}",
                f"{each['insert_p99_ms']:.1f}",
                f"{each['lock_waits']}",
            ]
            for each in relays
        ],
    )


def _outbox(database_url: str, broker_url: str) -> Outbox:
    app = Celery("scale", broker=broker_url, set_as_current=False)
    app.conf.update(task_default_queue=QUEUE, task_ignore_result=True, outbox_batch_size=BATCH)
    return Outbox(app, create_engine(database_url), prefix=PREFIX)


def _prepared(database_url: str, broker_url: str) -> Outbox:
    outbox = _outbox(database_url, broker_url)
    outbox.create_schema()

    @durable_task(app=outbox.app, name="benchmarks.task")
    def task(number: int, text: str) -> None: ...

    with outbox.engine.begin():
        task.delay(1, "x" * 190)
    with outbox.engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE TABLE {PREFIX}template AS TABLE {PREFIX}outbox")
    return outbox


def _load(outbox: Outbox, waiting: int, scheduled: int = 0) -> None:
    """Let so many rows wait, and others be due tomorrow; with statistics, and no dead rows."""
    with outbox.engine.begin() as connection:
        connection.execute(text(f"TRUNCATE {PREFIX}outbox"))
        connection.execute(_COPIES, {"count": waiting, "age": -3600})
        if scheduled:
            connection.execute(_COPIES, {"count": scheduled, "age": 86_400})
    with outbox.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(
            f"VACUUM ANALYZE {PREFIX}outbox"
        )


def _claims(outbox: Outbox, count: int) -> dict[str, float]:
    """Claim and settle pages; return the medians, in milliseconds."""
    claimed, settled = [], []
    for _ in range(count):
        start = time.perf_counter()
        batch = outbox.store.claim(BATCH, 60)
        middle = time.perf_counter()
        assert len(batch.rows) == BATCH, f"{len(batch.rows)} rows claimed"
        outbox.store.settle(batch, Settlement(confirmed=[row.id for row in batch.rows]))
        claimed.append(middle - start)
        settled.append(time.perf_counter() - middle)
    return {
        "claim_ms": statistics.median(claimed) * 1e3,
        "settle_ms": statistics.median(settled) * 1e3,
    }


@contextmanager
def _old_snapshot(engine: Engine) -> Iterator[None]:
    """As a report holds it: until it ends, no dead row goes away."""
    with engine.connect() as connection:
        connection = connection.execution_options(isolation_level="REPEATABLE READ")
        connection.exec_driver_sql(f"SELECT count(*) FROM {PREFIX}template")
        yield


def _relays(
    outbox: Outbox, database_url: str, broker_url: str, count: int, *, quick: bool
) -> dict[str, Any]:
    """Empty the table by several processes, while the app inserts."""
    messages = 6_000 if quick else 100_000
    _load(outbox, messages)
    empty_queue(broker_url, QUEUE)
    stop, inserted = Event(), list[float]()
    waits: list[int] = []
    threads = [
        Thread(target=_insert, args=(outbox.engine, stop, inserted)),
        Thread(target=_watch, args=(outbox.engine, stop, waits)),
    ]
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:
        list(pool.map(_warm_up, [(database_url, broker_url)] * count * 4))
        for thread in threads:
            thread.start()
        start = time.perf_counter()
        confirmed = list(pool.map(_relay, [(database_url, broker_url)] * count))
        seconds = time.perf_counter() - start
        stop.set()
        for thread in threads:
            thread.join()
    with outbox.engine.connect() as connection:
        left = connection.execute(text(f"SELECT count(*) FROM {PREFIX}outbox")).scalar_one()
    inserted.sort()
    return {
        "relays": count,
        "messages_per_second": sum(confirmed) / seconds,
        "twice": sum(confirmed) + left - messages - len(inserted),
        "inserts": len(inserted),
        "insert_ms": statistics.median(inserted) * 1e3,
        "insert_p99_ms": inserted[int(len(inserted) * 0.99)] * 1e3,
        "lock_waits": sum(waits),
    }


_here: Outbox | None = None


def _warm_up(urls: tuple[str, str]) -> None:
    """Connect, so that processes that start late are not measured."""
    global _here
    if _here is None:
        _here = _outbox(*urls)
        _here.relay()
        with _here.engine.connect() as connection:
            connection.execute(text("SELECT 1"))
    time.sleep(0.1)


def _relay(urls: tuple[str, str]) -> int:
    _warm_up(urls)
    assert _here is not None
    return _here.relay_all().confirmed


def _insert(engine: Engine, stop: Event, seconds: list[float]) -> None:
    """Insert rows that are not due while the relays work, one a transaction."""
    while not stop.is_set():
        start = time.perf_counter()
        with engine.begin() as connection:
            connection.execute(text("SET LOCAL lock_timeout = '5s'"))
            connection.execute(_COPIES, {"count": 1, "age": 86_400})
        seconds.append(time.perf_counter() - start)
        stop.wait(0.005)


def _watch(engine: Engine, stop: Event, waits: list[int]) -> None:
    """Count the inserts that wait for a row or a transaction of somebody else."""
    waiting = text(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE wait_event IN ('transactionid', 'tuple') AND query ~ 'INSERT'"
    )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while not stop.wait(0.01):
            waits.append(connection.execute(waiting).scalar_one())
