"""P9: a commit wakes an idle relay, and where it does not, the relay looks by itself."""

import logging
import re
import threading
import time
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from celery_outbox.relay.wakeup import WakeUp
from celery_outbox.storage.notifications import channel_of
from celery_outbox.storage.store import Store
from celery_outbox.storage.tables import Tables
from celery_outbox.testing.contract.outgoing import claim, stage
from tests.unit.conftest import MakeShop
from tests.unit.shop import Shop

LONG = 5.0


@pytest.fixture
def shop(make_shop: MakeShop, postgresql_url: str) -> Shop:
    """On PostgreSQL, which tells of commits."""
    return make_shop(postgresql_url)


def _listening(store: Store) -> WakeUp:
    wake_up = WakeUp(store, LONG / 25, listens=True)
    wake_up._prove()
    assert wake_up._is_proven
    return wake_up


def _seconds(wait: Any) -> float:
    start = time.monotonic()
    wait()
    return time.monotonic() - start


def test_a_commit_ends_the_wait(shop: Shop) -> None:
    wake_up = _listening(shop.outbox.store)
    with shop.Session.begin():
        shop.notify.delay("m")
    wake_up.sleep(60)
    assert len(claim(shop.outbox.store).rows) == 1
    wake_up.close()


def test_a_roll_back_tells_nobody_and_a_commit_tells_once(shop: Shop) -> None:
    """One notification for each transaction, however many messages it sends."""
    listener = shop.outbox.store.listen()
    assert listener is not None
    with shop.Session() as session:
        session.begin()
        shop.notify.delay("gone")
        session.flush()
        session.rollback()
    with shop.Session.begin():
        for number in range(30):
            shop.notify.delay(str(number))
    heard: list[Any] = []
    driver: Any = listener
    for notification in driver._driver.notifies(timeout=1.0, stop_after=2):
        heard.append(notification)
    assert len(heard) == 1
    listener.close()


def test_waking_by_hand_ends_the_wait(shop: Shop) -> None:
    wake_up = _listening(shop.outbox.store)
    threading.Timer(0.1, wake_up.wake).start()
    wake_up.sleep(60)
    wake_up.wake()
    wake_up.wake()
    wake_up.sleep(60)
    wake_up.close()
    wake_up.wake()


def test_what_becomes_due_needs_no_commit(shop: Shop) -> None:
    """P11."""
    wake_up = _listening(shop.outbox.store)
    shop.notify.apply_async(("m",), countdown=1)
    wake_up.sleep(1)  # the commit's own
    assert _seconds(wake_up.wait) < LONG / 2
    wake_up.close()


def test_without_notifications_the_outbox_is_polled(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pooler in transaction mode swallows them."""
    store = shop.outbox.store
    monkeypatch.setattr(store, "notify", lambda: None)
    wake_up = WakeUp(store, 0.05, listens=True)
    with caplog.at_level(logging.WARNING, "celery_outbox"):
        wake_up.wait()
    assert "do not arrive" in caplog.text
    assert wake_up._listener is None
    assert _seconds(wake_up.wait) < 1
    wake_up.close()


def test_pauses_grow_and_are_short_again_after_work(
    sqlite_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    wake_up = WakeUp(sqlite_shop.outbox.store, 0.8, listens=True)
    monkeypatch.setattr(wake_up, "sleep", slept.append)
    for _ in range(7):
        wake_up.wait()
    wake_up.worked()
    wake_up.wait()
    *growing, again = slept
    for pause, usual in zip(growing, (0.05, 0.1, 0.2, 0.4, 0.8, 0.8, 0.8), strict=True):
        assert usual * 0.75 <= pause <= usual * 1.25
    assert again <= 0.05 * 1.25
    wake_up.close()


def test_a_connection_that_is_lost_is_made_anew(shop: Shop) -> None:
    store = shop.outbox.store
    wake_up = _listening(store)
    with store.engine.begin() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"
            )
        )
    # First comes the server's last word, and then the end.
    for _ in range(5):
        wake_up.sleep(1)
    assert wake_up._listener is None
    wake_up._prove()
    assert wake_up._is_proven
    wake_up.close()


def test_notifications_can_be_switched_off(make_shop: MakeShop, postgresql_url: str) -> None:
    shop = make_shop(postgresql_url, outbox_notify=False)
    listener = shop.outbox.store.listen()
    assert listener is not None
    shop.notify.delay("m")
    driver: Any = listener
    assert list(driver._driver.notifies(timeout=0.3)) == []
    listener.close()


def test_another_driver_is_polled(postgresql_url: str) -> None:
    """Only psycopg's way of listening is known."""
    engine = create_engine(postgresql_url)
    engine.dialect.driver = "psycopg2"
    assert Store(engine, Tables()).listen() is None
    engine.dispose()


@pytest.mark.parametrize(
    ("table", "channel"),
    [
        ("outbox", "celery_outbox.outbox"),
        ("messaging.shop_outbox", "celery_outbox.messaging.shop_outbox"),
    ],
)
def test_the_channel_of_a_table(table: str, channel: str) -> None:
    assert channel_of(table) == channel


@pytest.mark.parametrize("table", ['Odd"name', "x" * 60, "ä" * 40])
def test_the_channel_of_a_table_whose_name_does_not_fit(table: str) -> None:
    channel = channel_of(table)
    assert re.fullmatch(r"celery_outbox\.[0-9a-f]{32}", channel)
    assert channel != channel_of(table + "x")


def test_stage_is_heard_across_stores(shop: Shop) -> None:
    listener = shop.outbox.store.listen()
    assert listener is not None
    stage(shop.outbox.store, "m")
    driver: Any = listener
    assert len(list(driver._driver.notifies(timeout=5, stop_after=1))) == 1
    listener.close()
