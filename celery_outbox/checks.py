"""What must hold before a worker or a relay starts."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from celery import bootsteps
from sqlalchemy.exc import DBAPIError

from celery_outbox.errors import ConfigurationError
from celery_outbox.inbox.chords import check_chords, keep_chords
from celery_outbox.inbox.installation import installed_in
from celery_outbox.inbox.redelivery import redelivery_window
from celery_outbox.inbox.task import DurableTask
from celery_outbox.relay.publishers import is_servicebus
from celery_outbox.storage import schema

if TYPE_CHECKING:
    from celery import Celery

    from celery_outbox.inbox.installation import Installation

__all__ = ["WorkerChecks", "check", "check_task"]

logger = logging.getLogger("celery_outbox")


def check(app: Celery, installation: Installation) -> None:
    """Raise what is wrong with the settings, the broker, the tables or the durable tasks.

    A database that is away is only logged: the worker starts, and its deliveries wait in the broker.
    """
    store = installation.store
    installation.check_broker()
    try:
        schema.verify(store.engine, store.tables)
    except DBAPIError as exc:
        logger.error("the outbox's database can't be asked for its tables: %s", exc.orig)
    _check_retention(app, installation)
    for task in app.tasks.values():
        if isinstance(task, DurableTask):
            check_task(task)


def _check_retention(app: Celery, installation: Installation) -> None:
    """The inbox must remember for longer than the broker can deliver the same message again."""
    retention = installation.config.inbox_retention_seconds
    window = redelivery_window(app, installation.config)
    if window is None or retention > window.seconds:
        return
    wrong = (
        f"outbox_inbox_retention_seconds={retention:g} is not longer than the {window.seconds:g} s "
        f"after which the broker may deliver a message again, by {window.reason}: a duplicate that "
        "the inbox has forgotten would be executed"
    )
    if window.is_certain:
        raise ConfigurationError(wrong)
    logger.warning("%s; say what holds with outbox_redelivery_window_seconds", wrong)


def check_task(task: DurableTask) -> None:
    """Raise `ConfigurationError` if the task would be acknowledged before its commit."""
    if not task.inbox:
        return
    for option in ("acks_late", "reject_on_worker_lost"):
        if not getattr(task, option):
            raise ConfigurationError(
                f"task {task.name} is durable, but task_annotations (or its class) set "
                f"{option}=False: its message would be gone before its effects are committed"
            )


def _prepare_for_servicebus(app: Celery) -> None:
    with app.connection_for_read() as connection:
        if is_servicebus(connection):
            # Here, for it needs the SDK.
            from celery_outbox.servicebus.receiving import prepare_worker

            prepare_worker(connection)


class WorkerChecks(bootsteps.Step):
    """A worker does not start with what could lose messages."""

    def create(self, worker: Any) -> None:
        """Check; what is raised here ends the worker."""
        app = worker.app
        installation = installed_in(app)
        if installation is not None:
            check(app, installation)
            _prepare_for_servicebus(app)
            check_chords(app)
            keep_chords(app)
            # No connection of the main process may reach the pool's children.
            installation.store.engine.dispose()
