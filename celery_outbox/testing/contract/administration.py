"""Administration: what operators read and change, with messages in every state."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, insert, select, update

from celery_outbox.local.message import queued
from celery_outbox.storage.administration import Administration, Selection
from celery_outbox.storage.store import Batch, Settlement, Store
from celery_outbox.testing.contract.database import Database
from celery_outbox.testing.contract.incoming import receive, remembered
from celery_outbox.testing.contract.outgoing import (
    claim,
    dead,
    envelope,
    ids,
    seconds_from_now,
    stage,
    stored,
)

NOW = datetime.now(timezone.utc) - timedelta(seconds=1)
ETA = NOW + timedelta(days=2)


@pytest.fixture
def administration(store: Store) -> Administration:
    return Administration(store.engine, store.tables)


def labels(store: Store) -> set[str]:
    """What is in the outbox."""
    return {row["task_id"] for row in stored(store)}


def buried(store: Store) -> set[str]:
    """What is among the dead letters."""
    return {row["task_id"] for row in dead(store)}


def row_id(store: Store, label: str) -> int:
    (found,) = [row["id"] for row in (*stored(store), *dead(store)) if row["task_id"] == label]
    return int(found)


def bury(store: Store, *names: str, error: str = "NOT_FOUND - no exchange", **changes: Any) -> None:
    stage(store, *names, **changes)
    batch = claim(store)
    assert set(names) == set(ids(batch))
    store.settle(batch, Settlement(dead={row.id: error for row in batch.rows}))


def schedule(store: Store, *names: str, **changes: Any) -> None:
    headers = {"id": names[0], "eta": ETA.isoformat()}
    stage(store, *names, **{"due_at": ETA, "headers": headers, **changes})


def keep(store: Store, *names: str) -> None:
    stage(store, *names)
    batch = claim(store)
    store.settle(batch, Settlement(kept={row.id: 3600 for row in batch.rows}))


def claimed(store: Store, *names: str) -> Batch:
    stage(store, *names)
    batch = claim(store)
    assert set(ids(batch)) == set(names)
    return batch


def end_leases(store: Store) -> None:
    outbox = store.tables.outbox
    with store.engine.begin() as connection:
        over = update(outbox).where(outbox.c.lease_token.is_not(None))
        connection.execute(over.values(available_at=store.dialect.after(-10)))


def fill(store: Store) -> None:
    """One message in each state, called by its name."""
    bury(store, "dead")
    keep(store, "published")
    claimed(store, "in_flight")
    schedule(store, "scheduled")
    stage(store, "outgoing")
    assert receive(store, "handled:0:0:")


EVERY = {"published", "in_flight", "scheduled", "outgoing"}


@contextmanager
def before(engine: Engine, verb: str, action: Callable[[], object]) -> Iterator[None]:
    """Let something happen just before the first statement of a kind, once."""
    happened: list[bool] = []

    def listen(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith(verb) and not happened:
            happened.append(True)
            action()

    event.listen(engine, "before_cursor_execute", listen)
    try:
        yield
    finally:
        event.remove(engine, "before_cursor_execute", listen)
    assert happened


# Reading


def test_states_are_those_of_the_counts(store: Store, administration: Administration) -> None:
    """P17."""
    fill(store)
    rows = administration.messages()
    assert {row["task_id"]: row["state"] for row in rows} == {name: name for name in EVERY}
    counts = store.counts()
    for state in EVERY:
        assert administration.how_many(Selection(state=state)) == counts[state] == 1


def test_bodies_are_not_read(store: Store, administration: Administration) -> None:
    fill(store)
    for row in (*administration.messages(), *administration.dead_letters()):
        assert "body" not in row


def test_counts_by_task_and_by_destination(store: Store, administration: Administration) -> None:
    """P17."""
    fill(store)
    stage(store, "other", task="shop.other", routing_key="mail")
    notify = administration.counts_by("task")["shop.notify"]
    assert notify == {**dict.fromkeys(EVERY, 1), "dead": 1, "incoming": 1}
    assert administration.counts_by("task")["shop.other"] == {"outgoing": 1}
    by_destination = administration.counts_by("destination")
    assert by_destination == {
        "celery": {**dict.fromkeys(EVERY, 1), "dead": 1},
        "mail": {"outgoing": 1},
    }


def test_what_is_listed_is_the_oldest(store: Store, administration: Administration) -> None:
    stage(store, "1", "2", "3")
    assert [row["task_id"] for row in administration.messages(limit=2)] == ["1", "2"]
    assert administration.how_many() == 3


@pytest.mark.parametrize(
    ("selection", "found"),
    [
        (Selection(task="shop.mail"), {"mail"}),
        (Selection(task="shop.*"), {"mail", "upper", "percent"}),
        (Selection(task="shop.M*"), {"upper"}),
        (Selection(task="*"), {"mail", "upper", "percent"}),
        (Selection(task="shop.%"), {"percent"}),
        (Selection(task="sh_p.mail"), set()),
        (Selection(task="' OR 1=1 --"), set()),
        (Selection(destination="orders/eu"), {"upper"}),
        (Selection(destination="orders/*"), {"upper"}),
        (Selection(task_ids=["mail", "percent"]), {"mail", "percent"}),
        (Selection(ids=[], task_ids=["mail"]), {"mail"}),
        (Selection(ids=[]), set()),
        (Selection(older_than_seconds=3600), set()),
        (Selection(older_than_seconds=0), {"mail", "upper", "percent"}),
        (Selection(task="shop.*", destination="celery"), {"mail", "percent"}),
    ],
)
def test_a_selection_means_what_it_says(
    store: Store, administration: Administration, selection: Selection, found: set[str]
) -> None:
    stage(store, "mail", task="shop.mail")
    stage(store, "upper", task="shop.Mail", exchange="orders", routing_key="eu")
    stage(store, "percent", task="shop.%")
    assert {row["task_id"] for row in administration.messages(selection)} == found


@pytest.mark.parametrize(
    ("text", "found"),
    [("100%", {"full"}), ("queue", {"full", "gone"}), ("_", {"gone"}), ("%' OR 1=1", set())],
)
def test_an_error_is_found_by_a_part_of_it(
    store: Store, administration: Administration, text: str, found: set[str]
) -> None:
    bury(store, "full", error="Queue is 100% full")
    bury(store, "gone", error="no queue a_b")
    rows = administration.dead_letters(Selection(error=text))
    assert {row["task_id"] for row in rows} == found


def test_the_age_of_a_dead_letter_is_since_it_died(
    store: Store, administration: Administration
) -> None:
    bury(store, "young", "old")
    table = store.tables.dead_letter
    with store.engine.begin() as connection:
        aged = update(table).where(table.c.task_id == "old")
        connection.execute(aged.values(died_at=store.dialect.after(-3600)))
    (row,) = administration.dead_letters(Selection(older_than_seconds=1800))
    assert row["task_id"] == "old"


def test_errors_are_grouped(store: Store, administration: Administration) -> None:
    bury(store, "1", "2", error="no exchange")
    batch = claimed(store, "3", "4")
    one, other = (row.id for row in batch.rows)
    store.settle(batch, Settlement(retried={one: (60, "no exchange"), other: (60, "full")}))
    assert administration.errors() == [
        {"error": "no exchange", "messages": 3, "dead": 2},
        {"error": "full", "messages": 1, "dead": 0},
    ]
    assert len(administration.errors(limit=1)) == 1


def test_leases_live_and_over(store: Store, administration: Administration) -> None:
    over = claimed(store, "1", "2")
    end_leases(store)
    live = claim(store, limit=1)
    leases = {lease["token"]: lease for lease in administration.leases()}
    assert (leases[over.token]["messages"], bool(leases[over.token]["is_over"])) == (1, True)
    assert (leases[live.token]["messages"], bool(leases[live.token]["is_over"])) == (1, False)


# Local queues


def queue(store: Store, *names: str, due_at: datetime | None = None) -> None:
    """Put messages into a local queue."""
    eta = {} if due_at is None else {"eta": due_at.isoformat()}
    with store.engine.begin() as connection:
        for name in names:
            sent = envelope(name, due_at=due_at, headers={"id": name, **eta})
            store.local.put(connection, [queued(sent, "emails", hold_scheduled=True)])


def test_messages_of_local_queues_are_messages(
    store: Store, administration: Administration
) -> None:
    """P17, P18: on each database they are listed, counted, moved, released and cancelled."""
    fill(store)
    queue(store, "taken")
    store.local.take(["emails"], 1, token="w", lease_seconds=60, max_attempts=3)
    queue(store, "due")
    queue(store, "later", due_at=ETA)
    rows = administration.messages(Selection(destination="emails"))
    assert {row["task_id"]: row["state"] for row in rows} == {
        "taken": "taken",
        "due": "due",
        "later": "scheduled",
    }
    every = {**dict.fromkeys(EVERY, 1), "due": 1, "taken": 1, "dead": 1, "incoming": 1}
    assert administration.counts() == {**every, "scheduled": 2}
    assert store.local.lags()["emails"] >= 0
    assert [lease["holder"] for lease in administration.leases()] == ["relay", "worker"]
    assert sum(administration.reschedule(Selection(task_ids=["later"]), NOW)) == 1
    assert administration.counts() == {**every, "due": 2}
    assert sum(administration.release(token="w")) == 1
    assert sum(administration.cancel(Selection(destination="emails"))) == 3
    assert administration.counts() == {**every, "due": 0, "taken": 0}


# Clear, cancel, discard


@pytest.mark.parametrize("what", ["outgoing", "scheduled", "published"])
def test_clear_deletes_what_is_in_the_state_and_nothing_else(
    store: Store, administration: Administration, what: str
) -> None:
    """P18."""
    fill(store)
    assert sum(administration.clear(what)) == 1
    assert labels(store) == EVERY - {what}
    assert buried(store) == {"dead"}
    assert remembered(store) == 1
    assert sum(administration.clear(what)) == 0


def test_clear_incoming(store: Store, administration: Administration) -> None:
    """P18."""
    fill(store)
    assert sum(administration.clear("incoming")) == 1
    assert remembered(store) == 0
    assert labels(store) == EVERY
    assert buried(store) == {"dead"}


def test_clear_dead(store: Store, administration: Administration) -> None:
    """P18."""
    fill(store)
    assert sum(administration.clear("dead")) == 1
    assert buried(store) == set()
    assert labels(store) == EVERY
    assert remembered(store) == 1


def test_changes_go_in_chunks(store: Store, administration: Administration) -> None:
    """P12."""
    stage(store, *"abcde")
    assert list(administration.clear("outgoing", chunk=2)) == [2, 2, 1]
    bury(store, *"abcd")
    assert list(administration.replay(chunk=2)) == [2, 2]
    assert labels(store) == set("abcd")
    for number in range(3):
        receive(store, str(number))
    assert list(administration.clear("incoming", chunk=2)) == [2, 1]


def test_what_comes_in_meanwhile_does_not_keep_a_change_going(
    store: Store, administration: Administration
) -> None:
    stage(store, "1", "2")
    changes = administration.clear("outgoing", chunk=1)
    assert next(changes) == 1
    stage(store, "late")
    assert list(changes) == [1]
    assert labels(store) == {"late"}


def test_a_lease_that_is_over_protects_nothing(
    store: Store, administration: Administration
) -> None:
    claimed(store, "m")
    assert sum(administration.cancel(Selection(task_ids=["m"]))) == 0
    end_leases(store)
    assert sum(administration.cancel(Selection(task_ids=["m"]))) == 1
    assert labels(store) == set()


def test_cancel_takes_what_was_chosen_and_not_claimed(
    store: Store, administration: Administration
) -> None:
    """P11, P18."""
    fill(store)
    stage(store, "other")
    chosen = Selection(task_ids=["outgoing", "scheduled", "in_flight", "published", "dead"])
    assert sum(administration.cancel(chosen)) == 2
    assert labels(store) == {"in_flight", "published", "other"}
    assert buried(store) == {"dead"}


def test_a_relay_that_claims_in_between_wins_or_finds_nothing(
    store: Store, administration: Administration
) -> None:
    """P6: a message is cancelled or claimed, never both."""
    stage(store, "1", "2", "3")
    taken: list[str] = []
    relay = Store(create_engine(store.engine.url), store.tables)
    with before(store.engine, "DELETE", lambda: taken.extend(ids(claim(relay, limit=2)))):
        cancelled = sum(administration.cancel(Selection(task="shop.notify")))
    relay.engine.dispose()
    assert cancelled + len(taken) == 3
    assert labels(store) == set(taken)


def test_discard_deletes_what_was_chosen(store: Store, administration: Administration) -> None:
    """P18."""
    bury(store, "1", "2", error="full")
    bury(store, "3", error="gone")
    assert sum(administration.discard(Selection(error="full"))) == 2
    assert buried(store) == {"3"}


# Replay


def test_replay_puts_a_dead_letter_back_as_it_was_sent(
    store: Store, administration: Administration
) -> None:
    """P3, P18."""
    sent = envelope("m", expires_at=ETA, is_text=True)
    bury(store, "m", expires_at=ETA, is_text=True)
    (buried_row,) = dead(store)
    assert sum(administration.replay(Selection(task_ids=["m"]))) == 1
    assert dead(store) == []
    (row,) = stored(store)
    assert (row["id"], row["attempts"], row["last_error"]) == (buried_row["id"], 0, None)
    assert (row["lease_token"], row["published_at"]) == (None, None)
    assert row["created_at"] == buried_row["created_at"]
    assert seconds_from_now(store, row) <= 0
    (again,) = claim(store).rows
    assert again.envelope == sent
    assert again.attempts == 1


def test_replay_takes_what_was_chosen(store: Store, administration: Administration) -> None:
    fill(store)
    bury_again = {"full": "Queue is full", "gone": "no exchange"}
    with store.engine.begin() as connection:
        connection.execute(store.tables.outbox.delete())
    for name, error in bury_again.items():
        bury(store, name, error=error)
    assert sum(administration.replay(Selection(error="queue"))) == 1
    assert labels(store) == {"full"}
    assert buried(store) == {"dead", "gone"}


def test_replay_is_one_transaction(store: Store, administration: Administration) -> None:
    """P5: interrupted after the insert, nothing has happened."""
    bury(store, "1", "2")

    def die() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), before(store.engine, "DELETE", die):
        list(administration.replay())
    assert labels(store) == set()
    assert buried(store) == {"1", "2"}
    assert sum(administration.replay()) == 2


def test_a_dead_letter_is_replayed_once(store: Store, administration: Administration) -> None:
    """Of two that replay at once one does; the other reports that it did not."""
    bury(store, "1", "2")
    engine = create_engine(store.engine.url)
    other = Administration(engine, store.tables)
    counts: list[int] = []
    with before(store.engine, "INSERT", lambda: counts.append(sum(other.replay()))):
        counts.append(sum(administration.replay()))
    engine.dispose()
    assert sum(counts) == 2
    assert labels(store) == {"1", "2"}
    assert len(stored(store)) == 2
    assert buried(store) == set()


def test_a_replayed_message_may_die_again(store: Store, administration: Administration) -> None:
    bury(store, "m")
    assert sum(administration.replay()) == 1
    batch = claim(store)
    store.settle(batch, Settlement(dead={row.id: "again" for row in batch.rows}))
    assert buried(store) == {"m"}
    assert sum(administration.replay()) == 1


def test_replay_puts_a_dead_letter_back_into_its_local_queue(
    store: Store, administration: Administration
) -> None:
    """P18: also where a row of the outbox has died with the same number."""
    bury(store, "relay")
    queue(store, "worker")
    options: dict[str, Any] = {"token": "w", "max_attempts": 1}
    (taken,) = store.local.take(["emails"], 1, lease_seconds=-1, **options)
    assert [each.is_dead for each in store.local.take(["emails"], 1, lease_seconds=60, **options)]
    assert buried(store) == {"relay", "worker"}
    assert sum(administration.replay(Selection(local_ids=[taken.id]))) == 1
    assert (buried(store), labels(store)) == ({"relay"}, set())
    (again,) = store.local.take(["emails"], 1, lease_seconds=60, **options)
    assert (again.id, again.number, again.envelope) == (taken.id, 1, taken.envelope)
    assert sum(administration.replay()) == 1
    assert labels(store) == {"relay"}


# Release


def test_release_gives_back_where_the_lease_is_over(
    store: Store, administration: Administration
) -> None:
    """P6, P18."""
    claimed(store, "over")
    end_leases(store)
    live = claimed_alone(store, "live")
    (waited,) = [row["available_at"] for row in stored(store) if row["task_id"] == "over"]
    assert sum(administration.release()) == 1
    rows = {row["task_id"]: row for row in stored(store)}
    assert rows["over"]["lease_token"] is None
    assert rows["over"]["available_at"] == waited
    assert rows["over"]["attempts"] == 1
    assert rows["live"]["lease_token"] == live


def claimed_alone(store: Store, label: str) -> str:
    """Claim a message while others are available; return the token."""
    outbox = store.tables.outbox
    stage(store, label)
    token = f"token of {label}"
    with store.engine.begin() as connection:
        values = {"lease_token": token, "attempts": 1, "available_at": store.dialect.after(60)}
        connection.execute(update(outbox).where(outbox.c.task_id == label).values(**values))
    return token


def test_release_of_one_lease(store: Store, administration: Administration) -> None:
    """P6: whoever has held it can't settle any more."""
    batch = claimed(store, "1", "2")
    other = claimed_alone(store, "3")
    assert sum(administration.release(token=batch.token)) == 2
    rows = {row["task_id"]: row for row in stored(store)}
    assert rows["3"]["lease_token"] == other
    assert {rows[each]["lease_token"] for each in "12"} == {None}
    assert store.settle(batch, Settlement(confirmed=[row.id for row in batch.rows])) == 2
    assert ids(claim(store)) == ["1", "2"]


def test_release_of_leases_that_end_soon(store: Store, administration: Administration) -> None:
    claimed_alone(store, "m")  # for 60 seconds
    assert sum(administration.release(ends_within_seconds=30)) == 0
    assert sum(administration.release(ends_within_seconds=61)) == 1
    assert ids(claim(store)) == ["m"]


# Republish, reschedule, prune


def test_republish_makes_kept_messages_due_now(
    store: Store, administration: Administration
) -> None:
    """P18."""
    fill(store)
    keep_again = [row for row in stored(store) if row["task_id"] == "published"]
    assert seconds_from_now(store, keep_again[0]) > 3000
    assert sum(administration.republish(Selection(task="shop.other"))) == 0
    assert sum(administration.republish(Selection(task="shop.notify"))) == 1
    assert sum(administration.republish()) == 0
    assert set(ids(claim(store))) == {"outgoing", "published"}


def test_reschedule_moves_the_row_and_the_eta_in_its_headers(
    store: Store, administration: Administration
) -> None:
    """P11: the worker would wait for the eta that it finds in the message."""
    fill(store)
    sooner = ETA - timedelta(days=1)
    assert sum(administration.reschedule(Selection(task="shop.notify"), sooner)) == 1
    (row,) = [row for row in stored(store) if row["task_id"] == "scheduled"]
    assert (row["due_at"], row["available_at"]) == (sooner, sooner)
    assert store.counts()["scheduled"] == 1
    now = administration.now()
    assert sum(administration.reschedule(Selection(ids=[row["id"]]), now)) == 1
    batch = claim(store)
    (again,) = [row.envelope for row in batch.rows if row.task_id == "scheduled"]
    assert again is not None
    assert again.headers == {"id": "scheduled", "eta": now.isoformat()}
    assert again.due_at == now
    assert again.body == envelope().body


def test_reschedule_passes_over_what_would_expire_or_can_not_be_read(
    store: Store, administration: Administration
) -> None:
    schedule(store, "expires", expires_at=ETA + timedelta(hours=1))
    schedule(store, "newer")
    schedule(store, "protocol 1", headers={})
    outbox = store.tables.outbox
    with store.engine.begin() as connection:
        newer = update(outbox).where(outbox.c.task_id == "newer")
        connection.execute(newer.values(message='{"format": 99}'))
    unchanged = stored(store)
    assert sum(administration.reschedule(Selection(), ETA + timedelta(hours=2))) == 0
    assert stored(store) == unchanged


def test_prune_deletes_all_that_is_old(store: Store, administration: Administration) -> None:
    """P12."""
    inbox = store.tables.inbox
    for number in range(5):
        receive(store, str(number))
    with store.engine.begin() as connection:
        connection.execute(update(inbox).values(handled_at=store.dialect.after(-100)))
    receive(store, "young")
    assert list(administration.prune(50, chunk=2)) == [2, 2, 1]
    assert remembered(store) == 1


def test_rows_that_another_transaction_holds_are_left_alone(
    store: Store, administration: Administration, database: Database
) -> None:
    if not database.several_writers:
        pytest.skip("one writer at a time")
    bury(store, "1", "2")
    table, first = store.tables.dead_letter, row_id(store, "1")
    with store.engine.connect() as connection, connection.begin():
        # By the key: without an index InnoDB would lock the whole table.
        held = select(table).where(table.c.id == first).with_for_update()
        connection.execute(held)
        assert sum(administration.replay()) == 1
    assert buried(store) == {"1"}


def test_the_inbox_answers_by_key_and_by_task_id(
    store: Store, administration: Administration
) -> None:
    receive(store, "one:0:0:")
    with store.engine.begin() as connection:
        connection.execute(
            insert(store.tables.inbox).values(
                key="two:0:0:",
                task="t",
                task_id="two",
                state="SUCCESS",
                handled_at=store.dialect.now(),
            )
        )
    (by_key,) = administration.handled(keys=["one:0:0:"])
    (by_task_id,) = administration.handled(task_id="two")
    assert (by_key["key"], by_task_id["key"]) == ("one:0:0:", "two:0:0:")
    assert administration.handled() == []
