"""Site: one app with its database and broker, as the test's process and its workers see it.

The test's process is the app that sends (the "web" process). Workers, beats and relays are processes
that build the same app again from their environment (`tests.journeys.worker`).
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from celery import Celery
from sqlalchemy import String, create_engine, insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from celery_outbox import Outbox
from tests.journeys.points import Points
from tests.support.processes import Process, celery_beat, celery_worker, outbox_relay
from tests.support.waiting import wait_until

__all__ = ["Base", "Effect", "Setup", "Site", "open_sites"]

ROOT = Path(__file__).parents[2]
_VARIABLE = "CELERY_OUTBOX_TEST_SITE"

#: Short pauses, for nobody waits in a test for what takes its time in production.
_SETTINGS: dict[str, Any] = {
    "broker_connection_retry_on_startup": True,
    "include": ["tests.journeys.tasks"],
    "outbox_backoff_base_seconds": 0.05,
    "outbox_backoff_cap_seconds": 0.2,
    "outbox_busy_pause_seconds": 0.2,
    "outbox_poll_seconds": 0.05,
    "outbox_relay_tick_seconds": 0,
    "task_default_retry_delay": 0,
    "task_store_errors_even_if_ignored": False,
    "worker_lost_wait": 0.3,
    "worker_prefetch_multiplier": 1,
}


class Base(DeclarativeBase):
    """The app's models."""


class Effect(Base):
    """What a task has done in the app's database: a row for each time."""

    __tablename__ = "effect"

    id: Mapped[int] = mapped_column(primary_key=True)
    tag: Mapped[str] = mapped_column(String(200), index=True)
    name: Mapped[str] = mapped_column(String(200))


@dataclass(frozen=True)
class Setup:
    """What a process must know to build the app."""

    folder: str
    broker: str
    database: str
    backend: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """Return the environment of a process of this site."""
        return {_VARIABLE: json.dumps(vars(self)), "PYTHONPATH": str(ROOT)}

    @classmethod
    def of_environment(cls) -> Setup:
        """Read what `environment` wrote."""
        return cls(**json.loads(os.environ[_VARIABLE]))


#: For the report of a test that fails.
open_sites: list[Site] = []


class Site:
    """An app with an Outbox, and the processes that were started for it."""

    def __init__(self, setup: Setup, left: Callable[[], int] = lambda: 0) -> None:
        self.setup = setup
        self.folder = Path(setup.folder)
        self.points = Points(self.folder)
        self._journal = self.folder / "journal"
        self._left = left
        self.processes: list[Process] = []
        self._ending = ExitStack()
        sqlite = setup.database.startswith("sqlite")
        self.engine = create_engine(
            setup.database, connect_args={"timeout": 30} if sqlite else {"connect_timeout": 10}
        )
        self.Session: sessionmaker[Session] = sessionmaker(self.engine)
        self.app = Celery("site", broker=setup.broker, backend=setup.backend)
        self.app.conf.update({**_SETTINGS, **setup.settings})
        self.app.site = self
        self.outbox = Outbox(self.app, self.Session)
        open_sites.append(self)

    def create(self) -> Site:
        """Create the tables."""
        self.app.loader.import_default_modules()
        Base.metadata.create_all(self.engine)
        self.outbox.create_schema()
        return self

    def close(self) -> None:
        """End the processes, and the connections of this one."""
        open_sites.remove(self)
        self._ending.close()
        if self.setup.settings.get("outbox_publish_after_commit"):
            self.outbox.fast_path.stop()
        # Results that are collected later must not look for a server that is gone.
        self.app.backend.remove_pending_result = lambda result: None
        self.app.close()
        if self.outbox._relay is not None:
            self.outbox.relay().close()
        self.engine.dispose()

    # Processes

    def worker(self, *args: str, module: str = "tests.journeys.worker", **options: Any) -> Process:
        """Start a worker and wait until it is ready."""
        return self._keep(
            celery_worker(module, self.folder, self._environment(options), *args, **options)
        )

    def reviving_worker(self, *args: str) -> Process:
        """Start a worker in one process that starts again when it is killed; wait for the first."""
        options = ("--loglevel=INFO", "--without-gossip", "--without-mingle", "--hostname=one@%h")
        command = [_python(), "-m", "tests.journeys.matrix_worker", *options, *args]
        environment = {**self.setup.environment(), "C_FORCE_ROOT": "1"}
        log = self.folder / "worker.log"
        worker = self._keep(Process(command, cwd=self.folder, env=environment, log=log))
        worker.wait_for_log(r"\bready\.$")
        return worker

    def beat(self, *args: str) -> Process:
        """Start a beat."""
        return self._keep(
            celery_beat("tests.journeys.worker", self.folder, self._environment({}), *args)
        )

    def relay(self, *args: str, wait: bool = True, **env: str) -> Process:
        """Start ``celery outbox relay``, and wait until it is ready."""
        environment = {**self.setup.environment(), **env}
        relay = self._keep(outbox_relay("tests.journeys.worker", self.folder, environment, *args))
        if wait:
            relay.wait_for_log("relay: ready")
        return relay

    def python(self, code: str, **env: str) -> Process:
        """Run a program in which ``site`` is this site."""
        environment = {**self.setup.environment(), **env}
        start = "from tests.journeys.worker import site\n"
        return self._keep(
            Process([_python(), "-c", start + code], cwd=self.folder, env=environment)
        )

    def _environment(self, options: dict[str, Any]) -> dict[str, str]:
        return {**self.setup.environment(), **options.pop("env", {})}

    def _keep(self, process: Process) -> Process:
        self.processes.append(process)
        return self._ending.enter_context(process)

    # Sending

    def task(self, name: str) -> Any:
        """Return a task of `tests.journeys.tasks`."""
        return self.app.tasks[f"tests.journeys.tasks.{name}"]

    def step(self, tag: str, name: str = "done") -> Any:
        """Return the signature of the simplest durable task."""
        return self.task("step").s(tag=tag, name=name)

    def send(self, signature: Any) -> Any:
        """Send in a transaction of its own; return the result."""
        with self.Session.begin():
            return signature.apply_async()

    # What came of it

    def journal(self, tag: str, name: str) -> None:
        """Write down that a body has been entered, whatever becomes of its transaction."""
        with self._journal.open("a") as journal:
            journal.write(f"{tag} {name}\n")

    def runs(self, tag: str) -> list[str]:
        """Return what was written into the journal, sorted."""
        if not self._journal.exists():
            return []
        # What follows the last line's end is a line that is being written.
        whole, _, _ = self._journal.read_text().rpartition("\n")
        lines = (line.split(maxsplit=1) for line in whole.splitlines())
        return sorted(name for found, name in lines if found == tag)

    def effects(self, tag: str) -> list[str]:
        """Return the names of the effects in the database, sorted."""
        with self.Session() as session:
            return sorted(session.scalars(select(Effect.name).where(Effect.tag == tag)))

    def wait_effects(self, tag: str, expected: list[str], timeout: float = 90.0) -> None:
        """Return when the effects are these (or more)."""
        wait_until(
            lambda: len(self.effects(tag)) >= len(expected),
            timeout,
            f"{expected} (there is {self.effects(tag)})",
        )
        assert self.effects(tag) == sorted(expected)

    def wait_quiet(self, timeout: float = 90.0) -> None:
        """Return when nothing is left to relay or to handle."""
        wait_until(self.is_quiet, timeout, "quiet")

    def is_quiet(self) -> bool:
        """Say whether nothing is left to relay or to handle."""
        counts = self.outbox.store.counts()
        # While we look, a message may go round behind our back; then something has been handled.
        return (
            not self.pending()
            and not self._left()
            and not self.pending()
            and self.outbox.store.counts() == counts
        )

    def relay_all(self, timeout: float = 90.0) -> None:
        """Be the relay, until the outbox is empty."""

        def empty() -> bool:
            self.outbox.relay_all()
            return not self.pending()

        wait_until(empty, timeout, "an empty outbox")

    def pending(self) -> int:
        """Return how many messages the outbox holds."""
        counts = self.outbox.store.counts()
        return sum(counts[state] for state in ("outgoing", "scheduled", "in_flight", "published"))

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the outbox, in the order of their ids."""
        outbox = self.outbox.tables.outbox
        with self.engine.connect() as connection:
            found = connection.execute(select(outbox).order_by(outbox.c.id)).mappings()
            return [dict(row) for row in found]

    def insert_again(self, rows: list[dict[str, Any]]) -> None:
        """Let the relay publish `rows`, which `rows()` returned, as if it never had."""
        copies = [{name: row[name] for name in row if name != "id"} for row in rows]
        if not copies:  # relayed between two looks
            return
        with self.engine.begin() as connection:
            connection.execute(insert(self.outbox.tables.outbox), copies)

    def dead(self) -> list[dict[str, Any]]:
        """Return the dead letters."""
        dead = self.outbox.tables.dead_letter
        with self.engine.connect() as connection:
            found = connection.execute(select(dead).order_by(dead.c.id)).mappings()
            return [dict(row) for row in found]

    def left(self) -> int:
        """Return how many messages the broker holds."""
        return self._left()

    # Gates: bodies that wait for the test

    def wait_at_gate(self, name: str, timeout: float = 90.0) -> None:
        """In a body: say that it is there, and wait until the gate is opened."""
        (self.folder / f"{name}.waiting").touch()
        wait_until(lambda: self.is_open(name), timeout, f"gate {name}")

    def is_open(self, name: str) -> bool:
        """Whether bodies may pass."""
        return (self.folder / f"{name}.open").exists()

    def wait_for_body(self, name: str, timeout: float = 90.0) -> None:
        """In the test: return when a body waits at the gate."""
        wait_until((self.folder / f"{name}.waiting").exists, timeout, f"a body at gate {name}")

    def open_gate(self, name: str) -> None:
        """Let bodies pass."""
        (self.folder / f"{name}.open").touch()


def new_tag(name: str = "") -> str:
    """Return a name for one run of a flow."""
    return f"{name}-{uuid.uuid4().hex[:8]}"


def _python() -> str:
    import sys

    return sys.executable
