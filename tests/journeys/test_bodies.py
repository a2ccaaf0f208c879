"""What a body may do, and how it may end."""

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery.result import AsyncResult

from tests.journeys.making import Making
from tests.journeys.site import Effect, Site, new_tag
from tests.journeys.tasks import Oops
from tests.support.processes import Process
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def site(module_sites: Making) -> Site:
    """A site on RabbitMQ with a relay."""
    site = module_sites("amqp", worker_lost_wait=0.1, task_queue_max_priority=5)
    site.relay()
    return site


@pytest.fixture(scope="module")
def worker(site: Site) -> Process:
    """Its worker."""
    return site.worker("--concurrency=3")


@pytest.fixture(autouse=True)
def _with_worker(worker: Process) -> None:
    """Every test here needs it."""


def _send(site: Site, task: str, tag: str, **arguments: Any) -> AsyncResult:
    result: AsyncResult = site.send(site.task(task).s(tag=tag, **arguments))
    return result


def _verify(site: Site, tag: str, effects: list[str]) -> None:
    site.wait_effects(tag, effects)
    site.wait_quiet()
    assert site.effects(tag) == sorted(effects)


def test_a_body_without_an_inbox(site: Site) -> None:
    tag = new_tag()
    incoming = site.outbox.store.counts()["incoming"]
    assert _send(site, "without_inbox", tag).get(timeout=90) == "done"
    _verify(site, tag, ["child", "done"])
    assert site.outbox.store.counts()["incoming"] == incoming + 1  # the child's


def test_a_body_without_a_session(site: Site) -> None:
    tag = new_tag()
    assert _send(site, "without_session", tag).get(timeout=90) == "done"
    _verify(site, tag, ["child", "done"])


def test_a_body_that_commits_and_rolls_back_its_session(site: Site) -> None:
    tag = new_tag()
    assert _send(site, "committing_itself", tag).get(timeout=90) == "done"
    site.wait_quiet()
    effects = site.effects(tag)
    assert [name for name in effects if name != "child"] == ["committed", "pending"]


def test_a_commit_in_the_body_is_undone_when_the_body_fails(site: Site) -> None:
    tag = new_tag()
    with pytest.raises(Oops):
        _send(site, "committing_itself", tag, fail=True).get(timeout=90)
    _verify(site, tag, [])


def test_code_with_a_session_of_its_own_joins(site: Site) -> None:
    tag = new_tag()
    assert _send(site, "joining", tag).get(timeout=90) == "done"
    _verify(site, tag, ["joined"])


def test_code_with_a_session_of_its_own_is_undone_when_the_body_fails(site: Site) -> None:
    tag = new_tag()
    with pytest.raises(Oops):
        _send(site, "joining", tag, fail=True).get(timeout=90)
    _verify(site, tag, [])


def test_the_users_own_call_is_kept(site: Site) -> None:
    """A base class with a __call__, as Flask's application context around a task."""
    tag = new_tag()
    assert _send(site, "in_context", tag).get(timeout=90) == "in context"
    _verify(site, tag, ["in context"])


def test_a_rejected_message_leaves_nothing(site: Site, worker: Process) -> None:
    tag = new_tag()
    result = _send(site, "rejecting", tag)
    worker.wait_for_log(rf"{result.id}.*[Rr]eject")
    _verify(site, tag, [])
    assert site.runs(tag) == ["rejected"]
    assert site.left() == 0


def test_a_hard_time_limit_is_recorded_once(site: Site) -> None:
    tag = new_tag()
    signature = site.task("hanging").s(tag=tag)
    signature.set(link_error=[site.task("handle_error").s(tag=tag)])
    result = site.send(signature)
    with pytest.raises(Exception, match="TimeLimitExceeded"):
        result.get(timeout=90)
    _verify(site, tag, ["error handled"])
    assert site.runs(tag) == ["error handled", "never"]


def test_a_soft_time_limit_is_a_failure(site: Site) -> None:
    tag = new_tag()
    signature = site.task("hanging_softly").s(tag=tag)
    signature.set(link_error=[site.task("handle_error").s(tag=tag)])
    result = site.send(signature)
    with pytest.raises(Exception, match="SoftTimeLimitExceeded"):
        result.get(timeout=90)
    _verify(site, tag, ["error handled"])
    assert site.runs(tag) == ["error handled", "never"]


def test_a_countdown_rests_in_the_database(site: Site) -> None:
    """P11."""
    tag = new_tag()
    before = datetime.now(timezone.utc)
    with site.Session.begin():
        result = site.task("step").apply_async(kwargs={"tag": tag, "name": "done"}, countdown=2)
    assert site.outbox.store.counts()["scheduled"] == 1
    assert site.left() == 0
    assert result.get(timeout=90) == "done"
    assert datetime.now(timezone.utc) - before >= timedelta(seconds=2)
    _verify(site, tag, ["done"])


def test_an_eta_is_the_earliest_time(site: Site) -> None:
    tag = new_tag()
    eta = datetime.now(timezone.utc) + timedelta(days=365)
    with site.Session.begin():
        site.task("step").apply_async(kwargs={"tag": tag, "name": "done"}, eta=eta)
    (row,) = site.rows()
    assert row["due_at"] == row["available_at"] == eta
    site.outbox.relay_all()
    assert site.outbox.store.counts()["scheduled"] == 1
    with site.engine.begin() as connection:
        connection.execute(site.outbox.tables.outbox.delete())


def test_an_expired_message_is_not_executed(site: Site, worker: Process) -> None:
    tag = new_tag()
    past = datetime.now(timezone.utc) - timedelta(seconds=5)
    with site.Session.begin():
        site.task("step").apply_async(kwargs={"tag": tag, "name": "done"}, expires=past)
    site.wait_quiet()
    assert site.runs(tag) == []


def test_priority_reaches_the_broker(site: Site) -> None:
    """The broker hands out the most urgent one first."""
    tag = new_tag()
    with site.Session.begin():
        for priority in (0, 3, 5, 1):
            site.step(tag).apply_async(priority=priority, queue="urgent")
    wait_until(lambda: not site.pending(), 90, "an empty outbox")
    with site.app.connection_for_read() as connection:
        messages = [connection.default_channel.basic_get("urgent") for _ in range(4)]
        assert [message.properties["priority"] for message in messages] == [5, 3, 1, 0]
        for message in messages:
            connection.default_channel.basic_ack(message.delivery_tag)
    wait_until(lambda: site.left() == 0, 10, "an empty broker")


def test_children_are_known(site: Site) -> None:
    """AsyncResult.children, as stock Celery tells them."""
    tag = new_tag()
    result = _send(site, "spawning", tag)
    assert result.get(timeout=90) == "parent"
    children = result.children
    assert sorted(child.get(timeout=90) for child in children) == ["child 1", "child 2"]
    _verify(site, tag, ["child 1", "child 2", "parent"])


def test_signals_are_seen(site: Site, worker: Process) -> None:
    tag = new_tag()
    result = _send(site, "step", tag, name="done")
    assert result.get(timeout=90) == "done"
    for name in ("task_prerun", "task_success", "task_postrun"):
        worker.wait_for_log(f"signal {name} {result.id}")
    failed = _send(site, "failing", tag)
    with pytest.raises(Oops):
        failed.get(timeout=90)
    worker.wait_for_log(f"signal task_failure {failed.id}")
    retried = _send(site, "retrying", tag, times=1)
    assert retried.get(timeout=90) == "done"
    worker.wait_for_log(f"signal task_retry {retried.id}")


def test_a_plain_task_calls_a_durable_one(site: Site) -> None:
    tag = new_tag()
    assert site.task("plain_calling_durable").delay(tag=tag).get(timeout=90) == "plain"
    _verify(site, tag, ["durable", "plain"])


def test_a_durable_task_calls_a_plain_one(site: Site) -> None:
    tag = new_tag()
    assert _send(site, "durable_calling_plain", tag).get(timeout=90) == "durable"
    _verify(site, tag, ["durable", "plain"])


def test_a_failed_durable_task_has_called_nobody(site: Site) -> None:
    tag = new_tag()
    with pytest.raises(Oops):
        _send(site, "durable_calling_plain", tag, fail=True).get(timeout=90)
    _verify(site, tag, [])


def test_a_session_of_the_app_is_the_callers(site: Site) -> None:
    tag = new_tag()
    with site.Session.begin() as session:
        session.add(Effect(tag=tag, name="app"))
        result = site.step(tag).delay()
    assert result.get(timeout=90) == "done"
    _verify(site, tag, ["app", "done"])
