"""task_always_eager: a durable task runs at the call, by the rules of a worker's transaction."""

from typing import Any

import pytest
import sqlalchemy as sa
from celery.exceptions import Ignore, Retry

from celery_outbox import CommitRefused, current_session, durable_task
from tests.unit.conftest import MakeShop
from tests.unit.shop import Customer, Purpose, Shop, add_customer, failing_on_purpose


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


def test_a_failure_that_is_not_propagated_takes_its_own_writes_back(
    without_propagation: Eager,
) -> None:
    """P13: as in a worker."""
    eager = without_propagation
    with eager.Session.begin() as session:
        add_customer(session)
        result = eager.fail.delay("Bob")
        eager.add.delay("Cid")
    assert result.state == "FAILURE"
    assert eager.shop.customers() == ["Ann", "Cid"]


def test_what_a_failed_task_has_sent_is_taken_back(without_propagation: Eager) -> None:
    """P15. `apply` executes the task itself here; what it sends goes through the outbox."""
    shop = without_propagation.shop
    shop.app.conf.task_always_eager = False

    @durable_task(app=shop.app, name="eager.send_and_fail")
    def send_and_fail() -> None:
        shop.notify.delay("lost")
        raise Purpose

    with shop.Session.begin() as session:
        session.connection()
        shop.notify.delay("before")
        send_and_fail.apply()
        shop.notify.delay("after")
    assert shop.stored() == ["before", "after"]


def test_the_writes_of_an_attempt_that_is_retried_are_taken_back(
    without_propagation: Eager,
) -> None:
    eager = without_propagation

    @durable_task(app=eager.shop.app, name="eager.write_and_retry", bind=True)
    def write_and_retry(task: Any) -> None:
        task.session.add(Customer(name=f"attempt {task.request.retries}"))
        task.session.flush()
        if not task.request.retries:
            raise task.retry(countdown=3600)

    with eager.Session.begin():
        write_and_retry.delay()
    assert eager.shop.customers() == ["attempt 1"]


def test_what_an_ignored_task_has_written_stays(eager: Eager) -> None:
    @durable_task(app=eager.shop.app, name="eager.ignore", bind=True)
    def ignore(task: Any) -> None:
        task.session.add(Customer(name="Ann"))
        raise Ignore

    with eager.Session.begin():
        ignore.delay()
    assert eager.shop.customers() == ["Ann"]


def test_in_a_connections_transaction(without_propagation: Eager) -> None:
    eager = without_propagation

    @durable_task(app=eager.shop.app, name="eager.by_connection")
    def by_connection(connection: list[sa.Connection], name: str) -> None:
        connection[0].execute(sa.insert(Customer).values(name=name))
        if name == "Bob":
            raise Purpose

    with eager.shop.engine.begin() as connection:
        for name in ("Ann", "Bob", "Cid"):
            by_connection.apply(([connection], name))
    assert eager.shop.customers() == ["Ann", "Cid"]


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


# Outside a transaction: one of its own


def test_its_own_transaction_is_committed(eager: Eager) -> None:
    eager.add.delay("Ann")
    assert eager.shop.customers() == ["Ann"]
    assert not any(eager.shop.outbox.store.counts().values())


def test_its_own_transaction_is_rolled_back_by_a_failure(without_propagation: Eager) -> None:
    assert without_propagation.fail.delay("Bob").state == "FAILURE"
    assert without_propagation.shop.customers() == []


def test_sessions_of_its_own_join_that_transaction(without_propagation: Eager) -> None:
    eager = without_propagation

    @durable_task(app=eager.shop.app, name="eager.other_and_fail")
    def other_and_fail() -> None:
        with eager.Session.begin() as session:
            session.add(Customer(name="Ann"))
        raise Purpose

    eager.add_other.delay("Bob")
    other_and_fail.delay()
    assert eager.shop.customers() == ["Bob"]


def test_what_it_sends_goes_with_that_transaction(without_propagation: Eager) -> None:
    shop = without_propagation.shop
    shop.app.conf.task_always_eager = False

    @durable_task(app=shop.app, name="eager.send")
    def send(label: str) -> None:
        shop.notify.delay(label)
        assert shop.stored() == []
        if label == "lost":
            raise Purpose

    send.apply(("lost",))
    assert shop.stored() == []
    send.apply(("kept",))
    assert shop.stored() == ["kept"]


def test_an_eager_task_within_an_eager_task(without_propagation: Eager) -> None:
    eager = without_propagation

    @durable_task(app=eager.shop.app, name="eager.outer", bind=True)
    def outer(task: Any) -> None:
        task.session.add(Customer(name="Ann"))
        eager.fail.delay("Bob")
        eager.add.delay("Cid")

    outer.delay()
    assert eager.shop.customers() == ["Ann", "Cid"]


def test_a_task_that_needs_no_database_runs_without_one(make_shop: MakeShop) -> None:
    shop = make_shop(
        "postgresql+psycopg://nobody@127.0.0.1:9/none",
        tables=False,
        task_always_eager=True,
        task_eager_propagates=True,
    )
    assert shop.notify.delay("m").state == "SUCCESS"


def test_a_commit_that_the_database_refuses_is_a_failure(postgresql_shop: Shop) -> None:
    shop = postgresql_shop
    with shop.engine.begin() as connection:
        connection.exec_driver_sql(
            "ALTER TABLE customer ADD CONSTRAINT one UNIQUE (name) DEFERRABLE INITIALLY DEFERRED"
        )

    @durable_task(app=shop.app, name="eager.twice", bind=True)
    def twice(task: Any) -> None:
        task.session.add_all([Customer(name="Ann"), Customer(name="Ann")])

    with pytest.raises(CommitRefused):
        twice.apply(throw=True)
    assert shop.customers() == []
