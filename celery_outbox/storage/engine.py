"""Engines: the database that a user's session, engine or URL stands for."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, Table, create_engine, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, UnboundExecutionError
from sqlalchemy.orm import scoped_session, sessionmaker

from celery_outbox.errors import ConfigurationError
from celery_outbox.storage.asynchronous import AsyncEngine, async_sessionmaker

__all__ = [
    "engine_from_url",
    "engine_of",
    "has_twin",
    "is_same_database",
    "twin_of",
    "working_engine_of",
]

#: Drivers that only work in an event loop, and those that reach the same database without one.
_SYNCHRONOUS = {
    "postgresql+asyncpg": "postgresql+psycopg",
    "postgresql+psycopg_async": "postgresql+psycopg",
    "sqlite+aiosqlite": "sqlite",
    "mysql+aiomysql": "mysql+pymysql",
    "mysql+asyncmy": "mysql+pymysql",
    "mariadb+aiomysql": "mariadb+pymysql",
    "mariadb+asyncmy": "mariadb+pymysql",
    "mssql+aioodbc": "mssql+pyodbc",
}

_DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def engine_of(target: Any, table: Table) -> Engine | None:
    """Return a synchronous engine for `target`, or None if it has no engine yet."""
    bind = _bind_of(target, table)
    if isinstance(bind, AsyncEngine):
        return _synchronous(bind)
    engine = getattr(bind, "engine", None)
    return engine if isinstance(engine, Engine) else None


def working_engine_of(target: Any, table: Table) -> Engine | None:
    """Return the engine on which the app's own transactions run: of an AsyncEngine, the one inside."""
    bind = _bind_of(target, table)
    return bind.sync_engine if isinstance(bind, AsyncEngine) else engine_of(bind, table)


def _bind_of(target: Any, table: Table) -> Any:
    if isinstance(target, scoped_session):
        target = target.session_factory
    if isinstance(target, async_sessionmaker):
        target = target.kw.get("bind")
    if isinstance(target, sessionmaker):
        try:
            with target() as session:
                target = session.get_bind(clause=table)
        except UnboundExecutionError:
            return None
    return target


def engine_from_url(url: str) -> Engine:
    """Return an engine for a URL; raise `ConfigurationError` that names what is wrong with it."""
    try:
        parsed = make_url(url)
        return create_engine(parsed.set(drivername=_driver(parsed)))
    except (NoSuchModuleError, ImportError) as exc:
        raise ConfigurationError(
            f"the outbox's database URL: {parsed.drivername!r} can't be used here: {exc}; install "
            "the driver (for PostgreSQL: pip install 'celery-outbox[psycopg]', for MySQL and "
            "MariaDB: [mysql])"
        ) from exc
    except (ArgumentError, ValueError):  # the latter for a port that is no number
        # The URL may hold a password: not in the message.
        raise ConfigurationError(
            "the outbox's database URL (Outbox(app, url) or outbox_database_url) is none; it looks "
            "like postgresql+psycopg://user@host/database or sqlite:///path"
        ) from None


def twin_of(engine: Engine) -> Engine:
    """Return an engine like this one with a pool of its own: they share no connection and no lock.

    A database that lives in its connection alone (SQLite's in memory) has no twin but itself.
    """
    return (
        Engine(engine.pool.recreate(), engine.dialect, engine.url) if has_twin(engine) else engine
    )


def has_twin(engine: Engine) -> bool:
    """Whether another connection reaches the same database."""
    in_memory = _identity(engine.url)[-1] in (None, "", ":memory:")
    return not (in_memory and engine.dialect.name == "sqlite")


def is_same_database(one: Engine, other: Engine) -> bool:
    """Whether two engines reach the same database, be it by other drivers or users."""
    if one is other:
        return True
    first, second = _identity(one.url), _identity(other.url)
    return first == second and first[-1] not in (None, "", ":memory:")


def _identity(url: URL) -> tuple[str, str | None, int | None, str | None]:
    # SQLAlchemy has two names for MariaDB.
    backend = url.get_backend_name().replace("mariadb", "mysql")
    host = "localhost" if url.host in ("127.0.0.1", "::1") else url.host
    return backend, host, url.port or _DEFAULT_PORTS.get(backend), url.database


def _driver(url: URL) -> str:
    return _SYNCHRONOUS.get(url.drivername, url.drivername)


def _synchronous(engine: AsyncEngine) -> Engine:
    driver = _driver(engine.url)
    if driver == "postgresql+psycopg" or driver != engine.url.drivername:
        return create_engine(engine.url.set(drivername=driver))
    raise ConfigurationError(
        f"the relay needs a driver without an event loop for {engine.url.drivername!r}: "
        "give Outbox(app) the URL in outbox_database_url"
    )
