"""The databases under contract. Another dialect is another line of `DATABASES` (and a URL fixture)."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import Engine, MetaData, create_engine
from sqlalchemy.exc import SQLAlchemyError

from celery_outbox.storage import schema
from celery_outbox.storage.store import Store
from celery_outbox.storage.tables import Tables
from tests.support.record import used
from tests.unit.conftest import (
    mariadb_url,
    postgresql_url,
    shared_mariadb_url,
    shared_postgresql_url,
)

__all__ = [
    "DATABASES",
    "Database",
    "mariadb_url",
    "postgresql_url",
    "shared_mariadb_url",
    "shared_postgresql_url",
]


@dataclass(frozen=True)
class Database:
    """One database: where its tests find it, and how it differs."""

    name: str
    #: The fixture that gives the URL of an empty one.
    url_fixture: str
    #: Driver options with which whoever must wait for a lock fails after about a second.
    impatient: dict[str, Any]
    #: Driver options with which whoever must wait for a lock fails at once, if there are such.
    never_waits: dict[str, Any] | None = None
    #: Whether one writer need not wait for another.
    several_writers: bool = True
    #: A schema that can be created and used, if it has any.
    schema: str | None = None
    #: SQL that brings `schema` about.
    prepare_schema: list[str] = field(default_factory=list)


#: Servers that are not installed here: where these name one, the contract is run on it.
_MYSQL, _MSSQL = "CELERY_OUTBOX_TEST_MYSQL_URL", "CELERY_OUTBOX_TEST_MSSQL_URL"
_SCHEMA = "IF SCHEMA_ID('messaging') IS NULL EXEC('CREATE SCHEMA messaging')"

DATABASES = [
    Database(
        "postgresql",
        "postgresql_url",
        impatient={"options": "-c lock_timeout=1000"},
        schema="messaging",
        prepare_schema=["CREATE SCHEMA messaging"],
    ),
    Database(
        "mariadb",
        "mariadb_url",
        impatient={"init_command": "SET innodb_lock_wait_timeout = 1"},
        never_waits={"init_command": "SET innodb_lock_wait_timeout = 0"},
        schema="messaging",
        prepare_schema=["DROP DATABASE IF EXISTS messaging", "CREATE DATABASE messaging"],
    ),
    # MariaDB under SQLAlchemy's other name, by which MySQL is reached.
    Database(
        "mysql",
        "mysql_url",
        impatient={"init_command": "SET innodb_lock_wait_timeout = 1"},
        never_waits={"init_command": "SET innodb_lock_wait_timeout = 0"},
        schema="messaging",
        prepare_schema=["DROP DATABASE IF EXISTS messaging", "CREATE DATABASE messaging"],
    ),
    Database("sqlite", "sqlite_url", impatient={"timeout": 1}, several_writers=False),
]


if _MSSQL in os.environ:
    DATABASES.append(
        Database("mssql", "mssql_url", impatient={}, schema="messaging", prepare_schema=[_SCHEMA])
    )


@pytest.fixture
def mysql_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an empty database: of the MySQL that is named, or of MariaDB as if it were one."""
    if _MYSQL not in os.environ:
        url: str = request.getfixturevalue("mariadb_url")
        yield url.replace("mariadb+", "mysql+")
        return
    yield os.environ[_MYSQL]
    _empty(os.environ[_MYSQL])


@pytest.fixture
def mssql_url() -> Iterator[str]:
    """The URL of the SQL Server database that is named."""
    yield os.environ[_MSSQL]
    _empty(os.environ[_MSSQL])


def _empty(url: str) -> None:
    engine = create_engine(url)
    for schema_name in (None, "messaging"):
        found = MetaData()
        with suppress(SQLAlchemyError):
            found.reflect(engine, schema=schema_name)
        found.drop_all(engine)
    engine.dispose()


@pytest.fixture(params=DATABASES, ids=lambda database: database.name)
def database(request: pytest.FixtureRequest) -> Database:
    """Each database in turn."""
    found: Database = request.param
    return found


@pytest.fixture
def engine(request: pytest.FixtureRequest, database: Database) -> Iterator[Engine]:
    """An engine of an empty database."""
    url: str = request.getfixturevalue(database.url_fixture)
    used(url)
    engine = create_engine(url, connect_args=database.impatient)
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: Engine) -> Store:
    """A store with its tables, empty."""
    tables = Tables()
    schema.create(engine, tables)
    return Store(engine, tables)
