"""Report: a progress line while it runs, and a table at the end."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rehearsal.customer import Answer
from rehearsal.outcome import Outcome
from rehearsal.rehearsal import Rehearsal

__all__ = ["Progress", "explain", "say", "table"]

_WIDTH = 30


def say(line: str = "") -> None:
    """Print a line at once."""
    print(line, flush=True)


class Progress:
    """A bar on the terminal, redrawn in place; nothing if there is no terminal."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._shown = 0.0
        self._visible = sys.stdout.isatty()

    def __call__(self, rehearsal: Rehearsal) -> None:
        """Draw it, ten times a second at most."""
        if not self._visible or time.monotonic() < self._shown + 0.1:
            return
        self._shown = time.monotonic()
        part = rehearsal.placed / rehearsal.plan.orders
        bar = ("#" * round(part * _WIDTH)).ljust(_WIDTH, ".")
        sys.stdout.write(
            f"\r\033[K{self._title} [{bar}] {rehearsal.placed} orders, "
            f"{sum(rehearsal.kills.values())} of {rehearsal.all_kills} kills, "
            f"{rehearsal.backlog.total} messages wait"
        )
        sys.stdout.flush()

    def clear(self) -> None:
        """Wipe it off."""
        if self._visible:
            sys.stdout.write("\r\033[K")
            sys.stdout.flush()


def table(columns: Mapping[str, Outcome]) -> str:
    """Return the figures side by side, one column for each run."""
    rows = [_figures(outcome) for outcome in columns.values()]
    names = dict.fromkeys(name for row in rows for name in row)
    wide = max(len(name) for name in names)
    width = max(12, *(len(title) + 3 for title in columns))
    lines = ["".ljust(wide) + "".join(title.rjust(width) for title in columns)]
    for name in names:
        lines.append(name.ljust(wide) + "".join(row.get(name, "-").rjust(width) for row in rows))
    return "\n".join(lines)


def explain(outcome: Outcome, folder: Path) -> str:
    """Return what went wrong, and where to look."""
    census, left = outcome.census, outcome.left
    troubles = {
        "it did not come to rest": outcome.trouble,
        "no order was placed": not census.committed,
        "orders answered with an error": outcome.answers.get(Answer.ERROR, 0),
        "orders without their charge": census.charges.lost,
        "orders without their receipt": census.receipts.lost,
        "charges of orders that do not exist": census.charges.ghosts,
        "receipts of orders that do not exist": census.receipts.ghosts,
        "charges too many": census.charges.duplicates,
        "receipts too many": census.receipts.duplicates,
        "messages left in the outbox": left.outbox,
        "messages left in the queue": left.queue,
        "dead letters": left.dead,
    }
    lines = [f"  {what}: {which}" for what, which in troubles.items() if which]
    return "\n".join(["\nFAILED, with the outbox:", *lines, f"The logs are in {folder}"])


def _figures(outcome: Outcome) -> dict[str, str]:
    census = outcome.census
    figures = {
        "orders sent": outcome.orders,
        "  rolled back by the shop": outcome.answers.get(Answer.ROLLED_BACK, 0),
        "  cut short by a kill": outcome.answers.get(Answer.NONE, 0),
        "  answered with an error": outcome.answers.get(Answer.ERROR, 0),
        "orders in the database": census.committed,
        **{f"kills of {name}": times for name, times in outcome.kills.items()},
        "processes that ended by themselves": sum(outcome.crashes.values()),
        "effects expected": 2 * census.committed,
        "effects found": sum(effects.found for effects in census.effects),
        "LOST (charge or receipt missing)": census.lost,
        "GHOSTS (for no order)": census.ghosts,
        "DUPLICATES (twice for one order)": census.duplicates,
        "duplicate deliveries absorbed": outcome.absorbed,
        "left in the outbox": outcome.left.outbox,
        "left in the queue": outcome.left.queue,
        "dead letters": outcome.left.dead,
        "seconds": round(outcome.seconds),
    }
    return {name: f"{figure:,}" for name, figure in figures.items()}
