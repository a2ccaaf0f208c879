"""Messages that go around the outbox are noticed, with the line that sends them."""

import logging
from collections.abc import Iterator
from inspect import currentframe
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
from celery import Celery
from kombu import Connection

from celery_outbox import Bypassed, ConfigurationError
from celery_outbox.outbox import bypass
from tests.unit import wire
from tests.unit.conftest import MakeShop
from tests.unit.shop import Shop

HERE = Path(__file__).name


@pytest.fixture(autouse=True)
def _other_tests_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bypass, "_watching", WeakSet())


@pytest.fixture
def other_app() -> Iterator[Celery]:
    """An app without an Outbox."""
    app = Celery("other", broker=f"recording://{wire.new_name()}", set_as_current=False)
    yield app
    app.close()


@pytest.fixture
def strict_shop(make_shop: MakeShop, sqlite_url: str) -> Shop:
    """A shop that refuses bypasses."""
    return make_shop(sqlite_url, outbox_bypass="refuse")


def line_of_next() -> str:
    frame = currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return f"{HERE}:{frame.f_back.f_lineno + 1}"


def bypasses(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "celery_outbox.bypass"]


def test_a_task_that_is_not_captured_inside_a_transaction(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    with shop.Session.begin():
        where = line_of_next()
        shop.plain.delay("m")
    (warning,) = bypasses(caplog)
    assert "shop.plain is not captured" in warning
    assert where in warning


def test_once_for_each_line(sqlite_shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    with sqlite_shop.Session.begin():
        for _ in range(3):
            sqlite_shop.plain.delay("m")
        sqlite_shop.plain.delay("m")
    assert len(bypasses(caplog)) == 2


def test_outside_a_transaction_there_is_nothing_to_say(
    sqlite_shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    sqlite_shop.plain.delay("m")
    sqlite_shop.notify.delay("m")
    with sqlite_shop.Session.begin() as session:
        sqlite_shop.notify.delay("m")
        with sqlite_shop.outbox.using(session):
            sqlite_shop.plain.delay("m")
    assert bypasses(caplog) == []


def test_a_durable_task_through_another_app(
    sqlite_shop: Shop, other_app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    where = line_of_next()
    other_app.send_task("shop.notify", ("m",))
    (warning,) = bypasses(caplog)
    assert (
        "shop.notify is durable, and goes around the outbox, through another Celery app" in warning
    )
    assert where in warning
    other_app.send_task("shop.plain", ("m",))
    assert len(bypasses(caplog)) == 1


def test_what_another_outbox_takes_is_no_bypass(
    make_shop: MakeShop, sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    one, _ = make_shop(sqlite_url), make_shop(sqlite_url)
    with one.Session.begin():
        one.notify.delay("m")
    assert bypasses(caplog) == []


@pytest.mark.parametrize("how", ["not captured", "another app", "another broker"])
def test_refused(strict_shop: Shop, other_app: Celery, how: str) -> None:
    shop, elsewhere = strict_shop, wire.new_name()

    def go_around() -> Any:
        match how:
            case "not captured":
                return shop.plain.delay("m")
            case "another app":
                return other_app.send_task("shop.notify", ("m",))
        with Connection(f"recording://{elsewhere}") as connection:
            return shop.notify.apply_async(("m",), connection=connection)

    with pytest.raises(Bypassed, match=HERE), shop.Session.begin():
        go_around()
    assert shop.published() == []
    assert wire.broker(elsewhere).published == []


def test_allowed(
    make_shop: MakeShop, sqlite_url: str, other_app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    shop = make_shop(sqlite_url, outbox_bypass="allow")
    other_app.send_task("shop.notify", ("m",))
    with shop.Session.begin():
        shop.plain.delay("m")
    assert bypasses(caplog) == []


def test_published_at_once_as_configured_is_no_bypass(
    make_shop: MakeShop, sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    shop = make_shop(sqlite_url, outbox_no_transaction="publish")
    shop.notify.delay("m")
    assert shop.published() == ["shop.notify"]
    assert bypasses(caplog) == []


def test_a_policy_that_does_not_exist(make_shop: MakeShop, sqlite_url: str) -> None:
    shop = make_shop(sqlite_url, outbox_bypass="shout")
    with pytest.raises(ConfigurationError, match='"warn", "refuse" or "allow"'):
        _ = shop.outbox.config
