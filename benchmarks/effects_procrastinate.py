"""The app beside `effects_app`: the same task with procrastinate. As a program it sends.

BENCHMARK_DATABASE=... python -m benchmarks.effects_procrastinate 10000 bench
"""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import procrastinate
import psycopg
from psycopg_pool import AsyncConnectionPool
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from benchmarks.effects_app import EFFECT, EFFECTS
from benchmarks.peers.procrastinate_queue import QUEUE, TASK, conninfo

URL = os.environ["BENCHMARK_DATABASE"]
DSN = conninfo(URL)

engine = create_engine(URL, pool_size=10)
Session = sessionmaker(engine)
app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=DSN))
_pool: AsyncConnectionPool[Any] | None = None


@app.task(name=TASK, queue=QUEUE)
def effect(number: int, text: str = "") -> None:
    """As an application writes it that has no asyncio: procrastinate runs it in a thread."""
    with Session.begin() as session:
        session.execute(EFFECT, {"number": number})


@app.task(name="effect_async", queue="asyncio")
async def effect_async(number: int) -> None:
    """As fast as it can be: without SQLAlchemy."""
    async with _connection() as connection:
        await connection.execute(EFFECT.text.replace(":number", "%s"), (number,))


@asynccontextmanager
async def _connection() -> AsyncIterator[Any]:
    global _pool
    if _pool is None:
        _pool = AsyncConnectionPool(DSN, min_size=4, max_size=10, open=False)
        await _pool.open()
    async with _pool.connection() as connection:
        yield connection


def fill(messages: int, queue: str) -> None:
    """Empty the tables, and send."""
    with psycopg.connect(DSN, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
        connection.execute(EFFECTS)
    task = {QUEUE: TASK, "asyncio": "effect_async"}[queue]
    with app.open() as opened:
        opened.schema_manager.apply_schema()
        deferrer = opened.configure_task(task, queue=queue)
        for begin in range(0, messages, 500):
            deferrer.batch_defer(
                *({"number": number} for number in range(begin, min(begin + 500, messages)))
            )
    with psycopg.connect(DSN, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")


if __name__ == "__main__":
    fill(int(sys.argv[1]), sys.argv[2])
