"""Table `relay`: how fast the relay empties the outbox, beside publishers without one, and a peer.

The bodies are JSON of about 300 B and 3 kB. The peer stores calls, and builds the messages in its
relay.
"""

import itertools
import time
from dataclasses import dataclass, replace
from typing import Any

from celery import Celery
from sqlalchemy import create_engine, delete

from benchmarks.figures import Contender, Figure, chart, measure, print_table
from benchmarks.peers.django_outbox import DjangoOutbox
from benchmarks.reference import BarePublisher, empty_queue
from celery_outbox import Outbox, durable_task, events
from celery_outbox.envelope import Envelope
from celery_outbox.storage.rows import row_of

QUEUE = "bench"
BATCHES = (100, 500)
#: Name → the length of the text that a task is given.
BODIES = {"300 B": 190, "3 kB": 2_900}
TITLE = "relay: from committed rows to confirmed messages; RabbitMQ, one relay"
GOAL_BARE, GOAL_PEER = 0.75, 8

ONE_BY_ONE = "bare publisher, one confirm per message"


def table(database_url: str, broker_url: str, *, quick: bool) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    messages, rounds = (1_000, 2) if quick else (10_000, 5)
    bodies = list(BODIES)[: 1 if quick else None]
    peer = DjangoOutbox(database_url, broker_url)
    report: dict[str, Any] = {"messages": messages, "bodies": {}, "charts": []}
    rows = []
    for body in bodies:
        figures = _measure(_Bench(database_url, broker_url, peer, messages, BODIES[body]), rounds)
        rows += _rows(body, figures)
        report["bodies"][body] = [figure.as_json() for figure in figures]
        report["charts"].append(_chart(body, figures))
    header = [
        "",
        "messages/s",
        "CPU us/message",
        "x one by one",
        "x pipelined",
        "x django-celery-outbox",
        "claim",
        "publish",
        "settle",
    ]
    print_table(TITLE, header, rows)
    print(
        f"Goals: relay at least {GOAL_BARE} of the pipelined bare publisher, and {GOAL_PEER} times "
        "django-celery-outbox.",
        flush=True,
    )
    return report


@dataclass(frozen=True)
class _Bench:
    """What one body is measured with."""

    database_url: str
    broker_url: str
    peer: DjangoOutbox
    messages: int
    length: int

    @property
    def few(self) -> int:
        """How many messages the slow ones get."""
        return self.messages // 10

    def clear(self) -> None:
        """Empty the queue."""
        empty_queue(self.broker_url, QUEUE)

    def fill_peer(self) -> None:
        """Store the peer's messages."""
        self.clear()
        self.peer.fill(self.few, "x" * self.length)


def _measure(bench: _Bench, rounds: int) -> list[Figure]:
    publisher = BarePublisher(bench.broker_url)
    envelopes = _envelopes(bench)
    few = envelopes[: bench.few]
    contenders = [
        Contender(ONE_BY_ONE, bench.few, lambda: publisher.publish_one_by_one(few), bench.clear)
    ]
    clocks = {}
    for batch in BATCHES:
        outbox = _outbox(bench, f"relay_{bench.length}_{batch}_", outbox_batch_size=batch)
        ours = f"relay, batches of {batch}"
        clock = clocks[ours] = _Clock()
        contenders += [
            Contender(
                f"bare publisher, confirms pipelined by {batch}",
                bench.messages,
                lambda batch=batch: publisher.publish_pipelined(envelopes, batch),  # type: ignore[misc]
                bench.clear,
            ),
            Contender(
                ours,
                bench.messages,
                lambda outbox=outbox, clock=clock: _relay(outbox, clock, bench.messages),  # type: ignore[misc]
                lambda outbox=outbox: _fill(outbox, envelopes),  # type: ignore[misc]
            ),
            Contender(
                f"django-celery-outbox, confirms, batches of {batch}",
                bench.few,
                lambda batch=batch: bench.peer.relay(bench.few, batch),  # type: ignore[misc]
                bench.fill_peer,
            ),
        ]
    figures = measure(contenders, rounds)
    publisher.close()
    return [
        replace(figure, shares=clocks[figure.name].shares) if figure.name in clocks else figure
        for figure in figures
    ]


def _rows(body: str, figures: list[Figure]) -> list[list[str]]:
    by_name = {figure.name: figure for figure in figures}
    rows = []
    for figure in figures:
        size = figure.name.rsplit(" ", 1)[-1]
        pipelined = by_name.get(f"bare publisher, confirms pipelined by {size}")
        peer = by_name.get(f"django-celery-outbox, confirms, batches of {size}")
        rows.append(
            [
                f"{body}: {figure.name}",
                f"{figure.rate:,.0f}",
                f"{figure.cpu_seconds * 1e6:,.0f}",
                f"{figure.times_as_fast_as(by_name[ONE_BY_ONE]):.2f}",
                f"{figure.times_as_fast_as(pipelined):.2f}" if pipelined else "",
                f"{figure.times_as_fast_as(peer):.1f}" if peer else "",
                *(f"{share:.0%}" for share in figure.shares.values()),
                *([] if figure.shares else ["", "", ""]),
            ]
        )
    return rows


def _chart(body: str, figures: list[Figure]) -> dict[str, Any]:
    kinds = {"bare": "limit", "relay": "ours", "django": "others"}
    return chart(
        f"From committed rows to confirmed messages, bodies of {body}",
        "messages/s",
        [
            (figure.name, figure.rate, next(kinds[k] for k in kinds if figure.name.startswith(k)))
            for figure in figures
        ],
    )


class _Clock:
    """Where the relay's time goes, told by its events; what overlaps counts where it ends."""

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


def _outbox(bench: _Bench, prefix: str, **settings: Any) -> Outbox:
    app = Celery(prefix, broker=bench.broker_url, set_as_current=False)
    app.conf.update(task_default_queue=QUEUE, task_ignore_result=True, **settings)
    outbox = Outbox(app, create_engine(bench.database_url), prefix=prefix)
    outbox.create_schema()
    return outbox


def _envelopes(bench: _Bench) -> list[Envelope]:
    """Return messages as Celery builds them."""
    outbox = _outbox(bench, f"envelopes_{bench.length}_")

    @durable_task(app=outbox.app, name="benchmarks.task")
    def task(number: int, text: str) -> None: ...

    with outbox.engine.begin():
        for number in range(bench.messages):
            task.delay(number, "x" * bench.length)
    taken = outbox.store.claim(bench.messages, 60).rows
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
