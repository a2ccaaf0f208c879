"""The app as workers, beats and relays import it: ``celery -A tests.journeys.worker``."""

import logging
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

from celery_outbox.envelope import Envelope
from celery_outbox.relay.publisher import Publisher
from tests.journeys.site import Setup, Site

logger = logging.getLogger("celery_outbox.tests")
site = Site(Setup.of_environment())
app = site.app
site.points.watch_events()

# A pool looks for lost children every five seconds; here they are lost on purpose.
AsynPool.timers = property(lambda pool: {pool.maintain_pool: 0.2})
if site.setup.broker.startswith("sqla+"):
    # An option of every other transport without events, but not of this one.
    import_module("kombu.transport.sqlalchemy").Transport.polling_interval = 0.05

_message = Publisher._message


def _message_that_passes_by(channel: Any, envelope: Envelope) -> Any:
    site.points.pass_by("publishing", envelope.key)
    return _message(channel, envelope)


Publisher._message = staticmethod(_message_that_passes_by)  # type: ignore[method-assign]


def _tell(signal: Signal) -> None:
    def told(sender: Any, task_id: str | None = None, **details: Any) -> None:
        logger.info("signal %s %s", signal.name, task_id or sender.request.id)

    signal.connect(told, weak=False)


for seen in (task_prerun, task_success, task_failure, task_retry, task_postrun):
    _tell(seen)


@before_task_publish.connect(weak=False)
def _before_a_message(sender: str, **_: object) -> None:
    site.points.pass_by("sending", sender)


@task_postrun.connect(weak=False)
def _after_the_result(task_id: str, **_: object) -> None:
    site.points.pass_by("acknowledging", task_id)
