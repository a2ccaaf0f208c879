"""The fast path's thread: when it publishes, and when it leaves what was sent to the relays.

Whose fault tests are in tests/faults/test_fast_path_*.py; here the broker is a function.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from kombu.transport import virtual
from sqlalchemy.orm import Session

from celery_outbox import events
from celery_outbox.envelope import Envelope
from celery_outbox.relay import after_commit
from celery_outbox.relay.after_commit import FastPath
from celery_outbox.relay.loop import Relay
from celery_outbox.relay.outcome import Confirmed, Outcome, Undecided
from celery_outbox.relay.publishers import Publisher
from celery_outbox.relay.publishers.base import Meanwhile, nothing
from celery_outbox.storage.store import FreshestFirst
from tests.support.waiting import wait_until
from tests.unit.conftest import MakeShop
from tests.unit.shop import Purpose, Shop, add_customer, failing_on_purpose

LEASE: dict[str, Any] = {"outbox_lease_seconds": 2.0, "outbox_confirm_timeout_seconds": 1.0}


class Broker(Publisher):
    """Confirms, unless it is away; a test may close its gate, and then it is slow."""

    def __init__(self) -> None:
        super().__init__(lambda: None, 1.0)
        self.away = False
        self.dies = False
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()
        self.tries = 0
        self.closed = 0
        self.taken: list[str] = []

    def open(self) -> None:
        self.tries += 1
        if self.away:
            raise ConnectionRefusedError("away, says the test")

    def close(self) -> None:
        self.closed += 1

    def publish(
        self, batch: Sequence[tuple[int, Envelope]], meanwhile: Meanwhile = nothing
    ) -> dict[int, Outcome]:
        self.waiting.set()
        assert self.gate.wait(30)
        if self.dies:
            return {number: Undecided("it died") for number, _ in batch}
        self.taken.extend(envelope.task_id for _, envelope in batch)
        return {number: Confirmed() for number, _ in batch}


class Strange(virtual.Transport):
    """A transport of which it is not known what a publish that returned means."""

    driver_type = driver_name = "strange"


class Fast:
    """A shop that publishes after the commit, to a broker that is a function."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        self.broker = Broker()
        self.left = 0
        self.path = FastPath(
            lambda: FreshestFirst(sa.create_engine(shop.url), shop.outbox.tables),
            lambda store: Relay(store, self.broker, shop.outbox.config),
        )
        shop.outbox.store.on_stage = self.path.takes

    def hear(self, event: str, details: dict[str, Any]) -> None:
        if event == events.LEFT_TO_RELAY:
            self.left += details["count"]

    def send(self, *labels: object) -> None:
        with self.shop.Session.begin() as session:
            session.connection()
            for label in labels:
                self.shop.notify.delay(label)

    def wait_published(self, count: int) -> None:
        wait_until(lambda: len(self.broker.taken) >= count, 20, f"{count} published")
        wait_until(lambda: not self.shop.stored(), 20, "an empty outbox")
        assert len(self.broker.taken) == count


@pytest.fixture
def make_fast(make_shop: MakeShop) -> Iterator[Callable[[str], Fast]]:
    """Make a shop with a fast path on a database; its thread ends with the test."""
    made: list[Fast] = []

    def make(url: str) -> Fast:
        fast = Fast(make_shop(url, **LEASE))
        events.subscribe(fast.hear)
        made.append(fast)
        return fast

    yield make
    for fast in made:
        fast.broker.gate.set()
        fast.path.stop()
        events.unsubscribe(fast.hear)


@pytest.fixture
def fast(make_fast: Callable[[str], Fast], database_url: str) -> Fast:
    """On PostgreSQL and, once more, on SQLite."""
    return make_fast(database_url)


@pytest.fixture
def postgresql_fast(make_fast: Callable[[str], Fast], postgresql_url: str) -> Fast:
    """On PostgreSQL."""
    return make_fast(postgresql_url)


# When it publishes


def test_what_a_session_commits(fast: Fast) -> None:
    fast.send("a", "b")
    fast.wait_published(2)
    fast.send("c")
    fast.wait_published(3)


def test_what_a_connection_commits(fast: Fast) -> None:
    with fast.shop.engine.begin():
        fast.shop.notify.delay("a")
    fast.wait_published(1)


def test_what_is_stored_by_itself(fast: Fast) -> None:
    fast.shop.notify.delay("a")
    fast.wait_published(1)


def test_nothing_of_what_is_rolled_back(fast: Fast) -> None:
    """P1: also where it was inserted before, for a savepoint's sake."""
    with failing_on_purpose(), fast.shop.engine.begin() as connection:
        add = sa.text("INSERT INTO customer (name) VALUES ('Ann')")
        connection.execute(add)
        fast.shop.notify.delay("gone")
        with connection.begin_nested():
            connection.execute(add)
        raise Purpose
    with fast.shop.engine.begin() as connection:
        connection.execute(add)
        with failing_on_purpose(), connection.begin_nested():
            fast.shop.notify.delay("gone, too")
            with connection.begin_nested():
                connection.execute(add)
            raise Purpose
        fast.shop.notify.delay("kept")
    fast.wait_published(1)


def test_what_a_session_in_an_outer_transaction_commits_only_with_that(
    postgresql_fast: Fast,
) -> None:
    """P1: a commit that is a savepoint's release is none."""
    fast = postgresql_fast
    with fast.shop.engine.connect() as connection:
        outer = connection.begin()
        for label in ("a", "b"):
            with Session(connection, join_transaction_mode="create_savepoint") as session:
                add_customer(session)
                with fast.shop.outbox.using(session):
                    fast.shop.notify.delay(label)
                session.commit()
        # The fast path is at work, and does not see them.
        elsewhere = threading.Thread(target=fast.send, args=("c",))
        elsewhere.start()
        elsewhere.join()
        wait_until(lambda: len(fast.broker.taken) == 1, 20, "the other message")
        outer.commit()
    fast.wait_published(3)


@pytest.mark.parametrize("prepared", [False, True])
def test_what_is_committed_in_two_phases(postgresql_fast: Fast, prepared: bool) -> None:
    with postgresql_fast.shop.engine.connect() as connection:
        transaction = connection.begin_twophase()
        postgresql_fast.shop.notify.delay("a")
        if prepared:
            transaction.prepare()
        transaction.commit()
    postgresql_fast.wait_published(1)


def test_what_is_due_later_is_left_to_the_relays(fast: Fast) -> None:
    fast.shop.notify.apply_async(("later",), countdown=3600)
    fast.send("now")
    wait_until(lambda: fast.shop.stored() == ["later"], 20, "the one that is due")
    assert len(fast.broker.taken) == 1


def test_many_threads_send(postgresql_fast: Fast) -> None:
    def work(number: int) -> None:
        for turn in range(10):
            postgresql_fast.send(f"{number}-{turn}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # What the thread was not told in time is a relay's; nothing is published twice.
    wait_until(
        lambda: len(postgresql_fast.shop.stored()) == postgresql_fast.left,
        20,
        "all but what is left",
    )
    taken = postgresql_fast.broker.taken
    assert len(taken) == len(set(taken)) == 80 - postgresql_fast.left


def test_a_process_that_sends_nothing_keeps_no_connection(
    make_fast: Callable[[str], Fast], sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall would cut it and tell nobody, and the next message would wait for a timeout."""
    monkeypatch.setattr(after_commit, "_IDLE_AFTER", 0.1)
    fast = make_fast(sqlite_url)
    fast.send("a")
    fast.wait_published(1)
    wait_until(lambda: fast.broker.closed == 1, 20, "the connection's end")
    fast.send("b")
    fast.wait_published(2)
    wait_until(lambda: fast.broker.closed == 2, 20, "the connection's end")


# When it does not


def test_while_the_broker_is_away_it_asks_seldom_and_leaves_everything(fast: Fast) -> None:
    """P7: no storm of tries, nothing leased, nothing counted."""
    fast.broker.away = True
    for number in range(50):
        fast.send(number)
    wait_until(lambda: fast.broker.tries > 0, 20, "a try")
    for number in range(50, 100):
        fast.send(number)
    assert fast.broker.tries <= 10
    assert len(fast.shop.stored()) == 100
    assert fast.shop.outbox.store.counts()["in_flight"] == 0
    assert fast.left >= 50
    # It comes back, and so does the fast path; what it has left, it does not take again.
    fast.broker.away = False
    wait_until(lambda: _publishes(fast), 20, "the fast path", interval=0.2)


def _publishes(fast: Fast) -> bool:
    before = len(fast.broker.taken)
    fast.send("again")
    time.sleep(0.1)
    return len(fast.broker.taken) > before


def test_a_broker_that_dies_in_the_middle_costs_nobody_an_attempt(fast: Fast) -> None:
    fast.broker.dies = True
    fast.send("a", "b")
    outbox = fast.shop.outbox.tables.outbox

    def given_back() -> bool:
        with fast.shop.engine.connect() as connection:
            rows = connection.execute(sa.select(outbox.c.attempts, outbox.c.lease_token)).all()
        return fast.broker.waiting.is_set() and [tuple(row) for row in rows] == [(0, None)] * 2

    wait_until(given_back, 20, "both given back")


def test_a_slow_broker_bounds_what_is_remembered(
    make_fast: Callable[[str], Fast], sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound it is the relays'."""
    monkeypatch.setattr(after_commit, "_MOST", 20)
    fast = make_fast(sqlite_url)
    fast.broker.gate.clear()
    fast.send("first")
    assert fast.broker.waiting.wait(20)
    for number in range(100):
        fast.send(number)
    assert fast.path._told.qsize() + len(fast.path._open) <= 20
    assert fast.left == 80
    fast.broker.gate.set()
    wait_until(lambda: len(fast.shop.stored()) == 80, 20, "what was remembered")
    assert len(fast.broker.taken) == 21


def test_a_thread_that_does_not_come_back_is_told_nothing_more(
    make_fast: Callable[[str], Fast], sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(after_commit, "_BEHIND_AFTER", 0.05)
    fast = make_fast(sqlite_url)
    fast.broker.gate.clear()
    fast.send("first")
    assert fast.broker.waiting.wait(20)
    fast.send("second")
    time.sleep(0.1)
    fast.send("third")
    assert fast.left == 1


def test_a_process_in_which_threads_never_run_loses_nothing(
    make_fast: Callable[[str], Fast], sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in uWSGI without enable-threads."""
    monkeypatch.setattr(after_commit, "_BEHIND_AFTER", 0.05)
    monkeypatch.setattr(threading.Thread, "start", lambda thread: None)
    fast = make_fast(sqlite_url)
    fast.send("first")
    time.sleep(0.1)
    for number in range(10):
        fast.send(number)
    assert len(fast.shop.stored()) == 11
    assert fast.left == 10
    assert fast.shop.outbox.store.counts()["in_flight"] == 0


def test_a_system_without_a_thread_to_spare_leaves_it_to_the_relays(
    make_fast: Callable[[str], Fast], sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    fast = make_fast(sqlite_url)
    fast.send("a")
    fast.send("b")
    assert fast.shop.stored() == ["a", "b"]


def test_a_broker_to_which_nothing_can_be_published_safely(
    make_shop: MakeShop, sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    shop = make_shop(sqlite_url, outbox_publish_after_commit=True)
    shop.app.conf.broker_transport = Strange
    shop.notify.delay("a")
    shop.outbox.fast_path.stop()
    assert shop.stored() == ["a"]
    assert "nothing is published after the commit" in caplog.text


def test_what_is_committed_is_published_when_the_process_ends(fast: Fast) -> None:
    fast.broker.gate.clear()
    fast.send("first")
    assert fast.broker.waiting.wait(20)
    fast.send("last")
    threading.Timer(0.1, fast.broker.gate.set).start()
    fast.path.stop()
    assert len(fast.broker.taken) == 2
    assert fast.shop.stored() == []
    fast.send("after the end")
    assert fast.shop.stored() == ["after the end"]


def test_the_end_of_the_process_does_not_wait_for_long(fast: Fast) -> None:
    fast.broker.gate.clear()
    fast.send("first")
    assert fast.broker.waiting.wait(20)
    fast.path.stop(timeout=0.1)
    assert fast.shop.stored() == ["first"]


def test_a_transaction_that_nobody_ends_is_given_up(
    make_fast: Callable[[str], Fast], postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(after_commit, "_OPEN_FOR", 0.1)
    fast = make_fast(postgresql_url)
    with fast.shop.engine.connect() as connection, fast.shop.outbox.using(_begun(connection)):
        fast.shop.notify.delay("a")
        connection.begin_nested()  # writes it
        wait_until(lambda: fast.left == 1, 20, "it was left")
        connection.rollback()


def _begun(connection: sa.Connection) -> sa.Connection:
    connection.begin()
    return connection


# A fork


def test_a_child_begins_anew(postgresql_fast: Fast) -> None:
    """Forked while the parent's thread is in the middle of a batch."""
    fast = postgresql_fast
    fast.broker.gate.clear()
    fast.send("parent's")
    assert fast.broker.waiting.wait(20)
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with os.fdopen(reading) as answers:
            assert answers.read() == "1"
        os.waitpid(child, 0)
        fast.broker.gate.set()
        wait_until(lambda: not fast.shop.stored(), 20, "an empty outbox")
        assert len(fast.broker.taken) == 1
        return
    try:
        fast.path.forget()  # what an Outbox does for its own
        fast.shop.engine.dispose(close=False)
        fast.broker.gate = threading.Event()
        fast.broker.gate.set()
        fast.send("child's")
        wait_until(lambda: fast.broker.taken, 20, "published by the child")
        fast.path.stop()
        os.write(writing, str(len(fast.broker.taken)).encode())
    finally:
        os._exit(0)
