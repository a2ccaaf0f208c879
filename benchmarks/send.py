"""Table `send`: what `apply_async` costs the app, beside stock Celery and the message alone."""

from collections.abc import Callable
from typing import Any

from celery import Celery
from kombu.messaging import Producer
from sqlalchemy import Engine, create_engine, delete, insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from benchmarks.figures import Contender, Figure, measure, print_table
from benchmarks.reference import empty_queue
from celery_outbox import Outbox, durable_task

QUEUE = "bench"
SIZES = (1, 10, 100)
TITLE = "send: a transaction with one row, and apply_async in it; commit included"

Send = Callable[[int, str], Any]


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


def table(database_url: str, broker_url: str, *, quick: bool) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    transactions, rounds = (100, 3) if quick else (400, 5)
    engine = create_engine(database_url)
    Base.metadata.create_all(engine)
    outbox, durable = _durable(database_url, broker_url)
    senders: dict[str, tuple[Engine, Send | None]] = {
        "the transaction alone": (engine, None),
        "the message built only": (engine, _built(broker_url)),
        "celery_outbox": (outbox.engine, durable),
        "stock Celery": (engine, _stock(broker_url, confirm=False)),
        "stock Celery, confirm_publish": (engine, _stock(broker_url, confirm=True)),
    }

    def clear() -> None:
        empty_queue(broker_url, QUEUE)
        with outbox.engine.begin() as connection:
            connection.execute(delete(outbox.tables.outbox))
            connection.execute(delete(Order))

    report: dict[str, Any] = {}
    all_figures: dict[int, list[Figure]] = {}
    for size in SIZES:
        count = max(transactions // size, 10)
        contenders = [
            Contender(
                name,
                count * size,
                lambda engine=engine, send=send, size=size, count=count: _work(  # type: ignore[misc]
                    engine, send, size, count
                ),
                clear,
            )
            for name, (engine, send) in senders.items()
        ]
        all_figures[size] = measure(contenders, rounds)
        report[str(size)] = [figure.as_json() for figure in all_figures[size]]
    _print(all_figures)
    return report


def _print(all_figures: dict[int, list[Figure]]) -> None:
    rows = []
    for size, figures in all_figures.items():
        by_name = {figure.name: figure for figure in figures}
        alone, stock = by_name["the transaction alone"], by_name["stock Celery"]
        for figure in figures:
            rows.append(
                [
                    f"{size:>3} per transaction: {figure.name}",
                    f"{figure.seconds * 1e6:,.0f}",
                    f"{figure.cpu_seconds * 1e6:,.0f}",
                    f"{(figure.seconds - alone.seconds) * 1e6:,.0f}" if figure != alone else "",
                    f"{1 / figure.times_as_fast_as(stock):.2f}",
                ]
            )
    header = ["", "us/message", "CPU us/message", "above the transaction", "x stock Celery"]
    print_table(TITLE, header, rows)


def _work(engine: Engine, send: Send | None, size: int, transactions: int) -> None:
    for number in range(transactions):
        with Session(engine) as session, session.begin():
            session.execute(insert(Order).values(cents=number))
            if send is not None:
                for _ in range(size):
                    send(number, "x" * 190)


def _app(name: str, broker_url: str, **settings: Any) -> Celery:
    app = Celery(name, broker=broker_url, set_as_current=False)
    app.conf.update(task_default_queue=QUEUE, task_ignore_result=True, **settings)
    return app


def _durable(database_url: str, broker_url: str) -> tuple[Outbox, Send]:
    app = _app("durable", broker_url)
    outbox = Outbox(app, create_engine(database_url), prefix="send_")
    outbox.create_schema()

    @durable_task(app=app, name="benchmarks.task")
    def task(number: int, text: str) -> None: ...

    return outbox, task.delay


def _stock(broker_url: str, *, confirm: bool) -> Send:
    options = {"confirm_publish": True} if confirm else {}
    app = _app(f"stock{confirm}", broker_url, broker_transport_options=options)

    @app.task(name="benchmarks.task")
    def task(number: int, text: str) -> None: ...

    send: Send = task.delay
    return send


def _built(broker_url: str) -> Send:
    app = _app("built", broker_url)

    @app.task(name="benchmarks.task")
    def task(number: int, text: str) -> None: ...

    producer = DroppingProducer(app.connection_for_write())

    def send(number: int, text: str) -> Any:
        return task.apply_async((number, text), producer=producer)

    return send
