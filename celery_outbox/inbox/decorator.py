"""durable_task: what users write above a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast, overload

from celery import Celery, Task
from celery._state import _get_active_apps, connect_on_app_finalize, get_current_app
from celery.local import Proxy

from celery_outbox.errors import ConfigurationError
from celery_outbox.inbox.task import DurableTask

__all__ = ["durable_task"]

F = TypeVar("F", bound=Callable[..., Any])


@overload
def durable_task(function: F, /) -> Any: ...
@overload
def durable_task(
    *,
    app: Celery | None = None,
    inbox: bool = True,
    session: bool = True,
    base: type[Task] | None = None,
    **options: Any,
) -> Callable[[Callable[..., Any]], Any]: ...


def durable_task(
    function: Callable[..., Any] | None = None,
    /,
    *,
    app: Celery | None = None,
    inbox: bool = True,
    session: bool = True,
    base: type[Task] | None = None,
    **options: Any,
) -> Any:
    """Make a function a durable task, of `app` or, like ``shared_task``, of every app.

    Takes every option of Celery's ``shared_task``. Besides:

    - ``inbox=False``: no inbox. The message goes through the outbox, the execution is a stock one, at
      least once: it is acknowledged late, unless you say otherwise.
    - ``session=False``: no transaction is held open while the body runs, for tasks that take long or
      write nothing. What it sends, and its outcome, still are committed once; the body may run twice.
    - ``outbox_ordering_key``: a text, or a callable on the task's arguments that returns a text, a
      number or None. Messages with the same key leave the outbox in the order of their commits.
    - ``base``: a task class of yours; without it the app's own ``Task`` class is kept.

    The body's writes through ``self.session`` (or `current_session()`, or a session of the
    sessionmaker that the Outbox was given), the messages that it sends and its outcome commit
    together. Not promised: effects elsewhere (HTTP, files) happen at least once.

    Raises `ConfigurationError` for ``acks_late=False`` or ``reject_on_worker_lost=False`` with an
    inbox: the message would be gone before the commit.
    """
    if inbox:
        for option in ("acks_late", "reject_on_worker_lost"):
            if options.get(option, True) is False:
                raise ConfigurationError(
                    f"@durable_task({option}=False): the broker would forget the message before its "
                    "effects are committed; leave it out, or give inbox=False"
                )
    options.update(inbox=inbox, holds_session=session and inbox)

    def decorate(function: Callable[..., Any]) -> Any:
        def make(app: Celery) -> Task:
            return app._task_from_fun(function, base=_durable(base or app.Task), **options)

        if app is not None:
            return make(app)
        # As celery.shared_task, which takes one base class for all apps, where each may have its own.
        connect_on_app_finalize(make)
        for active in _get_active_apps():
            if active.finalized:
                with active._finalize_mutex:
                    make(active)

        def task_of_current_app() -> Task:
            current = get_current_app()
            name = options.get("name") or current.gen_task_name(
                function.__name__, function.__module__
            )
            return current.tasks[name]

        return Proxy(task_of_current_app)

    return decorate if function is None else decorate(function)


def _durable(base: type[Task]) -> type[DurableTask]:
    if issubclass(base, DurableTask):
        return base
    return cast("type[DurableTask]", type(base.__name__, (DurableTask, base), {"abstract": True}))
