"""The brokers on which journeys are made: where each is, its settings, what is left in it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError

from tests.journeys.folder import unacknowledged
from tests.support.servers import RabbitMQ
from tests.support.servicebus import ServiceBus
from tests.support.servicebus.namespace import Namespace

__all__ = [
    "Broker",
    "filesystem",
    "local_queues",
    "rabbitmq",
    "redis_database",
    "servicebus",
    "sqlalchemy_transport",
]


@dataclass(frozen=True)
class Broker:
    """A broker: `left` counts the messages in it, delivered ones that are not acknowledged included."""

    url: str
    left: Callable[[], int]
    settings: dict[str, Any] = field(default_factory=dict)


def rabbitmq(server: RabbitMQ, url: str | None = None) -> Broker:
    """A vhost, by its own address or another (a proxy's)."""
    vhost = server.create_vhost()
    address = vhost if url is None else url + "/" + vhost.rpartition("/")[2]
    return Broker(address, lambda: sum(_tasks(server.queue_depths(vhost)).values()))


def _tasks(depths: dict[str, int]) -> dict[str, int]:
    return {name: depth for name, depth in depths.items() if "celery.pidbox" not in name}


def redis_database(url: str) -> Broker:
    """A Redis database; it may hold results, too."""

    def left() -> int:
        with redis.Redis.from_url(url) as client:
            lists = [key for key in client.keys("*") if client.type(key) == b"list"]
            waiting = sum(client.llen(key) for key in lists)
            return waiting + client.hlen("unacked")

    return Broker(url, left)


def filesystem(folder: Path) -> Broker:
    """Kombu's filesystem transport, in a folder, with the example's way of writing files.

    Kombu's own lets a worker read a file that is not yet filled, and that ends the worker.
    """

    def left() -> int:
        # In this order, for a message that is taken in between.
        waiting = [path for path in messages.glob("*.msg") if "celery.pidbox" not in path.name]
        return len(waiting) + unacknowledged(messages)

    messages, control = folder / "messages", folder / "control"
    for path in (messages, control):
        path.mkdir(parents=True)
    options = {
        "data_folder_in": str(messages),
        "data_folder_out": str(messages),
        "control_folder": str(control),
        "polling_interval": 0.05,
    }
    return Broker(
        "filesystem://",
        left,
        {
            "broker_transport": "tests.journeys.folder:Transport",
            "broker_transport_options": options,
        },
    )


def sqlalchemy_transport(url: str) -> Broker:
    """Kombu's SQLAlchemy transport, in a database of its own."""
    engine = create_engine(url)

    def left() -> int:
        try:
            with engine.connect() as connection:
                return connection.execute(
                    text("SELECT count(*) FROM kombu_message WHERE visible")
                ).scalar_one()
        except DBAPIError:
            return 0  # nobody has sent anything yet
        finally:
            engine.dispose()

    return Broker(f"sqla+{url}", left)


def servicebus(server: ServiceBus | Namespace, prefix: str, *, lock_seconds: int = 5) -> Broker:
    """A namespace, with a queue whose messages are known by their ids; `prefix` makes it one's own."""
    queue = f"{prefix}celery"
    server.create_queue(
        queue, duplicate_detection=True, lock_seconds=lock_seconds, max_delivery_count=100
    )
    options = {
        "peek_lock_seconds": lock_seconds,
        "polling_interval": 0.05,
        "queue_name_prefix": prefix,
        "use_lock_renewal": True,
        "wait_time_seconds": 1,
    }
    return Broker(
        server.url,
        lambda: server.counts(queue)["active"],
        {"broker_transport_options": options},
    )


def local_queues(database: str) -> Broker:
    """No broker at all: the local queues of an outbox in `database`."""

    def left() -> int:
        engine = create_engine(database)
        try:
            with engine.connect() as connection:
                return connection.execute(text("SELECT count(*) FROM outbox_local")).scalar_one()
        finally:
            engine.dispose()

    return Broker("outbox://", left)
