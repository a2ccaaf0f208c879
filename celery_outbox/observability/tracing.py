"""OpenTelemetry: one trace from whoever sends a task, by the relay, to the worker that handles it.

Needs the extra ``opentelemetry``. The context is captured when the task is sent, as W3C's
``traceparent`` in the message's headers: where opentelemetry-instrumentation-celery has it, too.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from celery import signals
from opentelemetry import context, propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider

from celery_outbox import events
from celery_outbox.relay.outcome import Confirmed, Stalled

__all__ = ["Tracing", "trace_messages"]


def trace_messages(tracer_provider: TracerProvider | None = None) -> Tracing:
    """Trace what this process sends, relays and handles; call it once, where the app is made.

    Where opentelemetry-instrumentation-celery has instrumented the process, its spans are used for
    sending and handling, and only the relay's are added.
    """
    tracing = Tracing(tracer_provider)
    tracing.start()
    return tracing


class Tracing:
    """The spans of this process.

    - ``create <task>`` (producer): the task was sent, and stored in the caller's transaction. The
      message carries its context.
    - ``publish <destination>`` (client), a child of that: an attempt of the relay. The time between
      the two is what the message has waited.
    - ``process <task>`` (consumer), a child of ``create`` as well: the worker.
    """

    def __init__(self, tracer_provider: TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("celery_outbox", tracer_provider=tracer_provider)
        self._relaying = threading.local()
        self._handled: dict[tuple[str, int], tuple[Span, Any]] = {}

    def start(self) -> None:
        """Listen to what happens."""
        events.subscribe(self._relayed)
        signals.before_task_publish.connect(self._created, weak=False)
        signals.task_prerun.connect(self._begun, weak=False)
        signals.task_failure.connect(self._failed, weak=False)
        signals.task_retry.connect(self._retried, weak=False)
        signals.task_postrun.connect(self._ended, weak=False)

    def stop(self) -> None:
        """Undo `start`."""
        events.unsubscribe(self._relayed)
        signals.before_task_publish.disconnect(self._created)
        signals.task_prerun.disconnect(self._begun)
        signals.task_failure.disconnect(self._failed)
        signals.task_retry.disconnect(self._retried)
        signals.task_postrun.disconnect(self._ended)

    # Sending

    def _created(self, sender: Any = None, headers: Any = None, **_: Any) -> None:
        if not isinstance(headers, dict) or _is_instrumented():
            return
        attributes = {**_task(str(sender), headers.get("id")), "messaging.operation.type": "create"}
        with self._tracer.start_as_current_span(
            f"create {sender}", kind=SpanKind.PRODUCER, attributes=attributes
        ):
            propagate.inject(headers)

    # Relaying

    def _relayed(self, event: str, details: dict[str, Any]) -> None:
        if event == events.CLAIMED:
            self._relaying.since = time.time_ns()
        elif event == events.PUBLISHED:
            self._published(details)

    def _published(self, details: dict[str, Any]) -> None:
        since = getattr(self._relaying, "since", None) or time.time_ns()
        for row in details.get("rows", ()):
            outcome = details["outcomes"].get(row.id)
            # What was left alone was not tried.
            if row.envelope is None or outcome is None or isinstance(outcome, Stalled):
                continue
            span = self._tracer.start_span(
                f"publish {row.destination}",
                context=propagate.extract(_strings(row.envelope.headers)),
                kind=SpanKind.CLIENT,
                start_time=since,
                attributes={
                    **_task(row.task, row.task_id),
                    "messaging.operation.type": "send",
                    "messaging.destination.name": row.destination,
                    "celery_outbox.attempt": row.attempts,
                    "celery_outbox.outcome": type(outcome).__name__.lower(),
                },
            )
            if not isinstance(outcome, Confirmed) and (error := getattr(outcome, "error", None)):
                span.set_status(Status(StatusCode.ERROR, str(error)))
            span.end()

    # Handling

    def _begun(self, task_id: str, task: Any, **_: Any) -> None:
        if _is_instrumented():
            return
        request = task.request
        carrier = {
            name: getattr(request, name, None) for name in propagate.get_global_textmap().fields
        }
        parent = propagate.extract(_strings(carrier))
        span = self._tracer.start_span(
            f"process {task.name}",
            context=parent,
            kind=SpanKind.CONSUMER,
            attributes={
                **_task(task.name, task_id),
                "messaging.operation.type": "process",
                "celery_outbox.retries": request.retries or 0,
            },
        )
        token = context.attach(trace.set_span_in_context(span, parent))
        self._handled[task_id, threading.get_ident()] = span, token

    def _failed(self, task_id: str, exception: BaseException, **_: Any) -> None:
        span, _token = self._handled.get((task_id, threading.get_ident()), (None, None))
        if span is not None:
            span.record_exception(exception)
            span.set_status(Status(StatusCode.ERROR, str(exception)))

    def _retried(self, request: Any, reason: Any, **_: Any) -> None:
        span, _token = self._handled.get((str(request.id), threading.get_ident()), (None, None))
        if span is not None:
            span.add_event("retry", {"reason": str(reason)})

    def _ended(self, task_id: str, state: Any = None, **_: Any) -> None:
        span, token = self._handled.pop((task_id, threading.get_ident()), (None, None))
        if span is not None and token is not None:
            span.set_attribute("celery.state", str(state))
            context.detach(token)
            span.end()


def _task(name: str, task_id: Any) -> dict[str, str]:
    return {
        "messaging.system": "celery",
        "messaging.message.id": str(task_id),
        "celery.task_name": name,
    }


def _strings(carrier: Any) -> dict[str, str]:
    return {name: value for name, value in carrier.items() if isinstance(value, str)}


def _is_instrumented() -> bool:
    """Whether opentelemetry-instrumentation-celery does sending and handling in this process."""
    try:
        from opentelemetry.instrumentation.celery import CeleryInstrumentor
    except ImportError:
        return False
    return bool(CeleryInstrumentor().is_instrumented_by_opentelemetry)
