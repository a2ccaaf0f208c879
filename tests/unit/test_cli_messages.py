"""``celery -A app outbox list|show|cancel|republish|dead-letters|scheduled``."""

import json
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa

from celery_outbox.storage.store import Settlement
from tests.unit import wire
from tests.unit.shop import Shop
from tests.unit.test_cli import run
from tests.unit.test_cli_storage import EVERY, answer, fill


def row_ids(shop: Shop) -> dict[str, str]:
    """The ids of the rows by the task ids, in the outbox and among the dead letters."""
    tables = shop.outbox.tables
    with shop.outbox.engine.connect() as connection:
        return {
            task_id: str(number)
            for table in (tables.outbox, tables.dead_letter)
            for number, task_id in connection.execute(sa.select(table.c.id, table.c.task_id))
        }


def bury(shop: Shop, label: str, error: str, **options: Any) -> str:
    """Make a dead letter; return the id of its row."""
    task_id = str(shop.notify.apply_async((label,), **options).id)
    batch = shop.outbox.store.claim(100, 60)
    dead = {row.id: error for row in batch.rows if row.task_id == task_id}
    rest = [row.id for row in batch.rows if row.task_id != task_id]
    shop.outbox.store.settle(batch, Settlement(dead=dead, released=rest))
    (number,) = dead
    return str(number)


def listed(shop: Shop, *words: str) -> list[str]:
    """The task ids that a command lists, in its order."""
    return [message["task_id"] for message in answer(shop, *words)["messages"]]


# list


def test_list_shows_every_message_of_the_outbox(shop: Shop) -> None:
    """P18."""
    found = fill(shop)
    said = answer(shop, "list")
    assert said["total"] == 4
    states = {message["task_id"]: message["state"] for message in said["messages"]}
    assert states == {task_id: state for state, task_id in found.items() if state != "dead"}
    result = run(shop.app, "list")
    assert "4 of 4 message(s)" in result.output
    for state, task_id in found.items():
        assert (task_id in result.output) == (state != "dead")


@pytest.mark.parametrize("state", ["outgoing", "scheduled", "in_flight", "published"])
def test_list_by_state(shop: Shop, state: str) -> None:
    found = fill(shop)
    assert listed(shop, "list", "--state", state) == [found[state]]


def test_list_filters_and_limits(shop: Shop) -> None:
    one = shop.notify.apply_async(("1",), queue="mail").id
    two = shop.notify.delay("2").id
    assert listed(shop, "list", "--destination", "mail") == [one]
    assert listed(shop, "list", "--queue", "ma*") == [one]
    assert listed(shop, "list", "--task", "shop.*") == [one, two]
    assert listed(shop, "list", "--task", "shop.plain") == []
    assert listed(shop, "list", "--older-than", "3600") == []
    said = answer(shop, "list", "--limit", "1")
    assert ([message["task_id"] for message in said["messages"]], said["total"]) == ([one], 2)


@pytest.mark.parametrize(
    "words",
    [["--task", "*.notify"], ["--task", ""], ["--state", "gone"], ["--limit", "0"]],
    ids=" ".join,
)
def test_list_refuses_what_makes_no_sense(sqlite_shop: Shop, words: list[str]) -> None:
    assert run(sqlite_shop.app, "list", *words).exit_code == 2


def test_filters_are_never_sql(shop: Shop) -> None:
    fill(shop)
    for words in (
        ["--task", "'; DROP TABLE outbox; --"],
        ["--destination", "x' OR '1'='1"],
        ["--error", "%"],
    ):
        assert listed(shop, "list", *words) == []
    assert shop.outbox.store.counts() == EVERY


def test_a_terminal_is_told_no_control_characters(sqlite_shop: Shop) -> None:
    number = bury(sqlite_shop, "m", "\x1b[2Jgone\nand more")
    for words in (["dead-letters", "list"], ["show", number], ["status"]):
        output = run(sqlite_shop.app, *words).output
        assert "\x1b" not in output
        assert "gone and more" in output


# show


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("outgoing", "has waited for a relay for"),
        ("scheduled", "due in 60 min"),
        ("in_flight", "a relay has claimed it; the lease ends in"),
        ("published", "kept until a worker handles it; again in"),
        ("dead", "NOT_FOUND - no exchange 'mail'"),
    ],
)
def test_show_says_why_a_message_is_where_it_is(shop: Shop, state: str, reason: str) -> None:
    """P18."""
    task_id = fill(shop)[state]
    for name in (task_id, row_ids(shop)[task_id]):
        (message,) = answer(shop, "show", name)["messages"]
        assert (message["task_id"], message["state"]) == (task_id, state)
        assert reason in message["why"]
        assert message["lineage"]["root_id"] == task_id
        result = run(shop.app, "show", name)
        assert result.exit_code == 0
        assert reason in result.output


@pytest.mark.parametrize(
    ("settlement", "reason"),
    [
        ("retried", "the broker did not take it; again in 50 s: queue full"),
        ("postponed", "the broker did not take it; again in 50 s: format 99"),
        ("nothing", "its relay did not end the batch; the lease has been over for"),
    ],
)
def test_show_says_why_a_tried_message_waits(
    sqlite_shop: Shop, settlement: str, reason: str
) -> None:
    store = sqlite_shop.outbox.store
    task_id = sqlite_shop.notify.delay("m").id
    batch = store.claim(1, 60 if settlement != "nothing" else -5)
    number = batch.rows[0].id
    match settlement:
        case "retried":
            store.settle(batch, Settlement(retried={number: (50.4, "queue full")}))
        case "postponed":
            store.settle(batch, Settlement(postponed={number: (50.4, "format 99")}))
    (message,) = answer(sqlite_shop, "show", task_id)["messages"]
    assert reason in message["why"]


def test_show_tells_of_the_execution(shop: Shop) -> None:
    """P18: of a kept message that is handled meanwhile, and of one whose row is gone."""
    task_id = shop.notify.delay("m").id
    store = shop.outbox.store
    batch = store.claim(1, 60)
    envelope = batch.rows[0].envelope
    assert envelope is not None
    with store.engine.begin() as connection:
        store.receive(connection, envelope.key, "shop.notify", task_id)
        store.record(connection, envelope.key, "FAILURE", None, forget=False)
    (message,) = answer(shop, "show", task_id)["messages"]
    assert (message["state"], message["handled"]["state"]) == ("in_flight", "FAILURE")
    store.settle(batch, Settlement(confirmed=[batch.rows[0].id]))
    (message,) = answer(shop, "show", task_id)["messages"]
    assert (message["state"], message["handled"]["state"]) == ("handled", "FAILURE")
    assert "FAILURE" in run(shop.app, "show", task_id).output


def test_show_of_a_task_shows_all_its_messages(sqlite_shop: Shop) -> None:
    for _ in range(2):
        sqlite_shop.notify.apply_async(("m",), task_id="fixed")
    assert len(answer(sqlite_shop, "show", "fixed")["messages"]) == 2


def test_a_task_id_of_digits_is_written_as_task(sqlite_shop: Shop) -> None:
    sqlite_shop.notify.apply_async(("1",), task_id="2")
    sqlite_shop.notify.apply_async(("2",), task_id="other")
    (by_row,) = answer(sqlite_shop, "show", "2")["messages"]
    (by_task,) = answer(sqlite_shop, "show", "task:2")["messages"]
    assert (by_row["task_id"], by_task["task_id"]) == ("other", "2")


@pytest.mark.parametrize("name", ["99", "nobody", "9" * 40, "task:99", "²", "-- ;"])
def test_show_of_what_is_not_there(shop: Shop, name: str) -> None:
    result = run(shop.app, "show", "--", name)
    assert result.exit_code == 1
    assert "is not here" in result.output


# cancel


def test_cancel_by_row_and_by_task(shop: Shop) -> None:
    """P11, P18."""
    found = fill(shop)
    said = answer(shop, "cancel", row_ids(shop)[found["outgoing"]], found["scheduled"], "--yes")
    assert said == {"dry_run": False, "rows": 2, "refused": {}, "unknown": []}
    assert shop.outbox.store.counts() == {**EVERY, "outgoing": 0, "scheduled": 0}


@pytest.mark.parametrize("state", ["in_flight", "published", "dead"])
def test_cancel_refuses_what_is_on_its_way(shop: Shop, state: str) -> None:
    """P6."""
    found = fill(shop)
    result = run(shop.app, "cancel", found[state], "--yes", "--json")
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert said["rows"] == 0
    assert bool(said["refused"]) == (state != "dead")
    assert said["unknown"] == ([found["dead"]] if state == "dead" else [])
    assert shop.outbox.store.counts() == EVERY


def test_cancel_does_what_it_can_and_says_what_not(sqlite_shop: Shop) -> None:
    found = fill(sqlite_shop)
    words = [found["outgoing"], found["in_flight"], "nobody"]
    result = run(sqlite_shop.app, "cancel", *words, "--yes")
    assert result.exit_code == 1
    assert "cancelled 1 message(s)" in result.output
    assert "a relay has claimed it" in result.output
    assert "not nobody: it is not here" in result.output
    assert sqlite_shop.outbox.store.counts() == {**EVERY, "outgoing": 0}


def test_cancel_tries_without_changing(shop: Shop) -> None:
    found = fill(shop)
    assert answer(shop, "cancel", found["outgoing"], "--dry-run")["rows"] == 1
    assert shop.outbox.store.counts() == EVERY


def test_a_cancelled_message_is_not_published(shop: Shop) -> None:
    task_id = shop.notify.delay("cancelled").id
    shop.notify.delay("kept")
    answer(shop, "cancel", task_id, "--yes")
    assert shop.outbox.relay_all().confirmed == 1
    assert shop.published() == ["shop.notify"]


# republish


def test_republish_has_kept_messages_published_again(shop: Shop) -> None:
    """P18."""
    fill(shop)
    assert answer(shop, "republish", "--task", "shop.plain")["rows"] == 0
    assert answer(shop, "republish", "--dry-run")["rows"] == 1
    assert shop.outbox.relay_all().confirmed == 1  # what was outgoing
    assert answer(shop, "republish", "--task", "shop.notify")["rows"] == 1
    assert shop.outbox.relay_all().confirmed == 1


def test_republish_counts_what_it_changes_also_without_changing(shop: Shop) -> None:
    """Twice in a row the second changes nothing, and its trial says so."""
    fill(shop)
    assert answer(shop, "republish")["rows"] == 1
    assert answer(shop, "republish", "--dry-run")["rows"] == 0
    assert answer(shop, "republish")["rows"] == 0


# dead-letters


def test_dead_letters_are_listed_by_what_they_have_in_common(shop: Shop) -> None:
    """P18."""
    bury(shop, "1", "NOT_FOUND - no exchange", task_id="one", queue="mail")
    bury(shop, "2", "queue is full", task_id="two")
    assert listed(shop, "dead-letters", "list") == ["one", "two"]
    assert listed(shop, "dead-letters", "list", "--error", "FULL") == ["two"]
    assert listed(shop, "dead-letters", "list", "--queue", "mail") == ["one"]
    assert listed(shop, "dead-letters", "list", "--older-than", "60") == []
    assert answer(shop, "dead-letters", "list", "--limit", "1")["total"] == 2
    output = run(shop.app, "dead-letters", "list").output
    assert "queue is full" in output
    assert "2 of 2 dead letter(s)" in output


def test_dead_letters_show(shop: Shop) -> None:
    number = bury(shop, "m", "queue is full", task_id="one")
    (message,) = answer(shop, "dead-letters", "show", number)["messages"]
    assert (message["task_id"], message["last_error"]) == ("one", "queue is full")
    assert message["died_at"]


def test_a_replayed_dead_letter_is_published(shop: Shop) -> None:
    """P18."""
    number = bury(shop, "m", "queue is full")
    bury(shop, "other", "queue is full")
    assert answer(shop, "dead-letters", "replay", number) == {"dry_run": False, "rows": 1}
    assert shop.outbox.store.counts()["dead"] == 1
    assert shop.outbox.relay_all().confirmed == 1
    (message,) = wire.broker(shop.broker_name).published
    assert json.loads(message.body)[0] == ["m"]


@pytest.mark.parametrize("verb", ["replay", "discard"])
def test_dead_letters_are_changed_by_what_they_have_in_common(shop: Shop, verb: str) -> None:
    """P18."""
    bury(shop, "1", "NOT_FOUND - no exchange", queue="mail")
    bury(shop, "2", "queue is full")
    words = ["dead-letters", verb, "--error", "not_found", "--queue", "mail"]
    yes = ["--yes"] if verb == "discard" else []
    assert answer(shop, *words, "--dry-run")["rows"] == 1
    assert shop.outbox.store.counts()["dead"] == 2
    assert answer(shop, *words, *yes)["rows"] == 1
    counts = shop.outbox.store.counts()
    assert (counts["dead"], counts["outgoing"]) == (1, 1 if verb == "replay" else 0)
    assert answer(shop, "dead-letters", verb, "--all", *yes)["rows"] == 1
    assert answer(shop, "dead-letters", verb, "--all", *yes)["rows"] == 0
    assert shop.outbox.store.counts()["dead"] == 0


@pytest.mark.parametrize("verb", ["replay", "discard"])
@pytest.mark.parametrize("words", [[], ["--all", "1"], ["--all", "--task", "t"]], ids=repr)
def test_which_dead_letters_has_to_be_said(sqlite_shop: Shop, verb: str, words: list[str]) -> None:
    bury(sqlite_shop, "m", "full")
    result = run(sqlite_shop.app, "dead-letters", verb, *words)
    assert result.exit_code == 2
    assert "say which" in result.output
    assert sqlite_shop.outbox.store.counts()["dead"] == 1


def test_a_dead_letter_that_is_not_there_is_a_no(sqlite_shop: Shop) -> None:
    fill(sqlite_shop)
    result = run(sqlite_shop.app, "dead-letters", "replay", "99")
    assert result.exit_code == 1
    assert "replayed 0 dead letter(s)" in result.output


# scheduled


def eta_in_message(shop: Shop) -> str:
    outbox = shop.outbox.tables.outbox
    with shop.outbox.engine.connect() as connection:
        message = connection.execute(sa.select(outbox.c.message)).scalar_one()
    return str(json.loads(message)["headers"]["eta"])


def test_scheduled_list_shows_what_is_not_due(shop: Shop) -> None:
    """P11, P18."""
    found = fill(shop)
    assert listed(shop, "scheduled", "list") == [found["scheduled"]]
    assert "due in 60 min" in run(shop.app, "scheduled", "list").output


def test_scheduled_cancel_touches_nothing_else(shop: Shop) -> None:
    found = fill(shop)
    words = [found["scheduled"], found["outgoing"]]
    result = run(shop.app, "scheduled", "cancel", *words, "--yes")
    assert result.exit_code == 1
    assert "cancelled 1 message(s)" in result.output
    assert shop.outbox.store.counts() == {**EVERY, "scheduled": 0}


def test_reschedule_to_a_time(shop: Shop) -> None:
    task_id = shop.notify.apply_async(("m",), countdown=3600).id
    said = answer(shop, "scheduled", "reschedule", task_id, "--at", "2100-01-01T01:00:00+01:00")
    assert (said["rows"], said["due_at"]) == (1, "2100-01-01T00:00:00+00:00")
    (message,) = answer(shop, "scheduled", "list")["messages"]
    assert message["due_at"] == message["available_at"] == "2100-01-01T00:00:00+00:00"
    assert eta_in_message(shop) == "2100-01-01T00:00:00+00:00"


def test_reschedule_by_seconds_counts_on_the_databases_clock(shop: Shop) -> None:
    task_id = shop.notify.apply_async(("m",), countdown=3600).id
    said = answer(shop, "scheduled", "reschedule", task_id, "--in", "600")
    left = datetime.fromisoformat(said["due_at"]) - datetime.now(timezone.utc)
    assert timedelta(seconds=500) < left <= timedelta(seconds=610)


def test_run_now_publishes_a_message_that_the_worker_does_not_hold_back(shop: Shop) -> None:
    """P11: also the eta that the worker reads is over."""
    task_id = shop.notify.apply_async(("m",), countdown=3600).id
    assert shop.outbox.relay_all().claimed == 0
    assert answer(shop, "scheduled", "run-now", task_id, "--dry-run")["rows"] == 1
    assert shop.outbox.relay_all().claimed == 0
    assert answer(shop, "scheduled", "run-now", task_id)["rows"] == 1
    assert shop.outbox.relay_all().confirmed == 1
    (message,) = wire.broker(shop.broker_name).published
    eta = message.properties["application_headers"]["eta"]
    assert datetime.fromisoformat(eta) <= datetime.now(timezone.utc) + timedelta(seconds=30)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--in", "-1"],
        ["--in", "5", "--at", "2100-01-01T00:00:00Z"],
        ["--at", "2100-01-01T00:00:00"],
        ["--at", "tomorrow"],
        ["--in", "1e300"],
    ],
    ids=" ".join,
)
def test_reschedule_wants_one_sensible_time(sqlite_shop: Shop, words: list[str]) -> None:
    task_id = sqlite_shop.notify.apply_async(("m",), countdown=3600).id
    result = run(sqlite_shop.app, "scheduled", "reschedule", task_id, *words)
    assert result.exit_code == 2, result.output


def test_reschedule_beyond_the_expiry_is_refused(sqlite_shop: Shop) -> None:
    task_id = sqlite_shop.notify.apply_async(("m",), countdown=60, expires=3600).id
    before = eta_in_message(sqlite_shop)
    words = ["scheduled", "reschedule", task_id, "--in", "7200"]
    for trial in ([], ["--dry-run"]):
        result = run(sqlite_shop.app, *words, *trial)
        assert result.exit_code == 1
        assert "expired by then" in result.output
        assert ": 0 message(s)" in result.output
    assert eta_in_message(sqlite_shop) == before


@pytest.mark.parametrize("state", ["outgoing", "in_flight", "published", "dead"])
def test_what_is_not_scheduled_is_not_moved(sqlite_shop: Shop, state: str) -> None:
    found = fill(sqlite_shop)
    result = run(sqlite_shop.app, "scheduled", "run-now", found[state])
    assert result.exit_code == 1
    assert "not scheduled, or not here" in result.output
    assert sqlite_shop.outbox.store.counts() == EVERY
