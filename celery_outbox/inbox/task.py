"""DurableTask: a task whose effects in the app's database happen once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from celery import Task, states
from celery.exceptions import Ignore
from sqlalchemy.exc import SQLAlchemyError

from celery_outbox import events
from celery_outbox.errors import NotInstalled, NoTransaction
from celery_outbox.inbox.backend import DurableBackend
from celery_outbox.inbox.eager import run_eagerly
from celery_outbox.inbox.installation import Installation, installation_of
from celery_outbox.inbox.parking import Busy
from celery_outbox.inbox.replay import given_back, replay
from celery_outbox.inbox.request import DurableRequest
from celery_outbox.inbox.transaction import (
    AnsweredElsewhere,
    GivenBack,
    InboxTransaction,
    InExecution,
    current_transaction,
)
from celery_outbox.outbox.scope import SessionScope, open_scopes

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

__all__ = ["DurableTask", "current_session"]

logger = logging.getLogger("celery_outbox.inbox")

_PAUSE_WITHOUT_OUTBOX = 5.0


def current_session() -> Session:
    """Return the session of the durable task that runs here.

    Outside a worker (called directly, or eagerly) it is the caller's: the one session of this
    context with an open transaction. Raises `NoTransaction` where there is none.
    """
    transaction = current_transaction()
    if transaction is not None and transaction.session is not None:
        return transaction.session
    sessions = [scope.session for scope in open_scopes() if isinstance(scope, SessionScope)]
    if len(sessions) == 1 and sessions[0] is not None:
        return sessions[0]
    raise NoTransaction(
        "there is no current session: it exists inside a durable task (without session=False), or, "
        "where one is called directly, inside the caller's one open session"
    )


class DurableTask(Task):
    """Base class of durable tasks; `durable_task` applies it.

    In a worker the task runs like this: the inbox row of the delivery is inserted; if it is there
    already the delivery is answered from it; else the body runs in the same transaction, Celery
    dispatches links and the next step of the chain into it, the outcome is recorded, and one commit
    makes all of it true. Then the result is stored and the message acknowledged.
    """

    abstract = True
    Request = DurableRequest
    acks_late = True
    reject_on_worker_lost = True
    #: False: no inbox; the task runs as a stock one, only its message goes through the outbox.
    inbox = True
    #: False: no transaction is open while the body runs; what it sends and its outcome are committed
    #: after it. Its body may run twice, then; what it sends still goes out once.
    holds_session = True

    _tracer: Callable[..., Any] | None = None

    @property
    def installation(self) -> Installation:
        """The Outbox of the task's app."""
        return installation_of(self.app, self.name)

    @property
    def session(self) -> Session:
        """The SQLAlchemy session of the task's transaction.

        It commits together with the inbox row, what the task sends and its outcome, after the body
        has returned. Its own ``commit()`` is a savepoint's, its ``rollback()`` undoes what came after
        the last of them.
        """
        return current_session()

    def apply_async(self, *args: Any, **kwargs: Any) -> Any:
        """Celery's, but the app must have an Outbox."""
        _ = self.installation
        return super().apply_async(*args, **kwargs)

    # The three places where Celery's tracer meets the inbox. The tracer itself is Celery's.

    @property
    def __trace__(self) -> Callable[..., Any] | None:
        """The tracer that the worker has assigned, inside our transaction."""
        return self._tracer

    @__trace__.setter
    def __trace__(self, tracer: Callable[..., Any] | None) -> None:
        if tracer is None or not self.inbox:
            self._tracer = tracer
            return

        def trace(
            uuid: str, args: Any, kwargs: Any, request: Mapping[str, Any] | None = None
        ) -> Any:
            return self._trace_once(tracer, uuid, args, kwargs, request or {"id": uuid})

        self._tracer = trace

    def _trace_once(
        self,
        tracer: Callable[..., Any],
        uuid: str,
        args: Any,
        kwargs: Any,
        request: Mapping[str, Any],
    ) -> Any:
        try:
            installation = self.installation
        except NotInstalled as exc:
            # Better a message that goes round than one that is lost.
            logger.error("%s[%s] goes back: %s", self.name, uuid, exc)
            time.sleep(_PAUSE_WITHOUT_OUTBOX)
            return given_back(exc)
        transaction = InboxTransaction(
            installation, {"task": self.name, **request}, holds_session=self.holds_session
        )
        try:
            handled = transaction.begin()
            if handled is None:
                with transaction.active():
                    answer = tracer(uuid, args, kwargs, request)
                    self._commit_unreported(transaction, answer)
                    return answer
        except AnsweredElsewhere as exc:
            handled = exc.handled
        except (GivenBack, SQLAlchemyError) as exc:
            return self._give_back(transaction, exc)
        try:
            return replay(self, request, handled)
        except (GivenBack, Exception) as exc:
            # What the error callbacks wrote may not be committed.
            return self._give_back(transaction, exc)

    def _commit_unreported(self, transaction: InboxTransaction, answer: Any) -> None:
        """Commit the outcomes of which the tracer tells no backend."""
        state = answer.info.state if answer.info else states.SUCCESS
        if transaction.state is None and state in (states.IGNORED, states.RETRY):
            if state == states.RETRY:
                transaction.roll_back()
            transaction.commit(state)
        elif state == states.REJECTED and not answer.info.retval.requeue:
            transaction.forget()

    def _give_back(self, transaction: InboxTransaction, reason: BaseException) -> Any:
        """Requeue the delivery, after a pause: a broker redelivers at once, hundreds a second.

        While the database is away the pause is here, in the slot: nothing else could be done in it.
        """
        logger.warning("%s[%s] goes back: %s", self.name, transaction.task_id, reason)
        events.emit(events.BUSY, key=transaction.key, error=str(reason))
        if isinstance(reason, InExecution):
            return given_back(reason, Busy)
        time.sleep(self.installation.config.busy_pause_seconds)
        return given_back(reason)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body: inside the transaction of its delivery, or, called directly, just so.

        Eagerly: in a savepoint of the caller's transaction, or in a transaction of its own.
        """
        if self.inbox and self.request.is_eager and not self.request.called_directly:
            return self._eagerly(args, kwargs)
        transaction = current_transaction()
        is_body = (
            transaction is not None
            and not transaction.entered
            and transaction.task_id == self.request.id
        )
        if transaction is None or not is_body:
            return super().__call__(*args, **kwargs)
        transaction.enter_body()
        try:
            returned = self._body(*args, **kwargs)
        except Ignore:
            # replace() ends like this, and its message must go out.
            transaction.leave_body()
            raise
        except Exception as exc:
            if transaction.broken():
                raise GivenBack(f"the database went away under the task: {exc}") from exc
            raise
        transaction.leave_body()
        return returned

    def _eagerly(self, args: Any, kwargs: Any) -> Any:
        request = self.request
        described = {"task": self.name, "id": request.id, "retries": request.retries}
        return run_eagerly(
            self.installation,
            described,
            lambda: self._body(*args, **kwargs),
            holds_session=self.holds_session,
        )

    def _body(self, *args: Any, **kwargs: Any) -> Any:
        # Celery's own __call__ would push a second request; one of the user's base class (an
        # application context around the task, say) is kept.
        call = super().__call__
        if getattr(call, "__func__", None) is Task.__call__:
            return self.run(*args, **kwargs)
        return call(*args, **kwargs)

    @property
    def backend(self) -> DurableBackend:
        """The result backend, with the commit before each outcome."""
        return DurableBackend(self, self._backend or self.app.backend)

    @backend.setter
    def backend(self, backend: Any) -> None:
        self._backend = backend
