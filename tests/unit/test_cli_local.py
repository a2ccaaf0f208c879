"""Operators' commands and local queues: what lies there is found, told of and changed as well."""

import json
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa

from tests.unit.conftest import MakeShop
from tests.unit.shop import Shop
from tests.unit.test_cli import run
from tests.unit.test_cli_messages import listed
from tests.unit.test_cli_storage import answer

#: The states of local queues' messages, with one of the outbox beside them.
STATES = {"due": 1, "scheduled": 1, "taken": 1, "outgoing": 1}
WORKER = "4711@web:5f1c9a7e02"


@pytest.fixture
def local_shop(make_shop: MakeShop, database_url: str) -> Shop:
    """A shop with a local queue, emails, that has a message in each state; one waits for a relay."""
    shop = make_shop(database_url, outbox_local_queues=["emails"])
    shop.notify.apply_async(("taken",), task_id="taken", queue="emails", priority=9)
    take(shop)
    shop.notify.apply_async(("due",), task_id="due", queue="emails", priority=3)
    shop.notify.apply_async(("later",), task_id="scheduled", queue="emails", countdown=3600)
    shop.notify.apply_async(("relay",), task_id="outgoing")
    return shop


def take(shop: Shop, seconds: float = 30.0) -> None:
    store = shop.outbox.store.local
    assert store.take(["emails"], 1, token=WORKER, lease_seconds=seconds, max_attempts=3)


def counts(shop: Shop) -> dict[str, int]:
    """How many rows are in each state, of those with rows."""
    found: dict[str, int] = answer(shop, "storage", "counts")
    return {state: count for state, count in found.items() if count}


def rows(shop: Shop) -> dict[str, Any]:
    """The rows of local queues, by task id."""
    table = shop.outbox.tables.local
    with shop.engine.connect() as connection:
        return {row.task_id: row for row in connection.execute(sa.select(table))}


def end_lease(shop: Shop, seconds_ago: float = 5.0) -> None:
    table = shop.outbox.tables.local
    over = sa.update(table).where(table.c.task_id == "taken")
    with shop.engine.begin() as connection:
        ended = shop.outbox.store.dialect.after(-seconds_ago)
        assert connection.execute(over.values(available_at=ended)).rowcount == 1


def local_id(shop: Shop, task_id: str) -> str:
    return f"local:{rows(shop)[task_id].id}"


# list, show


def test_list_has_the_messages_of_local_queues(local_shop: Shop) -> None:
    """P17, P18."""
    said = answer(local_shop, "list")
    assert said["total"] == 4
    states = {message["task_id"]: message["state"] for message in said["messages"]}
    assert states == {name: name for name in STATES}
    ids = {message["task_id"]: message["id"] for message in said["messages"]}
    assert ids["due"] == local_id(local_shop, "due")
    assert isinstance(ids["outgoing"], int)
    for state in STATES:
        assert listed(local_shop, "list", "--state", state) == [state]
    assert set(listed(local_shop, "list", "--queue", "emails")) == {"due", "scheduled", "taken"}
    assert f"{ids['due']} " in run(local_shop.app, "list").output


@pytest.mark.parametrize(
    ("task_id", "reason"),
    [
        ("due", "has waited for a worker of emails for"),
        ("scheduled", "due in 60 min"),
        ("taken", f"taken by {WORKER}; the lease ends in"),
    ],
)
def test_show_says_why_a_message_is_where_it_is(
    local_shop: Shop, task_id: str, reason: str
) -> None:
    """P18."""
    for name in (task_id, local_id(local_shop, task_id)):
        (message,) = answer(local_shop, "show", name)["messages"]
        assert (message["task_id"], message["state"]) == (task_id, task_id)
        assert message["queue"] == "emails"
        assert reason in message["why"]
        assert message["lineage"]["root_id"] == task_id
        assert reason in run(local_shop.app, "show", name).output


def test_show_says_that_a_worker_is_lost(local_shop: Shop) -> None:
    end_lease(local_shop, 90.4)
    (message,) = answer(local_shop, "show", "taken")["messages"]
    assert message["state"] == "due"
    assert message["why"] == f"{WORKER} is lost, its lease has been over for 2 min"


def test_show_says_that_a_worker_gave_a_message_back(local_shop: Shop) -> None:
    local_shop.outbox.store.local.give_back([rows(local_shop)["taken"].id], WORKER, 50.4)
    (message,) = answer(local_shop, "show", "taken")["messages"]
    assert message["why"] == "its worker gave it back; again in 50 s"


def test_show_tells_of_the_execution_that_is_not_acknowledged(local_shop: Shop) -> None:
    """P18: handled, and its row not deleted yet."""
    store, key = local_shop.outbox.store, rows(local_shop)["taken"].key
    with store.engine.begin() as connection:
        store.receive(connection, key, "shop.notify", "taken")
    (message,) = answer(local_shop, "show", "taken")["messages"]
    assert (message["state"], message["handled"]["state"]) == ("taken", "SUCCESS")


# cancel, scheduled


@pytest.mark.parametrize("task_id", ["due", "scheduled"])
def test_cancel_by_row_and_by_task(local_shop: Shop, task_id: str) -> None:
    """P11, P18."""
    name = task_id if task_id == "due" else local_id(local_shop, task_id)
    assert answer(local_shop, "cancel", name, "--yes", "--dry-run")["rows"] == 1
    assert counts(local_shop) == STATES
    said = answer(local_shop, "cancel", name, "--yes")
    assert said == {"dry_run": False, "rows": 1, "refused": {}, "unknown": []}
    assert set(rows(local_shop)) == {"due", "scheduled", "taken"} - {task_id}
    assert counts(local_shop)["outgoing"] == 1


def test_cancel_refuses_what_a_worker_has(local_shop: Shop) -> None:
    """P6."""
    name = local_id(local_shop, "taken")
    result = run(local_shop.app, "cancel", name, "due", "--yes", "--json")
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert (said["rows"], list(said["refused"])) == (1, [name])
    assert WORKER in said["refused"][name]
    assert set(rows(local_shop)) == {"scheduled", "taken"}


def test_the_same_number_is_another_row_in_each_table(sqlite_url: str, make_shop: MakeShop) -> None:
    shop = make_shop(sqlite_url, outbox_local_queues=["emails"])
    shop.notify.apply_async(task_id="local", queue="emails")
    shop.notify.apply_async(("m",), task_id="relay")
    assert [message["task_id"] for message in answer(shop, "show", "1")["messages"]] == ["relay"]
    answer(shop, "cancel", "local:1", "--yes")
    assert (rows(shop), shop.stored()) == ({}, ["m"])


def test_scheduled_messages_are_listed_and_moved(local_shop: Shop) -> None:
    """P11: also the eta that the worker reads."""
    assert listed(local_shop, "scheduled", "list") == ["scheduled"]
    name = local_id(local_shop, "scheduled")
    words = ["scheduled", "reschedule", name, "--at", "2100-01-01T00:00:00Z"]
    assert answer(local_shop, *words, "--dry-run")["rows"] == 1
    assert answer(local_shop, *words)["rows"] == 1
    row = rows(local_shop)["scheduled"]
    then = datetime(2100, 1, 1, tzinfo=timezone.utc)
    assert (row.due_at, row.available_at) == (then, then)
    assert json.loads(row.message)["headers"]["eta"] == "2100-01-01T00:00:00+00:00"
    assert answer(local_shop, "scheduled", "run-now", "scheduled")["rows"] == 1
    eta = json.loads(rows(local_shop)["scheduled"].message)["headers"]["eta"]
    assert datetime.fromisoformat(eta) <= datetime.now(timezone.utc) + timedelta(seconds=30)
    assert counts(local_shop) == {"due": 2, "taken": 1, "outgoing": 1}


def test_scheduled_cancel_touches_nothing_else(local_shop: Shop) -> None:
    words = ["scheduled", "cancel", "scheduled", "due", "--yes"]
    assert run(local_shop.app, *words).exit_code == 1
    assert set(rows(local_shop)) == {"due", "taken"}


# dead-letters


def test_a_message_that_is_delivered_in_vain_too_often(local_shop: Shop) -> None:
    """P18: it is listed, shown, and replayed into its queue."""
    name = local_id(local_shop, "taken")
    for _ in range(3):
        end_lease(local_shop)
        take(local_shop)
    assert set(rows(local_shop)) == {"due", "scheduled"}
    error = f"delivered 3 times and never handled; the last time: its worker was lost: {WORKER}"
    (listed_letter,) = answer(local_shop, "dead-letters", "list", "--queue", "emails")["messages"]
    assert (listed_letter["id"], listed_letter["last_error"]) == (name, error)
    for word in (name, "taken"):
        (shown,) = answer(local_shop, "dead-letters", "show", word)["messages"]
        assert (shown["id"], shown["state"], shown["queue"]) == (name, "dead", "emails")
        assert shown["why"] == f"dead letter: {error}"
    assert answer(local_shop, "dead-letters", "replay", name, "--dry-run")["ids"] == [name]
    assert answer(local_shop, "dead-letters", "replay", name)["rows"] == 1
    row = rows(local_shop)["taken"]
    assert (row.attempts, row.last_error, row.lease_token) == (0, None, None)
    assert counts(local_shop) == {"due": 2, "scheduled": 1, "outgoing": 1}


def test_dead_letters_of_local_queues_are_discarded(local_shop: Shop) -> None:
    name = local_id(local_shop, "taken")
    for _ in range(3):
        end_lease(local_shop)
        take(local_shop)
    assert answer(local_shop, "dead-letters", "discard", name, "--yes")["rows"] == 1
    assert counts(local_shop) == {"due": 1, "scheduled": 1, "outgoing": 1}


# storage


def test_counts_have_local_queues(local_shop: Shop) -> None:
    """P17."""
    assert counts(local_shop) == STATES
    by_task = answer(local_shop, "storage", "counts", "--by", "task")["shop.notify"]
    assert {state: count for state, count in by_task.items() if count} == STATES
    by_destination = answer(local_shop, "storage", "counts", "--by", "destination")
    assert {name: sum(found.values()) for name, found in by_destination.items()} == {
        "emails": 3,
        "celery": 1,
    }


@pytest.mark.parametrize("state", ["due", "scheduled"])
def test_clear_deletes_what_it_is_told(local_shop: Shop, state: str) -> None:
    """P18."""
    assert answer(local_shop, "storage", "clear", state, "--yes", "--dry-run")["deleted"] == {
        state: 1
    }
    said = answer(local_shop, "storage", "clear", state, "--yes")
    assert (said["deleted"], said["taken"]) == ({state: 1}, 1)
    assert counts(local_shop) == {name: 1 for name in STATES if name != state}


def test_clear_leaves_alone_what_workers_have(local_shop: Shop) -> None:
    said = run(local_shop.app, "storage", "clear", "due", "--yes").output
    assert "left alone: 1 taken (local queues), which are a worker's" in said


def test_release_gives_back_what_a_dead_worker_had(local_shop: Shop) -> None:
    """P6, P18."""
    assert answer(local_shop, "storage", "release") == {"dry_run": False, "rows": 0}
    end_lease(local_shop)
    (lease,) = answer(local_shop, "storage", "release", "--dry-run")["leases"]
    assert (lease["token"], lease["holder"], lease["messages"]) == (WORKER, "worker", 1)
    assert answer(local_shop, "storage", "release") == {"dry_run": False, "rows": 1}
    assert rows(local_shop)["taken"].lease_token is None


@pytest.mark.parametrize("words", [["--token", WORKER], ["--older-than", "5"]])
def test_release_of_a_live_lease(local_shop: Shop, words: list[str]) -> None:
    """P6, P18: by its token, or by the time since the worker renewed it."""
    table = local_shop.outbox.tables.local
    renewed = sa.update(table).where(table.c.lease_token == WORKER)
    with local_shop.engine.begin() as connection:
        ends = local_shop.outbox.store.dialect.after(20)
        connection.execute(renewed.values(available_at=ends))
    longer = ["storage", "release", "--older-than", "15", "--yes"]
    assert answer(local_shop, *longer)["rows"] == 0
    assert answer(local_shop, "storage", "release", *words, "--yes")["rows"] == 1
    assert counts(local_shop) == {"due": 2, "scheduled": 1, "outgoing": 1}
    take(local_shop)


# status


def test_status_shows_backlog_and_lag_of_each_queue(local_shop: Shop) -> None:
    """P17."""
    table = local_shop.outbox.tables.local
    waits = sa.update(table).where(table.c.task_id == "due")
    with local_shop.engine.begin() as connection:
        late = local_shop.outbox.store.dialect.after(-90)
        connection.execute(waits.values(available_at=late))
    said = answer(local_shop, "status")
    assert {state: said[state] for state in STATES} == STATES
    emails = said["local_queues"]["emails"]
    assert 90 <= emails.pop("lag_seconds") < 300
    assert emails == {"due": 1, "scheduled": 1, "taken": 1}
    assert "emails" in run(local_shop.app, "status").output
    assert run(local_shop.app, "status", "--max-lag", "600").exit_code == 0
    late_result = run(local_shop.app, "status", "--max-lag", "60")
    assert late_result.exit_code == 1
    assert "the lag of the local queue emails is more than 60 s" in late_result.output
