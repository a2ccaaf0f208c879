"""The tasks of the journeys: each leaves a row for what it has done, and a line for each try."""

from __future__ import annotations

import os
import signal
from typing import Any

from celery import Task, chain, current_app, group, shared_task
from celery.exceptions import Ignore, Reject

from celery_outbox import current_session, durable_task
from tests.journeys.site import Effect, Site

__all__ = ["Oops"]


class Oops(Exception):
    """What tasks fail with."""


def _site(task: Any) -> Site:
    site: Site = task.app.site
    return site


def _take_effect(task: Any, tag: str, name: str) -> None:
    site = _site(task)
    site.journal(tag, name)
    session = current_session()
    session.add(Effect(tag=tag, name=name))
    session.flush()
    request = task.request
    site.points.pass_by("body", f"{request.id}:{request.retries}:{request.group_index}:{name}")


@durable_task(bind=True)
def step(self: Any, *_previous: Any, tag: str, name: str) -> str:
    _take_effect(self, tag, name)
    return name


@durable_task(bind=True)
def total(self: Any, parts: list[str], *, tag: str) -> list[str]:
    _take_effect(self, tag, "total")
    return sorted(parts, key=str)


@durable_task(bind=True)
def held(self: Any, *, tag: str, name: str = "done") -> str:
    _take_effect(self, tag, name)
    _site(self).wait_at_gate(tag)
    return name


@durable_task(bind=True)
def spawning(self: Any, *, tag: str) -> str:
    _take_effect(self, tag, "parent")
    for name in ("child 1", "child 2"):
        step.delay(tag=tag, name=name)
    return "parent"


@durable_task(bind=True)
def spawning_by_name(self: Any, *, tag: str) -> str:
    _take_effect(self, tag, "parent")
    for name in ("child 1", "child 2"):
        self.app.send_task(step.name, kwargs={"tag": tag, "name": name})
    return "parent"


@durable_task(bind=True, max_retries=5)
def retrying(self: Any, *, tag: str, times: int = 2) -> str:
    _take_effect(self, tag, f"try {self.request.retries}")
    if self.request.retries < times:
        raise self.retry(countdown=0)
    return "done"


@durable_task(bind=True, autoretry_for=(Oops,), max_retries=5, default_retry_delay=0)
def autoretrying(self: Any, *, tag: str) -> str:
    _take_effect(self, tag, f"try {self.request.retries}")
    if self.request.retries < 2:
        raise Oops("not yet")
    return "done"


@durable_task(
    bind=True,
    autoretry_for=(Oops,),
    max_retries=5,
    retry_backoff=1,
    retry_backoff_max=1,
    retry_jitter=False,
)
def backing_off(self: Any, *, tag: str) -> str:
    _take_effect(self, tag, f"try {self.request.retries}")
    if self.request.retries < 2:
        raise Oops("not yet")
    return "done"


@durable_task(bind=True)
def replaced(self: Any, *, tag: str) -> str:
    _take_effect(self, tag, "host")
    raise self.replace(step.s(tag=tag, name="replacement"))


@durable_task(bind=True)
def replaced_by_chain(self: Any, *, tag: str) -> str:
    _take_effect(self, tag, "host")
    raise self.replace(chain(step.s(tag=tag, name="first"), step.s(tag=tag, name="second")))


@durable_task(bind=True)
def replaced_by_group(self: Any, *, tag: str) -> str:
    _take_effect(self, tag, "host")
    raise self.replace(group(step.s(tag=tag, name="part 1"), step.s(tag=tag, name="part 2")))


@durable_task(bind=True)
def ignoring(self: Any, *, tag: str) -> None:
    _take_effect(self, tag, "ignored")
    raise Ignore


@durable_task(bind=True)
def deadly(self: Any, *, tag: str) -> str:
    """A body that kills its process, until its gate is open."""
    _take_effect(self, tag, "done")
    site = _site(self)
    if not site.is_open(tag):
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


@durable_task(bind=True)
def rejecting(self: Any, *, tag: str) -> None:
    _take_effect(self, tag, "rejected")
    raise Reject("for good", requeue=False)


@durable_task(bind=True)
def requeueing(self: Any, *, tag: str) -> str:
    tries = _site(self).runs(tag).count("once more")
    _take_effect(self, tag, "once more")
    if not tries:
        raise Reject("not now", requeue=True)
    return "done"


@durable_task(bind=True)
def failing(self: Any, *_previous: Any, tag: str) -> None:
    _take_effect(self, tag, "failed")
    step.delay(tag=tag, name="child of a failure")
    raise Oops("as told")


@durable_task(bind=True)
def handle_error(self: Any, _failed_id: str, *, tag: str) -> None:
    _take_effect(self, tag, "error handled")


@durable_task
def handle_error_here(request: Any, exc: BaseException, _traceback: Any, *, tag: str) -> None:
    """Called where the task has failed. Celery would send it if it were bound."""
    site: Site = current_app.site
    site.journal(tag, "error handled")
    session = current_session()
    session.add(Effect(tag=tag, name="error handled"))
    session.flush()
    site.points.pass_by("body", f"{request.id}:errback")


@durable_task(bind=True)
def unserialisable(self: Any, *, tag: str) -> object:
    _take_effect(self, tag, "done")
    return object()


@durable_task(bind=True, ignore_result=True)
def forgetting(self: Any, *_previous: Any, tag: str, name: str = "done") -> str:
    _take_effect(self, tag, name)
    return "nobody asks"


@durable_task(bind=True, inbox=False)
def without_inbox(self: Any, *, tag: str) -> str:
    site = _site(self)
    site.journal(tag, "done")
    with site.Session.begin() as session:
        session.add(Effect(tag=tag, name="done"))
        step.delay(tag=tag, name="child")
    return "done"


@durable_task(bind=True, session=False)
def without_session(self: Any, *, tag: str) -> str:
    site = _site(self)
    site.journal(tag, "done")
    with site.Session.begin() as session:
        session.add(Effect(tag=tag, name="done"))
    step.delay(tag=tag, name="child")
    return "done"


@durable_task(bind=True)
def committing_itself(self: Any, *, tag: str, fail: bool = False) -> str:
    """A body that commits and rolls back its own session in the middle."""
    self.session.add(Effect(tag=tag, name="committed"))
    self.session.commit()
    self.session.add(Effect(tag=tag, name="rolled back"))
    step.delay(tag=tag, name="child")
    self.session.flush()
    self.session.rollback()
    self.session.add(Effect(tag=tag, name="pending"))
    if fail:
        raise Oops("after a commit of its own")
    return "done"


@durable_task(bind=True)
def joining(self: Any, *, tag: str, fail: bool = False) -> str:
    """Code that knows nothing of the outbox, and opens its own session."""
    with _site(self).Session.begin() as session:
        session.add(Effect(tag=tag, name="joined"))
    if fail:
        raise Oops("after its own session has committed")
    return "done"


class InContext(Task):
    """A base class as Flask's documentation has it: the application's context around each task."""

    abstract = True
    inside = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.inside = True
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.inside = False


@durable_task(bind=True, base=InContext)
def in_context(self: Any, *, tag: str) -> str:
    name = "in context" if self.inside else "outside"
    _take_effect(self, tag, name)
    return name


@durable_task(bind=True, time_limit=1)
def hanging(self: Any, *, tag: str) -> None:
    _take_effect(self, tag, "never")
    _site(self).wait_at_gate(tag)


@durable_task(bind=True, soft_time_limit=1)
def hanging_softly(self: Any, *, tag: str) -> None:
    _take_effect(self, tag, "never")
    _site(self).wait_at_gate(tag)


@shared_task(bind=True)
def plain(self: Any, *_previous: Any, tag: str, name: str = "plain") -> str:
    """A stock Celery task."""
    site = _site(self)
    site.journal(tag, name)
    with site.Session.begin() as session:
        session.add(Effect(tag=tag, name=name))
    return name


@shared_task(bind=True)
def plain_calling_durable(self: Any, *, tag: str) -> str:
    with _site(self).Session.begin() as session:
        session.add(Effect(tag=tag, name="plain"))
        step.delay(tag=tag, name="durable")
    return "plain"


@durable_task(bind=True)
def durable_calling_plain(self: Any, *, tag: str, fail: bool = False) -> str:
    _take_effect(self, tag, "durable")
    plain.delay(tag=tag)
    if fail:
        raise Oops("as told")
    return "durable"


@shared_task(bind=True, acks_late=True, reject_on_worker_lost=True)
def repeatable(self: Any, *, tag: str) -> str:
    """A stock task that does not mind running twice."""
    plain(tag=tag)
    _site(self).points.pass_by("body", self.request.id)
    return "plain"


@shared_task(bind=True, acks_late=True, reject_on_worker_lost=True)
def repeatable_calling_durable(self: Any, *, tag: str) -> str:
    plain_calling_durable(tag=tag)
    _site(self).points.pass_by("body", self.request.id)
    return "plain"


@durable_task(bind=True)
def durable_calling_repeatable(self: Any, *, tag: str) -> str:
    repeatable.delay(tag=tag)
    _take_effect(self, tag, "durable")
    return "durable"
