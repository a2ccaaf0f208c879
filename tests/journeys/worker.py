"""The app as workers, beats and relays import it: ``celery -A tests.journeys.worker``."""

import logging
from contextvars import ContextVar
from importlib import import_module
from typing import Any

from celery.concurrency.asynpool import AsynPool
from celery.signals import (
    before_task_publish,
    task_failure,
    task_postrun,
    task_prerun,
    task_retry,
    task_success,
)
from celery.utils.dispatch import Signal

from celery_outbox import events
from celery_outbox.envelope import Envelope, message_key
from celery_outbox.inbox.task import DurableTask
from celery_outbox.inbox.transaction import InboxTransaction
from celery_outbox.relay.publishers import Publisher
from celery_outbox.storage.store import Handled
from tests.journeys.site import Setup, Site
from tests.support.servicebus.trust import trust_of_environment
from tests.support.wire import cut, use

trust_of_environment()
logger = logging.getLogger("celery_outbox.tests")
site = Site(Setup.of_environment())
app = site.app
site.points.watch_events()

# A pool looks for lost children every five seconds; here they are lost on purpose.
AsynPool.timers = property(lambda pool: {pool.maintain_pool: 0.05})
if site.setup.broker.startswith("sqla+"):
    # An option of every other transport without events, but not of this one.
    import_module("kombu.transport.sqlalchemy").Transport.polling_interval = 0.05

_declare = Publisher._declare


def _pass_by_and_declare(publisher: Publisher, channel: Any, envelope: Envelope) -> None:
    site.points.pass_by("publishing", envelope.key)
    _declare(publisher, channel, envelope)


Publisher._declare = _pass_by_and_declare  # type: ignore[method-assign,assignment]


def _tell(signal: Signal) -> None:
    def told(sender: Any, task_id: str | None = None, **details: Any) -> None:
        logger.info("signal %s %s", signal.name, task_id or sender.request.id)

    signal.connect(told, weak=False)


for seen in (task_prerun, task_success, task_failure, task_retry, task_postrun):
    _tell(seen)


@before_task_publish.connect(weak=False)
def _before_a_message(sender: str, **_: object) -> None:
    site.points.pass_by("sending", sender)


# A durable task's journey, from the delivery to the acknowledgement.

_trace_once = DurableTask._trace_once
_begin = InboxTransaction.begin


def _trace_as_part_of_a_run(
    task: DurableTask, tracer: Any, uuid: str, args: Any, kwargs: Any, request: Any
) -> Any:
    with site.points.running(kwargs.get("tag", "")):
        answer = _trace_once(task, tracer, uuid, args, kwargs, request)
        site.points.pass_by("acknowledging", message_key({"id": uuid, **request}))
    return answer


def _pass_by_and_begin(transaction: InboxTransaction) -> Handled | None:
    site.points.pass_by("claiming", transaction.key)
    return _begin(transaction)


DurableTask._trace_once = _trace_as_part_of_a_run  # type: ignore[method-assign,assignment]
InboxTransaction.begin = _pass_by_and_begin  # type: ignore[method-assign,assignment]


# A stock task's.


@task_prerun.connect(weak=False)
def _before_a_body(sender: Any, kwargs: dict[str, Any], **_: object) -> None:
    if not isinstance(sender, DurableTask):
        site.points.begin_run(kwargs.get("tag", ""))


@task_postrun.connect(weak=False)
def _after_the_result(sender: Any, task_id: str, **_: object) -> None:
    if not isinstance(sender, DurableTask):
        site.points.pass_by("acknowledging", task_id)
        site.points.begin_run("")


# The commit itself: the connection is cut before the server has it, or before its answer has come.

#: The key of the execution that is about to be committed.
_committing: ContextVar[str] = ContextVar("committing", default="")


def _remember_what_is_committed(name: str, details: dict[str, Any]) -> None:
    if name == events.COMMITTING:
        _committing.set(details["key"])


def _watch_commits(dialect: Any) -> None:
    do_commit = dialect.do_commit

    def commit(pooled: Any) -> None:
        key = _committing.get()
        _committing.set("")
        if key and site.points.strikes_run("commit_lost", key):
            cut(pooled.driver_connection)
        do_commit(pooled)
        if key and site.points.strikes_run("answer_lost", key):
            cut(pooled.driver_connection)
            use(pooled.driver_connection)

    dialect.do_commit = commit


if site.engine.dialect.driver in ("psycopg", "pymysql"):
    events.subscribe(_remember_what_is_committed)
    _watch_commits(site.engine.dialect)
