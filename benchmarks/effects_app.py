"""The app of tables `local` and `end_to_end`: a task that writes one row. As a program it sends.

BENCHMARK_DATABASE=... BENCHMARK_BROKER=outbox:// BENCHMARK_KIND=durable \
    python -m benchmarks.effects_app 10000
"""

import os
import sys

from celery import Celery
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker

from celery_outbox import Outbox, durable_task
from celery_outbox.plugin import outbox_of

EFFECTS = (
    "CREATE TABLE IF NOT EXISTS effects (number integer, at timestamptz DEFAULT clock_timestamp())"
)
EFFECT = text("INSERT INTO effects (number) VALUES (:number)")
TASK = "benchmarks.effect"


def make_app(kind: str, database_url: str, broker_url: str) -> Celery:
    """Return an app whose task is "durable", or "stock": as it is written with Celery alone."""
    app = Celery(kind, broker=broker_url, set_as_current=False)
    app.conf.update(task_default_queue=f"effects_{kind}", task_ignore_result=True)
    maker = sessionmaker(create_engine(database_url, pool_size=10))
    if kind == "stock":

        @app.task(acks_late=True, name=TASK, shared=False)
        def stock_effect(number: int, filling: str = "") -> None:
            with maker.begin() as session:
                session.execute(EFFECT, {"number": number})

    else:
        app.conf.outbox_local_lease_seconds = 2
        Outbox(app, maker)

        @durable_task(app=app, bind=True, name=TASK)
        def effect(self, number: int, filling: str = "") -> None:  # type: ignore[no-untyped-def]
            self.session.execute(EFFECT, {"number": number})

    return app


def fill(messages: int) -> None:
    """Empty the tables, and send."""
    outbox = outbox_of(app)
    outbox.drop_schema()
    outbox.create_schema()
    with outbox.engine.begin() as connection:
        connection.execute(text(EFFECTS))
        connection.execute(text("TRUNCATE effects"))
    for begin in range(0, messages, 500):
        with outbox.engine.begin():
            for number in range(begin, min(begin + 500, messages)):
                app.tasks[TASK].delay(number)
    with outbox.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))


if "BENCHMARK_KIND" in os.environ:
    app = make_app(
        os.environ["BENCHMARK_KIND"],
        os.environ["BENCHMARK_DATABASE"],
        os.environ["BENCHMARK_BROKER"],
    )

if __name__ == "__main__":
    fill(int(sys.argv[1]))
