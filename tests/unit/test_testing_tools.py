"""What the fixtures do: staged messages, time, faults, until quiet."""

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from kombu.utils.json import loads
from sqlalchemy import select, update

from celery_outbox import durable_task, events
from celery_outbox.testing import (
    Faults,
    NotQuiet,
    Staged,
    Time,
    by_hand,
    expected,
    in_memory,
    run_until_quiet,
)
from tests.support.waiting import wait_until
from tests.unit.conftest import MakeShop
from tests.unit.shop import Base, Customer, Purpose, Shop, add_customer, failing_on_purpose


@pytest.fixture
def memory_shop(make_shop: MakeShop, database_url: str) -> Shop:
    """A shop on each database, with a broker in memory."""
    return _in_memory(make_shop(database_url))


@pytest.fixture
def fast_shop(make_shop: MakeShop, database_url: str) -> Iterator[Shop]:
    """The same, and it publishes by itself."""
    shop = _in_memory(make_shop(database_url, outbox_publish_after_commit=True))
    yield shop
    shop.outbox.fast_path.stop()


def _in_memory(shop: Shop) -> Shop:
    shop.app.conf.update(broker_url="memory://", result_backend="cache+memory://")
    shop.app.conf.task_default_queue = f"queue-{shop.broker_name}"
    return shop


# What is staged


def test_committed_and_rolled_back(shop: Shop) -> None:
    with Staged(shop.outbox)() as messages:
        with failing_on_purpose(), shop.Session.begin() as session:
            add_customer(session)
            shop.notify.delay("never")
            raise Purpose
        with shop.Session.begin() as session:
            shop.notify.delay("one", to=("a", "b"))
            with failing_on_purpose(), session.begin_nested():
                shop.notify.delay("undone")
                raise Purpose
        shop.notify.delay("alone")
    assert messages == [
        expected("shop.notify", args=("one",), kwargs={"to": ("a", "b")}),
        expected(shop.notify, args=["alone"], kwargs={}, eta=None),
    ]
    assert [message.args for message in messages.rolled_back] == [("never",), ("undone",)]
    assert not messages.undecided


def test_a_transaction_that_is_still_open(shop: Shop) -> None:
    with shop.Session() as session:
        session.begin()
        with Staged(shop.outbox)() as messages:
            shop.notify.delay(1)
        assert not messages
        assert messages.undecided == [expected("shop.notify", args=(1,))]
        session.rollback()


def test_seen_within_a_transaction_that_is_never_committed(postgresql_shop: Shop) -> None:
    shop = postgresql_shop
    with shop.engine.connect() as connection:
        transaction = connection.begin()
        with (
            Staged(shop.outbox)(within=connection) as messages,
            shop.Session(bind=connection, join_transaction_mode="create_savepoint") as session,
        ):
            session.begin()
            shop.notify.delay(1)
            session.commit()
        transaction.rollback()
    assert messages == [expected("shop.notify", args=(1,))]


def test_what_was_relayed_meanwhile_is_seen(shop: Shop) -> None:
    with Staged(shop.outbox).exactly(expected("shop.notify", args=(1,))):
        shop.notify.delay(1)
        assert shop.outbox.relay_all().confirmed == 1


def test_everything_that_a_message_says(shop: Shop) -> None:
    at = datetime(2040, 1, 1, tzinfo=timezone.utc)
    with Staged(shop.outbox)() as messages:
        shop.notify.apply_async(
            (1,), eta=at, queue="slow", headers={"tenant": "t"}, compression="gzip"
        )
        shop.notify.apply_async((2,), serializer="pickle")
    assert messages[0] == expected(
        "shop.notify", args=(1,), eta=at, queue="slow", headers={"tenant": "t"}
    )
    assert messages[1].args == (2,)


def test_a_difference_is_told(shop: Shop) -> None:
    staged = Staged(shop.outbox)

    def place() -> None:
        with staged.exactly("shop.notify", args=(7,)):
            shop.notify.delay(8)
            shop.notify.delay(9)

    with pytest.raises(AssertionError) as raised:
        place()
    said = str(raised.value)
    assert "staged 2 message(s), expected 1" in said
    assert "args: expected (7,), staged (8,)" in said
    assert "1: not expected: Message(task='shop.notify', args=(9,)" in said


def test_that_it_was_rolled_back_is_told(shop: Shop) -> None:
    staged = Staged(shop.outbox)

    def place() -> None:
        with staged.exactly(shop.notify), failing_on_purpose(), shop.Session.begin():
            shop.notify.delay(8)
            raise Purpose

    with pytest.raises(AssertionError, match=r"rolled back:\n.*shop.notify"):
        place()


def test_an_exception_of_the_block_is_not_hidden(shop: Shop) -> None:
    with pytest.raises(Purpose), Staged(shop.outbox).exactly("shop.notify"):
        raise Purpose


def test_afterwards_nobody_listens(shop: Shop) -> None:
    store = shop.outbox.store
    before = dict(vars(shop.outbox)), dict(vars(store))
    with Staged(shop.outbox).exactly():
        pass
    assert (vars(shop.outbox), vars(store)) == before


# Time


def test_what_is_scheduled_becomes_due(shop: Shop) -> None:
    time = Time(shop.outbox)
    shop.notify.apply_async((1,), countdown=7200, expires=7300)
    time.travel(hours=1)
    assert not shop.outbox.relay_all().claimed
    time.travel(to=time.now() + timedelta(seconds=3610))
    outbox = shop.outbox.tables.outbox
    with shop.outbox.engine.connect() as connection:
        message = loads(connection.execute(select(outbox.c.message)).scalar_one())
    assert datetime.fromisoformat(message["headers"]["eta"]) <= time.now()
    assert shop.outbox.relay_all().confirmed == 1


def test_time_goes_forwards(shop: Shop) -> None:
    with pytest.raises(ValueError, match="forwards"):
        Time(shop.outbox).travel(hours=-1)
    with pytest.raises(TypeError, match="one of"):
        Time(shop.outbox).travel()


# Faults


def test_a_lost_confirm_publishes_twice(shop: Shop) -> None:
    shop.notify.delay(1)
    with Faults(shop.outbox).lose_confirm():
        assert shop.outbox.relay_all().released == 1
    assert shop.outbox.relay_all().confirmed == 1
    assert shop.published() == ["shop.notify", "shop.notify"]


@pytest.mark.parametrize(
    ("fault", "outcome"), [("refuse", "postponed"), ("return_message", "retried")]
)
def test_a_message_that_is_not_taken(shop: Shop, fault: str, outcome: str) -> None:
    shop.notify.delay(1)
    with getattr(Faults(shop.outbox), fault)("shop.*"):
        assert getattr(shop.outbox.relay_all(), outcome) == 1
    Time(shop.outbox).travel(minutes=10)
    with getattr(Faults(shop.outbox), fault)("other.*"):
        assert shop.outbox.relay_all().confirmed == 1
    assert shop.published() == ["shop.notify"]


def test_a_broker_that_is_away(shop: Shop) -> None:
    shop.notify.delay(1)
    with Faults(shop.outbox).broker_away():
        assert not shop.outbox.relay_all().claimed
    assert shop.outbox.relay_all().confirmed == 1


def test_a_relay_that_is_killed_after_the_publish(shop: Shop) -> None:
    shop.notify.delay(1)
    with Faults(shop.outbox).kill(events.PUBLISHED):
        shop.outbox.relay_all()
    assert not shop.outbox.relay_all().claimed  # until the lease is over
    Time(shop.outbox).travel(minutes=5)
    assert shop.outbox.relay_all().confirmed == 1
    assert shop.published() == ["shop.notify", "shop.notify"]


def test_a_kill_that_does_not_happen_is_told(shop: Shop) -> None:
    with (
        pytest.raises(AssertionError, match="'published' happened 0 time"),
        Faults(shop.outbox).kill(events.PUBLISHED),
    ):
        pass
    with pytest.raises(ValueError, match="no event"), Faults(shop.outbox).kill("nonsense"):
        pass


# Until quiet


class Tasks:
    """What a worker has to do."""

    def __init__(self, shop: Shop) -> None:
        @durable_task(app=shop.app, name="t.add", bind=True)
        def add(task: Any, name: str) -> str:
            task.session.add(Customer(name=name))
            return name

        @durable_task(app=shop.app, name="t.retry", bind=True, max_retries=1)
        def retry(task: Any, name: str) -> None:
            task.session.add(Customer(name=name))
            if not task.request.retries:
                raise task.retry(countdown=3600)

        self.add, self.retry = add, retry


def test_a_chain_is_executed_to_its_end(memory_shop: Shop) -> None:
    tasks = Tasks(memory_shop)
    with memory_shop.Session.begin():
        result = (tasks.add.si("Ann") | tasks.add.si("Bob")).delay()
    assert run_until_quiet(memory_shop.outbox).tasks == ["t.add", "t.add"]
    assert memory_shop.customers() == ["Ann", "Bob"]
    assert result.get(timeout=5) == "Bob"


def test_a_retry_waits_for_its_time(memory_shop: Shop) -> None:
    tasks = Tasks(memory_shop)
    tasks.retry.delay("Ann")
    assert run_until_quiet(memory_shop.outbox).tasks == ["t.retry"]
    assert memory_shop.customers() == []
    Time(memory_shop.outbox).travel(hours=2)
    assert run_until_quiet(memory_shop.outbox).tasks == ["t.retry"]
    assert memory_shop.customers() == ["Ann"]


def test_a_worker_killed_before_and_after_its_commit(memory_shop: Shop) -> None:
    tasks = Tasks(memory_shop)
    for name, moment in (("Ann", events.COMMITTING), ("Bob", events.HANDLED)):
        tasks.add.delay(name)
        with Faults(memory_shop.outbox).kill(moment):
            run_until_quiet(memory_shop.outbox)
        assert run_until_quiet(memory_shop.outbox).tasks == ["t.add"]
    assert memory_shop.customers() == ["Ann", "Bob"]


def test_a_lost_confirm_has_its_effect_once(memory_shop: Shop) -> None:
    tasks = Tasks(memory_shop)
    tasks.add.delay("Ann")
    with Faults(memory_shop.outbox).lose_confirm():
        memory_shop.outbox.relay_all()
    assert run_until_quiet(memory_shop.outbox).tasks == ["t.add", "t.add"]
    assert memory_shop.customers() == ["Ann"]


def test_what_is_stuck_is_told(memory_shop: Shop) -> None:
    outbox = memory_shop.outbox
    memory_shop.notify.delay(1)
    with outbox.engine.begin() as connection:
        rows = outbox.tables.outbox
        later = datetime.now(timezone.utc) + timedelta(hours=1)
        connection.execute(
            update(rows).values(available_at=later, attempts=3, last_error="queue full")
        )
    with pytest.raises(NotQuiet) as raised:
        run_until_quiet(outbox, timeout=0.1)
    said = str(raised.value)
    assert "not quiet after 0.1 s" in said
    assert "shop.notify[" in said
    assert "attempts: 3" in said
    assert "last_error: queue full" in said


def test_a_dead_letter_is_told_at_once(memory_shop: Shop) -> None:
    outbox = memory_shop.outbox
    memory_shop.notify.delay(1)
    with outbox.engine.begin() as connection:
        connection.execute(update(outbox.tables.outbox).values(attempts=99))
    with Faults(outbox).return_message(), pytest.raises(NotQuiet, match="there are dead letters"):
        run_until_quiet(outbox)


# In memory


def test_afterwards_the_app_has_its_database_and_broker_again(shop: Shop) -> None:
    with in_memory(shop.outbox, Base.metadata):
        shop.notify.delay("in memory")
        assert run_until_quiet(shop.outbox).tasks == ["shop.notify"]
    assert shop.stored() == []
    shop.notify.delay("outside")
    assert shop.stored() == ["outside"]
    assert shop.outbox.relay_all().confirmed == 1
    assert shop.published() == ["shop.notify"]


# By hand


def test_nothing_is_published_by_itself(fast_shop: Shop) -> None:
    shop = fast_shop
    with by_hand(shop.outbox):
        shop.notify.delay("m")
        shop.outbox.fast_path.stop()  # nothing is on its way
        assert shop.stored() == ["m"]
        assert shop.outbox.relay_all().confirmed == 1
    shop.notify.delay("n")
    wait_until(lambda: not shop.stored(), 20, "published by itself")


def test_nothing_is_published_by_itself_in_memory(fast_shop: Shop) -> None:
    with in_memory(fast_shop.outbox, Base.metadata) as outbox:
        with fast_shop.Session.begin() as session:
            add_customer(session)
            fast_shop.notify.delay("m")
        outbox.fast_path.stop()
        assert outbox.store.counts()["outgoing"] == 1
        assert run_until_quiet(outbox).tasks == ["shop.notify"]
