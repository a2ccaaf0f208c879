"""task_always_eager: a durable task runs at the call, in the caller's transaction."""

from typing import Any

import pytest
from celery.exceptions import Retry

from celery_outbox import NoTransaction, current_session, durable_task
from tests.unit.conftest import MakeShop
from tests.unit.shop import Customer, Purpose, Shop, failing_on_purpose


class Eager:
    """A shop whose tasks run at the call."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        self.Session = shop.Session
        self.runs: list[int] = []

        @durable_task(app=shop.app, name="eager.add", bind=True)
        def add(task: Any, name: str) -> None:
            task.session.add(Customer(name=name))

        @durable_task(app=shop.app, name="eager.add_other")
        def add_other(name: str) -> None:
            with self.Session.begin() as session:
                session.add(Customer(name=name))

        @durable_task(app=shop.app, name="eager.fail", bind=True)
        def fail(task: Any, name: str) -> None:
            task.session.add(Customer(name=name))
            task.session.flush()
            raise Purpose

        @durable_task(app=shop.app, name="eager.retry", bind=True, max_retries=2)
        def retry(task: Any, name: str) -> str:
            self.runs.append(task.request.retries)
            if task.request.retries < 2:
                raise task.retry(countdown=3600)
            current_session().add(Customer(name=name))
            return name

        @durable_task(app=shop.app, name="eager.spawn")
        def spawn(name: str) -> None:
            add.delay(name)

        self.add, self.add_other, self.fail = add, add_other, fail
        self.retry, self.spawn = retry, spawn


@pytest.fixture
def eager(make_shop: MakeShop, database_url: str) -> Eager:
    """Eager, on each database."""
    return Eager(
        make_shop(
            database_url,
            task_always_eager=True,
            task_eager_propagates=True,
            result_backend="cache+memory://",
        )
    )


@pytest.fixture
def without_propagation(make_shop: MakeShop, database_url: str) -> Eager:
    """Eager, where a failure is in the result only."""
    return Eager(make_shop(database_url, task_always_eager=True, result_backend="cache+memory://"))


def test_its_writes_are_committed_with_the_caller(eager: Eager) -> None:
    with eager.Session.begin():
        eager.add.delay("Ann")
        assert eager.shop.customers() == []
    assert eager.shop.customers() == ["Ann"]


def test_its_writes_are_rolled_back_with_the_caller(eager: Eager) -> None:
    with failing_on_purpose(), eager.Session.begin():
        eager.add.delay("Ann")
        raise Purpose
    assert eager.shop.customers() == []


def test_nothing_is_stored_and_nothing_is_published(eager: Eager) -> None:
    with eager.Session.begin():
        eager.spawn.delay("Ann")
    assert not any(eager.shop.outbox.store.counts().values())
    assert eager.shop.published() == []
    assert eager.shop.customers() == ["Ann"]


def test_a_failure_fails_the_caller_and_its_transaction(eager: Eager) -> None:
    with failing_on_purpose(), eager.Session.begin():
        eager.add.delay("Ann")
        eager.fail.delay("Bob")
    assert eager.shop.customers() == []


def test_a_failure_that_is_not_propagated_leaves_its_writes_with_the_caller(
    without_propagation: Eager,
) -> None:
    """In a worker they would be rolled back: eagerly there is no transaction of the task's own."""
    with without_propagation.Session.begin():
        result = without_propagation.fail.delay("Bob")
    assert result.state == "FAILURE"
    assert without_propagation.shop.customers() == ["Bob"]


def test_a_retry_runs_at_once_in_the_same_transaction(without_propagation: Eager) -> None:
    eager = without_propagation
    with eager.Session.begin():
        assert eager.retry.delay("Ann").get() == "Ann"
        assert eager.shop.customers() == []
    assert eager.runs == [0, 1, 2]
    assert eager.shop.customers() == ["Ann"]


def test_a_retry_that_is_propagated_ends_the_caller(eager: Eager) -> None:
    """As in stock Celery: with task_eager_propagates Retry is an exception like any other."""
    with pytest.raises(Retry), eager.Session.begin():
        eager.retry.delay("Ann")
    assert eager.runs == [0]
    assert eager.shop.customers() == []


def test_a_chain_runs_in_the_same_transaction(eager: Eager) -> None:
    with eager.Session.begin():
        (eager.add.si("Ann") | eager.add.si("Bob")).delay()
        assert eager.shop.customers() == []
    assert eager.shop.customers() == ["Ann", "Bob"]


def test_outside_a_transaction_there_is_no_session(eager: Eager) -> None:
    with pytest.raises(NoTransaction, match="no current session"):
        eager.add.delay("Ann")


def test_outside_a_transaction_sessions_of_its_own_commit(eager: Eager) -> None:
    eager.add_other.delay("Ann")
    assert eager.shop.customers() == ["Ann"]
