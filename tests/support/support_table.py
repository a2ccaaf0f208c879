"""The README's table of what the tests were run on, made of a record (`tests.support.record`).

``python -m tests.support.support_table write RECORD`` writes it; ``check RECORD`` says what it names
that the run did not pass, and compares neither versions nor numbers.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.support.record import LIBRARIES, REAL_OF, SYSTEMS

__all__ = ["README", "claims", "not_passed", "table", "written"]

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- what the tests are run on: begin -->", "<!-- end -->"

#: The order of the columns.
SUITES = ["unit", "contract", "journeys", "faults", "servicebus"]

Record = Mapping[str, Any]


def table(record: Record) -> str:
    """Return the table in Markdown, and below it what was the same for all."""
    passed, versions = record["passed"], record["versions"]
    lines = [_row("Run on", "Version", *SUITES), _row(*["---"] * 2, *["--:"] * len(SUITES))]
    for system in SYSTEMS:
        if system in passed:
            numbers = [str(passed[system].get(suite, "")) for suite in SUITES]
            lines.append(_row(system, versions.get(system, ""), *numbers))
    libraries = ", ".join(f"{name} {versions[name]}" for name in ["Python", *LIBRARIES])
    note = f"The columns are folders of `tests/`, the numbers tests that passed, with {libraries}."
    return "\n".join([*lines, "", note])


def written(page: str, record: Record) -> str:
    """Return the page with the record's table between the marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(record)}\n{END}{after}"


def claims(page: str) -> set[tuple[str, str]]:
    """Return the systems and suites in which a page's table says that tests have passed."""
    _, _, rest = page.partition(BEGIN)
    rows = [line for line in rest.partition(END)[0].splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {
        (system, suite)
        for system, _, *numbers in body
        for suite, number in zip(header[2:], numbers, strict=True)
        if number
    }


def not_passed(page: str, record: Record) -> Iterator[str]:
    """Say what a page claims and a run has shown neither on it nor on what it stands in for."""
    passed = record["passed"]
    for system, suite in sorted(claims(page)):
        names = (system, REAL_OF.get(system))
        if not any(passed.get(name, {}).get(suite) for name in names):
            yield f"README.md: no test of tests/{suite} has passed on {system}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main(action: str, path: str) -> None:
    """Write the README's table from a record, or check it against one."""
    record = json.loads(Path(path).read_text())
    page = README.read_text()
    if action == "write":
        README.write_text(written(page, record))
    elif wrong := list(not_passed(page, record)):
        sys.exit("\n".join([*wrong, "scripts/support-table writes what the last run has shown."]))


if __name__ == "__main__":
    main(*sys.argv[1:])
