"""The app as the workers of the chord tests import it: with points around every message they send."""

from typing import Any

from celery.signals import after_task_publish, task_postrun, task_prerun

from tests.journeys.worker import app, site

__all__ = ["app"]

_POLL = "celery.chord_unlock"


@after_task_publish.connect(weak=False)
def _after_a_message(sender: str, **_: object) -> None:
    site.points.pass_by("sent", sender)


# The poll for a chord's parts belongs to the run of the chord's body.


@task_prerun.connect(weak=False)
def _before_a_poll(sender: Any, args: Any, **_: object) -> None:
    if sender.name == _POLL:
        site.points.begin_run(args[1]["kwargs"].get("tag", ""))


@task_postrun.connect(weak=False)
def _after_a_poll(sender: Any, **_: object) -> None:
    if sender.name == _POLL:
        site.points.begin_run("")
