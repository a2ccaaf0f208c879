"""The databases under contract. Another dialect is another line of `DATABASES` (and a URL fixture)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine

from celery_outbox.storage import schema
from celery_outbox.storage.store import Store
from celery_outbox.storage.tables import Tables
from tests.unit.conftest import postgresql_url, shared_postgresql_url

__all__ = ["DATABASES", "Database", "postgresql_url", "shared_postgresql_url"]


@dataclass(frozen=True)
class Database:
    """One database: where its tests find it, and how it differs."""

    name: str
    #: The fixture that gives the URL of an empty one.
    url_fixture: str
    #: Driver options with which whoever must wait for a lock fails after about a second.
    impatient: dict[str, Any]
    #: Whether one writer need not wait for another.
    several_writers: bool = True
    #: A schema that can be created and used, if it has any.
    schema: str | None = None
    #: SQL that brings `schema` about.
    prepare_schema: list[str] = field(default_factory=list)


DATABASES = [
    Database(
        "postgresql",
        "postgresql_url",
        impatient={"options": "-c lock_timeout=1000"},
        schema="messaging",
        prepare_schema=["CREATE SCHEMA messaging"],
    ),
    Database("sqlite", "sqlite_url", impatient={"timeout": 1}, several_writers=False),
]


@pytest.fixture(params=DATABASES, ids=lambda database: database.name)
def database(request: pytest.FixtureRequest) -> Database:
    """Each database in turn."""
    found: Database = request.param
    return found


@pytest.fixture
def engine(request: pytest.FixtureRequest, database: Database) -> Iterator[Engine]:
    """An engine of an empty database."""
    url: str = request.getfixturevalue(database.url_fixture)
    engine = create_engine(url, connect_args=database.impatient)
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: Engine) -> Store:
    """A store with its tables, empty."""
    tables = Tables()
    schema.create(engine, tables)
    return Store(engine, tables)
