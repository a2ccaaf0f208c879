"""Results: what Celery asks of the result backend when a message is sent, put off until it can be.

`Celery.send_task` calls ``backend.on_task_call`` before the message reaches our seam, and a group
asks for its results as soon as it is sent: Redis subscribes, rpc declares its reply queue, and both
hang or fail when they are away. Inside a transaction neither happens at the call.

A chord is announced to the backend too, which sends its body after the header: there the body is told
which application of the chord it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

from celery.result import task_join_will_block
from kombu import Queue

from celery_outbox.outbox.signatures import tasks_of

if TYPE_CHECKING:
    from celery import Celery
    from celery.canvas import Signature
    from kombu.messaging import Producer

__all__ = ["Results"]

#: Set while rpc's ``on_task_call`` is put off and its message is not yet sent.
_call_pending: ContextVar[bool] = ContextVar("celery_outbox_call_pending", default=False)


class Results:
    """The result backends of one app.

    `in_transaction` says whether the caller is in one, `has_inbox` and `application` are those of
    `Capture`.
    """

    def __init__(
        self,
        app: Celery,
        in_transaction: Callable[[], bool],
        has_inbox: Callable[[str], bool],
        application: Callable[[Mapping[str, Any]], str | None],
    ) -> None:
        self._app = app
        self._in_transaction = in_transaction
        self._has_inbox = has_inbox
        self._application = application

    def install(self) -> None:
        """Put the requests of every backend off that the app makes, or has made."""
        get_backend = self._app._get_backend

        def get_backend_that_waits() -> Any:
            backend = get_backend()
            self._put_off(backend)
            return backend

        self._app._get_backend = get_backend_that_waits
        for made in (
            getattr(self._app._local, "backend", None),
            getattr(self._app, "_backend_cache", None),
        ):
            if made is not None:
                self._put_off(made)

    def reply_queues(self) -> list[Queue]:
        """Return the queue that rpc's replies to the message in hand need: the relay declares it.

        No reply can come before the message has left the outbox.
        """
        if not _call_pending.get():
            return []
        _call_pending.set(False)
        return [self._app.backend.binding]

    def ask_now(self, producer: Producer) -> None:
        """Do what rpc needs for the message in hand, which is published here and now."""
        if _call_pending.get():
            _call_pending.set(False)
            self._app.backend.declare_replies(producer)

    def _put_off(self, backend: Any) -> None:
        if isinstance(getattr(backend, "binding", None), Queue):
            self._put_off_replies(backend)
        if consumer := getattr(backend, "result_consumer", None):
            self._put_off_subscriptions(consumer)
        if apply_chord := getattr(backend, "apply_chord", None):
            backend.apply_chord = partial(self._apply_chord, apply_chord)

    def _apply_chord(
        self, apply_chord: Callable[..., Any], header: Any, body: Signature | None, **options: Any
    ) -> Any:
        """Let the parts of the header carry the id of this application, for the body's message.

        Whichever part completes the chord sends the body, maybe again after it has been redelivered.
        """
        # None: who asks the backend itself, to prepare a chord.
        if body is not None and any(map(self._has_inbox, tasks_of(body))):
            application = self._application({"id": body.id})
            if application is not None:
                body.options.setdefault("message_id", application)
        return apply_chord(header, body, **options)

    def _put_off_replies(self, backend: Any) -> None:
        """For rpc://, whether in a transaction or not: the broker may be away."""
        declare = backend.on_task_call
        backend.declare_replies = lambda producer: declare(producer, None)

        def wait(_producer: Producer, _task_id: str) -> None:
            # A worker's own task may not wait for results, so it needs no replies.
            _call_pending.set(not task_join_will_block())

        backend.on_task_call = wait

    def _put_off_subscriptions(self, consumer: Any) -> None:
        subscribe, before_wait = consumer.consume_from, consumer.on_wait_for_pending
        put_off: set[str] = set()

        def subscribe_or_put_off(task_id: str) -> Any:
            if self._in_transaction():
                put_off.add(task_id)
                return None
            return subscribe(task_id)

        def subscribe_before_wait(result: Any, **options: Any) -> Any:
            while put_off:
                subscribe(put_off.pop())
            return before_wait(result, **options)

        consumer.consume_from = subscribe_or_put_off
        consumer.on_wait_for_pending = subscribe_before_wait
