"""Local queues: workers that are killed, frozen or told to stop, and a database that goes away.

P13: each effect once. P16: what a lost worker had in hand is delivered again, when its lease is over.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import func, select

from celery_outbox.storage.administration import Administration
from tests.journeys.making import Making
from tests.journeys.site import Effect, Site, new_tag
from tests.support.guardian import family
from tests.support.processes import Process
from tests.support.servers import PostgreSQL
from tests.support.waiting import wait_until

#: A lease that is soon over, renewed three times as often.
SHORT: dict[str, Any] = {"outbox_local_lease_seconds": 1.0, "worker_prefetch_multiplier": 4}
TASKS = 10_000

DATABASES = pytest.mark.parametrize("database", ["postgresql", "sqlite"])


@pytest.fixture(scope="module")
def own_postgresql() -> Iterator[PostgreSQL]:
    """A PostgreSQL that may be killed."""
    with PostgreSQL() as server:
        yield server


def _send(site: Site, count: int) -> list[str]:
    tags = [new_tag(f"{number}") for number in range(count)]
    with site.Session.begin():
        for tag in tags:
            site.step(tag).delay()
    return tags


def _verify_once(site: Site, tags: list[str], timeout: float = 60) -> None:
    for tag in tags:
        site.wait_effects(tag, ["done"], timeout)
    site.wait_quiet(timeout)
    assert [site.effects(tag) for tag in tags] == [["done"]] * len(tags)


def _hold(site: Site) -> str:
    """Send a task that waits in its body for `Site.open_gate`, and others after it."""
    tag = new_tag("held")
    site.send(site.task("held").s(tag=tag))
    return tag


def _taken(site: Site) -> int:
    return sum(counts["taken"] for counts in site.outbox.store.local.counts().values())


def _worker(site: Site, name: str, *args: str) -> Process:
    return site.worker("--concurrency=1", f"--hostname={name}@%h", *args)


@DATABASES
def test_killed_with_messages_in_hand(sites: Making, database: str) -> None:
    """The one in its body and those behind it are the next worker's."""
    site = sites("local", database, **SHORT)
    held = _hold(site)
    tags = _send(site, 3)
    worker = _worker(site, "one")
    site.wait_for_body(held)
    wait_until(lambda: _taken(site) == 4, 30, "four messages in hand")
    worker.kill()
    site.open_gate(held)
    _worker(site, "two")
    _verify_once(site, [held, *tags])
    assert site.runs(held) == ["done", "done"]
    assert [site.runs(tag) for tag in tags] == [["done"]] * 3


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_a_task_that_kills_its_process_each_time(sites: Making, pool: str) -> None:
    """P7: it is delivered so often and no more, and is replayed once it is mended.

    In the prefork pool the worker outlives it and gives the message back; else the lease ends.
    """
    site = sites("local", **SHORT, outbox_local_max_attempts=3)
    tag, good = new_tag("deadly"), new_tag()
    site.send(site.task("deadly").s(tag=tag))
    if pool == "prefork":
        _worker(site, "one")
    else:
        site.reviving_worker("--pool=solo")
    wait_until(site.dead, 60, "a dead letter")
    (letter,) = site.dead()
    assert (letter["attempts"], site.runs(tag)) == (3, ["done"] * 3)
    said = "signal 9 (SIGKILL)" if pool == "prefork" else "its worker was lost: "
    assert letter["last_error"].startswith("delivered 3 times and never handled; the last time: ")
    assert said in letter["last_error"]
    assert site.effects(tag) == []
    site.send(site.step(good))
    site.wait_effects(good, ["done"])
    site.open_gate(tag)
    assert sum(Administration(site.engine, site.outbox.tables).replay()) == 1
    _verify_once(site, [tag])
    assert site.dead() == []


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_task_may_take_longer_than_the_lease(sites: Making, pool: str) -> None:
    """It is renewed, also while the only thread is in the task."""
    site = sites("local", **SHORT)
    held = _hold(site)
    tags = _send(site, 3)
    worker = _worker(site, "one", f"--pool={pool}")
    site.wait_for_body(held)
    other = _worker(site, "two")
    time.sleep(3 * SHORT["outbox_local_lease_seconds"])
    assert site.runs(held) == ["done"]
    site.open_gate(held)
    _verify_once(site, [held, *tags])
    assert site.runs(held) == ["done"]
    assert "the lease of" not in worker.log + other.log


def test_frozen_beyond_the_lease(sites: Making) -> None:
    """Another worker has its messages, and it changes nothing when it wakes up."""
    site = sites("local", **SHORT)
    tags = _send(site, 4)
    site.points.arm("body", signal.SIGSTOP)
    frozen = _worker(site, "one")
    site.points.wait_struck("body")
    frozen.pause()
    other = _worker(site, "two")
    # The frozen one's transaction is open, and its message goes back until it has ended.
    other.wait_for_log("goes back: ")
    for tag in tags:
        if not site.effects(tag):
            continue
        assert site.runs(tag) == ["done"]
    frozen.resume()
    _verify_once(site, tags)
    assert frozen.alive
    frozen.wait_for_log(r"the lease of \d message\(s\) was over")


@pytest.mark.slow
@pytest.mark.timeout(300)
@DATABASES
def test_told_to_stop(sites: Making, database: str) -> None:
    """It ends what it has begun, and gives nothing away that it has not."""
    site = sites("local", database, **{**SHORT, "outbox_local_lease_seconds": 600.0})
    tags = _send(site, 60)
    worker = site.worker()
    wait_until(lambda: site.outbox.store.counts()["incoming"] > 5, 60, "the worker at work")
    assert worker.terminate(90) == 0
    assert _taken(site) == 0
    # Celery may not read the last results of a pool that ends: those are delivered again.
    assert site.left() + site.outbox.store.counts()["incoming"] >= len(tags)
    site.worker()
    _verify_once(site, tags)
    assert [site.runs(tag) for tag in tags] == [["done"]] * len(tags)


@pytest.mark.slow
def test_a_database_that_is_killed_again_and_again(
    sites: Making, own_postgresql: PostgreSQL
) -> None:
    """The worker comes back by itself, as with a broker."""
    site = sites("local", database=own_postgresql.create_database(), **SHORT)
    worker = site.worker()
    tags = _send(site, 300)
    for done in (30, 60, 90):
        _wait_handled(site, done)
        own_postgresql.kill()
        own_postgresql.start()
        site.engine.dispose()
    _verify_once(site, tags)
    assert worker.alive


@pytest.mark.slow
def test_a_database_that_is_away_when_the_worker_starts(
    sites: Making, own_postgresql: PostgreSQL
) -> None:
    site = sites("local", database=own_postgresql.create_database(), **SHORT)
    tags = _send(site, 2)
    own_postgresql.kill()
    worker = site.worker(ready_timeout=None)
    worker.wait_for_log("Trying again in")
    own_postgresql.start()
    site.engine.dispose()
    _verify_once(site, tags)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_tasks_and_workers_killed_at_random(sites: Making) -> None:
    """Whole workers, their main processes, and processes of their pools."""
    site = sites("local", backend=None, task_ignore_result=True, **SHORT)
    tag, chance = new_tag(), random.Random(11)
    step = site.task("step")
    for begin in range(0, TASKS, 500):
        with site.Session.begin():
            for number in range(begin, begin + 500):
                step.delay(tag=tag, name=f"{number}")
    workers = [_reviving(site, name) for name in ("one", "two")]
    kills, next_kill = 0, 100
    while (done := _effects(site, tag)) < TASKS:
        time.sleep(chance.uniform(0.01, 0.1))
        for worker in workers:
            if not worker.alive:
                worker.restart()
        # While they work: one that is always killed as it starts would never do so.
        if done < next_kill:
            continue
        next_kill = done + chance.randrange(100, 500)
        victim = chance.choice(workers)
        doomed = [[victim.pid], family(victim.pid), family(victim.pid)[1:2]][kills % 3]
        for pid in doomed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        kills += 1
    for worker in workers:
        worker.restart()
    site.wait_quiet(60)
    assert done == TASKS
    assert _effects(site, tag) == TASKS
    assert sorted(site.effects(tag)) == sorted(map(str, range(TASKS)))
    assert kills > 20
    print(f"{TASKS} tasks, {kills} kills, {len(site.runs(tag))} bodies entered")


def _reviving(site: Site, name: str) -> Process:
    return site.worker(
        "--loglevel=WARNING", "--concurrency=2", f"--hostname={name}@%h", ready_timeout=None
    )


def _effects(site: Site, tag: str) -> int:
    with site.Session() as session:
        found = session.execute(select(func.count()).where(Effect.tag == tag))
        return int(found.scalar_one())


def _wait_handled(site: Site, count: int) -> None:
    wait_until(lambda: site.outbox.store.counts()["incoming"] >= count, 60, f"{count} handled")
