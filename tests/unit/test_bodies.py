"""What a durable task's body sends shares the fate of the savepoint or session it was sent in."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from celery import Celery
from celery.app.trace import build_tracer
from sqlalchemy.orm import Session, sessionmaker

from celery_outbox import Outbox, current_session, durable_task
from celery_outbox.storage.engine import engine_from_url

Run = Callable[[Callable[..., Any]], tuple[str, list[str]]]


class Purpose(Exception):
    """Raised on purpose."""


def follow_up(label: str) -> None: ...


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = engine_from_url(database_url)
    if engine.dialect.name == "sqlite":
        # SQLAlchemy's recipe for savepoints with pysqlite.
        @sa.event.listens_for(engine, "connect")
        def leave_begin_to_us(connection: Any, _record: object) -> None:
            connection.isolation_level = None

        @sa.event.listens_for(engine, "begin")
        def begin(connection: sa.Connection) -> None:
            connection.exec_driver_sql("BEGIN")

    yield engine
    engine.dispose()


@pytest.fixture
def maker(engine: sa.Engine) -> sessionmaker[Session]:
    return sessionmaker(engine)


@pytest.fixture
def run(maker: sessionmaker[Session]) -> Run:
    """Run a body as a worker does; return the recorded state and what is in the outbox then."""
    app = Celery("bodies", broker="memory://", set_as_current=False)
    outbox = Outbox(app, maker)
    outbox.create_schema()

    def go(body: Callable[..., Any]) -> tuple[str, list[str]]:
        task = durable_task(app=app, bind=True, name="body", max_retries=3)(body)
        durable_task(app=app, name="follow_up")(follow_up)
        app.finalize()
        task = app.tasks["body"]
        task.__trace__ = build_tracer(task.name, task, app=app)
        key = str(uuid4())
        request = {"id": key, "task": "body", "delivery_info": {}, "root_id": key, "retries": 0}
        task.__trace__(key, (), {}, request)
        rows = outbox.tables.outbox.c
        with outbox.engine.connect() as connection:
            record = outbox.store.handled(connection, f"{key}:0:0:")
            bodies = connection.execute(sa.select(rows.task, rows.body).order_by(rows.id)).all()
        labels = [
            row.body.decode().split('"')[1] if row.task == "follow_up" else row.task
            for row in bodies
        ]
        return (record.state if record else "nothing"), labels

    return go


def send(task: Any, label: str) -> None:
    task.app.tasks["follow_up"].delay(label)


def test_what_is_sent_in_a_rolled_back_savepoint_is_not_sent(run: Run) -> None:
    """P1."""

    def body(self: Any) -> None:
        send(self, "before")
        with contextlib.suppress(Purpose), self.session.begin_nested():
            send(self, "dropped")
            raise Purpose
        with self.session.begin_nested():
            send(self, "kept")

    state, sent = run(body)
    assert state == "SUCCESS"
    assert sorted(sent) == ["before", "kept"]


def test_what_is_sent_in_a_rolled_back_session_of_the_body_is_not_sent(
    run: Run, maker: sessionmaker[Session]
) -> None:
    """P1, also before that session has sent a statement, or after another one has."""

    def body(self: Any) -> None:
        current_session().execute(sa.select(1))
        with contextlib.suppress(Purpose), maker.begin():
            send(self, "dropped")
            raise Purpose
        with contextlib.suppress(Purpose), maker.begin() as session:
            session.execute(sa.select(1))
            send(self, "dropped, too")
            raise Purpose
        with maker.begin():
            send(self, "kept")

    assert run(body) == ("SUCCESS", ["kept"])


def test_a_session_that_is_only_closed_takes_no_message_along(
    run: Run, maker: sessionmaker[Session]
) -> None:
    """P13: a body that reads, sends and closes has sent."""

    def body(self: Any) -> None:
        with maker() as session:
            session.execute(sa.select(1))
            send(self, "in the block")
        left_open.append(maker())
        left_open[0].execute(sa.select(1))
        send(self, "left open")

    left_open: list[Session] = []
    state, sent = run(body)
    left_open[0].close()
    assert state == "SUCCESS"
    assert sorted(sent) == ["in the block", "left open"]


def test_a_failed_body_has_sent_nothing(run: Run, maker: sessionmaker[Session]) -> None:
    """P13, whatever was committed inside it."""

    def body(self: Any) -> None:
        send(self, "dropped")
        with maker.begin():
            send(self, "dropped, too")
        raise Purpose

    assert run(body) == ("FAILURE", [])


def test_a_retry_outlives_the_roll_back_of_its_attempt(
    run: Run, maker: sessionmaker[Session]
) -> None:
    """P15, also where it is asked for inside a session of the body's own."""

    def body(self: Any) -> None:
        with maker.begin() as session:
            session.execute(sa.select(1))
            send(self, "dropped")
            raise self.retry(countdown=0)

    assert run(body) == ("RETRY", ["body"])


def test_a_commit_that_is_interrupted_leaves_nothing_for_the_next_one(
    run: Run, engine: sa.Engine
) -> None:
    """P13: SQLAlchemy gives a connection back with its transaction where a listener raised."""
    labels = ["dropped", "sent"]

    def interrupt(_connection: sa.Connection) -> None:
        sa.event.remove(engine, "commit", interrupt)
        raise Purpose

    def body(self: Any) -> None:
        if (label := labels.pop(0)) == "dropped":
            sa.event.listen(engine, "commit", interrupt)
        send(self, label)

    assert run(body) == ("nothing", [])
    assert run(body) == ("SUCCESS", ["sent"])
