"""Table `servicebus`: the relay to Azure Service Bus beside kombu's own publish.

The broker is the tests' emulator, in a process of its own. With the real service a round trip takes
some milliseconds; here each acknowledgement is delayed by as many.
"""

import itertools
from dataclasses import replace
from typing import Any

from celery import Celery
from kombu import Connection
from sqlalchemy import create_engine, delete

from benchmarks.figures import Contender, Figure, measure, print_table
from celery_outbox import Outbox, durable_task
from celery_outbox.envelope import Envelope
from celery_outbox.relay.outcome import Confirmed
from celery_outbox.relay.publishers import VirtualPublisher
from celery_outbox.storage.rows import row_of
from tests.support.servicebus import ServiceBus

QUEUE = "bench"
TITLE = (
    "servicebus: from committed rows to settled messages, emulator, one relay, about 1 kB a message"
)
DELAYS = (0.0, 0.010)
BATCHES = (100, 500)


def table(database_url: str, _broker_url: str, *, quick: bool) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    messages, rounds = (1_000, 1) if quick else (5_000, 5)
    with ServiceBus() as server:
        numbers = itertools.count()
        envelopes = _envelopes(database_url, server.url, messages)
        kombu = VirtualPublisher(lambda: Connection(server.url), 60.0)
        outboxes = {size: _outbox(database_url, server.url, size) for size in BATCHES}

        def prepare(delay: float) -> str:
            """Give each run an empty queue, with duplicate detection, and its delay."""
            server.delay_acknowledgements(delay)
            name = f"{QUEUE}{next(numbers)}"
            server.create_queue(name, duplicate_detection=True)
            return name

        contenders = []
        for delay in DELAYS:
            few = messages // (2 if delay == 0 else 10)
            contenders.append(_Kombu(f"kombu, {_ms(delay)}", few, kombu, envelopes, prepare, delay))
            for size, outbox in outboxes.items():
                name = f"relay, batches of {size}, {_ms(delay)}"
                contenders.append(_Relay(name, messages, outbox, envelopes, prepare, delay))
        figures = measure([each.contender() for each in contenders], rounds)
        kombu.close()
        for outbox in outboxes.values():
            outbox.relay().close()
    _print(figures)
    return {"messages": messages, "figures": [figure.as_json() for figure in figures]}


def _ms(delay: float) -> str:
    return f"{delay * 1000:g} ms"


def _print(figures: list[Figure]) -> None:
    by_name = {figure.name: figure for figure in figures}
    rows = []
    for figure in figures:
        delay = figure.name.rpartition(", ")[2]
        ratio = figure.times_as_fast_as(by_name[f"kombu, {delay}"])
        rows.append(
            [
                figure.name,
                f"{figure.rate:,.0f}",
                f"{figure.cpu_seconds * 1e6:,.0f}",
                f"{ratio:.1f}",
            ]
        )
    print_table(
        TITLE, ["delay of acknowledgements", "messages/s", "CPU us/message", "x kombu"], rows
    )


class _Kombu:
    """kombu's own publish, as its transport does it: one message a round trip."""

    def __init__(
        self,
        name: str,
        messages: int,
        publisher: VirtualPublisher,
        envelopes: list[Envelope],
        prepare: Any,
        delay: float,
    ) -> None:
        self.name, self.messages, self.delay = name, messages, delay
        self._publisher, self._envelopes, self._prepare = publisher, envelopes, prepare
        self._batch: list[tuple[int, Envelope]] = []

    def contender(self) -> Contender:
        return Contender(self.name, self.messages, self.run, self.prepare)

    def prepare(self) -> None:
        queue = self._prepare(self.delay)
        chosen = [_to(queue, each) for each in self._envelopes[: self.messages + 1]]
        self._batch = list(enumerate(chosen))
        # The first one connects.
        self._publish(self._batch[:1])

    def run(self) -> None:
        self._publish(self._batch[1:])

    def _publish(self, batch: list[tuple[int, Envelope]]) -> None:
        outcomes = self._publisher.publish(batch)
        assert all(isinstance(outcome, Confirmed) for outcome in outcomes.values())


class _Relay:
    """The relay: claim, publish, settle."""

    def __init__(
        self,
        name: str,
        messages: int,
        outbox: Outbox,
        envelopes: list[Envelope],
        prepare: Any,
        delay: float,
    ) -> None:
        self.name, self.messages, self.delay = name, messages, delay
        self._outbox, self._envelopes, self._prepare = outbox, envelopes, prepare

    def contender(self) -> Contender:
        return Contender(self.name, self.messages, self.run, self.prepare)

    def prepare(self) -> None:
        queue = self._prepare(self.delay)
        self._fill([_to(queue, self._envelopes[0])])
        # The first one connects.
        assert self._outbox.relay_all().confirmed == 1
        self._fill([_to(queue, each) for each in self._envelopes])

    def run(self) -> None:
        tally = self._outbox.relay_all()
        assert tally.confirmed == self.messages, tally

    def _fill(self, envelopes: list[Envelope]) -> None:
        outbox = self._outbox
        with outbox.engine.begin() as connection:
            connection.execute(delete(outbox.tables.outbox))
        rows = iter([row_of(envelope) for envelope in envelopes])
        while page := list(itertools.islice(rows, 500)):
            with outbox.engine.begin() as connection:
                outbox.store.stage(connection, page)
        with outbox.engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(
                f"VACUUM ANALYZE {outbox.tables.outbox.name}"
            )


def _to(queue: str, envelope: Envelope) -> Envelope:
    return replace(envelope, exchange="", routing_key=queue, declare=())


def _outbox(database_url: str, broker_url: str, size: int) -> Outbox:
    app = Celery(f"servicebus{size}", broker=broker_url, set_as_current=False)
    app.conf.update(task_default_queue=QUEUE, task_ignore_result=True, outbox_batch_size=size)
    outbox = Outbox(app, create_engine(database_url), prefix=f"servicebus_{size}_")
    outbox.create_schema()
    return outbox


def _envelopes(database_url: str, broker_url: str, count: int) -> list[Envelope]:
    """Return messages as Celery builds them."""
    outbox = _outbox(database_url, broker_url, 1)

    @durable_task(app=outbox.app, name="benchmarks.task")
    def task(number: int, text: str) -> None: ...

    with outbox.engine.begin():
        for number in range(count):
            task.delay(number, "x" * 190)
    taken = outbox.store.claim(count, 60).rows
    return [row.envelope for row in taken if row.envelope is not None]
