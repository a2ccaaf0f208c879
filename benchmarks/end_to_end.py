"""Table `end_to_end`: from the commit of who sends to the commit of the task; one row per task.

Stock Celery publishes after the commit, and acknowledges late; procrastinate has no broker. Beforehand:
the transactions of five hundred tasks are there before relay or worker may go on; their processes have
started, and connected. Meanwhile: transactions of ten are sent by one process, as fast as it can.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celery import Celery
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from benchmarks.effects_app import EFFECTS, TASK, make_app
from benchmarks.figures import Contender, Figure, chart, measure, print_table
from benchmarks.local import procrastinate_worker
from benchmarks.peers.procrastinate_queue import QUEUE, Procrastinate
from celery_outbox.plugin import outbox_of
from tests.support.processes import Process, celery_worker, outbox_relay
from tests.support.waiting import wait_until

MODULE = "benchmarks.effects_app"
TITLE = "end_to_end: from the sender's commit to the task's; PostgreSQL, RabbitMQ, four slots"
STOCK = "stock Celery, after the commit"
OURS = "celery_outbox, relay daemon"
PEER = "procrastinate, 4 threads"
BEFOREHAND, MEANWHILE = "sent beforehand", "sent meanwhile"
#: What the app itself writes, and how much it gives each task to carry.
ORDER = text("INSERT INTO orders DEFAULT VALUES")
FILLING = "x" * 190


@dataclass(frozen=True)
class Way:
    """How a transaction with some tasks is committed, and who takes them from there."""

    name: str
    commit: Callable[[Sequence[int]], None]
    #: Who takes the first step after the commit.
    taker: Process


def table(database_url: str, broker_url: str, *, quick: bool) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    messages, rounds = (300, 1) if quick else (3_000, 5)
    engine = create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE orders (id serial PRIMARY KEY)"))
        connection.execute(text(EFFECTS))
    with _ways(database_url, broker_url) as ways:
        figures = measure(
            [
                contender
                for way in ways
                for contender in (
                    _beforehand(way, engine, messages),
                    _meanwhile(way, engine, messages),
                )
            ],
            rounds,
        )
    _print(figures)
    return {
        "messages": messages,
        "figures": [figure.as_json() for figure in figures],
        "charts": _charts(figures),
    }


@contextmanager
def _ways(database_url: str, broker_url: str) -> Iterator[list[Way]]:
    """Start everybody; return when each has handled a first task."""
    peer = Procrastinate(database_url)
    environment = {"BENCHMARK_DATABASE": database_url, "BENCHMARK_BROKER": broker_url}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(peer.close)

        def worker(kind: str) -> Process:
            # What is logged of each task costs time.
            options = ["--concurrency=4", "--loglevel=WARNING", "--without-heartbeat"]
            variables = {**environment, "BENCHMARK_KIND": kind}
            started = celery_worker(MODULE, folder, variables, *options, ready_timeout=None)
            return stack.enter_context(started)

        durable = make_app("durable", database_url, broker_url)
        outbox_of(durable).create_schema()
        worker("durable")
        relay = outbox_relay(MODULE, folder, {**environment, "BENCHMARK_KIND": "durable"})
        ways = [
            Way(STOCK, _after_commit(database_url, broker_url), worker("stock")),
            Way(OURS, _in_transaction(durable), stack.enter_context(relay)),
            Way(
                PEER,
                _deferred(peer, database_url),
                stack.enter_context(Process(procrastinate_worker(QUEUE), env=environment)),
            ),
        ]
        engine = create_engine(database_url)
        for way in ways:
            _clear(engine)
            way.commit([0])
            _await_effects(engine, 1, way)
        yield ways


def _after_commit(database_url: str, broker_url: str) -> Callable[[Sequence[int]], None]:
    engine = create_engine(database_url)
    task = make_app("stock", database_url, broker_url).tasks[TASK]

    def commit(numbers: Sequence[int]) -> None:
        with Session(engine) as session, session.begin():
            session.execute(ORDER)
        for number in numbers:
            task.delay(number, FILLING)

    return commit


def _in_transaction(app: Celery) -> Callable[[Sequence[int]], None]:
    engine, task = outbox_of(app).engine, app.tasks[TASK]

    def commit(numbers: Sequence[int]) -> None:
        with Session(engine) as session, session.begin():
            session.execute(ORDER)
            for number in numbers:
                task.delay(number, FILLING)

    return commit


def _deferred(peer: Procrastinate, database_url: str) -> Callable[[Sequence[int]], None]:
    engine = create_engine(database_url)

    def commit(numbers: Sequence[int]) -> None:
        with Session(engine) as session, session.begin():
            session.execute(ORDER)
            for number in numbers:
                peer.defer(session, number, FILLING)

    return commit


def _beforehand(way: Way, engine: Engine, messages: int) -> Contender:
    def prepare() -> None:
        way.taker.pause()
        _send(way, messages, 500)
        _clear(engine)

    def run() -> None:
        way.taker.resume()
        _await_effects(engine, messages, way)

    return Contender(f"{BEFOREHAND}: {way.name}", messages, run, prepare)


def _meanwhile(way: Way, engine: Engine, messages: int) -> Contender:
    def run() -> None:
        _send(way, messages, 10)
        _await_effects(engine, messages, way)

    return Contender(f"{MEANWHILE}: {way.name}", messages, run, lambda: _clear(engine))


def _send(way: Way, messages: int, size: int) -> None:
    for begin in range(0, messages, size):
        way.commit(range(begin, min(begin + size, messages)))


def _clear(engine: Engine) -> None:
    """Forget what was done, and let the planner know what is to be done."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("TRUNCATE effects"))
        connection.execute(text("VACUUM ANALYZE"))


def _await_effects(engine: Engine, messages: int, way: Way) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        count = text("SELECT count(*) FROM effects")

        def all_there() -> bool:
            return bool(connection.execute(count).scalar_one() == messages)

        wait_until(all_there, 120, f"{messages} effects\n{way.taker.tail()}", 0.01)


def _print(figures: Sequence[Figure]) -> None:
    by_name = {figure.name: figure for figure in figures}
    rows = []
    for case in (BEFOREHAND, MEANWHILE):
        stock, peer = by_name[f"{case}: {STOCK}"], by_name[f"{case}: {PEER}"]
        for figure in figures:
            if figure.name.startswith(case):
                ratios = [f"{figure.times_as_fast_as(other):.2f}" for other in (stock, peer)]
                rows.append([figure.name, f"{figure.rate:,.0f}", *ratios])
    print_table(TITLE, ["", "tasks/s", "x stock", "x procrastinate"], rows)


def _charts(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    return [
        chart(
            f"From the sender's commit to the task's, {case}",
            "tasks/s",
            [
                (name, figure.rate, "ours" if name == OURS else "others")
                for figure in figures
                for of_case, name in [figure.name.split(": ", 1)]
                if of_case == case
            ],
        )
        for case in (BEFOREHAND, MEANWHILE)
    ]
