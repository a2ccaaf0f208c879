"""P10: where the ordering key of a message comes from."""

from typing import Any

import pytest
from celery import group
from sqlalchemy import select

from celery_outbox import ConfigurationError, DurableTask, EnvelopeError, durable_task
from tests.unit.conftest import MakeShop
from tests.unit.shop import Shop


def _keys(shop: Shop) -> list[Any]:
    outbox = shop.outbox.tables.outbox
    with shop.outbox.engine.connect() as connection:
        rows = connection.execute(select(outbox).order_by(outbox.c.id)).all()
    assert all("outbox_ordering_key" not in row.message for row in rows)
    return [row.ordering_key for row in rows]


@pytest.fixture
def shop(sqlite_shop: Shop) -> Shop:
    """One database will do: it is not the database's matter."""
    return sqlite_shop


def test_without_a_key_there_is_none(shop: Shop) -> None:
    shop.notify.delay("m")
    assert _keys(shop) == [None]


def test_a_call_names_it(shop: Shop) -> None:
    shop.notify.apply_async(("m",), outbox_ordering_key="customer 7")
    shop.notify.apply_async(("m",), outbox_ordering_key=7)
    shop.notify.s("m").set(outbox_ordering_key="of the signature").apply_async()
    assert _keys(shop) == ["customer 7", "7", "of the signature"]


def test_a_task_has_a_rule(shop: Shop) -> None:
    @durable_task(app=shop.app, outbox_ordering_key=lambda customer, amount=0: customer)
    def charge(customer: int, amount: int = 0) -> None: ...

    @durable_task(app=shop.app, outbox_ordering_key="all of them")
    def report() -> None: ...

    charge.delay(7)
    charge.delay(customer=8, amount=1)
    charge.apply_async((9,), outbox_ordering_key="the call's own wins")
    report.delay()
    charge.delay(None)
    assert _keys(shop) == ["7", "8", "the call's own wins", "all of them", None]


def test_a_task_class_has_a_static_method(shop: Shop) -> None:
    @shop.app.task(base=DurableTask, outbox_ordering_key=lambda text: text.upper())
    def stock(text: str) -> None: ...

    stock.delay("x")
    assert _keys(shop) == ["X"]


def test_canvas_steps_have_their_own(shop: Shop) -> None:
    @durable_task(app=shop.app, bind=True, outbox_ordering_key=lambda number: number)
    def step(self: Any, number: int) -> None: ...

    (step.si(1) | step.si(2)).apply_async()
    group(step.si(number) for number in (3, 4)).apply_async()
    assert _keys(shop) == ["1", "3", "4"]


def test_protocol_1(make_shop: MakeShop, sqlite_url: str) -> None:
    shop = make_shop(sqlite_url, task_protocol=1)

    @durable_task(app=shop.app, outbox_ordering_key=lambda number: number)
    def step(number: int) -> None: ...

    step.delay(3)
    step.delay(number=4)
    assert _keys(shop) == ["3", "4"]


def test_a_long_key_is_replaced_by_its_digest(shop: Shop) -> None:
    for last in ("a", "b", "a"):
        shop.notify.apply_async(("m",), outbox_ordering_key="x" * 300 + last)
    one, other, same = _keys(shop)
    assert len(one) <= 200
    assert one == same != other


@pytest.mark.parametrize("key", ["", True, 1.5, object()])
def test_what_can_not_be_a_key_is_an_error(shop: Shop, key: object) -> None:
    with pytest.raises(EnvelopeError, match="outbox_ordering_key"):
        shop.notify.apply_async(("m",), outbox_ordering_key=key)
    assert shop.stored() == []


def test_a_rule_that_fails_names_the_task(shop: Shop) -> None:
    @durable_task(
        app=shop.app, name="shop.charge", outbox_ordering_key=lambda customer: customer["id"]
    )
    def charge(customer: Any) -> None: ...

    with pytest.raises(ConfigurationError, match=r"shop\.charge.*args=\(7,\)"):
        charge.delay(7)
    assert shop.stored() == []


def test_published_at_once_it_means_nothing(make_shop: MakeShop, sqlite_url: str) -> None:
    """Not captured: the option must not reach the broker."""
    shop = make_shop(sqlite_url, outbox_no_transaction="publish")
    shop.notify.apply_async(("m",), outbox_ordering_key="x")
    assert shop.stored() == []
