"""Lies on PYTHONPATH as sitecustomize.py: in each process of the suite every app has an Outbox.

Tasks are durable unless they name a base class that is not (Celery's own Django class, for one),
and what is sent goes through the outbox, whoever sends it. Nothing in the suite knows of it.
"""

import os
import time
from typing import Any

import celery
from celery import Celery
from celery.app.control import Inspect

from celery_outbox import DurableTask, Outbox
from celery_outbox.plugin import outbox_of
from celery_outbox.storage.administration import Administration

SETTINGS = {
    "outbox_database_url": os.environ["CELERY_SUITE_DATABASE"],
    "outbox_capture": "all",
    "outbox_relay_tick_seconds": 0,
    "outbox_hold_scheduled": bool(os.environ["CELERY_SUITE_HOLDS"]),
    # The suite counts seconds: a hop must not take a fifth of one.
    "outbox_poll_seconds": 0.01,
}
#: A broker in memory can be reached from its own process only, and so has no part in the other's
#: tables.
SETTINGS_IN_MEMORY = {
    "outbox_database_url": os.environ["CELERY_SUITE_DATABASE_IN_MEMORY"],
    "outbox_relay_in_worker": True,
}

_stock_init = Celery.__init__


def _init(self: Celery, *args: Any, **kwargs: Any) -> None:
    _stock_init(self, *args, **kwargs)
    # Below whatever the app is configured with later.
    self._preconf.update(SETTINGS)

    def configured(**_: Any) -> None:
        if str(self.conf.broker_url).startswith("memory:"):
            self.conf.update(SETTINGS_IN_MEMORY)
            outbox_of(self).create_schema()

    # Before the Outbox, which reads its settings then.
    self.on_after_configure.connect(configured, weak=False)
    Outbox(self)


_stock_scheduled = Inspect.scheduled


def _scheduled(self: Inspect, safe: Any = None) -> Any:
    """Ask workers what they hold once they can hold it: what was sent before is at the broker.

    The suite asks right after it has sent, and the question takes no longer than the relay.
    """
    outbox = outbox_of(self.app)
    stored = Administration(outbox.engine, outbox.tables)
    deadline = time.monotonic() + 10
    while stored.how_many() and time.monotonic() < deadline:
        time.sleep(0.001)
    return _stock_scheduled(self, safe)


if not SETTINGS["outbox_hold_scheduled"]:
    Inspect.scheduled = _scheduled
Celery.__init__ = _init
Celery.task_cls = "celery_outbox.inbox.task:DurableTask"
# For the classes that derive from it.
celery.Task = DurableTask
