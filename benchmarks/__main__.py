"""``scripts/bench``: start private servers, measure, print, write JSON."""

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import after_commit, local, relay, send, servicebus, worker
from tests.support.servers import PostgreSQL, RabbitMQ

TABLES = {
    "after_commit": after_commit.table,
    "relay": relay.table,
    "send": send.table,
    "worker": worker.table,
    "servicebus": servicebus.table,
    "local": local.table,
}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(prog="scripts/bench")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--quick", action="store_true", help="fewer messages and rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    options = parser.parse_args()
    if unknown := [name for name in options.tables if name not in TABLES]:
        parser.error(f"no such table: {', '.join(unknown)} (there are {', '.join(TABLES)})")
    started = time.monotonic()
    report: dict[str, Any] = {"quick": options.quick, "conditions": _conditions(), "tables": {}}
    print(report["conditions"], flush=True)
    with PostgreSQL(fsync=True, settings=worker.SETTINGS) as postgresql, RabbitMQ() as rabbitmq:
        for name in options.tables or TABLES:
            report["tables"][name] = TABLES[name](
                postgresql.create_database(), rabbitmq.create_vhost(), quick=options.quick
            )
    print(f"{time.monotonic() - started:.0f} s in all; the machine was shared: trust the ratios.")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def _conditions() -> str:
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("celery", "kombu", "amqp", "SQLAlchemy", "psycopg")
    )
    return f"Python {platform.python_version()}, {os.cpu_count()} CPUs, {packages}"


if __name__ == "__main__":
    main()
