"""P4: a send inside a transaction needs neither the broker nor the result backend."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import kombu.exceptions
import pytest
from celery import chord, group
from celery.app.task import Context
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.support.ports import free_port
from tests.unit.conftest import MakeShop
from tests.unit.shop import Shop, add_customer


@contextmanager
def asking_nobody(*urls: str | None) -> Iterator[None]:
    """Nobody tries to connect to these in the block; nor waits, for who waits here waits to try."""
    connect, tried = socket.socket.connect, list[Any]()

    def try_to(self: socket.socket, address: Any) -> None:
        tried.append(address[1])
        connect(self, address)

    with patch.object(socket.socket, "connect", try_to):
        yield
    assert not {urlsplit(url).port for url in urls if url} & {*tried}


def amqp() -> str:
    return f"amqp://guest:guest@127.0.0.1:{free_port()}//"


def redis() -> str:
    return f"redis://127.0.0.1:{free_port()}/0"


BROKERS: dict[str, Callable[[], str]] = {"amqp": amqp, "redis": redis}
BACKENDS: dict[str, Callable[[], str | None]] = {
    "none": lambda: None,
    "redis": redis,
    "rpc": lambda: "rpc://",
    "database": lambda: f"db+postgresql+psycopg://nobody@127.0.0.1:{free_port()}/nowhere",
}

#: By default Celery makes the tables of the database backend with the first task that is sent.
LAZILY = {"database_create_tables_at_setup": False}


@pytest.fixture(params=BROKERS)
def broker_url(request: pytest.FixtureRequest) -> str:
    return BROKERS[request.param]()


@pytest.mark.parametrize("backend", BACKENDS)
def test_delay_in_a_transaction_asks_nobody_and_is_stored(
    make_shop: MakeShop, sqlite_url: str, broker_url: str, backend: str
) -> None:
    backend_url = BACKENDS[backend]()
    shop = make_shop(sqlite_url, result_backend=backend_url, **LAZILY)
    shop.app.conf.broker_url = broker_url
    with asking_nobody(broker_url, backend_url), shop.Session.begin() as session:
        add_customer(session)
        shop.notify.delay("m")
    assert shop.stored() == ["m"]


@pytest.mark.parametrize("backend", ["none", "rpc", "database"])
def test_delay_without_a_transaction_asks_nobody_and_is_stored(
    make_shop: MakeShop, sqlite_url: str, broker_url: str, backend: str
) -> None:
    """Not with Redis for results: without a transaction Celery subscribes at the call, as ever."""
    backend_url = BACKENDS[backend]()
    shop = make_shop(sqlite_url, result_backend=backend_url, **LAZILY)
    shop.app.conf.broker_url = broker_url
    with asking_nobody(broker_url, backend_url):
        shop.notify.apply_async(("m",), countdown=10, expires=60, priority=3)
    assert shop.stored() == ["m"]


@pytest.mark.parametrize("backend", ["none", "redis", "rpc"])
def test_canvas_without_a_chord_asks_nobody(
    make_shop: MakeShop, sqlite_url: str, broker_url: str, backend: str
) -> None:
    backend_url = BACKENDS[backend]()
    shop = make_shop(sqlite_url, result_backend=backend_url, **LAZILY)
    shop.app.conf.broker_url = broker_url
    with asking_nobody(broker_url, backend_url), shop.Session.begin():
        (shop.notify.si("1") | shop.notify.si("2")).delay()
        group(shop.notify.si("3"), shop.notify.si("4")).delay()
        shop.notify.apply_async(("5",), link=shop.notify.si("6"), link_error=shop.notify.si("7"))
        shop.notify.chunks([("8",), ("9",)], 1)
    assert shop.stored() == ["1", "3", "4", "5"]


def test_the_relay_claims_nothing_while_the_broker_is_away(
    make_shop: MakeShop, sqlite_url: str, broker_url: str
) -> None:
    """P7: no message is charged with the broker's absence."""
    shop = make_shop(sqlite_url, outbox_confirm_timeout_seconds=1, outbox_lease_seconds=5)
    shop.app.conf.broker_url = broker_url
    shop.notify.delay("m")
    assert shop.outbox.relay_once().claimed == 0
    assert shop.outbox.store.counts()["outgoing"] == 1


def test_a_plain_task_fails_as_it_does_without_an_outbox(
    make_shop: MakeShop, sqlite_url: str
) -> None:
    shop = make_shop(sqlite_url, broker_transport_options={"max_retries": 1, "interval_start": 0})
    shop.app.conf.broker_url = amqp()
    with pytest.raises(kombu.exceptions.OperationalError):
        shop.plain.delay("m")


@pytest.mark.parametrize("backend", ["redis", "rpc"])
def test_results_that_were_not_subscribed_to_at_the_call_still_arrive(
    make_shop: MakeShop, sqlite_url: str, redis_url: str, amqp_url: str, backend: str
) -> None:
    """What a group would have asked of the result backend is asked when somebody waits for it."""
    urls = {"redis": redis_url, "rpc": "rpc://"}
    shop = make_shop(sqlite_url, result_backend=urls[backend])
    shop.app.conf.broker_url = amqp_url
    with shop.Session.begin():
        result = group(shop.notify.si("1"), shop.notify.si("2")).delay()
        single = shop.notify.delay("3")
    assert shop.outbox.relay_once().confirmed == 3
    with shop.app.connection_for_read() as connection:
        queue = connection.SimpleQueue("celery")
        for _ in range(3):
            message = queue.get(timeout=5)
            request = Context(
                id=message.headers["id"],
                reply_to=message.properties["reply_to"],
                correlation_id=message.headers["id"],
            )
            label = json.loads(message.body)[0][0]
            shop.app.backend.store_result(message.headers["id"], label, "SUCCESS", request=request)
            message.ack()
        queue.close()
    assert result.get(timeout=5) == ["1", "2"]
    assert single.get(timeout=5) == "3"
    shop.app.backend.result_consumer.stop()


# Chords: Celery asks the result backend for them at the call.


def chord_of(shop: Shop) -> Any:
    return chord([shop.notify.si("part 1"), shop.notify.si("part 2")], shop.notify.si("body"))


def test_a_chord_with_the_database_backend_stores_parts_and_poll(
    make_shop: MakeShop, sqlite_url: str, broker_url: str, tmp_path: Any
) -> None:
    """That backend counts no parts: a message polls (chord_unlock), and shares their transaction."""
    shop = make_shop(sqlite_url, result_backend=f"db+sqlite:///{tmp_path}/results.sqlite")
    shop.app.conf.broker_url = broker_url
    with asking_nobody(broker_url), shop.Session.begin():
        result = chord_of(shop).delay()
        assert shop.stored() == []
    assert result.parent.children
    stored = shop.stored()
    assert sorted(str(label) for label in stored if label in ("part 1", "part 2")) == [
        "part 1",
        "part 2",
    ]
    assert len(stored) == 3


def test_a_chord_with_redis_stores_its_parts(
    make_shop: MakeShop, sqlite_url: str, broker_url: str, redis_url: str
) -> None:
    """Its body is sent by the worker that runs the last part."""
    shop = make_shop(sqlite_url, result_backend=redis_url)
    shop.app.conf.broker_url = broker_url
    with asking_nobody(broker_url), shop.Session.begin():
        chord_of(shop).delay()
        assert shop.stored() == []
    assert shop.stored() == ["part 1", "part 2"]


def test_a_chord_with_redis_away_fails_at_the_call(
    make_shop: MakeShop, sqlite_url: str, broker_url: str
) -> None:
    """Its size is written at the call, by Celery; with the error the transaction rolls back."""
    shop = make_shop(
        sqlite_url,
        result_backend=redis(),
        result_backend_transport_options={"retry_policy": {"max_retries": 0, "timeout": 0.1}},
    )
    shop.app.conf.broker_url = broker_url
    with (
        asking_nobody(broker_url),
        pytest.raises((kombu.exceptions.OperationalError, RedisConnectionError)),
        shop.Session.begin(),
    ):
        chord_of(shop).delay()
    assert shop.stored() == []


def test_a_chord_without_a_result_backend_fails_at_the_call(
    make_shop: MakeShop, sqlite_url: str, broker_url: str
) -> None:
    shop = make_shop(sqlite_url)
    shop.app.conf.broker_url = broker_url
    with pytest.raises(NotImplementedError), shop.Session.begin():
        chord_of(shop).delay()
    assert shop.stored() == []


def test_a_send_needs_no_place_in_the_pool_of_broker_connections(
    make_shop: MakeShop, sqlite_url: str
) -> None:
    """They may all be with threads that wait for a broker that is away."""
    shop = make_shop(sqlite_url)
    broker_url = amqp()
    shop.app.conf.update(broker_url=broker_url, broker_pool_limit=1)
    with (
        shop.app.producer_pool.acquire(),
        asking_nobody(broker_url),
        shop.Session.begin() as session,
    ):
        add_customer(session)
        shop.notify.delay("m")
        group(shop.notify.si("n"), shop.notify.si("o")).delay()
    assert shop.stored() == ["m", "n", "o"]
