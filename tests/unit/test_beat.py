"""Beat with the outbox's scheduler: a run and its message are one commit."""

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery.schedules import crontab, schedule
from sqlalchemy import delete, event, update
from sqlalchemy.exc import OperationalError

from celery_outbox import ConfigurationError, beat
from celery_outbox.beat import DurableScheduler
from tests.unit.shop import Shop


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beat, "_PAUSE", 0.0)


@pytest.fixture
def shop(shop: Shop) -> Shop:
    """The shop, with an entry of a plain task that is due each day."""
    shop.app.conf.beat_schedule = {
        "daily": {"task": shop.plain.name, "schedule": schedule(86400), "args": ("m",)}
    }
    shop.app.conf.beat_max_loop_interval = 300
    return shop


def a_beat(shop: Shop) -> DurableScheduler:
    return DurableScheduler(shop.app)


def run(scheduler: DurableScheduler, ticks: int = 5) -> None:
    for _ in range(ticks):
        scheduler.tick()


def make_due(shop: Shop, days: float = 1.5) -> None:
    """Let all entries have run so long ago."""
    before = datetime.now(timezone.utc) - timedelta(days=days)
    with shop.engine.begin() as connection:
        connection.execute(update(shop.outbox.tables.beat).values(last_run_at=before))


def count(shop: Shop) -> int:
    return shop.outbox.store.counts()["outgoing"]


def test_a_new_entry_waits_for_its_time(shop: Shop) -> None:
    run(a_beat(shop))
    assert count(shop) == 0


def test_what_was_due_while_no_beat_ran_is_run_once(shop: Shop) -> None:
    run(a_beat(shop))
    make_due(shop, days=10)
    run(a_beat(shop))
    assert count(shop) == 1
    run(a_beat(shop))
    assert count(shop) == 1


def test_several_beats_run_it_once(shop: Shop) -> None:
    run(a_beat(shop))
    make_due(shop)
    beats = [a_beat(shop) for _ in range(3)]
    for scheduler in beats:
        scheduler._read()
    for scheduler in beats:
        run(scheduler)
    assert count(shop) == 1


def test_a_crontab_goes_by_the_last_run(shop: Shop) -> None:
    shop.app.conf.beat_schedule["cron"] = {
        "task": shop.plain.name,
        "schedule": crontab(minute="0", hour="*/2"),
    }
    run(a_beat(shop))
    make_due(shop, days=0.5)
    run(a_beat(shop))
    assert count(shop) == 1


def test_no_message_without_its_run(shop: Shop) -> None:
    """A commit that fails undoes both; the entry is still due."""
    run(a_beat(shop))
    make_due(shop)
    scheduler = a_beat(shop)
    failing = [True]

    def refuse(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if failing and "INSERT INTO outbox " in statement:
            raise OperationalError(statement, None, Exception("the database goes away"))

    event.listen(shop.outbox.engine, "before_cursor_execute", refuse)
    run(scheduler)
    assert count(shop) == 0
    failing.clear()
    run(scheduler)
    assert count(shop) == 1


def test_an_entry_that_cannot_be_sent_is_passed_over(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    shop.app.conf.beat_schedule["bad"] = {
        "task": shop.plain.name,
        "schedule": 1000,
        "args": (object(),),
    }
    run(a_beat(shop))
    make_due(shop)
    run(a_beat(shop))
    assert count(shop) == 1
    assert "entry bad is passed over" in caplog.text
    caplog.clear()
    run(a_beat(shop))
    assert "bad" not in caplog.text


def test_a_row_that_was_deleted_is_made_again(shop: Shop) -> None:
    scheduler = a_beat(shop)
    run(scheduler)
    make_due(shop)
    scheduler = a_beat(shop)
    scheduler._read()
    with shop.engine.begin() as connection:
        connection.execute(delete(shop.outbox.tables.beat))
    run(scheduler)
    assert count(shop) == 1


def test_the_broker_is_not_needed(shop: Shop) -> None:
    shop.app.conf.broker_url = "amqp://127.0.0.1:1//"
    run(a_beat(shop))
    make_due(shop)
    run(a_beat(shop))
    assert count(shop) == 1


def test_a_name_that_is_too_long(shop: Shop) -> None:
    shop.app.conf.beat_schedule["n" * 300] = {"task": shop.plain.name, "schedule": 1}
    with pytest.raises(ConfigurationError, match="longer than 255"):
        a_beat(shop)
