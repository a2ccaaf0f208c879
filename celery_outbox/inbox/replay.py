"""Replay: a duplicate delivery is answered from the inbox's record.

The body does not run and nothing is sent, for both are in the commit. What lies outside the database
may have been lost with the worker, and is idempotent, so it is repeated: the result is stored and
the chord part is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionInfo
from celery import states
from celery._state import _task_stack
from celery.app.task import Context
from celery.app.trace import TraceInfo, trace_ok_t
from celery.exceptions import Ignore, Reject

from celery_outbox import events
from celery_outbox.inbox.outcome import Outcome
from celery_outbox.storage.store import Handled

if TYPE_CHECKING:
    from celery_outbox.inbox.task import DurableTask

__all__ = ["given_back", "replay"]


def replay(task: DurableTask, request: Mapping[str, Any], handled: Handled) -> Any:
    """Repeat what lies outside the database, and return the tracer's answer for it."""
    events.emit(events.DUPLICATE, key=handled.key, state=handled.state)
    backend = task.backend.real
    outcome = Outcome.load(handled.outcome)
    context = Context(request, called_directly=False)
    context.children.extend(outcome.results_of_children(task.app))
    wanted = not _ignores_result(task, context)
    # The body of a chord that completes here takes its lineage from the request.
    _task_stack.push(task)
    task.request_stack.push(context)
    try:
        _check_claim(backend, context)
        if handled.state == states.SUCCESS:
            result = outcome.result(backend)
            backend.mark_as_done(context.id, result, context, wanted)
            _check_claim(backend, context)
            return trace_ok_t(result, None, 0.0, "already handled")
        if handled.state == states.FAILURE:
            task.backend.tell_failure(
                outcome.error(backend),
                outcome.traceback,
                context,
                wanted or task.store_errors_even_if_ignored,
            )
            # The error callbacks of a chord's body are sent under the same claim.
            _check_claim(backend, context)
        return _answer(states.IGNORED, Ignore("already handled"))
    finally:
        task.request_stack.pop()
        _task_stack.pop()


def _check_claim(backend: Any, context: Context) -> None:
    """Raise, so that the delivery goes back, while a part that may have died has the claim.

    Before the part is told, for a claim that ends in between would be seen by neither; and after it,
    for one that began in between.
    """
    if _body_is_claimed(backend, context):
        raise RuntimeError("another part has claimed to send the chord's body")


def _body_is_claimed(backend: Any, context: Context) -> bool:
    """Whether a part, which may have died of it, has Celery's claim to send the chord's body.

    Redis, Celery 5.7: the claim ends by itself, but only a part that returns after that takes it.
    """
    if not (context.chord and context.group and hasattr(backend, "_chord_claim_extend_script")):
        return False
    claim = backend.client.get(backend.get_key_for_group(context.group, ".c"))
    return claim not in (None, b"done", "done")


def given_back(reason: BaseException, kind: type[Reject] = Reject) -> Any:
    """Return the tracer's answer for a delivery that goes back to the broker.

    Returned, not raised: only the prefork pool handles a `Reject` that comes out of the tracer. And
    as text, for it is pickled on its way to the worker's main process.
    """
    return _answer(states.REJECTED, kind(str(reason), requeue=True))


def _answer(state: str, exception: Exception) -> Any:
    try:
        raise exception
    except Exception as exc:
        return trace_ok_t(ExceptionInfo(internal=True), TraceInfo(state, exc), 0.0, None)


def _ignores_result(task: DurableTask, context: Context) -> bool:
    # A message's own ignore_result wins over the task's.
    own = getattr(context, "ignore_result", None)
    return bool(task.ignore_result if own is None else own)
