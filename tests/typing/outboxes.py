"""Making an Outbox, and sending through it."""

from celery import Celery
from sqlalchemy import Engine, MetaData, create_engine
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_outbox import Outbox, OutboxError, Tally, durable_task

app = Celery("typed")
engine: Engine = create_engine("sqlite://")
async_engine: AsyncEngine = create_async_engine("sqlite+aiosqlite://")

Outbox(app)
Outbox(app, "sqlite://")
Outbox(app, engine)
Outbox(app, async_engine)
Outbox(app, sessionmaker(engine))
Outbox(app, scoped_session(sessionmaker(engine)))
Outbox(app, async_sessionmaker(async_engine))
outbox = Outbox(app, engine, metadata=MetaData(), schema="messaging", prefix="app_")


@durable_task
def notify(order_id: int) -> None: ...


def send() -> None:
    with Session(engine) as session, outbox.using(session):
        notify.delay(7)
    with engine.begin() as connection:
        result = outbox.send(notify.s(7), into=connection)
        print(result.id)


async def send_asynchronously(session: AsyncSession, connection: AsyncConnection) -> None:
    with outbox.using(session):
        notify.delay(7)
    outbox.send(notify.s(7), into=connection)


def operate() -> None:
    outbox.create_schema()
    outbox.verify_schema()
    script: str = outbox.schema_script("postgresql")
    tally: Tally = outbox.relay_once()
    total: int = tally.confirmed + tally.retried + tally.dead + tally.released + tally.claimed
    counts: dict[str, int] = outbox.store.counts()
    used: Engine = outbox.engine
    print(script, total, counts, used)
    try:
        outbox.drop_schema()
    except OutboxError as error:
        print(error)


# What is wrong is told by mypy, too.
Outbox(app, 7)  # type: ignore[arg-type]
Outbox(app, engine, prefix=None)  # type: ignore[arg-type]
Outbox(app, engine, settings={})  # type: ignore[call-arg]
outbox.send(notify.s(7))  # type: ignore[call-arg]
outbox.using(engine)  # type: ignore[arg-type]
