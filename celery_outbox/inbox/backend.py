"""DurableBackend: the result backend of a durable task, where its transaction commits.

Celery's tracer calls ``mark_as_done`` after it has dispatched the links and the next step of the
chain, and before anything is visible outside: there everything is known that must be in the commit.
Before the tracer's call it would be too early, after it too late.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from celery import states
from celery.backends.base import DisabledBackend
from sqlalchemy.exc import SQLAlchemyError

from celery_outbox.inbox.errbacks import call_errbacks, described, send_errbacks
from celery_outbox.inbox.outcome import Outcome
from celery_outbox.inbox.transaction import (
    AnsweredElsewhere,
    GivenBack,
    InboxTransaction,
    current_transaction,
)

if TYPE_CHECKING:
    from celery_outbox.inbox.task import DurableTask

__all__ = ["DurableBackend"]

#: How long the worker's main process waits for a killed child's transaction to end, in seconds.
_FENCE_TIMEOUT = 10.0


class DurableBackend:
    """Celery's result backend, with a commit before each outcome that it is told."""

    def __init__(self, task: DurableTask, backend: Any) -> None:
        self._task = task
        self.real = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def mark_as_done(
        self,
        task_id: str,
        result: Any,
        request: Any = None,
        store_result: bool = True,
        state: str = states.SUCCESS,
    ) -> Any:
        """Commit, then tell the backend. If the backend is away the delivery goes back: a duplicate
        will tell it.
        """
        transaction = _transaction_of(task_id)
        if transaction is None:
            return self.real.mark_as_done(task_id, result, request, store_result, state)
        if transaction.state is None:
            wanted = store_result and not isinstance(self.real, DisabledBackend)
            wanted = wanted or bool(request and request.chord)
            outcome = Outcome.of_result(self.real, result, request, wanted=wanted)
            transaction.commit(state, outcome)
        transaction.result = result
        try:
            return self.real.mark_as_done(task_id, result, request, store_result, state)
        except Exception as exc:
            raise GivenBack(f"committed, but the result could not be stored: {exc!r}") from exc

    def mark_as_failure(
        self,
        task_id: str,
        exc: BaseException,
        traceback: object = None,
        request: Any = None,
        store_result: bool = True,
        call_errbacks: bool = True,
        state: str = states.FAILURE,
    ) -> Any:
        """Roll the body back, commit the failure with its error callbacks, then tell the backend."""
        transaction = _transaction_of(task_id)
        if transaction is None:
            if self._is_told_by_the_main_process(request):
                return self._fail_from_outside(exc, traceback, request, store_result, call_errbacks)
            return self.real.mark_as_failure(
                task_id, exc, traceback, request, store_result, call_errbacks, state
            )
        if transaction.state == states.SUCCESS:
            # A soft time limit struck after the commit, for instance: it is done.
            return self.mark_as_done(task_id, transaction.result, request, store_result)
        if transaction.state is None:
            transaction.roll_back()
            if call_errbacks and request:
                send_errbacks(self._task, request, exc, traceback)
            transaction.commit(state, Outcome.of_error(self.real, exc, traceback))
        try:
            return self.tell_failure(exc, traceback, request, store_result, call_errbacks)
        except Exception as error:
            raise GivenBack(f"committed, but the failure could not be stored: {error!r}") from error

    def tell_failure(
        self,
        exc: BaseException,
        traceback: object,
        request: Any,
        store_result: bool,
        errbacks: bool = True,
    ) -> None:
        """Do what follows the commit of a failure; a duplicate repeats it."""
        self.real.mark_as_failure(
            request.id, exc, traceback, request, store_result, call_errbacks=False
        )
        if errbacks:
            call_errbacks(self._task, request, exc, traceback)

    def mark_as_retry(self, task_id: str, *args: Any, **kwargs: Any) -> Any:
        """Roll the body back, commit the retry message, then tell the backend."""
        transaction = _transaction_of(task_id)
        if transaction is not None and transaction.state is None:
            transaction.roll_back()
            transaction.commit(states.RETRY)
        return self.real.mark_as_retry(task_id, *args, **kwargs)

    # What the worker's main process decides: hard time limits, lost children.

    def _is_told_by_the_main_process(self, request: Any) -> bool:
        return (
            self._task.inbox
            and request is not None
            and bool(request.id)
            and not request.is_eager
            and current_transaction() is None
        )

    def _fail_from_outside(
        self,
        exc: BaseException,
        traceback: object,
        request: Any,
        store_result: bool,
        errbacks: bool,
    ) -> Any:
        """Record a failure, unless the child had committed something before it died.

        The child is dead (`DurableRequest` sees to that), but the database may need a moment to
        notice, and holds its inbox row until then.
        """
        transaction = InboxTransaction(
            self._task.installation, described(self._task, request), holds_session=True
        )
        deadline = time.monotonic() + _FENCE_TIMEOUT
        while True:
            try:
                handled = transaction.begin()
                break
            except (GivenBack, SQLAlchemyError):
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"{transaction.key}: the failure {exc!r} could not be recorded"
                    ) from exc
                time.sleep(0.1)
        try:
            if handled is None:
                with transaction.active():
                    if errbacks:
                        send_errbacks(self._task, request, exc, traceback)
                    transaction.commit(states.FAILURE, Outcome.of_error(self.real, exc, traceback))
            elif handled.state == states.SUCCESS:
                result = Outcome.load(handled.outcome).result(self.real)
                return self.real.mark_as_done(request.id, result, request, store_result)
            return self.tell_failure(exc, traceback, request, store_result, errbacks)
        except (GivenBack, AnsweredElsewhere) as interruption:
            # No tracer is here to take them, and they must not end the worker's main process.
            raise RuntimeError(
                f"{transaction.key}: the failure {exc!r} may not have been recorded: {interruption!r}"
            ) from exc


def _transaction_of(task_id: str) -> InboxTransaction | None:
    """The open transaction, if it is this task's and not that of one that calls it."""
    transaction = current_transaction()
    return transaction if transaction is not None and transaction.task_id == task_id else None
