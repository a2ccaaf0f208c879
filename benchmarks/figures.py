"""Figures: a median of several rounds, as one line of a table."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """Something to measure: `run()` works through `messages` messages, `prepare()` is not timed."""

    name: str
    messages: int
    run: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Figure:
    """What the rounds of a contender came to."""

    name: str
    #: Seconds per message, one for each round.
    rounds: Sequence[float]
    #: Seconds of this process's CPU per message, which a busy machine changes less.
    cpu_rounds: Sequence[float]
    #: Shares of the time, by name.
    shares: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds per message: the median of the rounds."""
        return statistics.median(self.rounds)

    @property
    def cpu_seconds(self) -> float:
        """Seconds of CPU per message: the median of the rounds."""
        return statistics.median(self.cpu_rounds)

    @property
    def rate(self) -> float:
        """Messages per second."""
        return 1 / self.seconds

    def times_as_fast_as(self, other: "Figure") -> float:
        """Return the median ratio of the rounds that ran side by side."""
        ratios = [theirs / ours for ours, theirs in zip(self.rounds, other.rounds, strict=True)]
        return statistics.median(ratios)

    def as_json(self) -> dict[str, Any]:
        """Return all of it, for another program."""
        return {
            "name": self.name,
            "seconds_per_message": self.seconds,
            "cpu_seconds_per_message": self.cpu_seconds,
            "messages_per_second": self.rate,
            "rounds": list(self.rounds),
            "shares": self.shares,
        }


def measure(contenders: Sequence[Contender], rounds: int) -> list[Figure]:
    """Run all contenders in turn, `rounds` times, after one round that does not count.

    In turn, so that whatever else the machine does meets all of them alike.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    cpu: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    # Nobody pays for another's garbage, nor to look through all modules for it.
    gc.freeze()
    for number in range(rounds + 1):
        for contender in contenders:
            contender.prepare()
            gc.collect()
            start, cpu_start = time.perf_counter(), time.process_time()
            contender.run()
            taken, cpu_taken = time.perf_counter() - start, time.process_time() - cpu_start
            if number:
                seconds[contender.name].append(taken / contender.messages)
                cpu[contender.name].append(cpu_taken / contender.messages)
    return [Figure(name, taken, cpu[name]) for name, taken in seconds.items()]


def chart(
    title: str, unit: str, bars: Sequence[tuple[str, float, str]], *, digits: int = 0
) -> dict[str, Any]:
    """Return a chart for `benchmarks.plots`: each bar is a name, a value and a kind.

    The kinds are "ours", "limit" (what no outbox can be better than) and "others".
    """
    return {
        "title": title,
        "unit": unit,
        "digits": digits,
        "bars": [{"name": name, "value": value, "kind": kind} for name, value, kind in bars],
    }


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}\n")
    for row in [header, ["-" * width for width in widths], *rows]:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())
    print(flush=True)
