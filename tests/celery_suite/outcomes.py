"""Outcomes: what became of each test, read from a report, and how two runs differ."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PASSED, FAILED, SKIPPED, UNFINISHED = "passed", "failed", "skipped", "unfinished"
KINDS = (PASSED, FAILED, SKIPPED, UNFINISHED)


@dataclass
class Outcome:
    """What became of one test; `message` says why it failed or was skipped."""

    outcome: str = UNFINISHED
    seconds: float = 0.0
    message: str = ""
    #: How often it was started before this outcome: by its own `flaky` mark, or by us.
    reruns: int = 0

    def hear(self, line: Mapping[str, Any]) -> None:
        """Take in one line of the report."""
        self.seconds += line["seconds"]
        match line["outcome"]:
            case "rerun":
                self.outcome, self.reruns = UNFINISHED, self.reruns + 1
            case "failed":
                # A subtest, say: nothing that follows makes it good.
                if self.outcome != FAILED:
                    self.outcome, self.message = FAILED, line["message"]
            case "skipped" if self.outcome != FAILED:
                self.outcome, self.message = SKIPPED, line["message"]
            case "passed" if self.outcome == UNFINISHED and line["when"] == "call":
                self.outcome, self.message = PASSED, ""


Outcomes = dict[str, Outcome]


def read_report(report: Path) -> Outcomes:
    """Read what the reporter wrote."""
    outcomes: Outcomes = {}
    for text in report.read_text().splitlines() if report.exists() else ():
        line = json.loads(text)
        outcome = outcomes.setdefault(line["test"], Outcome())
        if line["when"] != "start":
            outcome.hear(line)
    return outcomes


def file_of(test: str) -> str:
    """Return the name of the file that a test is in."""
    return Path(test.partition("::")[0]).name


def count(outcomes: Iterable[Outcome], kind: str) -> int:
    """How many have this outcome."""
    return sum(each.outcome == kind for each in outcomes)


@dataclass
class Difference:
    """The tests that pass in one run and not in the other."""

    stock: Outcomes
    durable: Outcomes
    #: Only these are compared.
    tests: set[str] = field(default_factory=set)
    #: What became of the lost ones without the plugin, acknowledged late.
    late: Outcomes = field(default_factory=dict)

    def lost(self) -> list[str]:
        """Return what passes in the stock run only."""
        return sorted(_passed(self.stock, self.tests) - _passed(self.durable, self.tests))

    def gained(self) -> list[str]:
        """Return what passes in the durable run only."""
        return sorted(_passed(self.durable, self.tests) - _passed(self.stock, self.tests))

    def due_to_lateness(self) -> list[str]:
        """Return the lost ones that fail without the plugin too, if acknowledged late."""
        lost = self.lost()
        return [test for test in lost if test in self.late and self.late[test].outcome == FAILED]

    def unexplained(self) -> list[str]:
        """Return the other lost ones."""
        explained = self.due_to_lateness()
        return [test for test in self.lost() if test not in explained]


def _passed(outcomes: Outcomes, tests: set[str]) -> set[str]:
    return {test for test in tests if test in outcomes and outcomes[test].outcome == PASSED}
