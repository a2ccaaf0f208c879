"""Table `worker`: what a durable task costs a worker, beside the same task with Celery alone.

Beside both, but for ``--quick``, is the least that a task can do by hand to tell a duplicate: it writes
its id into a table of its own, by SQLAlchemy and in its transaction, and keeps no outcome.

Each task writes one row and commits once. The messages wait in the queue before the worker is told
to consume it, so that nobody but the worker is measured. PostgreSQL counts the statements.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from celery import Celery
from kombu import Exchange, Queue
from sqlalchemy import Engine, create_engine, text

from benchmarks.figures import Contender, Figure, measure, print_table
from celery_outbox import Outbox
from tests.support.processes import Process
from tests.support.servers import Redis
from tests.support.waiting import wait_until

KINDS = {"plain": "plain", "by_hand": "by hand", "durable": "durable"}
POOLS = {"prefork": 2, "threads": 4}
TASKS = {"silent": "no result", "answering": "result in Redis"}
TITLE = "worker: from the queue to the commit and the ack; one row and one commit per task"

#: What the server needs for the counts; nothing is counted where a database does not ask for it.
SETTINGS = {
    "shared_preload_libraries": "pg_stat_statements",
    "pg_stat_statements.track": "none",
    "compute_query_id": "on",
}


class Bench:
    """A running worker of one kind and pool, its queue, and the tables that it writes."""

    def __init__(
        self, kind: str, pool: str, urls: dict[str, str], engine: Engine, *, counted: bool = False
    ) -> None:
        self.queue = f"{kind}.{pool}.counted" if counted else f"{kind}.{pool}"
        self.node = f"{self.queue}@bench"
        self._engine = engine
        self._app = Celery(self.queue, broker=urls["BROKER"], set_as_current=False)
        self._app.conf.task_ignore_result = True
        self._queue = Queue(self.queue, Exchange(self.queue), self.queue)
        environment = {f"BENCHMARK_{name}": url for name, url in urls.items()}
        environment |= {"BENCHMARK_KIND": kind, "BENCHMARK_QUEUE": self.queue}
        environment |= {"BENCHMARK_COUNTED": "1"} if counted else {}
        self.process = Process(
            [
                Path(sys.executable).with_name("celery"),
                "--app=benchmarks.worker_app",
                "worker",
                f"--pool={pool}",
                f"--concurrency={POOLS[pool]}",
                f"--hostname={self.node}",
                "--loglevel=WARNING",
                "--without-gossip",
                "--without-mingle",
                "--without-heartbeat",
            ],
            env={**environment, "C_FORCE_ROOT": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def wait_ready(self) -> None:
        """Return when the worker answers, and let it consume nothing."""
        # What is asked before the worker has its queue for it is lost.
        wait_until(lambda: self._control("ping", 1.0), 60, self.node, 0.2)
        self._control("cancel_consumer", queue=self.queue)

    def fill(self, task: str, messages: int) -> None:
        """Empty the tables, and put messages into the queue, which nobody consumes."""
        self._control("cancel_consumer", queue=self.queue)
        with self._engine.begin() as connection:
            connection.execute(text("TRUNCATE effects, handled, worker_inbox"))
        with self._app.connection_for_write() as connection:
            producer = self._app.amqp.Producer(connection)
            self._queue(connection.default_channel).declare()
            for number in range(messages):
                self._app.send_task(
                    f"benchmarks.{task}", (number, "x" * 190), queue=self._queue, producer=producer
                )
            wait_until(lambda: self._waiting(connection) == messages, 30, "messages in the queue")
        with self._engine.begin() as connection:
            connection.execute(text("SELECT pg_stat_statements_reset()"))

    def work(self, messages: int) -> None:
        """Let the worker consume until the last task has committed."""
        self._control("add_consumer", queue=self.queue)
        with self._engine.connect() as connection:
            connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            count = text("SELECT count(*) FROM effects")
            wait_until(
                lambda: connection.execute(count).scalar_one() == messages, 120, self.node, 0.01
            )

    def counts(self, messages: int) -> dict[str, float]:
        """Return what the tasks since `fill` have asked of the database: statement → times per task."""
        with self._engine.connect() as connection:
            rows = connection.execute(
                text(
                    "SELECT query, sum(calls) FROM pg_stat_statements"
                    " JOIN pg_database ON dbid = oid AND datname = current_database()"
                    " GROUP BY query ORDER BY 2 DESC"
                )
            )
            return {str(query): int(calls) / messages for query, calls in rows}

    def has_committed(self, messages: int) -> bool:
        """Whether PostgreSQL has counted the commits of that many tasks since `fill`."""
        return self.counts(messages).get("COMMIT") == 1

    def _waiting(self, connection: Any) -> int:
        return int(self._queue(connection.default_channel).queue_declare(passive=True)[1])

    def _control(self, command: str, timeout: float = 10.0, **arguments: Any) -> Any:
        return self._app.control.broadcast(
            command, arguments, destination=[self.node], reply=True, timeout=timeout, limit=1
        )


def table(database_url: str, broker_url: str, *, quick: bool) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    messages, rounds = (200, 1) if quick else (1_500, 5)
    pools = ("prefork",) if quick else tuple(POOLS)
    kinds = [kind for kind in KINDS if not (quick and kind == "by_hand")]
    with Redis() as redis:
        urls = {"DATABASE": database_url, "BROKER": broker_url, "RESULTS": redis.url}
        engine = _prepared(database_url)
        benches = {
            (pool, kind): Bench(kind, pool, urls, engine) for pool in pools for kind in kinds
        }
        with _running(benches.values()):
            figures = measure(
                [
                    Contender(
                        f"{pool}, {TASKS[task]}: {KINDS[kind]}",
                        messages,
                        lambda bench=benches[pool, kind]: bench.work(messages),  # type: ignore[misc]
                        lambda bench=benches[pool, kind], task=task: bench.fill(task, messages),  # type: ignore[misc]
                    )
                    for pool in pools
                    for task in TASKS
                    for kind in kinds
                ],
                rounds,
            )
        counts = _counts(urls, engine, kinds)
    _print(figures, counts)
    return {
        "messages": messages,
        "figures": [figure.as_json() for figure in figures],
        "statements_per_task": counts,
    }


def _prepared(database_url: str) -> Engine:
    """Create the tables, and let PostgreSQL count what everybody but this process asks."""
    engine = create_engine(
        database_url, connect_args={"options": "-c pg_stat_statements.track=none"}
    )
    Outbox(Celery("tables", set_as_current=False), engine, prefix="worker_").create_schema()
    with engine.begin() as connection:
        connection.execute(
            text("CREATE TABLE effects (id serial PRIMARY KEY, number integer, text varchar)")
        )
        connection.execute(
            text("CREATE TABLE handled (task_id varchar PRIMARY KEY, handled_at timestamptz)")
        )
        connection.execute(text("CREATE EXTENSION pg_stat_statements"))
        name = database_url.rpartition("/")[2]
        connection.execute(text(f"ALTER DATABASE {name} SET pg_stat_statements.track = 'top'"))
    return engine


@contextmanager
def _running(benches: Iterable[Bench]) -> Iterator[None]:
    with ExitStack() as stack:
        for bench in benches:
            stack.enter_context(bench.process)
        for bench in benches:
            bench.wait_ready()
        yield


def _counts(
    urls: dict[str, str], engine: Engine, kinds: Iterable[str]
) -> dict[str, dict[str, float]]:
    """Return for each task and kind how often it asks which statement, whatever the pool."""
    benches = {kind: Bench(kind, "threads", urls, engine, counted=True) for kind in kinds}
    counts = {}
    with _running(benches.values()):
        for kind, bench in benches.items():
            # The first is for what is asked at a connection's first use.
            for task in ("silent", *TASKS):
                bench.fill(task, 50)
                bench.work(50)
                wait_until(partial(bench.has_committed, 50), 10, "the last commit's statistics")
                counts[f"{TASKS[task]}: {KINDS[kind]}"] = bench.counts(50)
    return counts


def _print(figures: list[Figure], counts: dict[str, dict[str, float]]) -> None:
    by_name = {figure.name: figure for figure in figures}
    rows = []
    for figure in figures:
        plain = by_name[figure.name.rpartition(": ")[0] + ": plain"]
        statements = counts[figure.name.partition(", ")[2]]
        rows.append(
            [
                figure.name,
                f"{figure.rate:,.0f}",
                f"{figure.times_as_fast_as(plain):.2f}",
                f"{sum(statements.values()):g}",
                f"{statements['COMMIT']:g}",
            ]
        )
    header = ["", "tasks/s", "x plain", "statements/task", "commits/task"]
    print_table(TITLE, header, rows)
