"""The app of table `local`: a durable task on a local queue. Run as a program it sends that many.

BENCHMARK_DATABASE=... python -m benchmarks.local_app 10000
"""

import os
import sys

from celery import Celery
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker

from celery_outbox import Outbox, durable_task

EFFECTS = (
    "CREATE TABLE IF NOT EXISTS effects (number integer, at timestamptz DEFAULT clock_timestamp())"
)
EFFECT = "INSERT INTO effects (number) VALUES (:number)"

engine = create_engine(os.environ["BENCHMARK_DATABASE"], pool_size=10)
Session = sessionmaker(engine)
app = Celery("local", broker="outbox://", set_as_current=False)
app.conf.outbox_local_lease_seconds = 2
outbox = Outbox(app, Session)


@durable_task(app=app, bind=True, name="benchmarks.effect", ignore_result=True)
def effect(self, number: int) -> None:  # type: ignore[no-untyped-def]
    self.session.execute(text(EFFECT), {"number": number})


def fill(messages: int) -> None:
    """Empty the tables, and send."""
    outbox.drop_schema()
    outbox.create_schema()
    with Session.begin() as session:
        session.execute(text(EFFECTS))
        session.execute(text("TRUNCATE effects"))
    for begin in range(0, messages, 500):
        with Session.begin():
            for number in range(begin, min(begin + 500, messages)):
                effect.delay(number)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))


if __name__ == "__main__":
    fill(int(sys.argv[1]))
