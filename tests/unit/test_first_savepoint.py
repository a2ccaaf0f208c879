"""A task's sessions behave as in a savepoint, also where none is set."""

from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from celery import Celery
from celery.app.trace import build_tracer
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from celery_outbox import Outbox, durable_task
from celery_outbox.outbox.scope import open_scopes
from celery_outbox.storage.engine import engine_from_url
from celery_outbox.storage.store import Store


class Base(DeclarativeBase):
    pass


class Effect(Base):
    __tablename__ = "effects"
    name: Mapped[str] = mapped_column(primary_key=True)


def follow_up() -> None: ...


class Place:
    """A database with an outbox, and a worker's way to run a body."""

    def __init__(self, url: str) -> None:
        self.engine = engine_from_url(url)
        if self.engine.dialect.name == "sqlite":
            # SQLAlchemy's recipe for savepoints with pysqlite.
            @sa.event.listens_for(self.engine, "connect")
            def leave_begin_to_us(connection: Any, _record: object) -> None:
                connection.isolation_level = None

            @sa.event.listens_for(self.engine, "begin")
            def begin(connection: sa.Connection) -> None:
                connection.exec_driver_sql("BEGIN")

        self.Session = sessionmaker(self.engine)
        self.app = Celery("savepoints", broker="memory://", set_as_current=False)
        self.outbox = Outbox(self.app, self.Session)
        self.outbox.create_schema()
        Base.metadata.create_all(self.engine)
        self.key = str(uuid4())
        self.statements: list[str] = []

    @property
    def store(self) -> Store:
        return self.outbox.store

    @property
    def inbox_key(self) -> str:
        return f"{self.key}:0:0:"

    def run(self, body: Callable[..., Any]) -> Any:
        """Run a body as a worker does; return the tracer's answer."""
        task = durable_task(app=self.app, bind=True, name="body")(body)
        durable_task(app=self.app, name="follow_up")(follow_up)
        self.app.finalize()
        task = self.app.tasks["body"]
        task.__trace__ = build_tracer(task.name, task, app=self.app)
        request = {"id": self.key, "task": "body", "delivery_info": {}, "retries": 0}
        sa.event.listen(self.engine, "before_cursor_execute", self._listen)
        try:
            return task.__trace__(self.key, (), {}, request)
        finally:
            sa.event.remove(self.engine, "before_cursor_execute", self._listen)

    def _listen(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        self.statements.append(statement.split()[0])

    def effects(self) -> list[str]:
        with self.Session() as session:
            return sorted(session.scalars(sa.select(Effect.name)))

    def state(self) -> str:
        with self.engine.connect() as connection:
            record = self.store.handled(connection, self.inbox_key)
        return record.state if record else "nothing"

    def left(self) -> list[int]:
        """Outgoing messages; connections that were not given back."""
        return [self.store.counts()["outgoing"], self.engine.pool.checkedout()]  # type: ignore[attr-defined]


@pytest.fixture
def place(database_url: str) -> Iterator[Place]:
    place = Place(database_url)
    yield place
    place.engine.dispose()


@pytest.fixture
def on_postgresql(place: Place) -> Place:
    if place.engine.dialect.name != "postgresql":
        pytest.skip("a savepoint is set there")
    return place


def add(session: Session, name: str) -> None:
    session.add(Effect(name=name))
    session.flush()


def test_a_task_asks_nothing_beside_its_claim(on_postgresql: Place) -> None:
    """That goes out with BEGIN, by the driver."""

    def body(self: Any) -> None:
        add(self.session, "kept")

    on_postgresql.run(body)
    assert on_postgresql.statements == ["INSERT"]
    assert on_postgresql.effects() == ["kept"]


def test_a_task_with_a_result_asks_nothing_more(on_postgresql: Place) -> None:
    """Its result goes out with COMMIT, by the driver."""
    on_postgresql.app.conf.result_backend = "cache+memory://"

    def body(self: Any) -> str:
        add(self.session, "kept")
        return "result"

    on_postgresql.run(body)
    assert on_postgresql.statements == ["INSERT"]
    assert on_postgresql.effects() == ["kept"]


def test_a_joined_session_asks_nothing_more(on_postgresql: Place) -> None:
    def body(_self: Any) -> None:
        with on_postgresql.Session.begin() as session:
            add(session, "kept")

    on_postgresql.run(body)
    assert on_postgresql.statements == ["INSERT"]
    assert on_postgresql.effects() == ["kept"]


def test_a_session_goes_on_after_its_rollback(place: Place) -> None:
    def body(self: Any) -> None:
        add(self.session, "undone")
        self.app.tasks["follow_up"].delay()
        self.session.rollback()
        add(self.session, "kept")
        self.session.commit()
        add(self.session, "undone, too")
        self.session.rollback()

    place.run(body)
    assert (place.effects(), place.state(), place.left()) == (["kept"], "SUCCESS", [0, 0])


def test_a_rollback_may_be_the_last_thing(place: Place) -> None:
    def body(self: Any) -> None:
        add(self.session, "undone")
        self.session.rollback()
        self.app.tasks["follow_up"].delay()

    place.run(body)
    assert (place.effects(), place.state(), place.left()) == ([], "SUCCESS", [1, 0])


def test_a_session_recovers_from_an_error(place: Place) -> None:
    def body(self: Any) -> None:
        for _ in range(2):
            with pytest.raises(sa.exc.IntegrityError), place.Session.begin() as session:
                session.execute(sa.insert(Effect), [{"name": "twice"}, {"name": "twice"}])
        add(self.session, "kept")

    place.run(body)
    assert (place.effects(), place.state(), place.left()) == (["kept"], "SUCCESS", [0, 0])


def test_a_session_that_is_closed_takes_its_writes_along(place: Place) -> None:
    def body(self: Any) -> None:
        with place.Session() as session:
            add(session, "undone")
        with place.Session.begin() as session:
            add(session, "kept")
        with place.Session() as session:
            add(session, "undone")
        self.session.add(Effect(name="kept, too"))

    place.run(body)
    assert (place.effects(), place.state()) == (["kept", "kept, too"], "SUCCESS")


def test_a_nested_savepoint_is_a_real_one(place: Place) -> None:
    def body(self: Any) -> None:
        add(self.session, "kept")
        with self.session.begin_nested() as savepoint:
            add(self.session, "undone")
            savepoint.rollback()

    place.run(body)
    assert (place.effects(), place.state()) == (["kept"], "SUCCESS")


def test_a_failure_after_a_rollback_is_recorded(place: Place) -> None:
    def body(self: Any) -> None:
        self.session.rollback()
        add(self.session, "undone")
        self.session.rollback()
        raise RuntimeError("on purpose")

    place.run(body)
    assert (place.effects(), place.state(), place.left()) == ([], "FAILURE", [0, 0])


@pytest.mark.parametrize("goes_on", [True, False])
def test_another_delivery_may_come_first_after_a_rollback(
    on_postgresql: Place, goes_on: bool
) -> None:
    """P13: then it was the first, and this one is its duplicate."""
    store = on_postgresql.store

    def body(self: Any) -> None:
        add(self.session, "undone")
        self.session.rollback()
        with store.engine.begin() as other:
            assert store.receive(other, on_postgresql.inbox_key, "body", "id")
            store.record(other, on_postgresql.inbox_key, "FAILURE", None, forget=False)
        if goes_on:
            add(self.session, "undone, too")

    on_postgresql.run(body)
    assert (on_postgresql.effects(), on_postgresql.state()) == ([], "FAILURE")
    assert on_postgresql.left() == [0, 0]


def test_another_delivery_may_have_begun_after_a_rollback(on_postgresql: Place) -> None:
    store = on_postgresql.store
    with store.engine.connect() as other:

        def body(self: Any) -> None:
            self.session.execute(sa.text("SELECT 1"))
            self.session.rollback()
            assert store.receive(other, on_postgresql.inbox_key, "body", "id")
            add(self.session, "undone")

        on_postgresql.app.conf.outbox_busy_pause_seconds = 0.01
        answer = on_postgresql.run(body)
        assert answer.info.state == "REJECTED"
        other.rollback()
    assert (on_postgresql.effects(), on_postgresql.state()) == ([], "nothing")


def test_an_error_that_is_swallowed_fails_the_task(on_postgresql: Place) -> None:
    def body(self: Any) -> None:
        add(self.session, "undone")
        with pytest.raises(sa.exc.DBAPIError):
            self.session.execute(sa.text("SELECT 1 / 0"))

    on_postgresql.run(body)
    assert (on_postgresql.effects(), on_postgresql.state()) == ([], "FAILURE")


def test_a_session_that_commits_after_an_error_is_told(on_postgresql: Place) -> None:
    def body(self: Any) -> None:
        session = on_postgresql.Session()
        with pytest.raises(sa.exc.DBAPIError):
            session.execute(sa.text("SELECT 1 / 0"))
        with pytest.raises(sa.exc.InternalError):
            session.commit()
        raise RuntimeError("on purpose")

    on_postgresql.run(body)
    assert (on_postgresql.effects(), on_postgresql.state()) == ([], "FAILURE")


@pytest.mark.parametrize("fails", [True, False])
def test_a_session_that_the_body_leaves_open_is_over_with_the_task(
    place: Place, fails: bool
) -> None:
    """Whoever holds it, a traceback for instance: what is sent next is not sent into it."""
    held: list[Session] = []

    def body(_self: Any) -> None:
        held.append(place.Session())
        add(held[0], "written")
        if fails:
            raise RuntimeError("on purpose")

    place.run(body)
    assert held[0].in_transaction()
    assert open_scopes() == []
    held[0].close()


def test_a_database_that_goes_away_gives_the_delivery_back(on_postgresql: Place) -> None:
    def body(self: Any) -> None:
        own = self.session.scalar(sa.text("SELECT pg_backend_pid()"))
        with on_postgresql.engine.begin() as other:
            other.execute(sa.text("SELECT pg_terminate_backend(:own, 5000)"), {"own": own})
        self.session.rollback()

    on_postgresql.app.conf.outbox_busy_pause_seconds = 0.01
    answer = on_postgresql.run(body)
    assert answer.info.state == "REJECTED"
    assert (on_postgresql.state(), on_postgresql.left()) == ("nothing", [0, 0])
