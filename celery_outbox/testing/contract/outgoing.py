"""The store's outgoing half: stage, claim, settle."""

import threading
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.exc import OperationalError

from celery_outbox.envelope import Envelope
from celery_outbox.storage import low_water
from celery_outbox.storage.rows import row_of
from celery_outbox.storage.store import Batch, Settlement, Store
from celery_outbox.testing.contract.database import Database

NOW = datetime.now(timezone.utc)


def envelope(label: str = "m", **changes: Any) -> Envelope:
    values: dict[str, Any] = {
        "task": "shop.notify",
        "task_id": label,
        "key": f"{label}:0:0:",
        "body": b"\x00\xff body",
        "is_text": False,
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "priority": 3,
        "headers": {"id": label, "when": NOW, "raw": b"\xff"},
        "properties": {"delivery_mode": 2},
        "exchange": "",
        "routing_key": "celery",
        "mandatory": True,
        **changes,
    }
    return Envelope(**values)


def stage(store: Store, *labels: str, **changes: Any) -> None:
    with store.engine.begin() as connection:
        store.stage(connection, [row_of(envelope(label, **changes)) for label in labels])


def claim(store: Store, limit: int = 100, lease_seconds: float = 60) -> Batch:
    return store.claim(limit, lease_seconds)


def ids(batch: Batch) -> list[str]:
    return [row.task_id for row in batch.rows]


def numbers(batch: Batch) -> list[int]:
    return [row.id for row in batch.rows]


def stored(store: Store) -> list[dict[str, Any]]:
    outbox = store.tables.outbox
    with store.engine.connect() as connection:
        rows = connection.execute(select(outbox).order_by(outbox.c.id))
        return [dict(row._mapping) for row in rows]


def dead(store: Store) -> list[dict[str, Any]]:
    table = store.tables.dead_letter
    with store.engine.connect() as connection:
        rows = connection.execute(select(table).order_by(table.c.id))
        return [dict(row._mapping) for row in rows]


def make_due(store: Store) -> None:
    """Let every lease and every pause be over."""
    outbox = store.tables.outbox
    with store.engine.begin() as connection:
        connection.execute(update(outbox).values(available_at=NOW - timedelta(days=1)))


def seconds_from_now(store: Store, row: dict[str, Any]) -> float:
    with store.engine.connect() as connection:
        now = connection.execute(select(store.dialect.now())).scalar_one()
    return float((row["available_at"] - now).total_seconds())


# Stage


def test_stage_belongs_to_the_callers_transaction(store: Store) -> None:
    """P1."""
    with store.engine.connect() as connection:
        store.stage(connection, [row_of(envelope("gone"))])
        connection.rollback()
        store.stage(connection, [row_of(envelope("kept"))])
        connection.commit()
    assert ids(claim(store)) == ["kept"]


def test_stage_alone_commits(store: Store) -> None:
    store.stage_alone(row_of(envelope("m")))
    assert ids(claim(store)) == ["m"]


def test_what_was_staged_is_claimed_unchanged(store: Store) -> None:
    """P3."""
    due, expires = NOW - timedelta(minutes=1), NOW + timedelta(hours=1)
    sent = envelope("ä☃", due_at=due, expires_at=expires, is_text=True)
    with store.engine.begin() as connection:
        store.stage(connection, [row_of(sent)])
    (row,) = claim(store).rows
    assert row.envelope == sent
    assert row.error is None
    assert (row.task, row.task_id, row.attempts) == ("shop.notify", "ä☃", 1)


def test_the_body_is_kept_to_the_byte(store: Store) -> None:
    body = bytes(range(256)) * 2000
    store.stage_alone(row_of(envelope("m", body=body)))
    (row,) = claim(store).rows
    assert row.envelope is not None
    assert row.envelope.body == body


def test_many_are_staged_at_once_in_their_order(store: Store) -> None:
    labels = [str(number) for number in range(1200)]
    stage(store, *labels)
    assert ids(claim(store, 2000)) == labels


def test_names_that_are_too_long_for_their_columns_are_cut(store: Store) -> None:
    long = "x" * 1000
    store.stage_alone(row_of(envelope(long, key="k", task=long, routing_key=long)))
    (row,) = claim(store).rows
    assert row.task_id == "x" * 255
    assert row.envelope is not None
    assert row.envelope.routing_key == long


def test_rows_are_dated_by_the_database(store: Store) -> None:
    """P6: no two machines agree on the time."""
    store.stage_alone(row_of(envelope("m")))
    (row,) = stored(store)
    assert row["created_at"].tzinfo is not None
    assert abs(seconds_from_now(store, row)) < 30
    assert claim(store).now is not None


# Claim


def test_nothing_to_claim(store: Store) -> None:
    batch = claim(store)
    assert batch.rows == []
    assert batch.now is None


def test_claim_takes_no_more_than_the_limit_the_oldest_first(store: Store) -> None:
    stage(store, "1", "2", "3", "4", "5")
    assert ids(claim(store, 2)) == ["1", "2"]
    assert ids(claim(store, 2)) == ["3", "4"]
    assert ids(claim(store, 2)) == ["5"]
    assert ids(claim(store, 2)) == []


def test_what_is_due_first_is_claimed_first(store: Store) -> None:
    stage(store, "later", due_at=NOW - timedelta(minutes=1))
    stage(store, "sooner", due_at=NOW - timedelta(hours=1))
    assert ids(claim(store, 1)) == ["sooner"]
    assert ids(claim(store, 1)) == ["later"]


def test_what_is_not_due_is_not_claimed(store: Store) -> None:
    """P11."""
    stage(store, "tomorrow", due_at=NOW + timedelta(days=1))
    stage(store, "now")
    assert ids(claim(store)) == ["now"]


def test_a_claim_that_begins_where_the_last_one_ended_forgets_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accident 14: dead rows that an old snapshot keeps are not read again by each claim."""
    monkeypatch.setattr(low_water, "_SLOW", -1.0)
    monkeypatch.setattr(low_water, "_OFTEN", 1)
    stage(store, "first", due_at=NOW - timedelta(hours=1))
    assert ids(claim(store)) == ["first"]
    # As if it had been committed late.
    stage(store, "late", due_at=NOW - timedelta(hours=2))
    stage(store, "next", due_at=NOW - timedelta(minutes=1))
    stage(store, "new")
    passed_over = store.dialect.name == "postgresql"
    assert ids(claim(store)) == [*([] if passed_over else ["late"]), "next", "new"]
    monkeypatch.setattr(store._low_water, "_full_look_at", 0.0)
    assert ids(claim(store)) == (["late"] if passed_over else [])


def test_a_leased_row_is_not_claimed_until_its_lease_is_over(store: Store) -> None:
    """P6."""
    stage(store, "m")
    assert ids(claim(store, lease_seconds=60)) == ["m"]
    assert ids(claim(store)) == []
    make_due(store)
    assert ids(claim(store)) == ["m"]


def test_a_lease_ends_by_itself(store: Store) -> None:
    stage(store, "m")
    first = claim(store, lease_seconds=0.05)
    threading.Event().wait(0.2)
    second = claim(store)
    assert ids(second) == ["m"]
    assert first.token != second.token


@pytest.mark.parametrize("claim_of", ["claim", "claim_freshest"])
def test_a_claims_commit_does_not_wait_for_the_disk_and_no_other_does_not(
    store: Store, database: Database, claim_of: str
) -> None:
    """A commit of the app's, or a settle, is durable when it returns."""
    if database.name != "postgresql":
        assert store.dialect.not_awaited() == ()
        return
    stage(store, "m")
    how = {"limit": 1, "lease_seconds": 60, "token": "t"}
    with store.engine.connect() as connection:
        assert len(getattr(store.dialect, claim_of)(connection, store.tables.outbox, **how)) == 1
        shown = connection.exec_driver_sql("SHOW synchronous_commit").scalar_one()
        connection.commit()
        assert shown == "off"
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar_one() == "on"


def test_each_claim_counts_an_attempt(store: Store) -> None:
    stage(store, "m")
    for attempt in (1, 2, 3):
        (row,) = claim(store).rows
        assert row.attempts == attempt
        make_due(store)


def test_a_row_of_a_newer_version_is_claimed_with_its_error(store: Store) -> None:
    """P19, P7: it counts against that row alone."""
    stage(store, "new", "good")
    outbox = store.tables.outbox
    with store.engine.begin() as connection:
        connection.execute(
            update(outbox).where(outbox.c.task_id == "new").values(message='{"format": 99}')
        )
    new, good = claim(store).rows
    assert new.envelope is None
    assert "format 99" in str(new.error)
    assert good.envelope is not None


@pytest.mark.parametrize("message", ["", "{", "{}", "[]", "null", '{"format": "x"}'])
def test_a_damaged_row_is_claimed_with_its_error(store: Store, message: str) -> None:
    """P7."""
    stage(store, "m")
    with store.engine.begin() as connection:
        connection.execute(update(store.tables.outbox).values(message=message))
    (row,) = claim(store).rows
    assert row.envelope is None
    assert "shop.notify[m]" in str(row.error)


def test_concurrent_claims_get_different_rows_and_do_not_wait(
    store: Store, database: Database
) -> None:
    """P6. Where there is one writer at a time, the second one gives up instead."""
    stage(store, *map(str, range(10)))
    claim_in = store.dialect.claim
    with store.dialect.transaction(store.engine) as connection:
        # Not committed while the other one claims.
        first = claim_in(connection, store.tables.outbox, limit=4, lease_seconds=60, token="first")
        try:
            second = claim(store, 4)
        except OperationalError:
            assert not database.several_writers
            second = None
    if second is None:
        second = claim(store, 4)
    assert sorted(row.task_id for row in first) == ["0", "1", "2", "3"]
    assert ids(second) == ["4", "5", "6", "7"]


def test_many_claimers_share_the_rows(store: Store, database: Database) -> None:
    """P6."""
    stage(store, *map(str, range(60)))
    taken: list[str] = []

    def take() -> None:
        while True:
            try:
                batch = claim(store, 7)
            except OperationalError:
                if database.several_writers:
                    raise
                continue
            if not batch.rows:
                return
            taken.extend(ids(batch))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if database.several_writers:
        # A claim may pass over rows that another one is just taking.
        taken.extend(ids(claim(store)))
    assert sorted(taken, key=int) == [str(number) for number in range(60)]


def test_a_staging_transaction_does_not_hold_up_a_claim(store: Store, database: Database) -> None:
    """And is claimed after its commit, whatever has been claimed meanwhile (accident 9)."""
    if not database.several_writers:
        pytest.skip("one writer at a time")
    with store.engine.connect() as connection:
        store.stage(connection, [row_of(envelope("slow"))])
        stage(store, "fast")
        batch = claim(store)
        assert ids(batch) == ["fast"]
        assert store.settle(batch, Settlement(confirmed=numbers(batch))) == 0
        connection.commit()
    assert ids(claim(store)) == ["slow"]


# Settle


def test_confirmed_rows_are_gone(store: Store) -> None:
    """P5."""
    stage(store, "1", "2", "3")
    batch = claim(store, 2)
    assert store.settle(batch, Settlement(confirmed=numbers(batch))) == 0
    assert [row["task_id"] for row in stored(store)] == ["3"]


def test_kept_rows_stay_until_they_are_sent_again(store: Store) -> None:
    stage(store, "m")
    batch = claim(store)
    assert store.settle(batch, Settlement(kept={batch.rows[0].id: 30.0})) == 0
    (row,) = stored(store)
    assert row["published_at"] is not None
    assert (row["lease_token"], row["attempts"], row["last_error"]) == (None, 0, None)
    assert 20 < seconds_from_now(store, row) <= 31
    assert claim(store).rows == []
    make_due(store)
    assert ids(claim(store)) == ["m"]


def test_retried_rows_wait_and_keep_their_error_and_attempts(store: Store) -> None:
    """P7."""
    stage(store, "1", "2")
    batch = claim(store)
    one, two = numbers(batch)
    assert (
        store.settle(batch, Settlement(retried={one: (30.0, "queue full"), two: (0.0, "x")})) == 0
    )
    first, second = stored(store)
    assert (first["lease_token"], first["attempts"], first["last_error"]) == (None, 1, "queue full")
    assert 20 < seconds_from_now(store, first) <= 31
    assert second["last_error"] == "x"
    assert ids(claim(store)) == ["2"]


def test_released_rows_are_not_charged(store: Store) -> None:
    """P7: the broker was at fault."""
    stage(store, "1", "2")
    batch = claim(store)
    assert store.settle(batch, Settlement(released=numbers(batch))) == 0
    assert [(row["lease_token"], row["attempts"]) for row in stored(store)] == [(None, 0)] * 2
    assert ids(claim(store)) == ["1", "2"]


def test_postponed_rows_wait_and_are_not_charged(store: Store) -> None:
    """P7: their destination was at fault."""
    stage(store, "m")
    batch = claim(store)
    settlement = Settlement(postponed={numbers(batch)[0]: (30.0, "queue full")})
    assert store.settle(batch, settlement) == 0
    (row,) = stored(store)
    assert (row["lease_token"], row["attempts"], row["last_error"]) == (None, 0, "queue full")
    assert 20 < seconds_from_now(store, row) <= 31


def test_dead_rows_move_with_everything_that_they_hold(store: Store) -> None:
    """P7."""
    stage(store, "1", "2", due_at=NOW - timedelta(hours=1), expires_at=NOW)
    before = stored(store)[0]
    batch = claim(store)
    first, second = numbers(batch)
    assert (
        store.settle(batch, Settlement(dead={first: "no such exchange"}, confirmed=[second])) == 0
    )
    assert stored(store) == []
    (letter,) = dead(store)
    shared = set(before) & set(letter) - {"last_error", "attempts"}
    assert {name: letter[name] for name in shared} == {name: before[name] for name in shared}
    assert shared >= {"id", "key", "task", "task_id", "body", "message", "created_at", "due_at"}
    assert letter["last_error"] == "no such exchange"
    assert letter["attempts"] == 1
    assert letter["died_at"] is not None


def test_one_settlement_holds_every_outcome(store: Store) -> None:
    stage(store, *"123456")
    batch = claim(store)
    a, b, c, d, e, f = numbers(batch)
    settlement = Settlement(
        confirmed=[a],
        kept={b: 9.0},
        retried={c: (9.0, "x")},
        released=[d],
        dead={e: "y"},
        postponed={f: (9.0, "z")},
    )
    assert store.settle(batch, settlement) == 0
    assert [row["id"] for row in stored(store)] == [b, c, d, f]
    assert [row["id"] for row in dead(store)] == [e]


def test_rows_that_the_settlement_leaves_out_stay_under_their_lease(store: Store) -> None:
    stage(store, "1", "2")
    batch = claim(store)
    assert store.settle(batch, Settlement(confirmed=numbers(batch)[:1])) == 0
    assert [row["lease_token"] for row in stored(store)] == [batch.token]
    assert store.settle(batch, Settlement(confirmed=numbers(batch)[1:])) == 0


def settlements(rows: Iterable[int]) -> dict[str, Settlement]:
    found = list(rows)
    return {
        "confirmed": Settlement(confirmed=found),
        "kept": Settlement(kept=dict.fromkeys(found, 9.0)),
        "retried": Settlement(retried=dict.fromkeys(found, (9.0, "late"))),
        "released": Settlement(released=found),
        "postponed": Settlement(postponed=dict.fromkeys(found, (9.0, "late"))),
        "dead": Settlement(dead=dict.fromkeys(found, "late")),
    }


@pytest.mark.parametrize("outcome", settlements([]))
def test_who_lost_the_lease_changes_nothing_and_is_told(store: Store, outcome: str) -> None:
    """P6: a relay that was paused beyond its lease."""
    stage(store, "1", "2", "3")
    late = claim(store)
    make_due(store)
    current = claim(store, 2)
    before = stored(store)
    # The third is still its own.
    assert store.settle(late, settlements(numbers(late))[outcome]) == 2
    assert stored(store)[:2] == before[:2]
    assert len(dead(store)) == (1 if outcome == "dead" else 0)
    assert store.settle(current, Settlement(confirmed=numbers(current))) == 0


def test_a_kept_row_that_was_handled_meanwhile_is_no_lost_lease(store: Store) -> None:
    """Its worker was faster than the relay's settlement."""
    stage(store, "1", "2")
    batch = claim(store)
    with store.engine.begin() as connection:
        assert store.forget(connection, "1:0:0:") == 1
    assert store.settle(batch, Settlement(kept=dict.fromkeys(numbers(batch), 9.0))) == 0
    assert [row["task_id"] for row in stored(store)] == ["2"]


@pytest.mark.parametrize("outcome", settlements([]))
def test_settling_twice_changes_nothing_the_second_time(store: Store, outcome: str) -> None:
    stage(store, "1", "2")
    batch = claim(store)
    settlement = settlements(numbers(batch))[outcome]
    assert store.settle(batch, settlement) == 0
    before = stored(store), dead(store)
    assert store.settle(batch, settlement) == 2
    assert (stored(store), dead(store)) == before


def test_settling_a_large_batch(store: Store) -> None:
    """More rows than a statement takes parameters in some databases."""
    stage(store, *map(str, range(3000)))
    batch = claim(store, 3000)
    every = numbers(batch)
    settlement = Settlement(
        confirmed=every[:1500], released=every[1500:2900], kept=dict.fromkeys(every[2900:], 5.0)
    )
    assert store.settle(batch, settlement) == 0
    assert len(stored(store)) == 1500


# Counts


def test_counts_in_every_state(store: Store) -> None:
    """P17."""
    zero = dict.fromkeys(("outgoing", "scheduled", "in_flight", "published", "dead", "incoming"), 0)
    assert store.counts() == zero
    stage(store, *"abcdefghij")
    stage(store, "tomorrow", due_at=NOW + timedelta(days=1))
    assert store.counts() == {**zero, "outgoing": 10, "scheduled": 1}
    batch = claim(store, 6)
    assert store.counts() == {**zero, "outgoing": 4, "scheduled": 1, "in_flight": 6}
    a, b, c, d, e, f = numbers(batch)
    store.settle(
        batch,
        Settlement(
            confirmed=[a],
            kept={b: 60.0, c: 60.0},
            retried={d: (60.0, "x")},
            released=[e],
            dead={f: "x"},
        ),
    )
    with store.engine.begin() as connection:
        store.receive(connection, "k", "shop.notify", "id")
    assert store.counts() == {
        "outgoing": 6,
        "scheduled": 1,
        "in_flight": 0,
        "published": 2,
        "dead": 1,
        "incoming": 1,
    }


def test_a_row_whose_lease_is_over_waits_again(store: Store) -> None:
    stage(store, "m")
    claim(store)
    make_due(store)
    counts = store.counts()
    assert (counts["in_flight"], counts["outgoing"]) == (0, 1)


def test_a_due_row_is_no_longer_scheduled(store: Store) -> None:
    stage(store, "m", due_at=NOW - timedelta(seconds=1))
    counts = store.counts()
    assert (counts["scheduled"], counts["outgoing"]) == (0, 1)


def test_every_row_has_one_id_for_ever(store: Store) -> None:
    """Ids are not used twice, also when the table was empty: a dead letter keeps the id of its row."""
    stage(store, "1")
    batch = claim(store)
    store.settle(batch, Settlement(dead={batch.rows[0].id: "x"}))
    stage(store, "2")
    batch = claim(store)
    store.settle(batch, Settlement(dead={batch.rows[0].id: "y"}))
    assert [letter["task_id"] for letter in dead(store)] == ["1", "2"]
    with store.engine.connect() as connection:
        assert (
            connection.execute(select(func.count()).select_from(store.tables.outbox)).scalar() == 0
        )
