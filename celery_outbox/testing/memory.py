"""In memory: the app's database and broker, for tests that want neither a server nor a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import MetaData, create_engine
from sqlalchemy.orm import scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool

from celery_outbox.errors import ConfigurationError
from celery_outbox.plugin import Outbox
from celery_outbox.testing.tables import empty

__all__ = ["in_memory"]

#: What an Outbox keeps of the database and the broker that it has met.
_MET = ("engine", "store", "fast_path")


@contextmanager
def in_memory(outbox: Outbox, metadata: MetaData | None = None) -> Iterator[Outbox]:
    """Give the outbox's sessionmaker a SQLite database in memory for a block, and its app a broker.

    The outbox's tables are created, and those of `metadata`. The database is one connection, so that
    only one thread may work, and the outbox can be looked at where no transaction is open.
    """
    target: Any = outbox._target
    maker = target.session_factory if isinstance(target, scoped_session) else target
    if not isinstance(maker, sessionmaker):
        raise ConfigurationError(
            "in memory the Outbox needs a sessionmaker, whose engine can be replaced: "
            "Outbox(app, Session)"
        )
    engine = create_engine(
        "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
    )
    conf: Any = outbox.app.conf
    bind = maker.kw.get("bind")
    urls = {name: conf.get(name) for name in ("broker_url", "broker_read_url", "broker_write_url")}
    met = {name: vars(outbox).pop(name) for name in _MET if name in vars(outbox)}
    relay, outbox._relay = outbox._relay, None
    try:
        if isinstance(target, scoped_session):
            target.remove()
        maker.configure(bind=engine)
        conf.update(broker_url="memory://", broker_read_url=None, broker_write_url=None)
        _forget_broker(outbox)
        outbox.create_schema()
        if metadata is not None:
            metadata.create_all(engine)
        empty(outbox)
        yield outbox
    finally:
        if outbox._relay is not None:
            outbox._relay[1].close()
        if isinstance(target, scoped_session):
            target.remove()
        for name in _MET:
            vars(outbox).pop(name, None)
        vars(outbox).update(met)
        outbox._relay = relay
        maker.configure(bind=bind)
        conf.update(urls)
        _forget_broker(outbox)
        engine.dispose()


def _forget_broker(outbox: Outbox) -> None:
    """Let the app connect anew: its pools, and what capture knows of its broker."""
    app: Any = outbox.app
    app._pool = None
    app.amqp._producer_pool = None
    app.amqp.send_task_message.__self__._own_brokers = None
