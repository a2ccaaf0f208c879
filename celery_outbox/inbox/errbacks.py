"""Error callbacks: those that are sent as messages, and those that Celery calls on the spot.

A ``link_error`` task that takes ``(request, exc, traceback)`` is called in the worker, after the
failure has been stored; any other is sent. The sent ones belong into the commit of the failure. The
called ones may look at the stored failure, so they come after it, in a transaction with an inbox row
of their own: what they write happens once, and a redelivery makes up for a worker that died between.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from celery import states
from celery.exceptions import NotRegistered
from celery.utils.functional import arity_greater

from celery_outbox.inbox.transaction import AnsweredElsewhere, InboxTransaction

if TYPE_CHECKING:
    from celery_outbox.inbox.task import DurableTask

__all__ = ["call_errbacks", "send_errbacks"]

logger = logging.getLogger("celery_outbox.inbox")


def send_errbacks(task: DurableTask, request: Any, error: BaseException, traceback: object) -> None:
    """Send the error callbacks that are messages, into the current transaction."""
    backend = task.backend.real
    sent = [errback for errback in request.errbacks or () if not _is_called(backend, errback)]
    if sent:
        with _only(request, sent):
            backend._call_task_errbacks(request, error, traceback)


def call_errbacks(task: DurableTask, request: Any, error: BaseException, traceback: object) -> None:
    """Call the error callbacks that are functions here, unless that has been done.

    What one of them raises is logged, and undoes what they have written: the failure stands.
    """
    backend = task.backend.real
    called = [errback for errback in request.errbacks or () if _is_called(backend, errback)]
    if not called:
        return
    transaction = InboxTransaction(
        task.installation, described(task, request), holds_session=True, part="errbacks"
    )
    if transaction.begin() is not None:
        return
    # A concurrent delivery that was faster has called them; the task's outcome is not this one's.
    with suppress(AnsweredElsewhere), transaction.active(), _only(request, called):
        try:
            backend._call_task_errbacks(request, error, traceback)
            transaction.leave_body()
        except Exception:
            logger.exception("an error callback of %s[%s] failed", task.name, request.id)
            transaction.roll_back()
        transaction.commit(states.SUCCESS)


def described(task: DurableTask, request: Any) -> dict[str, Any]:
    """Return what the inbox needs to know of a request that is given as Celery's ``Context``."""
    return {
        "id": request.id,
        "task": task.name,
        "retries": request.retries,
        "replaced_task_nesting": request.replaced_task_nesting,
        "group_index": request.group_index,
        "properties": request.properties,
    }


@contextmanager
def _only(request: Any, errbacks: list[Any]) -> Iterator[None]:
    every, request.errbacks = request.errbacks, errbacks
    try:
        yield
    finally:
        request.errbacks = every


def _is_called(backend: Any, errback: Any) -> bool:
    """Celery's own rule, of ``Backend._call_task_errbacks``."""
    errback = backend.app.signature(errback)
    if not errback._app:
        errback._app = backend.app
    try:
        header = getattr(errback.type, "__header__", None)
    except NotRegistered:
        return False
    if header is None or isinstance(header, partial):
        return False
    takes_more_than = getattr(backend, "_errback_arity_greater", None)  # since Celery 5.7
    return bool(takes_more_than(errback, 1) if takes_more_than else arity_greater(header, 1))
