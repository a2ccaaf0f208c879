"""The app of table `worker`: the same task durable, by hand, and as it is written with Celery alone.

``BENCHMARK_KIND`` says which of them a process runs; its URLs come from the environment, too.
"""

import os
from datetime import datetime

from celery import Celery
from sqlalchemy import create_engine, func
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from celery_outbox import Outbox, durable_task

KIND = os.environ["BENCHMARK_KIND"]


class Base(DeclarativeBase):
    pass


class Effect(Base):
    __tablename__ = "effects"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]
    text: Mapped[str]


class Handled(Base):
    __tablename__ = "handled"
    task_id: Mapped[str] = mapped_column(primary_key=True)
    handled_at: Mapped[datetime] = mapped_column()


# Made once: nothing of it is built for each task.
HANDLE = insert(Handled.__table__).values(handled_at=func.now()).on_conflict_do_nothing()


# PostgreSQL 15 counts a SAVEPOINT that the driver has prepared no second time.
counted = {"prepare_threshold": None} if os.environ.get("BENCHMARK_COUNTED") else {}
engine = create_engine(os.environ["BENCHMARK_DATABASE"], pool_size=10, connect_args=counted)
Session = sessionmaker(engine)
app = Celery(
    "benchmarks", broker=os.environ["BENCHMARK_BROKER"], backend=os.environ["BENCHMARK_RESULTS"]
)
app.conf.update(
    task_default_queue=os.environ["BENCHMARK_QUEUE"],
)


if KIND == "durable":
    outbox = Outbox(app, Session, prefix="worker_")

    @durable_task(app=app, bind=True, name="benchmarks.silent", ignore_result=True)
    def silent(self, number: int, text: str) -> int:  # type: ignore[no-untyped-def]
        self.session.add(Effect(number=number, text=text))
        return number

    @durable_task(app=app, bind=True, name="benchmarks.answering")
    def answering(self, number: int, text: str) -> int:  # type: ignore[no-untyped-def]
        self.session.add(Effect(number=number, text=text))
        return number

elif KIND == "by_hand":

    def write_once(task_id: str, effect: Effect) -> None:
        with Session.begin() as session:
            if session.execute(HANDLE, {"task_id": task_id}).rowcount:
                session.add(effect)

    @app.task(acks_late=True, bind=True, name="benchmarks.silent", ignore_result=True)
    def silent_by_hand(self, number: int, text: str) -> int:  # type: ignore[no-untyped-def]
        write_once(self.request.id, Effect(number=number, text=text))
        return number

    @app.task(acks_late=True, bind=True, name="benchmarks.answering")
    def answering_by_hand(self, number: int, text: str) -> int:  # type: ignore[no-untyped-def]
        write_once(self.request.id, Effect(number=number, text=text))
        return number

else:

    @app.task(acks_late=True, name="benchmarks.silent", ignore_result=True)
    def plain_silent(number: int, text: str) -> int:
        with Session.begin() as session:
            session.add(Effect(number=number, text=text))
        return number

    @app.task(acks_late=True, name="benchmarks.answering")
    def plain_answering(number: int, text: str) -> int:
        with Session.begin() as session:
            session.add(Effect(number=number, text=text))
        return number
