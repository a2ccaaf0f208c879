"""Table `after_commit`: from the commit to the execution, by the process that sent or by a relay.

The worker's task is a plain one everywhere, so that only the way to the broker differs. Stock Celery
publishes after the commit and without confirms, which loses what a crash or a broker's absence comes
between; it is the limit.
"""

import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from celery import Celery
from sqlalchemy import create_engine, delete, func, insert, select
from sqlalchemy.orm import sessionmaker

from benchmarks.figures import Contender, Figure, measure, print_table
from benchmarks.reference import empty_queue
from benchmarks.send import Base, Order
from celery_outbox import Outbox
from tests.support.processes import Process
from tests.support.waiting import wait_until

TITLE = "after_commit: from the commit to the execution"
COST_TITLE = "after_commit: what it costs the process that sends (commit included)"
QUEUE = "after_commit"
SIZES = (1, 10, 100)
#: Messages per second under load.
RATE = 500


class Way:
    """One way to the broker: how a transaction with some tasks in it is committed."""

    def __init__(self, name: str, database_url: str, broker_url: str, kind: str) -> None:
        self.name = name
        self.engine = create_engine(database_url)
        self._session = sessionmaker(self.engine)
        app = Celery(kind, broker=broker_url, set_as_current=False)
        app.conf.update(
            task_default_queue=QUEUE,
            task_ignore_result=True,
            outbox_capture="all",
            outbox_relay_tick_seconds=0,
            outbox_publish_after_commit=kind == "fast",
        )
        self.outbox = None if kind == "stock" else Outbox(app, self._session, prefix=f"{kind}_")
        if self.outbox is not None:
            self.outbox.create_schema()

        @app.task(name="benchmarks.arrived", shared=False)
        def arrived(number: int) -> None: ...

        self._send = arrived.delay

    def commit(self, numbers: Sequence[int]) -> float:
        """Commit one transaction with these tasks; return when it had committed."""
        with self._session.begin() as session:
            session.execute(insert(Order).values(cents=1))
            if self.outbox is not None:
                for number in numbers:
                    self._send(number)
        committed = time.monotonic()
        if self.outbox is None:
            for number in numbers:
                self._send(number)
        return committed

    def waiting(self) -> int:
        """Return how many messages the outbox holds."""
        if self.outbox is None:
            return 0
        with self.engine.connect() as connection:
            count = select(func.count()).select_from(self.outbox.tables.outbox)
            return int(connection.execute(count).scalar_one())

    def clear(self) -> None:
        """Delete what is left."""
        if self.outbox is not None:
            with self.engine.begin() as connection:
                connection.execute(delete(self.outbox.tables.outbox))

    def close(self) -> None:
        """End its thread."""
        if self.outbox is not None:
            self.outbox.fast_path.stop()


class Arrivals:
    """When each task was executed, as the worker tells."""

    def __init__(self, path: Path) -> None:
        self.times: dict[int, float] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        threading.Thread(target=self._hear, daemon=True).start()

    def _hear(self) -> None:
        while True:
            number, at = self._socket.recv(100).split()
            self.times[int(number)] = float(at)


def table(database_url: str, broker_url: str, *, quick: bool) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    ways = [
        Way("stock Celery, after the commit", database_url, broker_url, "stock"),
        Way("relay daemon", database_url, broker_url, "daemon"),
        Way("after the commit, by the sender", database_url, broker_url, "fast"),
    ]
    Base.metadata.create_all(ways[0].engine)
    idle, seconds = (50, 2) if quick else (300, 10)
    with _running(database_url, broker_url) as arrivals:
        latencies = {
            "idle": _latencies(ways, arrivals, lambda way: _one_by_one(way, arrivals, idle)),
            f"{RATE} messages/s": _latencies(
                ways, arrivals, lambda way: _steadily(way, arrivals, seconds)
            ),
        }
    figures = _costs(ways, broker_url, quick=quick)
    for way in ways:
        way.close()
    _print(latencies, figures)
    return {
        "latency_seconds": latencies,
        "cost": {str(size): [each.as_json() for each in figures[size]] for size in SIZES},
    }


@contextmanager
def _running(database_url: str, broker_url: str) -> Iterator[Arrivals]:
    """Run a worker and a relay; what the worker executes is told to the arrivals."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "arrivals"
        arrivals = Arrivals(path)
        environment = {
            "BENCHMARK_DATABASE": database_url,
            "BENCHMARK_BROKER": broker_url,
            "BENCHMARK_SOCKET": str(path),
            "C_FORCE_ROOT": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        celery = [Path(sys.executable).with_name("celery"), "--app=benchmarks.after_commit_app"]
        worker = [*celery, "worker", "--pool=solo", f"--queues={QUEUE}", "--loglevel=INFO"]
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        with (
            Process([*worker, *quiet], env=environment) as at_work,
            Process([*celery, "outbox", "relay"], env=environment) as relay,
        ):
            at_work.wait_for_log("ready", 60)
            relay.wait_for_log("ready", 60)
            yield arrivals


def _latencies(
    ways: Sequence[Way], arrivals: Arrivals, send: Callable[[Way], list[float]]
) -> dict[str, dict[str, float]]:
    found = {}
    for way in ways:
        # The first is for the connections.
        _one_by_one(way, arrivals, 3)
        taken = send(way)
        found[way.name] = {"median": median(taken), "p99": quantiles(taken, n=100)[98]}
    return found


def _one_by_one(way: Way, arrivals: Arrivals, count: int) -> list[float]:
    taken = []
    for _ in range(count):
        number = len(arrivals.times)
        committed = way.commit([number])
        wait_until(lambda number=number: number in arrivals.times, 30, "arrival", 0.001)  # type: ignore[misc]
        taken.append(arrivals.times[number] - committed)
        # Not in step with anybody's polling.
        time.sleep(0.02 + (number % 7) * 0.005)
    return taken


def _steadily(way: Way, arrivals: Arrivals, seconds: float) -> list[float]:
    first = len(arrivals.times)
    committed = {}
    begun = time.monotonic()
    for number in range(int(seconds * RATE)):
        time.sleep(max(0.0, begun + number / RATE - time.monotonic()))
        committed[first + number] = way.commit([first + number])
    last = first + len(committed)
    wait_until(lambda: len(arrivals.times) >= last, 60, "all arrivals")
    return [arrivals.times[number] - at for number, at in committed.items()]


def _costs(ways: Sequence[Way], broker_url: str, *, quick: bool) -> dict[int, list[Figure]]:
    transactions, rounds = (100, 3) if quick else (400, 5)

    def work(way: Way, size: int, count: int) -> None:
        for _ in range(count):
            way.commit(range(size))

    def clear() -> None:
        for way in ways:
            if way.outbox is not None and way.outbox.config.publish_after_commit:
                # Its thread is still at it.
                wait_until(lambda way=way: way.outbox.store.counts()["in_flight"] == 0, 30)  # type: ignore[misc]
            way.clear()
        empty_queue(broker_url, QUEUE)

    found = {}
    for size in SIZES:
        count = max(transactions // size, 10)
        contenders = [
            Contender(
                way.name,
                count * size,
                lambda way=way, size=size, count=count: work(way, size, count),  # type: ignore[misc]
                clear,
            )
            for way in ways
        ]
        found[size] = measure(contenders, rounds)
    return found


def _print(
    latencies: dict[str, dict[str, dict[str, float]]], figures: dict[int, list[Figure]]
) -> None:
    rows = []
    for load, by_way in latencies.items():
        stock = next(iter(by_way.values()))
        for name, taken in by_way.items():
            rows.append(
                [
                    f"{load}: {name}",
                    f"{taken['median'] * 1e3:.1f}",
                    f"{taken['p99'] * 1e3:.1f}",
                    f"{(taken['median'] - stock['median']) * 1e3:+.1f}",
                ]
            )
    print_table(TITLE, ["", "median ms", "p99 ms", "above stock, ms"], rows)
    rows = []
    for size, each in figures.items():
        for figure in each:
            rows.append(
                [
                    f"{size:>3} per transaction: {figure.name}",
                    f"{figure.seconds * 1e6:,.0f}",
                    f"{figure.cpu_seconds * 1e6:,.0f}",
                    f"{1 / figure.times_as_fast_as(each[0]):.2f}",
                ]
            )
    print_table(COST_TITLE, ["", "us/message", "CPU us/message", "x stock Celery"], rows)
