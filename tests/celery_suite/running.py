"""Running parts of the suite: each in a pytest of its own, on a broker and a Redis of its own."""

import ast
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from threading import Lock

from sqlalchemy import NullPool, create_engine, inspect, text
from typing_extensions import Self

from tests.celery_suite.outcomes import KINDS, Outcomes, count, file_of, read_report
from tests.support.processes import Process
from tests.support.servers import PostgreSQL, RabbitMQ, Redis

HERE = Path(__file__).parent
#: Looks in a worker for a message with an eta, which would rest in the database.
LOOKS_INTO_WORKERS = "test_inspect.py"
TESTS = "t/integration"
#: As in Celery's own runs one pytest runs one file, for some classes need the worker that another
#: class has started. In these each class starts its own, and they take a quarter of an hour.
DIVISIBLE = ("test_canvas.py",)
FUNCTIONS_A_PART = 15
LONG = ("test_canvas.py", "test_tasks.py", "test_backend_leak_in_fixture_teardown.py")
SECONDS_A_TEST = 300
SECONDS_A_PART = 2400.0


class Side(Enum):
    """With what the suite is run."""

    STOCK = "stock"
    DURABLE = "durable"
    #: Without the plugin, but acknowledged late, as durable tasks are.
    LATE = "late"


@dataclass(frozen=True)
class Part:
    """What one pytest runs."""

    name: str
    targets: tuple[str, ...]
    side: Side
    options: tuple[str, ...] = ()


class Suite:
    """The suite's files, unpacked for each side."""

    def __init__(self, sdist: Path, folder: Path) -> None:
        self.folder = folder
        for side in Side:
            _unpack(sdist, self.root(side))
            shutil.copy(HERE / "reporter.py", self.root(side) / "conftest.py")
        durable = self.root(Side.DURABLE)
        shutil.copy(HERE / "overlay.py", durable / "sitecustomize.py")
        # A copy, so that the project may be edited meanwhile.
        shutil.copytree(HERE.parent.parent / "celery_outbox", durable / "celery_outbox")
        # Celery's own conftest looks for this file.
        late = {"task_acks_late": True, "task_reject_on_worker_lost": True}
        config = self.root(Side.LATE) / "integration-tests-config.json"
        config.write_text(json.dumps(late))

    def root(self, side: Side) -> Path:
        """Where pytest runs."""
        return self.folder / side.value

    def files(self) -> list[str]:
        """The names of the test files, those first that take long."""
        names = sorted(path.name for path in (self.root(Side.STOCK) / TESTS).glob("test_*.py"))
        return sorted(names, key=lambda name: LONG.index(name) if name in LONG else len(LONG))

    def parts(self, file: str, side: Side) -> Iterator[Part]:
        """What of a file one pytest runs."""
        if file not in DIVISIBLE:
            yield Part(file, (f"{TESTS}/{file}",), side)
            return
        functions = list(self._functions(file))
        for number, start in enumerate(range(0, len(functions), FUNCTIONS_A_PART), 1):
            targets = tuple(functions[start : start + FUNCTIONS_A_PART])
            yield Part(f"{file} {number}", targets, side)

    def _functions(self, file: str) -> Iterator[str]:
        path = f"{TESTS}/{file}"
        tree = ast.parse((self.root(Side.STOCK) / path).read_text())
        for owner in tree.body:
            if isinstance(owner, ast.FunctionDef) and owner.name.startswith("test_"):
                yield f"{path}::{owner.name}"
            elif isinstance(owner, ast.ClassDef) and owner.name.startswith("test_"):
                for each in owner.body:
                    if isinstance(each, ast.FunctionDef) and each.name.startswith("test_"):
                        yield f"{path}::{owner.name}::{each.name}"


def _unpack(sdist: Path, root: Path) -> None:
    """Lay out the integration tests, what they import, and pytest's settings; no `celery`."""
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            _, _, path = member.name.partition("/")
            folder = Path(path).parent.as_posix()
            if path == "pyproject.toml" or folder == "t" or folder.startswith(TESTS):
                member.name = path
                archive.extract(member, root, filter="data")


class Runner:
    """Runs parts, some at a time; `python` has the suite's tools and the project's requirements.

    The servers end with the block.
    """

    def __init__(
        self, suite: Suite, python: Path, logs: Path, *, together: int, pytest_args: Sequence[str]
    ) -> None:
        self._suite = suite
        self._python = python
        self._logs = logs
        self._together = together
        self._pytest_args = pytest_args
        self._postgresql = PostgreSQL()
        self._rabbitmq = RabbitMQ()
        # Two calls to the node at a time take the same name, and one is refused.
        self._naming = Lock()

    def __enter__(self) -> Self:
        self._postgresql.start()
        self._rabbitmq.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._rabbitmq.close()
        self._postgresql.close()

    def run(self, parts: Sequence[Part]) -> dict[Side, Outcomes]:
        """Run parts; return what became of their tests on each side."""
        outcomes: dict[Side, Outcomes] = {side: {} for side in Side}
        with ThreadPoolExecutor(self._together) as pool:
            for part, found in zip(parts, pool.map(self._run, parts), strict=True):
                outcomes[part.side].update(found)
        return outcomes

    def _run(self, part: Part) -> Outcomes:
        started = time.monotonic()
        stem = self._logs / f"{part.side.value}-{part.name.replace(' ', '-')}"
        report = Path(f"{stem}.jsonl")
        for old in (report, Path(f"{stem}.log"), Path(f"{stem}.relay.log")):
            old.unlink(missing_ok=True)
        with self._broker() as broker, Redis() as redis, ExitStack() as stack:
            env = {
                "PATH": f"{self._python.parent}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": "",
                "PYTHONDONTWRITEBYTECODE": "1",
                "TEST_BROKER": broker,
                "TEST_BACKEND": redis.url,
                "REDIS_HOST": redis.host,
                "REDIS_PORT": str(redis.port),
                # The tests of the log look for lines of this level.
                "WORKER_LOGLEVEL": "INFO",
                "CELERY_SUITE_REPORT": str(report),
            }
            handled = None
            if part.side is Side.DURABLE:
                env["CELERY_SUITE_HOLDS"] = "" if LOOKS_INTO_WORKERS in part.name else "yes"
                handled = stack.enter_context(self._plugin(env, stem))
            command: list[str | Path] = [
                self._python,
                "-m",
                "pytest",
                "-q",
                "-rA",
                "-p",
                "no:cacheprovider",
            ]
            command += [f"--timeout={SECONDS_A_TEST}", *self._pytest_args]
            command += [*part.options, *part.targets]
            log, root = Path(f"{stem}.log"), self._suite.root(part.side)
            with Process(command, cwd=root, env=env, name="pytest", log=log) as pytest:
                try:
                    ended = f"exit {pytest.wait(SECONDS_A_PART)}"
                except AssertionError:
                    ended = f"killed after {SECONDS_A_PART:.0f} s"
            if handled is not None:
                ended += f", {handled()} executions in the inbox"
        outcomes = read_report(report)
        counts = [f"{count(outcomes.values(), kind):4} {kind}" for kind in KINDS]
        print(
            f"{part.side.value:8} {part.name:46}{''.join(counts)}"
            f" {time.monotonic() - started:5.0f} s  {ended}",
            flush=True,
        )
        return outcomes

    @contextmanager
    def _broker(self) -> Iterator[str]:
        with self._naming:
            url = self._rabbitmq.create_vhost()
        yield url
        with self._naming:
            self._rabbitmq.delete_vhost(url)

    @contextmanager
    def _plugin(self, env: dict[str, str], stem: Path) -> Iterator[Callable[[], int]]:
        """Add to `env` what the overlay needs, and run the relay; yield what counts executions."""
        databases = [self._postgresql.create_database() for _ in range(2)]
        env["CELERY_SUITE_DATABASE"], env["CELERY_SUITE_DATABASE_IN_MEMORY"] = databases
        env["PYTHONPATH"] = str(self._suite.root(Side.DURABLE))

        def handled() -> int:
            found = 0
            for url in databases:
                engine = create_engine(url, poolclass=NullPool)
                if inspect(engine).has_table("inbox"):
                    with engine.connect() as connection:
                        found += connection.scalar(text("SELECT count(*) FROM inbox")) or 0
            return found

        command = [self._python, HERE / "relay.py"]
        with Process(command, env=env, name="relay", log=Path(f"{stem}.relay.log")) as relay:
            relay.wait_for_log("^relay: tables made$", 60)
            yield handled


def again(tests: Sequence[str], side: Side, *options: str) -> list[Part]:
    """Return parts that run just these tests, a part a file, with these options of pytest's."""
    files: dict[str, list[str]] = {}
    for test in tests:
        files.setdefault(file_of(test), []).append(test)
    return [Part(f"{file} again", tuple(ids), side, options) for file, ids in files.items()]
