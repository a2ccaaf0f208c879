"""The README's table says what the suites are run on."""

import re

from tests.support.support_table import BEGIN, END, README, rows


def test_the_table_is_in_step_with_the_suites() -> None:
    """`scripts/support-table` writes it again; versions are those of the machine that did."""
    _, _, rest = README.read_text().partition(BEGIN)
    lines = rest.partition(END)[0].strip().splitlines()[2:]
    found = {}
    for line in lines:
        title, version, suites = (cell.strip() for cell in line.strip("|").split("|"))
        assert re.search(r"\d+\.\d+", version), line
        found[title] = suites.split(", ")
    assert found == rows()
