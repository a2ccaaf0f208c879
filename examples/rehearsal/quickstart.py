"""``scripts/quickstart``: the shop without any server, killed on the way, beside plain Celery."""

import argparse
import sys
from pathlib import Path

from shop.settings import Settings

from rehearsal.cast import Cast
from rehearsal.outcome import Outcome
from rehearsal.plan import Plan
from rehearsal.rehearsal import Rehearsal
from rehearsal.report import Progress, explain, say, table
from rehearsal.workplace import workplace

KILLS = {"web": 4, "worker1": 6}
KILLS_OF_THE_RELAY = {"beat": 4, "worker1's relaying process": 4}

INTRODUCTION = """\
A shop takes {orders} orders over HTTP, and rolls back a fifth of them after it has sent their
task. Each order is to be charged once and then to have one receipt: two tasks, the second sent by
the first. Meanwhile the web process, the worker, beat and the process that runs the relay are
killed (SIGKILL) and started again. SQLite, and a folder for a broker: no server runs.
"""

REMARK = """
Plain Celery ran the same code with @shared_task(acks_late=True, reject_on_worker_lost=True). Its
ghosts are tasks of orders that were rolled back. What it lost, this broker is party to: it forgets
what a killed worker had fetched. scripts/chaos --plain compares the two on RabbitMQ."""


def main() -> int:
    """Rehearse with the outbox and without; return 0 if the outbox kept its word."""
    parser = argparse.ArgumentParser("scripts/quickstart", description=__doc__)
    parser.add_argument("--orders", type=int, default=300, help="how many (default: 300)")
    parser.add_argument("--seed", type=int, default=1, help="of the accidents (default: 1)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave logs and data there")
    options = parser.parse_args()

    say(INTRODUCTION.format(orders=options.orders))
    with workplace(options.keep) as place:
        outcomes = {
            title: _rehearse(title, place.folder / name, options.orders, options.seed, outbox)
            for title, name, outbox in (
                ("celery_outbox", "outbox", True),
                ("plain Celery", "plain", False),
            )
        }
        say(table(outcomes))
        say(REMARK)
        outcome = outcomes["celery_outbox"]
        if not outcome.sound:
            place.keep()
            say(explain(outcome, place.folder))
            return 1
    say("\nWith the outbox: nothing lost, nothing invented, nothing done twice.")
    return 0


def _rehearse(title: str, folder: Path, orders: int, seed: int, outbox: bool) -> Outcome:
    settings = Settings(
        folder / "data", f"sqlite:///{folder}/data/shop.sqlite", "filesystem://localhost/", outbox
    )
    kills = KILLS | (KILLS_OF_THE_RELAY if outbox else {})
    progress = Progress(title)
    try:
        plan = Plan(seed, orders, kills)
        return Rehearsal(settings, Cast(beat=outbox), plan, folder, progress).run()
    finally:
        progress.clear()


if __name__ == "__main__":
    sys.exit(main())
