"""Whose fault a refusal is, and what follows from it."""

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from celery_outbox import events
from celery_outbox.config import Config
from celery_outbox.relay.breaker import Breaker, Breakers, backoff
from celery_outbox.relay.outcome import (
    Confirmed,
    Fault,
    Outcome,
    Refused,
    Stalled,
    Undecided,
    UnderWay,
    Unknown,
    fault_of,
)
from celery_outbox.relay.publishers.confirms import verdict
from celery_outbox.relay.settlement import settlement_of
from celery_outbox.storage.store import Claimed, Settlement
from celery_outbox.testing.contract.outgoing import envelope

NOW = datetime(2030, 1, 1, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (311, Fault.MESSAGE),
        (312, Fault.MESSAGE),
        (313, Fault.MESSAGE),
        (320, Fault.BROKER),
        (402, Fault.BROKER),
        (403, Fault.DESTINATION),
        (404, Fault.MESSAGE),
        (405, Fault.DESTINATION),
        (406, Fault.MESSAGE),
        (501, Fault.MESSAGE),
        (502, Fault.MESSAGE),
        (503, Fault.MESSAGE),
        (504, Fault.BROKER),
        (505, Fault.MESSAGE),
        (506, Fault.BROKER),
        (530, Fault.BROKER),
        (540, Fault.MESSAGE),
        (541, Fault.BROKER),
        (599, Fault.BROKER),
        (None, Fault.BROKER),
    ],
)
def test_whose_fault_a_reply_code_is(code: int | None, fault: Fault) -> None:
    """P7."""
    assert fault_of(code) is fault


@pytest.mark.parametrize(("code", "kind"), [(403, Stalled), (404, Refused), (None, Refused)])
def test_what_the_end_of_a_channel_says_of_its_one_message(code: int | None, kind: Any) -> None:
    error = RuntimeError("closed")
    error.reply_code = code  # type: ignore[attr-defined]
    assert verdict(error) == kind("RuntimeError: closed")


# Settlements


def row(number: int, destination: str = "celery", attempts: int = 1, **changes: Any) -> Claimed:
    return Claimed(number, attempts, "t", "id", destination, NOW, envelope(**changes))


def settle(
    rows: list[Claimed], outcomes: dict[int, Outcome], breakers: Breakers | None = None, **own: Any
) -> Settlement:
    return settlement_of(
        rows, outcomes, NOW, Config(**own), breakers or Breakers(base=1.0, cap=60.0)
    )


def test_each_outcome_has_its_consequence() -> None:
    """P7."""
    rows = [row(number, f"q{number}") for number in range(1, 8)]
    settlement = settle(
        [*rows[:6], row(7, attempts=10)],
        {
            1: Confirmed(),
            2: Refused("no such exchange"),
            3: Stalled("full"),
            4: Undecided("away"),
            5: Unknown(),
            6: UnderWay(),
            7: Refused("no such exchange"),
        },
    )
    assert settlement.confirmed == [1]
    assert settlement.retried[2][1] == "no such exchange"
    assert settlement.postponed[3][1] == "full"
    assert settlement.released == [4, 5]
    assert settlement.dead == {7: "no such exchange"}
    assert len(settlement) == 6


def test_a_stalled_message_is_never_buried() -> None:
    """P7: its queue is full, and that is not its fault."""
    settlement = settle([row(1, attempts=1000)], {1: Stalled("full")})
    assert list(settlement.postponed) == [1]


def test_a_row_of_a_newer_version_is_left_to_it() -> None:
    unreadable = Claimed(1, 1, "t", "id", "celery", NOW, None, "format 99")
    settlement = settle([unreadable], {}, backoff_cap_seconds=30.0)
    assert settlement.postponed == {1: (30.0, "format 99")}


def test_kept_rows_wait_as_long_as_they_are_old() -> None:
    old = Claimed(1, 1, "t", "id", "q", NOW - timedelta(hours=1), envelope(keep=True))
    settlement = settle([old], {1: Confirmed()}, keep_until_handled=True)
    assert settlement.kept == {1: 3600.0}


def test_a_destination_that_stalls_is_left_alone_until_it_takes_something() -> None:
    breakers = Breakers(base=1.0, cap=60.0)
    heard: list[dict[str, Any]] = []
    with events.listening(lambda name, told: heard.append(told) if name == "stalled" else None):
        settle([row(1, "full"), row(2, "full")], {1: Stalled("x"), 2: Stalled("x")}, breakers)
    assert heard == [{"destination": "full", "error": "x"}]
    assert 0 < breakers.seconds_left("full") <= 1.0
    assert breakers.error("full") == "x"
    settle([row(3, "full")], {3: Confirmed()}, breakers)
    assert breakers.seconds_left("full") == 0


def test_who_was_not_tried_makes_no_pause_longer() -> None:
    """Its pause was over while the batch was published."""
    breakers = Breakers(base=1.0, cap=60.0)
    settlement = settle([row(1, "q")], {1: Stalled("x", tried=False)}, breakers)
    assert settlement.postponed == {1: (0.0, "x")}
    assert breakers.seconds_left("q") == 0


def test_a_queue_that_took_some_and_refused_the_rest_is_full() -> None:
    breakers = Breakers(base=1.0, cap=60.0)
    settle([row(1, "q"), row(2, "q")], {1: Stalled("x"), 2: Confirmed()}, breakers)
    assert breakers.seconds_left("q")


def test_a_slow_destination_is_left_alone_unless_it_confirms_others() -> None:
    breakers = Breakers(base=1.0, cap=60.0)
    settle(
        [row(1, "slow"), row(2, "busy"), row(3, "busy")],
        {1: UnderWay(), 2: UnderWay(), 3: Confirmed()},
        breakers,
    )
    assert breakers.seconds_left("slow")
    assert not breakers.seconds_left("busy")


# Pauses


class Clock:
    """Time that passes when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_breaker_opens_for_longer_each_time() -> None:
    clock = Clock()
    breaker = Breaker(base=1.0, cap=8.0, clock=clock)
    assert breaker.seconds_left == 0
    for longest in (1.0, 2.0, 4.0, 8.0, 8.0):
        pause = breaker.failed()
        assert longest / 2 <= pause <= longest
        assert breaker.failed() == pause  # the same failure
        clock.now += pause
        assert breaker.seconds_left == 0
    breaker.succeeded()
    assert breaker.failed() <= 1.0


def test_backoff_has_full_jitter_and_a_cap() -> None:
    assert [backoff(n, base=1.0, cap=5.0, random=lambda: 1.0) for n in range(1, 6)] == [
        1,
        2,
        4,
        5,
        5,
    ]
    assert backoff(9, base=1.0, cap=5.0, random=lambda: 0.0) == 0.0
    assert backoff(10**6, base=1.0, cap=5.0, random=lambda: 1.0) == 5.0
