"""``scripts/celery-suite``: run the suite stock and durable, compare, print, write JSON."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from tests.celery_suite.outcomes import (
    FAILED,
    PASSED,
    SKIPPED,
    UNFINISHED,
    Difference,
    Outcome,
    Outcomes,
    count,
    file_of,
)
from tests.celery_suite.running import TESTS, Runner, Side, Suite, again

RERUNS = 2
#: Celery marks its tests as flaky, and repeats them up to five times: not again when we repeat them.
ONCE = ("-p", "no:rerunfailures")


def main() -> int:
    """Run what was asked for; return the exit status."""
    options = _options()
    started = time.monotonic()
    record = options.home / f"stock-{options.celery}.json"
    logs = options.home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="celery-suite-") as folder:
        suite = Suite(options.home / f"celery-{options.celery}.tar.gz", Path(folder))
        files = [file for file in suite.files() if not options.only or file in options.only]
        if unknown := set(options.only) - set(files):
            sys.exit(f"error: no such file in {TESTS}: {', '.join(unknown)}")
        python = options.home / f"venv-{options.celery}" / "bin" / "python"
        keywords = ["-k", options.k] if options.k else []
        parts = [
            part for file in files for side in options.sides for part in suite.parts(file, side)
        ]
        with Runner(suite, python, logs, together=options.together, pytest_args=keywords) as runner:
            outcomes = runner.run(parts)
            remembered = {} if options.stock_only else _remembered(record)
            stock = outcomes[Side.STOCK] or {
                test: outcome for test, outcome in remembered.items() if file_of(test) in files
            }
            seen = set(outcomes[Side.DURABLE]) | set(outcomes[Side.STOCK])
            compared = seen if options.k else seen | set(stock)
            difference = Difference(stock, outcomes[Side.DURABLE], compared)
            if not options.stock_only:
                for _ in range(RERUNS):
                    _run_again(runner, difference)
                difference.late = runner.run(again(difference.lost(), Side.LATE))[Side.LATE]
    if outcomes[Side.STOCK]:
        kept = {test: asdict(outcome) for test, outcome in (_remembered(record) | stock).items()}
        record.write_text(json.dumps(kept, indent=1) + "\n")
    _print_table(difference, files)
    if options.json:
        report = _report(difference, options.celery, time.monotonic() - started)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{time.monotonic() - started:.0f} s in all; the logs are in {logs}.")
    if options.stock_only:
        return int(any(outcome.outcome in (FAILED, UNFINISHED) for outcome in stock.values()))
    return _print_difference(difference)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/celery-suite")
    parser.add_argument("--home", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--celery", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", action="extend", default=[], metavar="FILE")
    parser.add_argument("-k", metavar="EXPR")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--stock-only", action="store_true")
    which.add_argument("--durable-only", action="store_true")
    parser.add_argument("--together", type=int, default=8, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    # The durable run takes a little longer.
    options.sides = [Side.DURABLE] * (not options.stock_only)
    options.sides += [Side.STOCK] * (not options.durable_only)
    if options.durable_only and not (options.home / f"stock-{options.celery}.json").exists():
        parser.error("there is no stock run to compare with yet")
    return options


def _remembered(record: Path) -> Outcomes:
    if not record.exists():
        return {}
    return {test: Outcome(**found) for test, found in json.loads(record.read_text()).items()}


def _run_again(runner: Runner, difference: Difference) -> None:
    """Run what passed on one side only once more, on the other; a pass there counts."""
    sides: Mapping[Side, list[str]] = {
        Side.DURABLE: difference.lost(),
        Side.STOCK: difference.gained(),
    }
    parts = [part for side, tests in sides.items() for part in again(tests, side, *ONCE)]
    if not parts:
        return
    print(f"{sum(map(len, sides.values()))} tests differ: once more", flush=True)
    found = runner.run(parts)
    for side, outcomes in (
        (Side.DURABLE, difference.durable),
        (Side.STOCK, difference.stock),
    ):
        for test in sides[side]:
            outcome = found[side].get(test, Outcome(message="was not run again"))
            outcome.reruns += 1 + (outcomes[test].reruns if test in outcomes else 0)
            outcomes[test] = outcome


def _print_table(difference: Difference, files: list[str]) -> None:
    print(f"\n{'':44}{'passed':>16} {'failed':>16} {'skipped':>16} {'s':>12}")
    print(f"{'':44}" + f"{'stock':>8}{'durable':>8} " * 3 + f"{'stock':>6}{'dur.':>6}")
    for file in [*files, "together"]:
        pair = [
            [each for test, each in side.items() if file in ("together", file_of(test))]
            for side in (difference.stock, difference.durable)
        ]
        cells = [
            "".join(f"{sum(count(side, kind) for kind in kinds):8}" for side in pair)
            for kinds in ((PASSED,), (FAILED, UNFINISHED), (SKIPPED,))
        ]
        seconds = "".join(f"{sum(each.seconds for each in side):6.0f}" for side in pair)
        print(f"{file:44}{cells[0]} {cells[1]} {cells[2]} {seconds}")


def _print_difference(difference: Difference) -> int:
    for outcomes, kind in ((difference.stock, "stock"), (difference.durable, "durable")):
        for test, outcome in sorted(outcomes.items()):
            if outcome.reruns and outcome.outcome == PASSED:
                print(f"passed at attempt {outcome.reruns + 1} ({kind}): {test}")
    for test in difference.due_to_lateness():
        print(
            f"fails in stock Celery too if tasks are acknowledged late, as durable ones are: {test}"
        )
    for tests, outcomes, kind in (
        (difference.unexplained(), difference.durable, "durable"),
        (difference.gained(), difference.stock, "stock"),
    ):
        for test in tests:
            outcome = outcomes.get(test, Outcome(message="was not run"))
            print(f"DIFFERS, {kind} {outcome.outcome}: {test}\n    {outcome.message}")
    different = len(difference.unexplained()) + len(difference.gained())
    compared = count(difference.durable.values(), PASSED)
    print(
        f"{different} tests pass on one side only."
        if different
        else f"No difference: {compared} tests pass, with and without the plugin."
    )
    return int(bool(different) or not compared)


def _report(difference: Difference, celery: str, seconds: float) -> dict[str, object]:
    return {
        "celery": celery,
        "seconds": round(seconds),
        "stock_only": difference.unexplained(),
        "stock_only_late": difference.due_to_lateness(),
        "durable_only": difference.gained(),
        "stock": {test: asdict(outcome) for test, outcome in difference.stock.items()},
        "durable": {test: asdict(outcome) for test, outcome in difference.durable.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
