"""Structured log events: one name for each transition, its details as fields."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from celery_outbox import events
from celery_outbox.observability.logging import fields_of, log_events
from celery_outbox.testing import Faults, in_memory, run_until_quiet
from tests.unit.conftest import MakeShop
from tests.unit.shop import Shop


@pytest.fixture
def shop(make_shop: MakeShop, sqlite_url: str) -> Iterator[Shop]:
    """A shop whose database and broker are in memory."""
    shop = make_shop(sqlite_url, tables=False, outbox_max_attempts=1)
    with in_memory(shop.outbox):
        yield shop


@pytest.fixture
def listener() -> Iterator[events.Listener]:
    listener = log_events()
    yield listener
    events.unsubscribe(listener)


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(line) for line in caplog.records if line.name == "celery_outbox.events"]


@pytest.mark.usefixtures("listener")
def test_the_journey_of_a_message(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "celery_outbox.events"):
        shop.notify.delay("secret")
        run_until_quiet(shop.outbox)
    told = lines(caplog)
    assert [line["outbox_event"] for line in told] == [
        "staged",
        "claimed",
        "published",
        "settled",
        "handling",
        "committing",
        "handled",
    ]
    assert [line["message"] for line in told][:2] == ["outbox.staged", "outbox.claimed"]
    assert told[1]["outbox_count"] == 1
    assert told[3]["outbox_confirmed"] == 1
    assert told[6]["outbox_state"] == "SUCCESS"
    assert "secret" not in str(told)


@pytest.mark.usefixtures("listener")
def test_what_somebody_should_look_at_is_louder(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    shop.notify.delay("m")
    with caplog.at_level(logging.INFO), Faults(shop.outbox).return_message():
        shop.outbox.relay_once()
    (dead,) = [line for line in lines(caplog) if line["outbox_event"] == "dead_letter"]
    assert dead["levelname"] == "ERROR"
    assert dead["outbox_task"] == "shop.notify"
    assert dead["outbox_error"]


def test_a_logger_of_ones_own(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    listener = log_events("shop.messages", level=logging.DEBUG)
    try:
        with caplog.at_level(logging.DEBUG, "shop.messages"):
            shop.notify.delay("m")
    finally:
        events.unsubscribe(listener)
    (line,) = [line for line in caplog.records if line.name == "shop.messages"]
    assert line.levelname == "DEBUG"


def test_each_event_has_fields_that_no_record_has_already() -> None:
    names = {
        value for name, value in vars(events).items() if name.isupper() and isinstance(value, str)
    }
    assert len(names) >= 12
    plain = set(vars(logging.makeLogRecord({})))
    for name in names:
        assert not plain & set(fields_of(name, {"name": 1, "args": 2, "rows": [object()]}))


def test_no_message_is_in_the_debug_log(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "celery_outbox"):
        shop.notify.delay("secret")
        shop.outbox.relay_all()
    told = [line.getMessage() for line in caplog.records if line.name == "celery_outbox"]
    assert any("published" in line for line in told)
    assert "secret" not in str(told)


def test_the_page_tells_of_each_event() -> None:
    names = {
        value for name, value in vars(events).items() if name.isupper() and isinstance(value, str)
    }
    page = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
    assert set(re.findall(r"`outbox\.(\w+)`", page)) == names
