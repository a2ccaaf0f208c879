"""Table `after_commit`: what it costs the process that sends to publish after its commits.

Stock Celery publishes after the commit and without confirms, which loses what a crash or a broker's
absence comes between; it is the limit. How soon a message arrives is told by table `latency`.
"""

from collections.abc import Sequence
from typing import Any

from celery import Celery
from sqlalchemy import create_engine, delete, insert
from sqlalchemy.orm import sessionmaker

from benchmarks.figures import Contender, Figure, measure, print_table
from benchmarks.reference import empty_queue
from benchmarks.send import Base, Order
from celery_outbox import Outbox
from tests.support.waiting import wait_until

TITLE = "after_commit: what it costs the process that sends (commit included)"
QUEUE = "after_commit"
SIZES = (1, 10, 100)


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

    def commit(self, numbers: Sequence[int]) -> None:
        """Commit one transaction with these tasks."""
        with self._session.begin() as session:
            session.execute(insert(Order).values(cents=1))
            if self.outbox is not None:
                for number in numbers:
                    self._send(number)
        if self.outbox is None:
            for number in numbers:
                self._send(number)

    def clear(self) -> None:
        """Delete what is left."""
        if self.outbox is not None:
            with self.engine.begin() as connection:
                connection.execute(delete(self.outbox.tables.outbox))

    def close(self) -> None:
        """End its thread."""
        if self.outbox is not None:
            self.outbox.fast_path.stop()


def table(database_url: str, broker_url: str, *, quick: bool) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    ways = [
        Way("stock Celery, after the commit", database_url, broker_url, "stock"),
        Way("by a relay", database_url, broker_url, "daemon"),
        Way("after the commit, by the sender", database_url, broker_url, "fast"),
    ]
    Base.metadata.create_all(ways[0].engine)
    figures = _costs(ways, broker_url, quick=quick)
    for way in ways:
        way.close()
    _print(figures)
    return {"cost": {str(size): [each.as_json() for each in figures[size]] for size in SIZES}}


def _costs(ways: Sequence[Way], broker_url: str, *, quick: bool) -> dict[int, list[Figure]]:
    transactions, rounds = (60, 2) if quick else (400, 5)

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


def _print(figures: dict[int, list[Figure]]) -> None:
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
    print_table(TITLE, ["", "us/message", "CPU us/message", "x stock Celery"], rows)
