"""What the journeys run: the same tasks in the test and, from the volume, in the worker."""

import time
from typing import Any

from celery import Celery
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from celery_outbox import Outbox, durable_task


class Base(DeclarativeBase):
    pass


class Effect(Base):
    """That a task's body took effect."""

    __tablename__ = "effects"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Gate(Base):
    """A row lets the tasks pass that wait for it."""

    __tablename__ = "gates"
    name: Mapped[str] = mapped_column(primary_key=True)


class Shop:
    """An app's database, outbox and durable tasks.

    The tasks belong to that app alone: shared ones would reach every app of the test run.
    """

    def __init__(self, app: Celery, database_url: str) -> None:
        self.engine = create_engine(database_url)
        self.Session = sessionmaker(self.engine)
        self.outbox = Outbox(app, self.Session)

        @durable_task(app=app, bind=True, name="shop.add")
        def add(self: Any, *numbers: int, name: str) -> int:
            self.session.add(Effect(name=name))
            return sum(numbers)

        @durable_task(app=app, bind=True, name="shop.total")
        def total(self: Any, numbers: list[int], name: str) -> int:
            self.session.add(Effect(name=name))
            return sum(numbers)

        @durable_task(app=app, bind=True, name="shop.try_again", max_retries=3)
        def try_again(self: Any, name: str) -> int:
            self.session.add(Effect(name=name))
            if self.request.retries < 2:
                raise self.retry(countdown=0)
            return int(self.request.retries)

        @durable_task(app=app, bind=True, name="shop.pass_gate")
        def pass_gate(self: Any, name: str) -> str:
            self.session.add(Effect(name=name))
            self.session.flush()
            add.delay(1, name=f"{name}, sent")
            print(f"at the gate: {name}.", flush=True)
            while self.session.scalar(select(Gate).filter_by(name=name)) is None:
                time.sleep(0.05)
            return name

        self.add, self.total, self.try_again, self.pass_gate = add, total, try_again, pass_gate

    def effects(self) -> list[str]:
        """Return what took effect, sorted."""
        with self.Session() as session:
            return sorted(session.scalars(select(Effect.name)))

    def waiting(self) -> int:
        """Return how many messages are not handled yet: kept ones leave with the task's commit."""
        counts = self.outbox.store.counts()
        return sum(counts[state] for state in ("outgoing", "scheduled", "in_flight", "published"))
