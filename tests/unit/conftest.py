"""The shop, on each database."""

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from tests.support.mariadb import MariaDB
from tests.support.servers import PostgreSQL
from tests.unit.shop import Shop

#: Builds a `Shop` with what the test wants different; closed afterwards.
MakeShop = Callable[..., Shop]


@pytest.fixture(scope="session")
def shared_postgresql_url(postgresql_server: PostgreSQL) -> Iterator[str]:
    """The URL of the database that `postgresql_url` empties."""
    url = postgresql_server.create_database()
    yield url
    postgresql_server.drop_database(url)


@pytest.fixture
def postgresql_url(shared_postgresql_url: str) -> Iterator[str]:
    """The URL of an empty database: emptied, which is faster than a new one."""
    yield shared_postgresql_url
    with psycopg.connect(shared_postgresql_url.replace("+psycopg", "")) as connection:
        connection.execute("SET lock_timeout = '10s'")
        connection.execute("SET client_min_messages = error")
        connection.execute(
            "DO $$ DECLARE name text; BEGIN FOR name IN SELECT nspname FROM pg_namespace "
            "WHERE nspname NOT LIKE 'pg\\_%' AND nspname <> 'information_schema' "
            "LOOP EXECUTE format('DROP SCHEMA %I CASCADE', name); END LOOP; END $$"
        )
        connection.execute("CREATE SCHEMA public")


@pytest.fixture(scope="session")
def shared_mariadb_url(mariadb_server: MariaDB) -> Iterator[str]:
    """The URL of the database that `mariadb_url` empties."""
    url = mariadb_server.create_database()
    yield url
    mariadb_server.drop_database(url)


@pytest.fixture
def mariadb_url(mariadb_server: MariaDB, shared_mariadb_url: str) -> Iterator[str]:
    """The URL of an empty database."""
    yield shared_mariadb_url
    mariadb_server.empty(shared_mariadb_url)


@pytest.fixture
def make_shop(request: pytest.FixtureRequest) -> Iterator[MakeShop]:
    """Build shops on one database, PostgreSQL or SQLite by turns."""
    shops: list[Shop] = []

    def make(*args: Any, **kwargs: Any) -> Shop:
        shops.append(Shop(*args, **kwargs))
        return shops[-1]

    yield make
    for shop in shops:
        shop.close()


@pytest.fixture
def shop(make_shop: MakeShop, database_url: str) -> Shop:
    """A shop on PostgreSQL and, once more, on SQLite."""
    return make_shop(database_url)


@pytest.fixture
def postgresql_shop(make_shop: MakeShop, postgresql_url: str) -> Shop:
    """A shop on PostgreSQL."""
    return make_shop(postgresql_url)


@pytest.fixture
def sqlite_shop(make_shop: MakeShop, sqlite_url: str) -> Shop:
    """A shop on SQLite."""
    return make_shop(sqlite_url)


@pytest.fixture
def other_postgresql_url(postgresql_server: PostgreSQL) -> Iterator[str]:
    """The URL of a second empty database."""
    url = postgresql_server.create_database()
    yield url
    postgresql_server.drop_database(url)
