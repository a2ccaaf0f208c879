"""Table `local`: how fast a worker empties a local queue, beside procrastinate's.

Each task writes one row. All messages are there before the worker starts; the time is that from the
first effect to the last one, as the database's clock has stamped them, so that no start counts.
procrastinate keeps no record of what it has handled: a task whose worker is killed has run, perhaps,
and runs again. A line more is for the same queue with workers that are killed at random.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, text

from benchmarks.figures import Figure, print_table
from benchmarks.peers.procrastinate_queue import QUEUE
from tests.support.guardian import family
from tests.support.processes import Process
from tests.support.waiting import wait_until

TITLE = "local: a local queue, from the first commit of a task to the last; one row per task"
KILLED = "celery_outbox, 2 x prefork 4, killed at random"


@dataclass(frozen=True)
class Contender:
    """Who empties a queue: how it is filled, and its workers' command."""

    name: str
    fill: Sequence[str]
    worker: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


_LOCAL = {"BENCHMARK_KIND": "durable", "BENCHMARK_BROKER": "outbox://"}


def _celery(*options: str) -> list[str]:
    program = str(Path(sys.executable).with_name("celery"))
    return [program, "--app=benchmarks.effects_app", "worker", "--loglevel=ERROR", *options]


def procrastinate_worker(queue: str) -> list[str]:
    """Return the command that works off a queue of `effects_procrastinate`."""
    program = str(Path(sys.executable).with_name("procrastinate"))
    app = "--app=benchmarks.effects_procrastinate.app"
    options = ["--concurrency=4", f"--queues={queue}", "--delete-jobs=always"]
    return [program, app, "--log-level=error", "worker", *options]


CONTENDERS = [
    Contender("celery_outbox, prefork 4", ["effects_app"], _celery("--concurrency=4"), _LOCAL),
    Contender(
        "celery_outbox, threads 4",
        ["effects_app"],
        _celery("--pool=threads", "--concurrency=4"),
        _LOCAL,
    ),
    Contender(
        "procrastinate, 4 threads",
        ["effects_procrastinate", QUEUE],
        procrastinate_worker(QUEUE),
    ),
    Contender(
        "procrastinate, asyncio 4",
        ["effects_procrastinate", "asyncio"],
        procrastinate_worker("asyncio"),
    ),
]


class Run:
    """Some messages in a queue, and the workers that empty it."""

    def __init__(self, contender: Contender, url: str, messages: int) -> None:
        self._contender = contender
        self._messages = messages
        self._engine: Engine = create_engine(url)
        self._environment = {
            **contender.environment,
            "BENCHMARK_DATABASE": url,
            "C_FORCE_ROOT": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }

    def seconds(
        self, workers: int = 1, disturb: Callable[[list[Process], int], None] | None = None
    ) -> float:
        """Return how long it took. `disturb` is called again and again, with what is done."""
        module, *arguments = self._contender.fill
        program = [sys.executable, "-m", f"benchmarks.{module}", str(self._messages), *arguments]
        with Process(program, env=self._environment) as filling:
            if filling.wait(300):
                raise RuntimeError(filling.describe())
        with ExitStack() as stack:
            running = [
                stack.enter_context(Process(self._command(number), env=self._environment))
                for number in range(workers)
            ]

            def finished() -> bool:
                done = self.effects()[0]
                if disturb is not None:
                    disturb(running, done)
                return done >= self._messages

            wait_until(finished, 900, running[0].tail(), 0.05)
        return self._span()

    def _command(self, number: int) -> list[str]:
        command = list(self._contender.worker)
        return [*command, f"--hostname=w{number}@bench"] if "worker" in command[2:3] else command

    def effects(self) -> tuple[int, int]:
        """Return how many effects there are, and of how many tasks."""
        with self._engine.connect() as connection:
            counted = text("SELECT count(*), count(DISTINCT number) FROM effects")
            effects, tasks = connection.execute(counted).one()
            return int(effects), int(tasks)

    def _span(self) -> float:
        with self._engine.connect() as connection:
            span = text("SELECT extract(epoch FROM max(at) - min(at)) FROM effects")
            return float(connection.execute(span).scalar_one())


class Killer:
    """Kills a worker, its main process or one of its pool, whenever some more work is done."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._next = every
        self._random = random.Random(11)
        self.kills = 0

    def __call__(self, workers: list[Process], done: int) -> None:
        for worker in workers:
            if not worker.alive:
                worker.restart()
        if done < self._next:
            return
        time.sleep(self._random.uniform(0, 0.1))
        self._next = done + self._random.randrange(self._every // 2, 2 * self._every)
        victim = self._random.choice(workers)
        running = family(victim.pid)
        for pid in ([victim.pid], running, running[1:2])[self.kills % 3]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.kills += 1


def table(database_url: str, _broker_url: str, *, quick: bool) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    messages, rounds = (160, 1) if quick else (10_000, 3)
    spans: dict[str, list[float]] = {contender.name: [] for contender in CONTENDERS}
    for _ in range(rounds):
        for contender in CONTENDERS:
            run = Run(contender, database_url, messages)
            spans[contender.name].append(run.seconds() / messages)
    figures = [Figure(name, taken, [0.0] * rounds) for name, taken in spans.items()]
    beside = next(figure for figure in figures if figure.name == CONTENDERS[2].name)
    rows = [
        [figure.name, f"{figure.rate:,.0f}", f"{figure.times_as_fast_as(beside):.2f}"]
        for figure in figures
    ]
    killer = Killer(messages // (8 if quick else 30))
    run = Run(CONTENDERS[0], database_url, messages)
    seconds = run.seconds(2, killer)
    effects, tasks = run.effects()
    rows.append([KILLED, f"{messages / seconds:,.0f}", ""])
    print_table(TITLE, ["", "tasks/s", "x procrastinate"], rows)
    print(f"{messages} tasks, {killer.kills} kills: {effects} effects of {tasks} tasks")
    return {
        "messages": messages,
        "figures": [figure.as_json() for figure in figures],
        "killed": {"seconds": seconds, "kills": killer.kills, "effects": effects, "tasks": tasks},
    }
