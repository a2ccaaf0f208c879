"""Local queues: which messages wait where, and kombu's side of ``outbox://``."""

import os
import socket
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery import Celery
from celery.signals import celeryd_init
from kombu import Connection, Exchange, Queue
from sqlalchemy.orm import sessionmaker

from celery_outbox import ConfigurationError, EnvelopeError, Outbox, events
from celery_outbox.inbox.parking import Busy
from celery_outbox.storage.administration import Administration
from tests.unit.conftest import MakeShop
from tests.unit.shop import Shop, engine_for

#: A time that comes after the test.
LATER = datetime.now(timezone.utc) + timedelta(days=1)


class Local:
    """An app that has no broker."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.app = Celery("local", broker="outbox://", set_as_current=False)
        self.app.conf.update(settings)
        self.engine = engine_for(url)
        self.Session = sessionmaker(self.engine)
        self.outbox = Outbox(self.app, self.Session)
        self.outbox.create_schema()

        @self.app.task(name="local.plain", shared=False)
        def plain(*args: Any) -> None:
            pass

        self.plain = plain
        self.connection: Connection = self.app.connection()
        self.channel = self.connection.channel()

    def counts(self) -> dict[str, dict[str, int]]:
        return self.outbox.store.local.counts()

    def close(self) -> None:
        self.connection.release()
        self.app.close()
        self.engine.dispose()


@pytest.fixture
def local(database_url: str) -> Iterator[Local]:
    local = Local(database_url)
    yield local
    local.close()


def _beside(make_shop: MakeShop, url: str, **settings: Any) -> Shop:
    return make_shop(url, outbox_local_queues=["emails", "media"], **settings)


def _queued(shop: Shop) -> dict[str, int]:
    counts = shop.outbox.store.local.counts()
    return {queue: sum(states.values()) for queue, states in counts.items()}


# Which messages are local


def test_by_the_queue_that_a_message_is_sent_to(make_shop: MakeShop, database_url: str) -> None:
    shop = _beside(make_shop, database_url)
    with shop.Session.begin():
        shop.notify.apply_async(("local",), queue="emails")
        shop.notify.apply_async(("broker",))
        assert _queued(shop) == {}
    assert _queued(shop) == {"emails": 1}
    assert shop.stored() == ["broker"]


def test_by_a_route(make_shop: MakeShop, sqlite_url: str) -> None:
    shop = _beside(make_shop, sqlite_url, task_routes={"shop.*": {"queue": "emails"}})
    shop.notify.delay("m")
    shop.plain.delay("m")
    assert _queued(shop) == {"emails": 2}
    assert shop.stored() == shop.published() == []


def test_by_the_default_queue(make_shop: MakeShop, sqlite_url: str) -> None:
    shop = _beside(make_shop, sqlite_url, task_default_queue="emails")
    shop.plain.delay("m")
    assert _queued(shop) == {"emails": 1}


def test_by_an_exchange_that_leads_there(make_shop: MakeShop, sqlite_url: str) -> None:
    exchange = Exchange("media", type="topic")
    queues = [Queue("media", exchange, routing_key="media.#"), Queue("celery")]
    shop = _beside(make_shop, sqlite_url, task_queues=queues)
    for task in (shop.notify, shop.plain):
        task.apply_async(("m",), exchange="media", routing_key="media.video")
        task.apply_async(("m",), queue="media")
    assert _queued(shop) == {"media": 4}
    assert shop.published() == []


def test_what_is_rolled_back_is_not_there(make_shop: MakeShop, database_url: str) -> None:
    """P1."""
    shop = _beside(make_shop, database_url)
    with shop.Session() as session:
        session.begin()
        shop.notify.apply_async(("gone",), queue="emails")
        session.rollback()
    assert _queued(shop) == {}


def test_no_queue_is_local_by_itself(make_shop: MakeShop, sqlite_url: str) -> None:
    shop = make_shop(sqlite_url)
    shop.notify.apply_async(("m",), queue="emails")
    assert _queued(shop) == {}
    assert shop.stored() == ["m"]


@pytest.mark.parametrize("names", ["emails", [1], [""]])
def test_a_wrong_setting(make_shop: MakeShop, sqlite_url: str, names: Any) -> None:
    shop = make_shop(sqlite_url, tables=False, outbox_local_queues=names)
    with pytest.raises(ConfigurationError, match=r"outbox_local_queues=.* a list of names"):
        _ = shop.outbox.config


# What a worker reads from


class Worker:
    """What Celery's worker shows of itself when it starts."""

    def __init__(self, app: Celery, **options: Any) -> None:
        self.app = app
        celeryd_init.send(sender="w", instance=self, conf=app.conf, options=options)


@pytest.mark.parametrize(
    ("options", "scheme"),
    [
        ({"queues": ["emails"]}, "outbox"),
        ({"queues": "emails,media"}, "outbox"),
        ({"queues": ["celery"]}, "recording"),
        ({}, "recording"),
        ({"exclude_queues": ["celery"]}, "outbox"),
    ],
)
def test_a_worker_reads_where_its_queues_are(
    make_shop: MakeShop, sqlite_url: str, options: dict[str, Any], scheme: str
) -> None:
    shop = _beside(make_shop, sqlite_url, task_queues=[Queue("emails"), Queue("celery")])
    Worker(shop.app, **options)
    assert shop.app.connection_for_read().transport_cls == scheme
    assert shop.app.connection_for_write().transport_cls == "recording"


def test_a_worker_of_all_queues_leaves_the_local_ones(make_shop: MakeShop, sqlite_url: str) -> None:
    shop = _beside(make_shop, sqlite_url, task_queues=[Queue("emails"), Queue("celery")])
    Worker(shop.app)
    assert list(shop.app.amqp.queues.consume_from) == ["celery"]


def test_a_worker_can_not_read_both(make_shop: MakeShop, sqlite_url: str) -> None:
    shop = _beside(make_shop, sqlite_url)
    with pytest.raises(SystemExit, match="emails is in the database and celery in the broker"):
        Worker(shop.app, queues=["emails", "celery"])


# An app without a broker


def test_celery_publishes_by_itself(local: Local) -> None:
    local.plain.apply_async(("now",))
    local.plain.apply_async(("later",), eta=LATER)
    assert local.counts() == {"celery": {"due": 1, "scheduled": 1, "taken": 0}}


def test_a_message_that_leads_nowhere_is_refused(database_url: str) -> None:
    local = Local(database_url, outbox_capture="all")
    with pytest.raises(EnvelopeError, match="no queue is bound for 'media/video'"):
        local.plain.apply_async(exchange=Exchange("media"), routing_key="video")
    assert local.counts() == {}
    local.close()


def test_it_has_no_relay_to_drive(local: Local) -> None:
    assert "celery-outbox-relay" not in local.app.conf.beat_schedule
    local.outbox.check_broker()


def test_what_waits_in_the_outbox_is_moved_by_a_relay(
    make_shop: MakeShop, postgresql_url: str
) -> None:
    """An app that had a broker before."""
    before = make_shop(postgresql_url)
    before.notify.delay("m")
    local = Local(postgresql_url)
    assert local.outbox.relay_all().confirmed == 1
    assert local.counts() == {"celery": {"due": 1, "scheduled": 0, "taken": 0}}
    assert before.stored() == []
    local.close()


def test_a_message_is_what_was_published(local: Local) -> None:
    """P3: body, headers and properties, of a message that is no task's."""
    local.connection.Producer().publish(
        {"a": "ä"},
        routing_key="q",
        headers={"when": LATER, "raw": "x"},
        correlation_id="c",
        reply_to="r",
        priority=7,
    )
    message = local.channel.basic_get("q")
    assert message.payload == {"a": "ä"}
    assert message.headers == {"when": LATER, "raw": "x"}
    assert message.properties["correlation_id"] == "c"
    assert message.properties["reply_to"] == "r"
    assert message.delivery_info == {
        "exchange": "",
        "routing_key": "q",
        "priority": 7,
        "redelivered": False,
    }


def test_bytes_stay_bytes(local: Local) -> None:
    body = b"\x00\xff"
    options = {"content_type": "application/data", "content_encoding": "binary"}
    local.connection.Producer().publish(body, routing_key="q", **options)
    assert local.channel.basic_get("q").body == body


def test_a_lease_tells_which_process_holds_it(local: Local) -> None:
    """P18."""
    local.plain.delay()
    local.channel.basic_get("celery")
    (lease,) = Administration(local.engine, local.outbox.tables).leases()
    assert lease["token"].startswith(f"{os.getpid()}@{socket.gethostname()[-17:]}:")
    assert len(lease["token"]) <= 36


def test_a_rejected_message_comes_back_or_is_gone(local: Local) -> None:
    local.plain.delay()
    message = local.channel.basic_get("celery")
    message.requeue()
    again = local.channel.basic_get("celery")
    assert again.delivery_info["redelivered"]
    again.reject()
    assert local.channel.basic_get("celery") is None
    local.channel.close()
    assert local.counts() == {}


def test_a_message_that_is_requeued_too_often_is_a_dead_letter(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """P7."""
    local = Local(database_url, outbox_local_max_attempts=2)
    local.plain.delay()
    told: list[tuple[str, dict[str, Any]]] = []
    with events.listening(lambda name, details: told.append((name, details))):
        for _ in range(2):
            local.channel.basic_get("celery").requeue()
        assert local.channel.basic_get("celery") is None
    error = "delivered 2 times and never handled; the last time: its worker gave it back"
    (death,) = [details for name, details in told if name == events.DEAD]
    assert (death["task"], death["error"]) == ("local.plain", error)
    assert f"is a dead letter: {error}" in caplog.text
    assert local.counts() == {}
    local.close()


def test_a_duplicate_of_what_still_runs_does_not_die(database_url: str) -> None:
    """It may go back a hundred times while the first execution takes long."""
    local = Local(database_url, outbox_local_max_attempts=1)
    local.plain.delay()
    for _ in range(3):
        message = local.channel.basic_get("celery")
        message.given_back_for = Busy("it is being executed", requeue=True)
        message.requeue()
    assert local.counts() == {"celery": {"due": 1, "scheduled": 0, "taken": 0}}
    local.close()


def test_messages_that_are_given_back_unused_do_not_die(database_url: str) -> None:
    """A worker may take a message along, and stop, as often as it likes."""
    local = Local(database_url, outbox_local_max_attempts=1)
    local.plain.delay()
    for _ in range(3):
        channel = local.connection.channel()
        assert channel.basic_get("celery") is not None
        channel.close()
    assert local.counts() == {"celery": {"due": 1, "scheduled": 0, "taken": 0}}
    local.close()


def test_a_channel_that_is_closed_deletes_and_gives_back(local: Local) -> None:
    for _ in range(2):
        local.plain.delay()
    local.channel.basic_get("celery").ack()
    local.channel.basic_get("celery")
    local.channel.close()
    assert local.counts() == {"celery": {"due": 1, "scheduled": 0, "taken": 0}}


def test_a_consumer_has_no_more_in_hand_than_it_may(local: Local) -> None:
    for _ in range(5):
        local.plain.delay()
    messages: list[Any] = []
    queue = Queue("celery")(local.channel)
    consumer = local.connection.Consumer(queue, channel=local.channel, on_message=messages.append)
    consumer.qos(prefetch_count=2)
    with consumer:
        local.connection.drain_events(timeout=5)
        with pytest.raises(TimeoutError):
            local.connection.drain_events(timeout=0.1)
        assert len(messages) == 2
        messages[0].ack()
        local.connection.drain_events(timeout=5)
        assert len(messages) == 3


def test_without_acknowledgement_a_message_is_gone(local: Local) -> None:
    local.plain.delay()
    messages: list[Any] = []
    queue = Queue("celery")(local.channel)
    with local.connection.Consumer(
        queue, channel=local.channel, no_ack=True, on_message=messages.append
    ):
        local.connection.drain_events(timeout=5)
    local.channel.close()
    assert len(messages) == 1
    assert local.counts() == {}


def test_a_callback_that_fails_keeps_nothing_back(local: Local) -> None:
    """What was taken with the message and not delivered yet is there for others."""
    for _ in range(3):
        local.plain.delay()

    def fail(_message: Any) -> None:
        raise ZeroDivisionError

    queue = Queue("celery")(local.channel)
    with (
        local.connection.Consumer(queue, channel=local.channel, on_message=fail),
        pytest.raises(ZeroDivisionError),
    ):
        local.connection.drain_events(timeout=5)
    assert local.counts() == {"celery": {"due": 2, "scheduled": 0, "taken": 1}}


def test_a_message_of_a_newer_version_is_left_to_newer_workers(
    local: Local, caplog: pytest.LogCaptureFixture
) -> None:
    """P19."""
    local.plain.delay()
    table = local.outbox.tables.local
    with local.engine.begin() as connection:
        connection.execute(table.update().values(message='{"format": 99}'))
    assert local.channel.basic_get("celery") is None
    assert "stored in format 99" in caplog.text
    assert local.counts() == {"celery": {"due": 0, "scheduled": 1, "taken": 0}}


def test_purge_and_size(local: Local) -> None:
    for _ in range(3):
        local.plain.delay()
    assert local.channel.queue_declare("celery", passive=True).message_count == 3
    assert local.app.control.purge() == 3
    assert local.counts() == {}


def test_the_address_shows_nothing(local: Local) -> None:
    assert "outbox://" in local.connection.as_uri()
    assert local.connection.info()["transport_options"]["outbox"].startswith("local-")


# Whose queues a connection reaches


def test_each_app_reaches_its_own(postgresql_url: str, sqlite_url: str) -> None:
    one, two = Local(postgresql_url), Local(sqlite_url)
    one.plain.delay()
    assert [list(local.counts()) for local in (one, two)] == [["celery"], []]
    with pytest.raises(ConfigurationError, match="several apps of this process have an Outbox"):
        _ = Connection("outbox://").transport
    for local in (one, two):
        local.close()


def test_an_app_without_an_outbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celery_outbox.local.hosts._hosts", {})
    app = Celery("bare", broker="outbox://", set_as_current=False)
    with pytest.raises(ConfigurationError, match=r"add `outbox = Outbox\(app, Session\)`"):
        _ = app.connection().transport
