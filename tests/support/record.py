"""What a test run has run on: how many tests passed, by system (a database or a broker) and suite.

Fixtures and tests say with `used` what they work on. A run whose environment has
`CELERY_OUTBOX_TEST_RECORD` writes the file that it names when it ends; `tests.support.support_table`
makes the README's table of that.
"""

import json
import os
import sqlite3
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.support.mariadb import MariaDB
from tests.support.servers import PostgreSQL, RabbitMQ, Redis

__all__ = ["LIBRARIES", "REAL_OF", "SYSTEMS", "VARIABLE", "Recorder", "system_of", "used"]

VARIABLE = "CELERY_OUTBOX_TEST_RECORD"
LIBRARIES = ("celery", "kombu", "SQLAlchemy", "psycopg", "PyMySQL", "redis", "azure-servicebus")


def _library(name: str) -> Callable[[], str]:
    return lambda: f"{name} {version(name)}"


#: What is run on, by the schemes of URLs, and how to learn the version.
_HERE: dict[str, tuple[str, Callable[[], str]]] = {
    "postgresql": ("PostgreSQL", PostgreSQL.version),
    "mariadb": ("MariaDB", MariaDB.version),
    "mysql": ("MySQL's dialect, on a MariaDB server; no MySQL", MariaDB.version),
    "mssql": ("SQL Server's statements, compiled and parsed; no server", _library("sqlglot")),
    "sqlite": ("SQLite", lambda: sqlite3.sqlite_version),
    "amqp": ("RabbitMQ", RabbitMQ.version),
    "redis": ("Redis", Redis.version),
    "azureservicebus": (
        "Azure Service Bus's SDK, on an emulator; no Azure",
        _library("azure-servicebus"),
    ),
    "outbox": ("local queues", _library("kombu")),
    "filesystem": ("kombu's filesystem", _library("kombu")),
    "sqla": ("kombu's SQLAlchemy", _library("kombu")),
    "memory": ("kombu's memory", _library("kombu")),
}
#: Where the environment has the URL of a real one, nothing stands in for it.
_REAL = {
    "mysql": ("CELERY_OUTBOX_TEST_MYSQL_URL", "MySQL"),
    "mssql": ("CELERY_OUTBOX_TEST_MSSQL_URL", "SQL Server"),
    "azureservicebus": ("CELERY_OUTBOX_SERVICEBUS_URL", "Azure Service Bus"),
}

#: Every name that `system_of` gives, and those of the real ones by those of what stands in.
SYSTEMS = [*(name for name, _ in _HERE.values()), *(name for _, name in _REAL.values())]
REAL_OF = {_HERE[scheme][0]: name for scheme, (_, name) in _REAL.items()}

#: What is being set up, and what the test that runs has said of itself, which comes first.
_noting: list[set[str]] = [set()]


def system_of(url: str) -> str:
    """Return the name of the system that is behind the URL of a database or a broker."""
    scheme = url.partition(":")[0].partition("+")[0]
    if scheme in _REAL:
        variable, name = _REAL[scheme]
        if url == os.environ.get(variable):
            return name
    name, _ = _HERE[scheme]
    return name


def used(*urls: str) -> None:
    """Note what the fixture that is set up, or else the test that runs, works on."""
    _noting[-1].update(map(system_of, urls))


class Recorder:
    """A pytest plugin that counts, and writes what it has counted into a file at the end."""

    def __init__(self, file: Path, tests: Path = Path(__file__).parents[1]) -> None:
        """Take the file, and the folder whose folders are the suites."""
        self._file = file
        self._tests = tests
        self._passed: dict[str, Counter[str]] = defaultdict(Counter)
        self._fixtures: dict[str, set[str]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any]
    ) -> Generator[None, object, object]:
        """Keep what a fixture notes, for all tests that have it until it is set up again."""
        noted = self._fixtures[fixturedef.argname] = set()
        _noting.append(noted)
        try:
            return (yield)
        finally:
            _noting.pop()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Count a test that has passed."""
        report = yield
        if report.when == "setup":
            _noting[0].clear()
        elif report.when == "call" and report.passed:
            fixtures = getattr(item, "fixturenames", ())
            noted = _noting[0].union(*(self._fixtures.get(name, ()) for name in fixtures))
            for system in noted:
                self._passed[system][item.path.relative_to(self._tests).parts[0]] += 1
        return report

    def pytest_sessionfinish(self) -> None:
        """Write the record."""
        versions = {name: ask() for name, ask in _HERE.values() if name in self._passed}
        versions |= {name: version(name) for name in LIBRARIES}
        versions["Python"] = ".".join(map(str, sys.version_info[:3]))
        record = {"passed": self._passed, "versions": versions}
        self._file.write_text(json.dumps(record, indent=1, sort_keys=True))
