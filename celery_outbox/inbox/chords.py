"""Chords: what makes Celery's own counting of parts safe against second deliveries.

Celery's result backends count the parts of a chord and send its body: Redis itself, the databases by
a task that polls (``celery.chord_unlock``). A part that is delivered again counts once there, and a
body that is sent again is one execution, by its frozen id. Left are the poll, which stock Celery
acknowledges before it has run, and the error callbacks of the body, which have a new id each time
that they are sent.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_OID, uuid5

from celery.backends.base import BaseKeyValueStoreBackend

from celery_outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from celery import Celery

__all__ = ["check_chords", "keep_chords"]

logger = logging.getLogger("celery_outbox.inbox")

#: Celery's own tasks by which chords go on. Each may run twice: what they send has frozen ids.
_LINKS = ("celery.chord_unlock", "celery.accumulate")

#: The application of the chord whose failure is told in this context.
_failing: ContextVar[str | None] = ContextVar("celery_outbox_failing_chord", default=None)


def keep_chords(app: Celery) -> None:
    """Let a second delivery neither lose nor repeat what Celery does for a chord in this worker.

    Its own tasks are acknowledged late, and the error callbacks of a body are sent with ids that are
    the same each time. For the worker's main process, before its pool starts.
    """
    for name in _LINKS:
        if task := app.tasks.get(name):
            task.acks_late = task.reject_on_worker_lost = True
    get_backend = app._get_backend

    def get_backend_that_names() -> Any:
        return _naming_errbacks(get_backend())

    app._get_backend = get_backend_that_names
    for made in (
        getattr(app._local, "backend", None),
        getattr(app, "_backend_cache", None),
    ):
        if made is not None:
            _naming_errbacks(made)


def check_chords(app: Celery) -> None:
    """Raise, or warn of, a result backend by which a part that is delivered again counts twice."""
    backend = app.backend
    if not getattr(backend, "_chord_zset", True) and not _counts_by_id(backend):
        raise ConfigurationError(
            "result_backend_transport_options has result_chord_ordered=False: before Celery 5.7 a "
            "part of a chord that is delivered twice is counted twice; leave the option out"
        )
    if _counts_blindly(backend):
        logger.warning(
            "the result backend %s counts each delivery of a chord's part: after a redelivery a "
            "chord's body may run too early; use Redis or a database for chords",
            type(backend).__name__,
        )


def _counts_by_id(backend: Any) -> bool:
    return hasattr(backend, "_chord_part_return_script")


def _counts_blindly(backend: Any) -> bool:
    own = getattr(type(backend), "on_chord_part_return", None)
    return bool(
        getattr(backend, "implements_incr", False)
        and own is BaseKeyValueStoreBackend.on_chord_part_return
    )


def _naming_errbacks(backend: Any) -> Any:
    """Let the error callbacks of a chord that fails have ids which are the same each time."""
    if "chord_error_from_stack" not in vars(backend):
        tell, call = backend.chord_error_from_stack, backend._call_task_errbacks
        backend.chord_error_from_stack = partial(_tell, tell)
        backend._call_task_errbacks = partial(_call, call)
    return backend


def _tell(tell: Callable[..., Any], callback: Any, exc: Any = None) -> Any:
    token = _failing.set(str(callback.options.get("message_id", "")))
    try:
        return tell(callback, exc)
    finally:
        _failing.reset(token)


def _call(call: Callable[..., Any], request: Any, exc: Any, traceback: Any) -> Any:
    application = _failing.get()
    if application is not None:
        request.errbacks = [
            _named(errback, f"{application}:{request.id}:{number}")
            for number, errback in enumerate(request.errbacks or ())
        ]
    return call(request, exc, traceback)


def _named(errback: Any, name: str) -> Any:
    # A copy, for the signature may stand in other tasks' options too.
    options = dict(errback["options"] or {})
    options.setdefault("task_id", str(uuid5(NAMESPACE_OID, name)))
    named = errback.clone() if hasattr(errback, "clone") else dict(errback)
    named["options"] = options
    return named
