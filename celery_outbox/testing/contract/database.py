"""The database under contract: where it is, how it differs, and the fixtures made of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import Engine, MetaData, create_engine, inspect, make_url
from sqlalchemy.exc import SQLAlchemyError

from celery_outbox.errors import ConfigurationError
from celery_outbox.storage import schema
from celery_outbox.storage.store import Store
from celery_outbox.storage.tables import Tables

__all__ = ["Database", "database", "engine", "store"]


@dataclass(frozen=True)
class Database:
    """One database: where it is, and how it differs. Each test finds it empty."""

    url: str
    #: Driver options with which whoever must wait for a lock fails after about a second.
    impatient: dict[str, Any] = field(default_factory=dict)
    #: Driver options with which whoever must wait for a lock fails at once, if there are such.
    never_waits: dict[str, Any] | None = None
    #: Whether one writer need not wait for another.
    several_writers: bool = True
    #: A schema that can be created and used, if it has any.
    schema: str | None = None
    #: SQL that brings `schema` about.
    prepare_schema: list[str] = field(default_factory=list)

    @classmethod
    def at(cls, url: str) -> Database:
        """Return the database at a URL, with what is known of its kind."""
        return cls(url, **_KINDS.get(make_url(url).get_backend_name(), {}))

    @property
    def name(self) -> str:
        """SQLAlchemy's name of its kind."""
        return make_url(self.url).get_backend_name()

    @contextmanager
    def emptied(self) -> Iterator[Database]:
        """Refuse a database that has tables; afterwards drop those that it has then."""
        engine = create_engine(self.url)
        try:
            if found := inspect(engine).get_table_names():
                raise ConfigurationError(
                    f"the contract wants an empty database, for it drops all tables; "
                    f"{engine.url} has {', '.join(sorted(found))}"
                )
            yield self
            for name in {None, self.schema}:
                tables = MetaData()
                with suppress(SQLAlchemyError):  # Most tests make no schema.
                    tables.reflect(engine, schema=name)
                tables.drop_all(engine)
        finally:
            engine.dispose()


_SCHEMA = "celery_outbox_contract"
_MYSQL: dict[str, Any] = {
    "impatient": {"init_command": "SET innodb_lock_wait_timeout = 1"},
    "never_waits": {"init_command": "SET innodb_lock_wait_timeout = 0"},
    "schema": _SCHEMA,
    "prepare_schema": [f"DROP DATABASE IF EXISTS {_SCHEMA}", f"CREATE DATABASE {_SCHEMA}"],
}
_KINDS: dict[str, dict[str, Any]] = {
    "postgresql": {
        "impatient": {"options": "-c lock_timeout=1000"},
        "schema": _SCHEMA,
        "prepare_schema": [f"CREATE SCHEMA IF NOT EXISTS {_SCHEMA}"],
    },
    "mariadb": _MYSQL,
    "mysql": _MYSQL,
    "mssql": {
        "schema": _SCHEMA,
        "prepare_schema": [f"IF SCHEMA_ID('{_SCHEMA}') IS NULL EXEC('CREATE SCHEMA {_SCHEMA}')"],
    },
    "sqlite": {"impatient": {"timeout": 1}, "several_writers": False},
}


@pytest.fixture
def database(outbox_contract_database: Database) -> Database:
    """The database."""
    return outbox_contract_database


@pytest.fixture
def engine(database: Database) -> Iterator[Engine]:
    """An engine of an empty database."""
    engine = create_engine(database.url, connect_args=database.impatient)
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: Engine) -> Store:
    """A store with its tables, empty."""
    tables = Tables()
    schema.create(engine, tables)
    return Store(engine, tables)
