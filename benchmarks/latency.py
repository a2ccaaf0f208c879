"""Table `latency`: from the return of the commit to the first line of the task, by each kind of relay.

Stock Celery publishes after the commit. Idle: one message at a time. Under load: 500 messages a second,
in transactions of ten.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from celery import Celery
from sqlalchemy import create_engine, text

from benchmarks.figures import chart, print_table
from benchmarks.latency_app import MODES, make_app
from celery_outbox.config import Config
from celery_outbox.plugin import outbox_of
from tests.support.processes import celery_beat, celery_worker, outbox_relay
from tests.support.waiting import wait_until

MODULE = "benchmarks.latency_app"
LOAD, SIZE = 500, 10
TITLE = "latency: from the commit to the execution, in milliseconds"


def table(database_url: str, broker_url: str, *, quick: bool) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    idle, longest, seconds = (8, 2.0, 1.0) if quick else (200, 60.0, 10.0)
    engine = create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE latency_orders (id serial, cents integer)"))
    report: dict[str, Any] = {"figures": []}
    for mode in _modes():
        with _running(mode, database_url, broker_url) as sender:
            for _ in range(3):
                sender.send(1)
                sender.wait()
            for name, sending in (
                ("idle", lambda sender=sender: sender.send_one_by_one(idle, longest)),
                (f"{LOAD} messages/s", lambda sender=sender: sender.send_steadily(seconds)),
            ):
                sending()
                taken = sorted(sender.wait())
                report["figures"].append(
                    {
                        "mode": mode,
                        "load": name,
                        "messages": len(taken),
                        "median_ms": statistics.median(taken) * 1e3,
                        "p99_ms": taken[int(len(taken) * 0.99)] * 1e3,
                    }
                )
    _print(report["figures"])
    report["charts"] = [
        chart(
            f"From the commit to the execution, {load}",
            "ms, median",
            [
                (each["mode"], each["median_ms"], "others" if each["mode"] == "stock" else "ours")
                for each in report["figures"]
                if each["load"] == load
            ],
            digits=1,
        )
        for load in ("idle", f"{LOAD} messages/s")
    ]
    return report


def _modes() -> list[str]:
    known = {f"outbox_{each.name}" for each in fields(Config)}
    return [mode for mode, settings in MODES.items() if known.issuperset(settings)]


def _print(figures: list[dict[str, Any]]) -> None:
    rows = []
    for each in figures:
        (stock,) = (
            other for other in figures if (other["mode"], other["load"]) == ("stock", each["load"])
        )
        rows.append(
            [
                f"{each['load']}: {each['mode']}",
                f"{each['median_ms']:.1f}",
                f"{each['median_ms'] - stock['median_ms']:.1f}",
                f"{each['p99_ms']:.1f}",
                f"{each['messages']}",
            ]
        )
    print_table(TITLE, ["", "median", "above stock", "p99", "messages"], rows)


class _Sender:
    """The sending process, and what the worker wrote down."""

    def __init__(self, app: Celery, engine: Any, notes: Path) -> None:
        self._note = app.tasks["benchmarks.note"]
        self._engine = engine
        self._notes = notes
        self._is_stock = app.main == "stock"
        self._number = 0
        self._committed: dict[int, float] = {}

    def send(self, size: int) -> None:
        """Commit a transaction of one row and `size` messages."""
        numbers = range(self._number, self._number + size)
        self._number += size
        with self._engine.begin() as connection:
            connection.execute(text("INSERT INTO latency_orders (cents) VALUES (1)"))
            if not self._is_stock:
                self._delay(numbers)
        self._committed.update(dict.fromkeys(numbers, time.monotonic()))
        if self._is_stock:
            self._delay(numbers)

    def _delay(self, numbers: range) -> None:
        for number in numbers:
            self._note.delay(number, "x" * 190)

    def send_one_by_one(self, messages: int, seconds: float) -> None:
        """Send the next message when the one before has been executed, for so long at most."""
        ends = time.monotonic() + seconds
        for _ in range(messages):
            if time.monotonic() > ends:
                break
            self.send(1)
            wait_until(self._all_noted, 30, "the execution", 0.005)

    def send_steadily(self, seconds: float) -> None:
        """Send `LOAD` messages a second, or as many as this machine can."""
        start = time.monotonic()
        for turn in range(int(seconds * LOAD / SIZE)):
            time.sleep(max(0.0, start + turn * SIZE / LOAD - time.monotonic()))
            self.send(SIZE)

    def wait(self) -> list[float]:
        """Wait until all is executed; return how long each has taken, and forget them."""
        wait_until(self._all_noted, 120, "all executions", 0.02)
        taken = [at - self._committed.pop(number) for number, at in self._noted().items()]
        self._notes.write_text("")
        return taken

    def _all_noted(self) -> bool:
        return self._noted().keys() >= self._committed.keys()

    def _noted(self) -> dict[int, float]:
        lines = [line.split() for line in self._notes.read_text().splitlines()]
        return {int(number): float(at) for number, at in (line for line in lines if len(line) == 2)}


@contextmanager
def _running(mode: str, database_url: str, broker_url: str) -> Iterator[_Sender]:
    app = make_app(mode, database_url, broker_url)
    engine = create_engine(database_url)
    if mode != "stock":
        outbox = outbox_of(app)
        outbox.create_schema()
        engine = outbox.engine
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        notes = folder / "notes"
        notes.touch()
        environment = {
            "BENCHMARK_MODE": mode,
            "BENCHMARK_DATABASE": database_url,
            "BENCHMARK_BROKER": broker_url,
            "BENCHMARK_NOTES": str(notes),
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        worker = celery_worker(
            MODULE, folder, environment, "--pool=threads", "--without-heartbeat", ready_timeout=90
        )
        stack.enter_context(worker)
        if mode in ("daemon", "fast path"):
            relay = stack.enter_context(outbox_relay(MODULE, folder, environment))
            relay.wait_for_log("relay: ready", 90)
        elif mode == "beat":
            stack.enter_context(
                celery_beat(MODULE, folder, environment, "--scheduler=outbox", ready_timeout=90)
            )
        yield _Sender(app, engine, notes)
