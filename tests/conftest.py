"""The servers and databases that tests ask for.

Servers start when the first test asks, are shared by all, and end with the session. What a test
gets is empty and its own: a database, a vhost, a Redis database. Tests that kill or pause a server
start one of their own (`tests.support.servers`). A server that is not installed is an error, never
a skip.
"""

import itertools
import logging
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.journeys.site import open_sites
from tests.support.mariadb import MariaDB
from tests.support.record import VARIABLE as RECORD
from tests.support.record import Recorder, used
from tests.support.servers import PostgreSQL, RabbitMQ, Redis
from tests.support.servicebus import ServiceBus
from tests.support.servicebus.namespace import VARIABLE, Namespace

_redis_numbers = itertools.count()


def pytest_configure(config: pytest.Config) -> None:
    """Record what is run on, if the environment names a file for that."""
    if file := os.environ.pop(RECORD, None):
        config.pluginmanager.register(Recorder(Path(file).absolute()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a test that fails what the processes of its sites have logged."""
    report = yield
    if report.failed:
        processes = [process for site in open_sites for process in site.processes]
        report.sections += [(f"log of {one.name}", one.describe()) for one in processes]
    return report


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A worker or a command that runs in this process sets up logging for all of it."""
    loggers = [logging.getLogger(name) for name in ("", "celery", "celery_outbox", "kombu")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgreSQL]:
    """The shared PostgreSQL: don't kill it."""
    with PostgreSQL() as server:
        yield server


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[MariaDB]:
    """The shared MariaDB: don't kill it."""
    with MariaDB() as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq_server() -> Iterator[RabbitMQ]:
    """The shared RabbitMQ: don't kill it."""
    with RabbitMQ() as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Redis]:
    """The shared Redis: don't kill it."""
    with Redis() as server:
        yield server


@pytest.fixture(scope="session")
def servicebus_server() -> Iterator[ServiceBus]:
    """The shared namespace of Azure Service Bus: don't pause it or end its connections."""
    with ServiceBus() as server:
        used(server.url)
        yield server


@pytest.fixture(scope="session")
def servicebus_namespace(request: pytest.FixtureRequest) -> Iterator[ServiceBus | Namespace]:
    """`servicebus_server`, or the real namespace whose address is in the environment."""
    if url := os.environ.get(VARIABLE):
        with Namespace(url) as namespace:
            yield namespace
    else:
        yield request.getfixturevalue("servicebus_server")


@pytest.fixture
def postgresql_url(postgresql_server: PostgreSQL) -> Iterator[str]:
    """The SQLAlchemy URL of an empty PostgreSQL database, dropped afterwards."""
    url = postgresql_server.create_database()
    yield url
    postgresql_server.drop_database(url)


@pytest.fixture
def mariadb_url(mariadb_server: MariaDB) -> Iterator[str]:
    """The SQLAlchemy URL of an empty MariaDB database, dropped afterwards."""
    url = mariadb_server.create_database()
    yield url
    mariadb_server.drop_database(url)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The SQLAlchemy URL of a SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'test.sqlite'}"


@pytest.fixture(params=["postgresql", "sqlite"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The test runs once with `postgresql_url` and once with `sqlite_url`."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def amqp_url(rabbitmq_server: RabbitMQ) -> Iterator[str]:
    """The URL of an empty RabbitMQ vhost, deleted afterwards with all connections to it."""
    url = rabbitmq_server.create_vhost()
    used(url)
    yield url
    rabbitmq_server.delete_vhost(url)


@pytest.fixture
def redis_url(redis_server: Redis) -> str:
    """The URL of an empty Redis database; its number comes round again after 64 tests."""
    number = next(_redis_numbers) % redis_server.databases
    redis_server.flush(number)
    url = redis_server.database_url(number)
    used(url)
    return url
