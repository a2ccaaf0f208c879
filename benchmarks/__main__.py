"""``scripts/bench``: start private servers, measure, print, write JSON and plots."""

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import plots, worker
from benchmarks.tables import SLOW, TABLES, measure_table
from tests.support.servers import PostgreSQL, RabbitMQ

PACKAGES = (
    "celery",
    "kombu",
    "amqp",
    "SQLAlchemy",
    "psycopg",
    "Django",
    "django-celery-outbox",
    "procrastinate",
)

#: Table `scale` fills tables that the same transaction has truncated: then nothing of it is logged.
UNLOGGED = {"wal_level": "minimal", "max_wal_senders": "0"}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(prog="scripts/bench")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--quick", action="store_true", help="fewer messages and rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the charts into DIR")
    options = parser.parse_args()
    if unknown := [name for name in options.tables if name not in TABLES]:
        parser.error(f"no such table: {', '.join(unknown)} (there are {', '.join(TABLES)})")
    started = time.monotonic()
    report: dict[str, Any] = {
        "quick": options.quick,
        "conditions": _conditions(),
        "load": {"before": os.getloadavg()},
        "tables": {},
    }
    print(report["conditions"], f"load {os.getloadavg()[0]:.1f}", flush=True)
    settings = {**worker.SETTINGS, **UNLOGGED}
    with PostgreSQL(fsync=True, settings=settings) as postgresql, RabbitMQ() as rabbitmq:
        for name in options.tables or _all(quick=options.quick):
            report["tables"][name] = measure_table(
                name, postgresql.create_database(), rabbitmq.create_vhost(), quick=options.quick
            )
            print(f"({time.monotonic() - started:.0f} s)", flush=True)
    report["load"]["after"] = os.getloadavg()
    print(f"Load {os.getloadavg()[0]:.1f}; where the machine is shared, trust the ratios.")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.plots:
        for file in plots.draw(report, options.plots):
            print(file)


def _all(*, quick: bool) -> list[str]:
    return [name for name in TABLES if not (quick and name in SLOW)]


def _conditions() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"Python {platform.python_version()}, {os.cpu_count()} CPUs, {packages}"


if __name__ == "__main__":
    main()
