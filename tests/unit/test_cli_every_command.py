"""Each command against rows in every state: what is in the tables before, and after."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.unit.shop import Shop
from tests.unit.test_cli import run
from tests.unit.test_cli_storage import EVERY, fill


@dataclass(frozen=True)
class Case:
    """A command, and how it changes the number of rows in each state."""

    words: str
    changes: dict[str, int] = field(default_factory=dict)
    exit_code: int = 0

    def __str__(self) -> str:
        return self.words


CASES = [
    # What only looks.
    Case("storage counts"),
    Case("storage counts --by task"),
    Case("storage counts --by destination"),
    Case("storage script"),
    Case("schema script"),
    Case("schema verify"),
    Case("schema create"),
    Case("status"),
    Case("status --max-lag 3600"),
    Case("status --min-relays 1", exit_code=1),
    Case("list"),
    Case("list --state scheduled"),
    Case("show {outgoing}"),
    Case("show {dead}"),
    Case("show handled"),
    Case("show nobody", exit_code=1),
    Case("dead-letters list"),
    Case("dead-letters show {dead}"),
    Case("scheduled list"),
    Case("doctor --check database --check schema --check writing --check content --check lag"),
    # What would change something, and is told not to.
    Case("storage clear outgoing scheduled published dead incoming --dry-run"),
    Case("storage release --older-than 0 --dry-run"),
    Case("dead-letters replay --all --dry-run"),
    Case("dead-letters discard --all --dry-run"),
    # What is asked, and not answered.
    Case("storage rebuild", exit_code=1),
    Case("storage clear outgoing", exit_code=1),
    Case("storage release --older-than 0", exit_code=1),
    Case("storage prune --older-than 0", exit_code=1),
    Case("cancel {outgoing}", exit_code=1),
    Case("dead-letters discard --all", exit_code=1),
    Case("scheduled cancel {scheduled}", exit_code=1),
    # What changes something.
    Case("storage rebuild --yes", dict.fromkeys(EVERY, -1)),
    Case("storage clear outgoing --yes", {"outgoing": -1}),
    Case("storage clear scheduled --yes", {"scheduled": -1}),
    Case("storage clear published --yes", {"published": -1}),
    Case("storage clear dead --yes", {"dead": -1}),
    Case("storage clear incoming --yes", {"incoming": -1}),
    Case(
        "storage clear outgoing scheduled published dead incoming --yes",
        {name: -1 for name in EVERY if name != "in_flight"},
    ),
    Case("storage release"),
    Case("storage release --older-than 0 --yes", {"in_flight": -1, "outgoing": +1}),
    Case("storage prune"),
    Case("storage prune --older-than 0 --yes", {"incoming": -1}),
    Case("cancel {outgoing} --yes", {"outgoing": -1}),
    Case("cancel {scheduled} --yes", {"scheduled": -1}),
    Case("cancel {in_flight} --yes", exit_code=1),
    Case("republish", {}),
    Case("dead-letters replay --all", {"dead": -1, "outgoing": +1}),
    Case("dead-letters replay {dead}", {"dead": -1, "outgoing": +1}),
    Case("dead-letters replay --error NOBODY", exit_code=0),
    Case("dead-letters discard {dead} --yes", {"dead": -1}),
    Case("scheduled reschedule {scheduled} --in 60"),
    Case("scheduled run-now {scheduled}", {"scheduled": -1, "outgoing": +1}),
    Case("scheduled run-now {outgoing}", exit_code=1),
    Case("scheduled cancel {scheduled} --yes", {"scheduled": -1}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_tables_before_and_after(shop: Shop, case: Case) -> None:
    """P18."""
    ids = fill(shop)
    assert shop.outbox.store.counts() == EVERY
    words = [word.format(**ids) for word in case.words.split()]
    result = run(shop.app, *words)
    assert result.exit_code == case.exit_code, result.output
    expected: dict[str, Any] = {
        name: count + case.changes.get(name, 0) for name, count in EVERY.items()
    }
    assert shop.outbox.store.counts() == expected


def test_every_command_is_among_them() -> None:
    from celery_outbox.cli import outbox as command

    run_here = {case.words for case in CASES}
    for name, found in command.commands.items():
        if name in ("relay", "servicebus"):
            continue  # tests/unit/test_cli.py, tests/servicebus
        for each in [f"{name} {verb}" for verb in getattr(found, "commands", ())] or [name]:
            assert any(f"{words} ".startswith(f"{each} ") for words in run_here), each
