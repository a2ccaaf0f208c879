"""Making: where sites come from."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import pytest
from celery.backends.database import models
from sqlalchemy import create_engine

from tests.journeys import brokers
from tests.journeys.brokers import Broker
from tests.journeys.site import Setup, Site, new_tag
from tests.support.mariadb import MariaDB
from tests.support.record import used
from tests.support.servers import PostgreSQL, RabbitMQ, Redis
from tests.support.servicebus import ServiceBus
from tests.support.servicebus.namespace import Namespace

__all__ = ["Making"]

_numbers = itertools.count()


class Making:
    """Makes sites, each with a folder, database and broker of its own; ends them with the block."""

    def __init__(
        self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        self._request = request
        self._folders = tmp_path_factory
        self._ending = ExitStack()

    @property
    def postgresql(self) -> PostgreSQL:
        """The shared PostgreSQL."""
        server: PostgreSQL = self._request.getfixturevalue("postgresql_server")
        return server

    @property
    def mariadb(self) -> MariaDB:
        """The shared MariaDB."""
        server: MariaDB = self._request.getfixturevalue("mariadb_server")
        return server

    @property
    def rabbitmq(self) -> RabbitMQ:
        """The shared RabbitMQ."""
        server: RabbitMQ = self._request.getfixturevalue("rabbitmq_server")
        return server

    @property
    def redis(self) -> Redis:
        """The shared Redis."""
        server: Redis = self._request.getfixturevalue("redis_server")
        return server

    @property
    def servicebus(self) -> ServiceBus | Namespace:
        """The shared namespace of Azure Service Bus."""
        server: ServiceBus | Namespace = self._request.getfixturevalue("servicebus_namespace")
        return server

    def __call__(
        self,
        broker: str | Broker = "amqp",
        database: str = "postgresql",
        backend: str | None = "redis",
        *,
        create: bool = True,
        **settings: Any,
    ) -> Site:
        """Make a site. `broker`, `database` and `backend` are kinds, or addresses."""
        folder = self._folders.mktemp("site")
        if database in ("postgresql", "mariadb"):
            database = self.database(database)
        elif database == "sqlite":
            database = f"sqlite:///{folder / 'app.sqlite'}"
        if broker == "local":
            broker = brokers.local_queues(database)
        elif isinstance(broker, str):
            broker = self.broker(broker)
        if backend == "redis":
            backend = self.redis_url()
        elif backend == "database":
            backend = self.database_for_results()
        used(broker.url, database)
        setup = Setup(str(folder), broker.url, database, backend, {**broker.settings, **settings})
        site = Site(setup, broker.left)
        self._ending.callback(site.close)
        return site.create() if create else site

    def database_for_results(self) -> str:
        """Return a result backend: a PostgreSQL database with its tables."""
        url = self.database()
        # Celery 5.4 creates them for a process's first app, and for no other.
        engine = create_engine(url)
        models.ResultModelBase.metadata.create_all(engine)
        engine.dispose()
        return f"db+{url}"

    def broker(self, kind: str) -> Broker:
        """Return an empty broker of a kind."""
        match kind:
            case "amqp":
                broker = brokers.rabbitmq(self.rabbitmq)
                self._ending.callback(self.rabbitmq.delete_vhost, broker.url)
                return broker
            case "redis":
                return brokers.redis_database(self.redis_url())
            case "filesystem":
                return brokers.filesystem(self._folders.mktemp("broker"))
            case "sqlalchemy":
                return brokers.sqlalchemy_transport(self.database())
            case "servicebus":
                return brokers.servicebus(self.servicebus, f"{new_tag('site')}-")
            case "memory":
                return Broker("memory://", lambda: 0)
            case _:
                raise ValueError(kind)

    def database(self, kind: str = "postgresql") -> str:
        """Return an empty database of a server."""
        server = self.mariadb if kind == "mariadb" else self.postgresql
        url = server.create_database()
        self._ending.callback(server.drop_database, url)
        return url

    def redis_url(self) -> str:
        """Return an empty Redis database."""
        number = next(_numbers) % self.redis.databases
        self.redis.flush(number)
        return self.redis.database_url(number)

    def __enter__(self) -> Making:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ending.close()
