"""Table `relay`: how fast the relay empties the outbox, beside a publisher without any outbox."""

import itertools
import time
from dataclasses import replace
from typing import Any

from celery import Celery
from sqlalchemy import create_engine, delete

from benchmarks.figures import Contender, Figure, measure, print_table
from benchmarks.reference import BarePublisher, empty_queue
from celery_outbox import Outbox, durable_task, events
from celery_outbox.envelope import Envelope
from celery_outbox.storage.store import row_of

QUEUE = "bench"
TITLE = "relay: from committed rows to confirmed messages, RabbitMQ, one relay, about 300 B of body"


def table(database_url: str, broker_url: str, *, quick: bool) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    messages, rounds = (2_000, 3) if quick else (10_000, 5)
    publisher = BarePublisher(broker_url)
    envelopes = _envelopes(database_url, broker_url, messages)

    def clear() -> None:
        empty_queue(broker_url, QUEUE)

    contenders = [
        Contender(
            "bare publisher, one confirm per message",
            messages // 10,
            lambda: publisher.publish_one_by_one(envelopes[: messages // 10]),
            clear,
        )
    ]
    clocks = {}
    for batch in (100, 500):
        contenders.append(
            Contender(
                f"bare publisher, confirms pipelined by {batch}",
                messages,
                lambda batch=batch: publisher.publish_pipelined(envelopes, batch),  # type: ignore[misc]
                clear,
            )
        )
        outbox = _outbox(database_url, broker_url, f"relay_{batch}_", outbox_batch_size=batch)
        name = f"relay, batches of {batch}"
        clocks[name] = _Clock()
        contenders.append(
            Contender(
                name,
                messages,
                lambda outbox=outbox, clock=clocks[name]: _relay(outbox, clock, messages),  # type: ignore[misc]
                lambda outbox=outbox: _fill(outbox, envelopes),  # type: ignore[misc]
            )
        )
    figures = [
        replace(figure, shares=clocks[figure.name].shares) if figure.name in clocks else figure
        for figure in measure(contenders, rounds)
    ]
    publisher.close()
    _print(figures)
    return {"messages": messages, "figures": [figure.as_json() for figure in figures]}


def _print(figures: list[Figure]) -> None:
    by_name = {figure.name: figure for figure in figures}
    each = by_name["bare publisher, one confirm per message"]
    rows = []
    for figure in figures:
        size = figure.name.rsplit(" ", 1)[-1]
        pipelined = by_name.get(f"bare publisher, confirms pipelined by {size}")
        rows.append(
            [
                figure.name,
                f"{figure.rate:,.0f}",
                f"{figure.cpu_seconds * 1e6:,.0f}",
                f"{figure.times_as_fast_as(each):.2f}",
                f"{figure.times_as_fast_as(pipelined):.2f}" if pipelined else "",
                *(f"{share:.0%}" for share in figure.shares.values()),
                *([] if figure.shares else ["", "", ""]),
            ]
        )
    header = [
        "",
        "messages/s",
        "CPU us/message",
        "x one by one",
        "x pipelined",
        "claim",
        "publish",
        "settle",
    ]
    print_table(TITLE, header, rows)


class _Clock:
    """Where the relay's time goes, told by its events."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(("claim", "publish", "settle"), 0.0)
        self._last = 0.0

    @property
    def shares(self) -> dict[str, float]:
        total = sum(self.spent.values())
        return {name: spent / total for name, spent in self.spent.items()}

    def start(self) -> None:
        self._last = time.perf_counter()

    def __call__(self, event: str, _details: dict[str, Any]) -> None:
        phases = {
            events.CLAIMED: "claim",
            events.PUBLISHED: "publish",
            events.SETTLED: "settle",
        }
        if event in phases:
            now = time.perf_counter()
            self.spent[phases[event]] += now - self._last
            self._last = now


def _relay(outbox: Outbox, clock: _Clock, messages: int) -> None:
    clock.start()
    with events.listening(clock):
        tally = outbox.relay_all()
    assert tally.confirmed == messages, tally


def _outbox(database_url: str, broker_url: str, prefix: str, **settings: Any) -> Outbox:
    app = Celery(prefix, broker=broker_url, set_as_current=False)
    app.conf.update(task_default_queue=QUEUE, task_ignore_result=True, **settings)
    outbox = Outbox(app, create_engine(database_url), prefix=prefix)
    outbox.create_schema()
    return outbox


def _envelopes(database_url: str, broker_url: str, count: int) -> list[Envelope]:
    """Return messages as Celery builds them."""
    outbox = _outbox(database_url, broker_url, "envelopes_")

    @durable_task(app=outbox.app, name="benchmarks.task")
    def task(number: int, text: str) -> None: ...

    with outbox.engine.begin():
        for number in range(count):
            task.delay(number, "x" * 190)
    taken = outbox.store.claim(count, 60).rows
    return [row.envelope for row in taken if row.envelope is not None]


def _fill(outbox: Outbox, envelopes: list[Envelope]) -> None:
    empty_queue(str(outbox.app.conf.broker_url), QUEUE)
    with outbox.engine.begin() as connection:
        connection.execute(delete(outbox.tables.outbox))
    rows = iter([row_of(envelope) for envelope in envelopes])
    while page := list(itertools.islice(rows, 500)):
        with outbox.engine.begin() as connection:
            outbox.store.stage(connection, page)
    with outbox.engine.connect() as connection:
        # A database at work has statistics and few dead rows; autovacuum may not have come by yet.
        connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(
            f"VACUUM ANALYZE {outbox.tables.outbox.name}"
        )
