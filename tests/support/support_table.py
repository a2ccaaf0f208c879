"""The README's table of what the tests are run on: ``python -m tests.support.support_table`` writes it.

The rows are the parameters of the test suites, the versions those of the machine that writes it.
"""

import re
import sqlite3
import subprocess
from importlib.metadata import version
from pathlib import Path

from tests.contract.conftest import DATABASES
from tests.faults import test_10_delivered_twice as delivered_twice
from tests.journeys import matrix, test_flows
from tests.support.mariadb import MariaDB
from tests.support.servers import PostgreSQL, RabbitMQ, Redis

__all__ = ["rows", "write"]

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- what the tests are run on: begin -->", "<!-- end -->"

_NAMES = {
    "postgresql": "PostgreSQL",
    "mariadb": "MariaDB",
    "mysql": "MySQL's dialect, on MariaDB",
    "mssql": "SQL Server",
    "sqlite": "SQLite",
    "amqp": "RabbitMQ",
    "redis": "Redis",
    "filesystem": "kombu's filesystem",
    "sqlalchemy": "kombu's SQLAlchemy",
}


def rows() -> dict[str, list[str]]:
    """Return the suites that each database and each broker is in, by its name."""
    crashes = {place.database for place in matrix.PLACES}
    flows = list(test_flows.PLACES.values())
    twice = list(delivered_twice.PLACES.values())
    suites = {
        "storage contract": DATABASES,
        "flows": [name for broker, database, _ in flows for name in (broker, database)],
        "delivered twice": [name for place in twice for name in place],
        "crash matrix": ["amqp", *crashes],
    }
    return {
        title: found
        for name, title in _NAMES.items()
        if (found := [suite for suite, names in suites.items() if name in names])
    }


def table(versions: dict[str, str]) -> str:
    """Return the table in Markdown."""
    lines = ["| Run on | Version | Suites |", "| --- | --- | --- |"]
    for title, suites in rows().items():
        lines.append(f"| {title} | {versions.get(title, '')} | {', '.join(suites)} |")
    return "\n".join(lines)


def write() -> None:
    """Write the table into the README, between its marks."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{table(_versions())}\n{END}{after}")


def _versions() -> dict[str, str]:
    with MariaDB() as mariadb, RabbitMQ() as rabbitmq:
        ((maria,),) = mariadb.execute("SELECT version()")
        rabbit = rabbitmq.rabbitmqctl("version").strip()
    found = {
        "PostgreSQL": _said_by(PostgreSQL()._bin / "postgres"),
        "MariaDB": _number(maria),
        "MySQL's dialect, on MariaDB": _number(maria),
        "SQLite": sqlite3.sqlite_version,
        "RabbitMQ": rabbit,
        "Redis": _said_by(Redis()._program),
    }
    kombu = f"kombu {version('kombu')}"
    return {**found, "kombu's filesystem": kombu, "kombu's SQLAlchemy": kombu}


def _said_by(program: Path) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    return _number(done.stdout)


def _number(text: str) -> str:
    found = re.search(r"\d+(\.\d+)+", text)
    assert found is not None, text
    return found[0]


if __name__ == "__main__":
    write()
