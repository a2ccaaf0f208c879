"""P3: what reaches the broker through the outbox is what stock Celery would have sent.

Two apps with the same settings are asked to do the same. One publishes; the other stores its messages
in SQLite, and its relay claims and publishes them. What the two brokers have received is compared
frame by frame.
"""

import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from random import Random
from typing import Any

import hypothesis.strategies as st
import kombu.utils
import pytest
import sqlalchemy as sa
from celery import Celery
from hypothesis import HealthCheck, example, given, settings
from kombu import Exchange, Queue
from kombu.common import Broadcast
from sqlalchemy.pool import StaticPool

from celery_outbox import Outbox, durable_task
from tests.unit import calls, wire

_DELAYED = "celery_delayed_27"


class FrozenCelery(Celery):
    """Its clock stands."""

    moment = datetime.now(timezone.utc)

    def now(self) -> datetime:
        return self.moment


def make_app(broker: str, *, durable: bool = False, **options: Any) -> Celery:
    app = FrozenCelery("same", set_as_current=False)
    app.conf.update(
        broker_url=f"recording://{broker}",
        accept_content=["json", "pickle", "yaml"],
        task_default_queue="default",
        task_queues=[
            Queue("default"),
            Queue(
                "topical",
                Exchange("topics", type="topic", arguments={"alternate-exchange": "others"}),
                routing_key="a.b.*",
                queue_arguments={"x-overflow": "reject-publish"},
            ),
            Queue(
                "quorate",
                Exchange("orders", type="direct"),
                routing_key="orders",
                queue_arguments={"x-queue-type": "classic"},
            ),
            Broadcast("everybody", queue="everybody-here"),
        ],
        task_routes={
            "t.routed": {"queue": "topical", "routing_key": "a.b.c"},
            "t.broadcast": {"queue": "everybody"},
        },
        **options,
    )
    # Goes into reply_to.
    app._local.oid = "the-same"

    @app.task(name="t.plain", shared=False)
    def plain(*args: Any, **kwargs: Any) -> None: ...

    @app.task(name="t.routed", shared=False)
    def routed(*args: Any, **kwargs: Any) -> None: ...

    @app.task(name="t.broadcast", shared=False, ignore_result=True)
    def broadcast(*args: Any, **kwargs: Any) -> None: ...

    @app.task(
        name="t.prioritised",
        shared=False,
        priority=5,
        serializer="pickle",
        expires=600,
        time_limit=9,
    )
    def prioritised(*args: Any, **kwargs: Any) -> None: ...

    @app.task(name="t.bound", shared=False, bind=True, compression="gzip", max_retries=9)
    def bound(self: Any, *args: Any, **kwargs: Any) -> None: ...

    task = partial(durable_task, app=app) if durable else partial(app.task, shared=False)

    @task(name="t.durable")
    def careful(*args: Any, **kwargs: Any) -> None: ...

    return app


class Pair:
    """A stock app, and one with an outbox."""

    def __init__(self, **options: Any) -> None:
        self._stock_broker, self._outbox_broker = wire.new_name(), wire.new_name()
        self.stock = make_app(self._stock_broker, **options)
        self.ours = make_app(
            self._outbox_broker,
            durable=True,
            outbox_capture="all",
            outbox_relay_tick_seconds=0,
            **options,
        )
        engine = sa.create_engine(
            "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
        )
        self.outbox = Outbox(self.ours, engine)
        self.outbox.create_schema()
        # A task that is sent by name has its options only where the app knows its tasks already.
        self.stock.finalize()
        self.ours.finalize()

    def compare(self, send: Callable[[Celery], Any], seed: int = 0) -> None:
        """Let both do `send`, and compare what became of it."""
        FrozenCelery.moment = datetime.now(timezone.utc)
        self._begin(self._stock_broker, self._outbox_broker)
        with same_ids(seed):
            expected_error = error_of(send, self.stock)
        with same_ids(seed):
            error = error_of(send, self.ours)
        assert type(error) is type(expected_error), (error, expected_error)
        expected, got = wire.broker(self._stock_broker), wire.broker(self._outbox_broker)
        assert got.published == []
        self._relay()
        assert [comparable(message) for message in got.published] == [
            comparable(message) for message in expected.published
        ]
        for message, like in zip(got.published, expected.published, strict=True):
            assert_close(milliseconds(message), milliseconds(like), 60_000)
            assert_close(delay(message), delay(like), 60)
        if error is None:  # else it may come before a declaration, or after
            assert distinct(got.declared) == distinct(expected.declared)

    def send(self, send: Callable[[Celery], Any]) -> tuple[wire.Published, wire.Published]:
        """Let both do `send`; return the one message of each."""
        self._begin(self._stock_broker, self._outbox_broker)
        for app in (self.stock, self.ours):
            with same_ids(0):
                send(app)
        self._relay()
        (stock,) = wire.broker(self._stock_broker).published
        (ours,) = wire.broker(self._outbox_broker).published
        return stock, ours

    def _begin(self, *brokers: str) -> None:
        for name in brokers:
            wire.broker(name).forget()
        self.outbox.relay().close()
        outbox = self.outbox.tables.outbox
        with self.outbox.engine.begin() as connection:
            connection.execute(sa.delete(outbox))

    def _relay(self) -> None:
        outbox = self.outbox.tables.outbox
        with self.outbox.engine.begin() as connection:
            # The scheduled ones, too.
            connection.execute(
                sa.update(outbox).values(available_at=datetime(2020, 1, 1, tzinfo=timezone.utc))
            )
        tally = self.outbox.relay_all()
        assert tally.confirmed == tally.claimed, tally
        assert sum(self.outbox.store.counts().values()) == 0


@contextmanager
def same_ids(seed: int) -> Iterator[None]:
    """Let Celery's new ids be the same each time."""
    new = kombu.utils.uuid
    random = Random(seed)
    before = new.__defaults__
    new.__defaults__ = (lambda: uuid.UUID(int=random.getrandbits(128), version=4),)
    try:
        yield
    finally:
        new.__defaults__ = before


def error_of(send: Callable[[Celery], Any], app: Celery) -> Exception | None:
    try:
        send(app)
    except Exception as exc:
        return exc
    return None


def comparable(message: wire.Published) -> dict[str, Any]:
    # What the relay asks for besides, so that nothing is confirmed that went nowhere: mandatory.
    routing_key = message.routing_key
    if message.exchange == _DELAYED:
        routing_key = re.sub(r"[01]\.", "", routing_key)
    return {
        "exchange": message.exchange,
        "routing_key": routing_key,
        "properties": message.properties,
        "frame": message.frame,
        "body": message.body,
        "expires": message.expiration is not None,
    }


def milliseconds(message: wire.Published) -> int:
    return int(message.expiration or 0)


def delay(message: wire.Published) -> int:
    if message.exchange != _DELAYED:
        return 0
    return int("".join(message.routing_key.split(".")[:28]), 2)


def assert_close(one: int, other: int, tolerance: int) -> None:
    assert abs(one - other) <= tolerance, (one, other)


def distinct(frames: list[tuple[Any, ...]]) -> list[str]:
    return sorted({repr(frame) for frame in frames})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    results = f"file://{tmp_path_factory.mktemp('results')}"
    return {
        "plain": Pair(),
        "protocol 1": Pair(task_protocol=1),
        "with results": Pair(result_backend=results),
        "rpc": Pair(result_backend="rpc://", result_expires=100),
        "quorum": Pair(
            task_default_queue_type="quorum",
            task_default_exchange_type="topic",
            task_create_missing_queue_type="quorum",
            task_create_missing_queue_exchange_type="topic",
            broker_native_delayed_delivery_queue_type="quorum",
        ),
        "elsewhere": Pair(
            timezone="Europe/Berlin",
            enable_utc=False,
            task_serializer="yaml",
            task_compression="bzip2",
            task_default_priority=3,
            task_queue_max_priority=9,
            task_default_delivery_mode=1,
            task_publish_retry=False,
        ),
    }


PAIRS = ("plain", "protocol 1", "with results", "rpc", "quorum", "elsewhere")
quick = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@settings(quick, max_examples=400)
@given(
    pair=st.sampled_from(PAIRS),
    name=st.sampled_from([*calls.TASKS, "unknown.task"]),
    args=st.lists(calls.values, max_size=3),
    kwargs=st.dictionaries(calls.names, calls.values, max_size=2),
    options=calls.options,
    destination=calls.destinations,
    by_name=st.booleans(),
)
@example("plain", "t.plain", calls.examples_of_arguments[2], {}, {}, {}, False)
@example("plain", "t.plain", calls.examples_of_arguments[3], {}, {}, {}, False)
@example("plain", "t.plain", calls.examples_of_arguments[4], {}, {}, {}, False)
@example("quorum", "t.plain", [], {}, {"eta": ("seconds", 5000)}, {}, False)
@example("quorum", "t.routed", [], {}, {"eta": ("aware", 86400)}, {"queue": "topical"}, True)
def test_a_task(
    pairs: dict[str, Pair],
    pair: str,
    name: str,
    args: list[Any],
    kwargs: dict[str, Any],
    options: dict[str, Any],
    destination: dict[str, Any],
    by_name: bool,
) -> None:
    def send(app: Celery) -> None:
        given = {**calls.options_at(FrozenCelery.moment, options), **destination}
        if by_name or name not in app.tasks:
            app.send_task(name, args, kwargs, **given)
        else:
            app.tasks[name].apply_async(args, kwargs, **given)

    pairs[pair].compare(send)


@pytest.mark.filterwarnings("ignore::celery.exceptions.CPendingDeprecationWarning")
@settings(quick, max_examples=250)
@given(
    # Without a result backend there are no chords.
    pair=st.sampled_from(["with results", "with results", "plain", "protocol 1", "rpc", "quorum"]),
    canvas=calls.canvases,
    options=st.fixed_dictionaries(
        {},
        optional={
            "priority": st.integers(0, 9),
            "queue": st.sampled_from(["default", "topical", "missing"]),
            "expires": st.tuples(st.just("seconds"), st.integers(1, 1000)),
            "eta": st.tuples(st.just("seconds"), st.integers(1, 1000)),
            "headers": st.dictionaries(calls.names, calls.header_values, max_size=2),
        },
    ),
    seed=st.integers(0, 2**32),
)
def test_a_canvas(
    pairs: dict[str, Pair], pair: str, canvas: Any, options: dict[str, Any], seed: int
) -> None:
    def send(app: Celery) -> None:
        given = calls.options_at(FrozenCelery.moment, options)
        calls.build(app, canvas).apply_async(**given)

    pairs[pair].compare(send, seed)


@pytest.mark.parametrize("pair", PAIRS)
def test_chunks_map_and_starmap(pairs: dict[str, Pair], pair: str) -> None:
    def send(app: Celery) -> None:
        task = app.tasks["t.plain"]
        task.chunks([(1,), (2,), (3,)], 2).apply_async()
        task.map([1, 2]).apply_async()
        task.starmap([(1, 2), (3, 4)]).apply_async()

    pairs[pair].compare(send)


@pytest.mark.parametrize("pair", PAIRS)
def test_what_the_outbox_does_in_a_transaction_is_the_same(
    pairs: dict[str, Pair], pair: str
) -> None:
    """Staged with the session's commit, not on its own."""
    from sqlalchemy.orm import Session

    both = pairs[pair]

    def send(app: Celery) -> None:
        task = app.tasks["t.plain"]
        if app is both.ours:
            with Session(both.outbox.engine) as session, session.begin():
                task.delay(1)
                task.apply_async((2,), countdown=9)
        else:
            task.delay(1)
            task.apply_async((2,), countdown=9)

    both.compare(send)


@pytest.mark.parametrize("pair", ["plain", "protocol 1"])
def test_a_durable_task_differs_in_two_properties(pairs: dict[str, Pair], pair: str) -> None:
    """It says which application it is, and is not dropped by the broker when it is out of date."""
    stock, ours = pairs[pair].send(lambda app: app.tasks["t.durable"].apply_async(expires=60))
    assert stock.expiration == "60000"
    assert ours.expiration is None
    message_id = ours.properties.pop("message_id")
    assert len(message_id) == 32
    assert ours.properties == stock.properties
    assert (ours.exchange, ours.routing_key, ours.body) == (
        stock.exchange,
        stock.routing_key,
        stock.body,
    )


def test_a_message_id_of_the_callers_is_kept(pairs: dict[str, Pair]) -> None:
    _, ours = pairs["plain"].send(
        lambda app: app.tasks["t.durable"].apply_async(message_id="order 7")
    )
    assert ours.properties["message_id"] == "order 7"
