"""A pytest plugin: writes each report to a file as it comes, so that a killed run leaves its part."""

import json
import os
from pathlib import Path

import pytest


def pytest_runtest_logstart(nodeid: str) -> None:
    """Write which test runs now."""
    _write({"test": nodeid, "when": "start"})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write what became of a phase of it, or of a subtest."""
    message = ""
    if not report.passed:
        lines = [line for line in report.longreprtext.splitlines() if line.startswith("E  ")]
        message = lines[0].removeprefix("E").strip() if lines else report.longreprtext[-300:]
    _write(
        {
            "test": report.nodeid,
            "when": report.when,
            "outcome": report.outcome,
            "seconds": round(report.duration, 2),
            "message": message,
        }
    )


def _write(line: dict[str, object]) -> None:
    with Path(os.environ["CELERY_SUITE_REPORT"]).open("a") as stream:
        stream.write(json.dumps(line) + "\n")
