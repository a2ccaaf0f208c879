"""The databases under contract. Another dialect is another line of `DATABASES` (and a URL fixture)."""

import os
from collections.abc import Iterator

import pytest

from celery_outbox.testing.contract.database import Database, database, engine, store
from tests.support.record import used
from tests.unit.conftest import (
    mariadb_url,
    postgresql_url,
    shared_mariadb_url,
    shared_postgresql_url,
)

__all__ = [
    "DATABASES",
    "database",
    "engine",
    "mariadb_url",
    "postgresql_url",
    "shared_mariadb_url",
    "shared_postgresql_url",
    "store",
]

#: Servers that are not installed here: where these name one, the contract is run on it.
_MYSQL, _MSSQL = "CELERY_OUTBOX_TEST_MYSQL_URL", "CELERY_OUTBOX_TEST_MSSQL_URL"

#: "mysql" is MariaDB under SQLAlchemy's other name, by which MySQL is reached.
DATABASES = ["postgresql", "mariadb", "mysql", "sqlite"]

if _MSSQL in os.environ:
    DATABASES.append("mssql")


@pytest.fixture
def mysql_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an empty database: of the MySQL that is named, or of MariaDB as if it were one."""
    if _MYSQL not in os.environ:
        url: str = request.getfixturevalue("mariadb_url")
        yield url.replace("mariadb+", "mysql+")
        return
    with Database.at(os.environ[_MYSQL]).emptied() as empty:
        yield empty.url


@pytest.fixture
def mssql_url() -> Iterator[str]:
    """The URL of the SQL Server database that is named."""
    with Database.at(os.environ[_MSSQL]).emptied() as empty:
        yield empty.url


@pytest.fixture(params=DATABASES)
def outbox_contract_database(request: pytest.FixtureRequest) -> Database:
    """Each database in turn."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    used(url)
    return Database.at(url)
