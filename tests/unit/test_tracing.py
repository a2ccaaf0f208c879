"""One trace leads from whoever sends a task, by the relay, to the worker."""

from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from celery_outbox import Outbox, durable_task
from celery_outbox.observability.tracing import trace_messages
from celery_outbox.testing import Faults, in_memory, run_until_quiet
from tests.unit.conftest import MakeShop
from tests.unit.shop import Purpose, Shop


class Told:
    """The spans that have ended."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def named(self, name: str) -> ReadableSpan:
        """The one span of this name."""
        (found,) = [span for span in self.all() if span.name == name]
        return found

    def all(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())


@pytest.fixture
def told() -> Iterator[Told]:
    """Spans, where nobody else traces."""
    told = Told()
    tracing = trace_messages(told.provider)
    yield told
    tracing.stop()
    told.provider.shutdown()


@pytest.fixture
def shop(make_shop: MakeShop, sqlite_url: str) -> Iterator[Shop]:
    """A shop whose database and broker are in memory."""
    shop = make_shop(sqlite_url, tables=False)
    with in_memory(shop.outbox):
        yield shop


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent and span.parent.span_id


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def trace_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.trace_id


def attribute(span: ReadableSpan, name: str) -> Any:
    return (span.attributes or {})[name]


def test_the_trace_of_a_message(shop: Shop, told: Told) -> None:
    with (
        told.provider.get_tracer("web").start_as_current_span("GET /orders") as web,
        shop.Session.begin() as session,
    ):
        session.connection()
        task_id = shop.notify.delay("m").id
    run_until_quiet(shop.outbox)
    create = told.named("create shop.notify")
    publish = told.named("publish celery")
    process = told.named("process shop.notify")
    assert parent_of(create) == web.get_span_context().span_id
    assert parent_of(publish) == parent_of(process) == id_of(create)
    assert len({trace_of(span) for span in told.all()}) == 1
    for span in (create, publish, process):
        assert attribute(span, "messaging.message.id") == task_id
    assert attribute(publish, "celery_outbox.outcome") == "confirmed"
    assert attribute(process, "celery.state") == "SUCCESS"


def test_what_a_task_sends_continues_its_trace(shop: Shop, told: Told) -> None:
    @durable_task(app=shop.app, name="shop.spawn")
    def spawn() -> None:
        shop.notify.delay("child")

    spawn.delay()
    run_until_quiet(shop.outbox)
    assert parent_of(told.named("create shop.notify")) == id_of(told.named("process shop.spawn"))
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_a_failure_is_told(shop: Shop, told: Told) -> None:
    @durable_task(app=shop.app, name="shop.fail")
    def fail() -> None:
        raise Purpose("on purpose")

    fail.delay()
    run_until_quiet(shop.outbox)
    process = told.named("process shop.fail")
    assert process.status.status_code is StatusCode.ERROR
    assert [event.name for event in process.events] == ["exception"]


def test_a_retry_has_spans_of_its_own(shop: Shop, told: Told) -> None:
    @durable_task(app=shop.app, name="shop.retry", bind=True)
    def retry(task: Any) -> None:
        if not task.request.retries:
            raise task.retry(countdown=0)

    retry.delay()
    run_until_quiet(shop.outbox)
    spans = [span for span in told.all() if span.name == "process shop.retry"]
    assert [attribute(span, "celery.state") for span in spans] == ["RETRY", "SUCCESS"]
    first, second = spans
    again = [span for span in told.all() if span.name == "create shop.retry"][-1]
    assert parent_of(again) == id_of(first)
    assert parent_of(second) == id_of(again)


def test_a_publish_that_was_refused_is_told(shop: Shop, told: Told) -> None:
    shop.notify.delay("m")
    with Faults(shop.outbox).return_message():
        shop.outbox.relay_once()
    publish = told.named("publish celery")
    assert publish.status.status_code is StatusCode.ERROR
    assert attribute(publish, "celery_outbox.outcome") == "refused"


def test_what_another_sends_without_a_trace_begins_one(shop: Shop, told: Told) -> None:
    """Sent by a process that does not trace."""
    with told_nothing(shop.outbox):
        shop.notify.delay("m")
    run_until_quiet(shop.outbox)
    assert parent_of(told.named("process shop.notify")) is None


class told_nothing:
    """A block in which nothing adds to headers."""

    def __init__(self, outbox: Outbox) -> None:
        self._receivers: Any = None

    def __enter__(self) -> None:
        from celery.signals import before_task_publish

        self._receivers, before_task_publish.receivers = before_task_publish.receivers, []

    def __exit__(self, *_: object) -> None:
        from celery.signals import before_task_publish

        before_task_publish.receivers = self._receivers


def test_with_celerys_own_instrumentation_its_spans_are_used(shop: Shop, told: Told) -> None:
    instrumentor = CeleryInstrumentor()
    instrumentor.instrument(tracer_provider=told.provider)
    try:
        shop.notify.delay("m")
        run_until_quiet(shop.outbox)
    finally:
        instrumentor.uninstrument()
    assert sorted(span.name for span in told.all()) == [
        "apply_async/shop.notify",
        "publish celery",
        "run/shop.notify",
    ]
    sent = told.named("apply_async/shop.notify")
    assert parent_of(told.named("publish celery")) == id_of(sent)
    assert parent_of(told.named("run/shop.notify")) == id_of(sent)
