"""P1, P4: a message shares the fate of the AsyncSession or AsyncConnection that it was sent in.

Nothing is awaited at the call: whatever touches the database there raises SQLAlchemy's MissingGreenlet.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.pool import NullPool

from celery_outbox import UnusableTransaction
from tests.unit.conftest import MakeShop
from tests.unit.shop import Customer, Purpose, Shop, failing_on_purpose


class AsyncShop:
    """A shop whose Outbox was given an async_sessionmaker; `run` makes a loop, and ends the engine."""

    def __init__(self, shop: Shop, engine: AsyncEngine, Session: async_sessionmaker[Any]) -> None:
        self.shop = shop
        self.engine = engine
        self.Session = Session

    def run(self, journey: Callable[[], Awaitable[None]]) -> None:
        async def whole() -> None:
            await journey()
            await self.engine.dispose()

        asyncio.run(whole())

    def send(self, label: object) -> None:
        self.shop.notify.delay(label)

    def stored(self) -> list[Any]:
        return self.shop.stored()


@pytest.fixture
def ashop(make_shop: MakeShop, database_url: str) -> AsyncShop:
    url = database_url.replace("sqlite://", "sqlite+aiosqlite://")
    engine = create_async_engine(url, poolclass=NullPool)
    Session = async_sessionmaker(engine)
    return AsyncShop(make_shop(database_url, target=Session), engine, Session)


async def add_customer(session: AsyncSession, name: str = "Ann") -> None:
    session.add(Customer(name=name))
    await session.flush()


def test_begin_and_commit_stores(ashop: AsyncShop) -> None:
    async def journey() -> None:
        async with ashop.Session.begin() as session:
            await add_customer(session)
            ashop.send("m")
            assert ashop.stored() == []

    ashop.run(journey)
    assert ashop.stored() == ["m"]


def test_a_send_may_be_the_first_operation_of_begin(ashop: AsyncShop) -> None:
    async def journey() -> None:
        async with ashop.Session.begin():
            ashop.send("m")

    ashop.run(journey)
    assert ashop.stored() == ["m"]


def test_autobegin_and_commit_stores(ashop: AsyncShop) -> None:
    async def journey() -> None:
        async with ashop.Session() as session:
            session.add(Customer(name="Ann"))
            ashop.send("m1")
            await session.commit()
            session.add(Customer(name="Bob"))
            ashop.send("m2")
            await session.rollback()

    ashop.run(journey)
    assert ashop.stored() == ["m1"]


def test_an_exception_stores_nothing(ashop: AsyncShop) -> None:
    async def journey() -> None:
        with failing_on_purpose():
            async with ashop.Session.begin() as session:
                await add_customer(session)
                ashop.send("m")
                raise Purpose

    ashop.run(journey)
    assert ashop.stored() == []


def test_close_without_commit_names_the_task(
    ashop: AsyncShop, caplog: pytest.LogCaptureFixture
) -> None:
    """P2."""

    async def journey() -> None:
        async with ashop.Session() as session:
            await add_customer(session)
            ashop.send("m")

    ashop.run(journey)
    assert ashop.stored() == []
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "shop.notify" in warnings[0]


def test_savepoints(ashop: AsyncShop) -> None:
    async def journey() -> None:
        async with ashop.Session.begin() as session:
            ashop.send("outer")
            with failing_on_purpose():
                async with session.begin_nested():
                    await add_customer(session)
                    async with session.begin_nested():
                        ashop.send("innermost")
                    ashop.send("inner")
                    raise Purpose
            async with session.begin_nested():
                ashop.send("released")
            with failing_on_purpose():
                async with session.begin_nested():
                    ashop.send("no sql")
                    raise Purpose
            ashop.send("outer2")

    ashop.run(journey)
    assert ashop.stored() == ["outer", "released", "outer2"]


def test_run_sync_may_send(ashop: AsyncShop) -> None:
    def synchronous(session: Any) -> None:
        session.add(Customer(name="Ann"))
        session.flush()
        ashop.send("m")

    async def journey() -> None:
        async with ashop.Session.begin() as session:
            await session.run_sync(synchronous)

    ashop.run(journey)
    assert ashop.stored() == ["m"]


def test_a_mapper_event_may_send_during_the_flush_of_the_commit(ashop: AsyncShop) -> None:
    def sends(*_: object) -> None:
        ashop.send("from after_insert")

    async def journey() -> None:
        async with ashop.Session.begin() as session:
            session.add(Customer(name="Ann"))

    sa.event.listen(Customer, "after_insert", sends)
    try:
        ashop.run(journey)
    finally:
        sa.event.remove(Customer, "after_insert", sends)
    assert ashop.stored() == ["from after_insert"]


def test_concurrent_tasks_keep_to_their_own_sessions(ashop: AsyncShop) -> None:
    async def one(number: int) -> None:
        with failing_on_purpose():
            async with ashop.Session.begin() as session:
                await session.execute(sa.select(1))
                await asyncio.sleep(0.001 * (number % 3))
                ashop.send(number)
                await asyncio.sleep(0.001)
                if number % 2:
                    raise Purpose

    async def journey() -> None:
        if "sqlite" in ashop.shop.url:  # one writer at a time, after a read: no waiting
            for number in range(10):
                await one(number)
        else:
            await asyncio.gather(*(one(number) for number in range(10)))

    ashop.run(journey)
    assert sorted(ashop.stored()) == [0, 2, 4, 6, 8]


def test_a_child_task_sends_with_its_parents_transaction(ashop: AsyncShop) -> None:
    async def child(label: str) -> None:
        ashop.send(label)

    async def journey() -> None:
        async with ashop.Session.begin() as session:
            await add_customer(session)
            await asyncio.create_task(child("kept"))
            assert ashop.stored() == []
        with failing_on_purpose():
            async with ashop.Session.begin() as session:
                await add_customer(session)
                await asyncio.create_task(child("dropped"))
                raise Purpose

    ashop.run(journey)
    assert ashop.stored() == ["kept"]


def test_a_child_that_outlives_the_transaction_sends_on_its_own(ashop: AsyncShop) -> None:
    async def journey() -> None:
        over = asyncio.Event()

        async def child() -> None:
            await over.wait()
            ashop.send("late")

        with failing_on_purpose():
            async with ashop.Session.begin() as session:
                await add_customer(session)
                task = asyncio.create_task(child())
                await asyncio.sleep(0)
                raise Purpose
        over.set()
        await task

    ashop.run(journey)
    assert ashop.stored() == ["late"]


def test_a_session_that_ended_in_another_task_is_no_longer_current(ashop: AsyncShop) -> None:
    """The context in which it began still names it: only its own state tells (stale context)."""

    async def journey() -> None:
        session = ashop.Session()
        await session.begin()
        await add_customer(session)

        async def ends() -> None:
            await session.rollback()
            await session.close()

        await asyncio.create_task(ends())
        ashop.send("after")
        assert ashop.stored() == ["after"]

    ashop.run(journey)


def test_a_session_that_began_in_another_task_is_current_with_its_next_statement(
    ashop: AsyncShop,
) -> None:
    async def journey() -> None:
        session = ashop.Session()

        async def begins() -> None:
            await session.begin()

        await asyncio.create_task(begins())
        await add_customer(session)
        ashop.send("m")
        assert ashop.stored() == []
        await session.commit()
        await session.close()

    ashop.run(journey)
    assert ashop.stored() == ["m"]


def test_async_scoped_session(ashop: AsyncShop) -> None:
    async def journey() -> None:
        registry = async_scoped_session(ashop.Session, scopefunc=asyncio.current_task)
        registry.add(Customer(name="Ann"))
        ashop.send("m")
        await registry.commit()
        await registry.remove()

    ashop.run(journey)
    assert ashop.stored() == ["m"]


def test_using_names_an_async_session(ashop: AsyncShop) -> None:
    async def journey() -> None:
        async with ashop.Session() as session:
            with ashop.shop.outbox.using(session):
                ashop.send("m1")
            result = ashop.shop.outbox.send(ashop.shop.notify.s("m2"), into=session)
            assert result.id
            assert ashop.stored() == []
            await session.commit()

    ashop.run(journey)
    assert ashop.stored() == ["m1", "m2"]


def test_a_connection(ashop: AsyncShop) -> None:
    async def journey() -> None:
        async with ashop.engine.begin() as connection:
            await connection.execute(sa.insert(Customer).values(name="Ann"))
            ashop.send("outer")
            with failing_on_purpose():
                async with connection.begin_nested():
                    await connection.execute(sa.insert(Customer).values(name="Bob"))
                    ashop.send("inner")
                    raise Purpose
            async with connection.begin_nested():
                ashop.send("released")
            assert ashop.stored() == []
        with failing_on_purpose():
            async with ashop.engine.begin() as connection:
                await connection.execute(sa.insert(Customer).values(name="Cy"))
                ashop.send("dropped")
                raise Purpose

    ashop.run(journey)
    assert ashop.stored() == ["outer", "released"]


def test_using_names_an_async_connection(ashop: AsyncShop) -> None:
    async def journey() -> None:
        async with ashop.engine.begin() as connection:
            with ashop.shop.outbox.using(connection):
                ashop.send("m")
            assert ashop.stored() == []

    ashop.run(journey)
    assert ashop.stored() == ["m"]


def test_a_session_joined_into_an_external_transaction(ashop: AsyncShop) -> None:
    async def journey() -> None:
        async with ashop.engine.connect() as connection:
            outer = await connection.begin()
            await connection.execute(sa.insert(Customer).values(name="Ann"))
            async with AsyncSession(
                connection, join_transaction_mode="create_savepoint"
            ) as session:
                session.add(Customer(name="Bob"))
                ashop.send("m")
                await session.commit()
            await outer.rollback()

    ashop.run(journey)
    assert ashop.stored() == []


def test_autocommit_is_refused(ashop: AsyncShop) -> None:
    """P4."""

    async def journey() -> None:
        engine = ashop.engine.execution_options(isolation_level="AUTOCOMMIT")
        async with AsyncSession(engine) as session:
            await session.execute(sa.select(1))
            with pytest.raises(UnusableTransaction, match="AUTOCOMMIT"):
                ashop.send("m")

    ashop.run(journey)
    assert ashop.stored() == []


def test_with_no_transaction_it_is_stored_on_its_own(ashop: AsyncShop) -> None:
    async def journey() -> None:
        ashop.send("m")
        assert ashop.stored() == ["m"]

    ashop.run(journey)
