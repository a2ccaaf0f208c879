"""``scripts/chaos``: the shop on PostgreSQL (or MariaDB) and RabbitMQ, its processes killed often."""

import argparse
import json
import random
import sys
from contextlib import ExitStack
from pathlib import Path

from shop.settings import Settings

from rehearsal.cast import Cast
from rehearsal.outcome import Outcome
from rehearsal.plan import Plan
from rehearsal.rehearsal import Rehearsal
from rehearsal.report import Progress, explain, say, table
from rehearsal.workplace import workplace
from tests.support.mariadb import MariaDB
from tests.support.servers import PostgreSQL, RabbitMQ


def main() -> int:
    """Rehearse; return 0 if nothing was lost, invented or done twice, and nothing is left."""
    options = _options()
    say(f"{options.orders:,} orders, seed {options.seed}")
    with workplace(options.keep) as place:
        outcomes = {"celery_outbox": _rehearse(options, place.folder, outbox=True)}
        if options.plain:
            outcomes["plain Celery"] = _rehearse(options, place.folder, outbox=False)
        say(table(outcomes))
        figures = {
            "seed": options.seed,
            **{title: outcome.as_dict() for title, outcome in outcomes.items()},
        }
        say("\n" + json.dumps(figures))
        if options.json:
            options.json.write_text(json.dumps(figures, indent=2) + "\n")
        outcome = outcomes["celery_outbox"]
        if not outcome.sound:
            place.keep()
            say(explain(outcome, place.folder))
            return 1
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/chaos", description=__doc__)
    parser.add_argument("--orders", type=int, default=5000, help="how many (default: 5000)")
    parser.add_argument(
        "--seed",
        type=int,
        default=random.randrange(1_000_000),
        help="of the accidents (default: another one each time)",
    )
    parser.add_argument(
        "--mariadb", action="store_true", help="a private MariaDB instead of PostgreSQL"
    )
    parser.add_argument(
        "--database", metavar="URL", help="an empty database (default: a private PostgreSQL)"
    )
    parser.add_argument("--broker", metavar="URL", help="(default: a private RabbitMQ)")
    parser.add_argument("--workers", type=int, default=2, help="(default: 2)")
    parser.add_argument("--relays", type=int, default=2, help="relay daemons (default: 2)")
    parser.add_argument(
        "--kills", type=int, default=10, help="of each worker, relay and the web process (10)"
    )
    parser.add_argument("--plain", action="store_true", help="compare with plain Celery")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the logs there")
    return parser.parse_args()


def _rehearse(options: argparse.Namespace, place: Path, *, outbox: bool) -> Outcome:
    folder = place / ("outbox" if outbox else "plain")
    cast = Cast(workers=options.workers, relays=options.relays if outbox else 0)
    plan = Plan(options.seed, options.orders, _kills(cast, options.kills))
    progress = Progress("celery_outbox" if outbox else "plain Celery")
    with ExitStack() as servers:
        database, broker = options.database, options.broker
        if not database:
            if options.mariadb:
                database = servers.enter_context(MariaDB(fsync=True)).create_database()
            else:
                database = servers.enter_context(PostgreSQL(fsync=True)).create_database()
        if not broker:
            broker = servers.enter_context(RabbitMQ()).url
        settings = Settings(folder / "data", database, broker, outbox)
        try:
            return Rehearsal(settings, cast, plan, folder, progress, clear=not options.keep).run()
        finally:
            progress.clear()


def _kills(cast: Cast, times: int) -> dict[str, int]:
    workers = [f"worker{n + 1}" for n in range(cast.workers)]
    relays = [f"relay{n + 1}" for n in range(cast.relays)]
    kills = dict.fromkeys(["web", *workers, *relays], times)
    return kills | {f"{worker}'s pool process": times // 2 for worker in workers}


if __name__ == "__main__":
    sys.exit(main())
