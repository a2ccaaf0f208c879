"""The app that most tests send from: a table of customers, an outbox, a broker that records."""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from celery import Celery
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.pool import NullPool

from celery_outbox import Outbox, durable_task
from tests.support.record import used
from tests.unit import wire

_numbers = itertools.count(1)


class Base(DeclarativeBase):
    """The shop's own tables."""


class Customer(Base):
    """A row of the app's own."""

    __tablename__ = "customer"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def engine_for(url: str, **options: Any) -> sa.Engine:
    """Return an engine whose connections close with their use, so that nothing outlives a test."""
    return sa.create_engine(url, poolclass=NullPool, **options)


def begin_before_savepoints(engine: sa.Engine) -> None:
    """Let SQLite's driver begin a transaction at the begin, as SQLAlchemy's documentation advises.

    By itself it begins with the first INSERT: where a savepoint comes first, releasing that commits.
    """
    if engine.dialect.name == "sqlite":

        @sa.event.listens_for(engine, "connect")
        def leave_it_to_us(connection: Any, _: object) -> None:
            connection.isolation_level = None

        @sa.event.listens_for(engine, "begin")
        def begin(connection: sa.Connection) -> None:
            connection.exec_driver_sql("BEGIN")


class Shop:
    """An app with an Outbox: `notify` is a durable task, `plain` is not.

    `target` is what the Outbox is given: by default the shop's own sessionmaker.
    """

    def __init__(
        self, url: str, target: Any = None, *, tables: bool = True, **settings: Any
    ) -> None:
        used(url)
        self.url = url
        self.broker_name = wire.new_name()
        self.app = Celery(f"shop{next(_numbers)}", set_as_current=False)
        self.app.conf.update(
            broker_url=f"recording://{self.broker_name}",
            task_publish_retry=False,
            outbox_relay_tick_seconds=0,
            **settings,
        )
        self.engine = engine_for(url)
        self.Session = sessionmaker(self.engine)
        self.outbox = Outbox(self.app, self.Session if target is None else target)
        # Of its own, watched by nobody.
        self._reader = engine_for(url)

        @durable_task(app=self.app, name="shop.notify")
        def notify(*args: Any, **kwargs: Any) -> None:
            pass

        @self.app.task(name="shop.plain", shared=False)
        def plain(*args: Any) -> None:
            pass

        self.notify = notify
        self.plain = plain
        if tables:
            self.outbox.create_schema()
            Base.metadata.create_all(self._reader)

    def stored(self) -> list[Any]:
        """Return the first argument of each stored message that others can see, in order."""
        outbox = self.outbox.tables.outbox
        with self._reader.connect() as connection:
            bodies = connection.execute(sa.select(outbox.c.body).order_by(outbox.c.id)).scalars()
            return [json.loads(body)[0][0] for body in bodies]

    def customers(self) -> list[str]:
        """Return the names of the customers that others can see, in order."""
        with self._reader.connect() as connection:
            return list(
                connection.execute(sa.select(Customer.name).order_by(Customer.id)).scalars()
            )

    def published(self) -> list[str]:
        """Return the names of the tasks whose messages have reached the broker."""
        return [message.task for message in wire.broker(self.broker_name).published]

    def close(self) -> None:
        """Close what stays open."""
        self.app.close()
        self.engine.dispose()
        self.outbox.engine.dispose()
        self._reader.dispose()


@contextmanager
def failing_on_purpose() -> Iterator[None]:
    """Swallow the `Purpose` that the block raises."""
    try:
        yield
    except Purpose:
        pass


class Purpose(Exception):
    """Raised by tests where the app would fail."""


def add_customer(session: Session, name: str = "Ann") -> None:
    """Write a row of the app's own, with SQL."""
    session.add(Customer(name=name))
    session.flush()
