"""Where a claim begins to look."""

import time
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import pytest

from celery_outbox.storage.low_water import LowWater, Mark

NOW = datetime(2030, 1, 1, tzinfo=timezone.utc)
FAST, SLOW = 0.01, 1.0


def row(number: int, *, age: float = 60.0, due: float | None = None) -> Any:
    return SimpleNamespace(
        id=number,
        created_at=NOW - timedelta(seconds=age),
        due_at=None if due is None else NOW - timedelta(seconds=due),
        now=NOW,
    )


def slow(water: LowWater, *rows: Any) -> None:
    for _ in range(5):
        water.looked(None, rows, SLOW)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def test_the_first_claim_looks_from_the_beginning() -> None:
    assert LowWater().start() is None


def test_as_long_as_that_is_fast_every_claim_does(clock: Any) -> None:
    water = LowWater()
    water.looked(None, [row(1)], FAST)
    assert water.start() is None


def test_a_few_slow_looks_are_those_of_a_busy_database(clock: Any) -> None:
    water = LowWater()
    for seconds in (SLOW, SLOW, SLOW, SLOW, FAST, SLOW):
        water.looked(None, [row(1)], seconds)
        assert water.start() is None


def test_after_slow_looks_claims_begin_where_the_last_one_ended(clock: Any) -> None:
    water = LowWater()
    slow(water, row(1), row(2), row(9, age=61))
    assert water.start() == Mark(row(2).created_at, 2)
    water.looked(water.start(), [row(3, age=50)], FAST)
    assert water.start() == Mark(row(3, age=50).created_at, 3)
    water.looked(water.start(), [], FAST)
    assert water.start() == Mark(row(3, age=50).created_at, 3)


def test_they_look_from_the_beginning_again_in_a_while(clock: Any) -> None:
    water = LowWater()
    slow(water, row(1))
    clock.now += 19
    assert water.start() is not None
    clock.now += 2
    assert water.start() is None


def test_a_while_is_never_long(clock: Any) -> None:
    water = LowWater()
    for _ in range(5):
        water.looked(None, [row(1)], 3600.0)
    clock.now += 30
    assert water.start() is None


def test_a_mark_is_never_behind_the_last_row(clock: Any) -> None:
    """When a row became available is not known any more: no sooner than the earlier of the two."""
    water = LowWater()
    slow(water, row(1, age=3600, due=10), row(2, age=60), row(3, age=1, due=3600))
    assert water.start() == Mark(row(2, age=60).created_at, 2)


def test_the_latest_seconds_are_seen_always(clock: Any) -> None:
    """Transactions do not commit in the order in which they began."""
    water = LowWater()
    slow(water, row(1, age=0.1))
    mark = water.start()
    assert mark is not None
    assert mark.available_at <= NOW - timedelta(seconds=1)
    assert mark.id == 0
