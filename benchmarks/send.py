"""Table `send`: what `apply_async` costs the app, beside stock Celery, two peers, the message alone.

Each transaction inserts one row of the app's; its commit is included. Stock Celery publishes inside
the same transaction, so that the outbox is all that it leaves out; but for the outbox's look at what
other apps of the process send, a few microseconds that stock Celery and building pay here too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from celery import Celery
from kombu.messaging import Producer
from sqlalchemy import Engine, create_engine, delete, insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from benchmarks.figures import Contender, Figure, chart, measure, print_table
from benchmarks.peers.django_outbox import DjangoOutbox
from benchmarks.peers.procrastinate_queue import Procrastinate
from benchmarks.reference import empty_queue
from celery_outbox import Outbox, durable_task

QUEUE = "bench"
#: Messages in a transaction, and which share of the transactions is enough then.
SIZES = {1: 1.0, 10: 0.3, 100: 0.07}
TITLE = "send: a transaction with one row, and apply_async in it; commit included"

ALONE = "the transaction alone"
BUILT = "the message built only"
OURS = "celery_outbox"
STOCK = "stock Celery"
CONFIRMED = "stock Celery, confirm_publish"
KINDS = {ALONE: "limit", BUILT: "limit", OURS: "ours"}
TEXT = "x" * 190

Send = Callable[[Session, int], Any]


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    cents: Mapped[int]


class DroppingProducer(Producer):
    """kombu's producer without its last hop: the message is built, and dropped."""

    def _publish(self, *_: Any, **__: Any) -> None:
        pass


@dataclass(frozen=True)
class _Sessions:
    """An app that works with SQLAlchemy's sessions."""

    engine: Engine
    send: Send | None

    def work(self, size: int, transactions: int) -> None:
        """Commit transactions of one row and `size` messages each."""
        for number in range(transactions):
            with Session(self.engine) as session, session.begin():
                session.execute(insert(Order).values(cents=number))
                if self.send is not None:
                    for _ in range(size):
                        self.send(session, number)


def table(database_url: str, broker_url: str, *, quick: bool) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    transactions, rounds = (50, 3) if quick else (400, 9)
    engine = create_engine(database_url)
    Base.metadata.create_all(engine)
    outbox, durable = _durable(database_url, broker_url)
    django, procrastinate = DjangoOutbox(database_url, broker_url), Procrastinate(database_url)
    workers: dict[str, Callable[[int, int], None]] = {
        ALONE: _Sessions(engine, None).work,
        BUILT: _Sessions(engine, _built(broker_url)).work,
        OURS: _Sessions(outbox.engine, durable).work,
        STOCK: _Sessions(engine, _stock(broker_url, confirm=False)).work,
        CONFIRMED: _Sessions(engine, _stock(broker_url, confirm=True)).work,
        "django-celery-outbox": lambda size, count: django.work(size, count, TEXT),
        "procrastinate": _Sessions(
            engine, lambda session, number: procrastinate.defer(session, number, TEXT)
        ).work,
    }

    def clear() -> None:
        empty_queue(broker_url, QUEUE)
        django.clear()
        procrastinate.clear()
        with outbox.engine.begin() as connection:
            connection.execute(delete(outbox.tables.outbox))
            connection.execute(delete(Order))

    report: dict[str, Any] = {"sizes": {}, "charts": []}
    all_figures: dict[int, list[Figure]] = {}
    for size, share in SIZES.items():
        count = int(transactions * share)
        contenders = [
            Contender(
                name,
                count * size,
                lambda work=work, size=size, count=count: work(size, count),  # type: ignore[misc]
                clear,
            )
            for name, work in workers.items()
        ]
        figures = all_figures[size] = measure(contenders, rounds)
        report["sizes"][str(size)] = [figure.as_json() for figure in figures]
        report["charts"].append(
            chart(
                f"apply_async in a transaction, {size} per transaction, commit included",
                "microseconds per message",
                [
                    (each.name, each.seconds * 1e6, KINDS.get(each.name, "others"))
                    for each in figures
                ],
            )
        )
    procrastinate.close()
    _print(all_figures)
    return report


def _print(all_figures: dict[int, list[Figure]]) -> None:
    rows = []
    for size, figures in all_figures.items():
        by_name = {figure.name: figure for figure in figures}
        built = by_name[BUILT]
        for figure in figures:
            rows.append(
                [
                    f"{size:>3} per transaction: {figure.name}",
                    f"{figure.seconds * 1e6:,.0f}",
                    f"{figure.cpu_seconds * 1e6:,.0f}",
                    f"{(figure.seconds - built.seconds) * 1e6:,.0f}",
                    f"{(figure.cpu_seconds - built.cpu_seconds) * 1e6:,.0f}",
                    f"{1 / figure.times_as_fast_as(by_name[STOCK]):.2f}",
                    f"{1 / figure.times_as_fast_as(by_name[CONFIRMED]):.2f}",
                ]
            )
    header = [
        "",
        "us/message",
        "CPU us/message",
        "above building",
        "CPU above building",
        "x stock",
        "x stock, confirms",
    ]
    print_table(TITLE, header, rows)
    print(
        "Goals at 10 per transaction: celery_outbox at most 0.85 of stock Celery, and 0.3 of it with "
        "confirms.",
        flush=True,
    )


def _app(name: str, broker_url: str, **settings: Any) -> Celery:
    app = Celery(name, broker=broker_url, set_as_current=False)
    app.conf.update(task_default_queue=QUEUE, task_ignore_result=True, **settings)
    return app


def _durable(database_url: str, broker_url: str) -> tuple[Outbox, Send]:
    app = _app("durable", broker_url)
    outbox = Outbox(app, create_engine(database_url), prefix="send_")
    outbox.create_schema()

    @durable_task(app=app, name="benchmarks.durable")
    def task(number: int, text: str) -> None: ...

    return outbox, lambda _, number: task.delay(number, TEXT)


def _stock(broker_url: str, *, confirm: bool) -> Send:
    options = {"confirm_publish": True} if confirm else {}
    app = _app(f"stock{confirm}", broker_url, broker_transport_options=options)

    @app.task(name="benchmarks.stock", shared=False)
    def task(number: int, text: str) -> None: ...

    return lambda _, number: task.delay(number, TEXT)


def _built(broker_url: str) -> Send:
    """Everything that Celery does but for the publish, its pool of producers included."""
    app = _app("built", broker_url)
    app.producer_pool.Producer = DroppingProducer

    @app.task(name="benchmarks.built", shared=False)
    def task(number: int, text: str) -> None: ...

    return lambda _, number: task.delay(number, TEXT)
