"""What may befall a process that publishes by itself after its commits.

P5: nothing is lost, the relay takes over. P6: a process that was stopped beyond its lease writes
nothing. P8: at most one batch is published twice.
"""

import re
import signal
from typing import Any

import pytest

from tests.journeys.brokers import rabbitmq
from tests.journeys.making import Making
from tests.journeys.site import Site, new_tag
from tests.support.processes import Process
from tests.support.servers import RabbitMQ
from tests.support.waiting import wait_until

BATCH = 40
SETTINGS: dict[str, Any] = {
    "outbox_publish_after_commit": True,
    "outbox_batch_size": BATCH,
    "outbox_lease_seconds": 1.0,
    "outbox_confirm_timeout_seconds": 0.5,
}

#: The web process: it sends COUNT messages in one commit, and goes on as the test says.
WEB = """
import os, signal, sys, time
site.create()
tag, count = os.environ["TAG"], int(os.environ.get("COUNT", 0))

def send(first, last):
    with site.Session.begin():
        for number in range(first, last):
            site.step(tag, f"{number:05}").delay()

def wait():
    print("waiting", flush=True)
    while not os.path.exists("go"):
        time.sleep(0.02)
"""


def _web(site: Site, tag: str, code: str, count: int = 0, **env: str) -> Process:
    return site.python(WEB + code, TAG=tag, COUNT=str(count), **env)


def _go(site: Site) -> None:
    (site.folder / "go").touch()


def _names(count: int) -> list[str]:
    return [f"{number:05}" for number in range(count)]


def _wait_empty(site: Site, timeout: float = 60) -> None:
    wait_until(lambda: not site.pending(), timeout, "an empty outbox")


def _verify_once(site: Site, tag: str, count: int) -> None:
    """Whatever was published twice, each message has its effect, and has it once."""
    site.worker()
    site.wait_effects(tag, _names(count), timeout=60)
    site.wait_quiet()
    assert site.effects(tag) == _names(count)
    assert site.runs(tag) == _names(count)


@pytest.mark.parametrize(
    ("point", "skip", "copies"),
    [
        ("claimed", 0, 0),  # committed and leased, before the publish
        ("publishing", BATCH // 2, BATCH),  # in the middle of the batch
        ("published", 0, BATCH),  # before its delete
        ("settled", 0, 0),
    ],
)
@pytest.mark.parametrize("broker", ["amqp", "redis"])
def test_killed(sites: Making, broker: str, point: str, skip: int, copies: int) -> None:
    site = sites(broker, **SETTINGS)
    tag = new_tag()
    site.points.arm(point, skip=skip)
    web = _web(site, tag, "send(0, count)\nwait()", 2 * BATCH)
    assert web.wait() == -signal.SIGKILL
    site.points.wait_struck(point)
    assert site.pending() == (BATCH if point == "settled" else 2 * BATCH)
    site.relay()
    _wait_empty(site)
    assert 2 * BATCH <= site.left() <= 2 * BATCH + copies
    if point == "published":
        assert site.left() == 3 * BATCH
    _verify_once(site, tag, 2 * BATCH)


def test_killed_right_after_the_commit(sites: Making) -> None:
    """Whatever the thread was at: the first commit starts it, the others find it at work."""
    site = sites("amqp", **SETTINGS)
    tag = new_tag()
    code = """
for number in range(count):
    send(number, number + 1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert _web(site, tag, code, 50).wait() == -signal.SIGKILL
    assert site.pending() + site.left() >= 50
    site.relay()
    _wait_empty(site)
    assert 50 <= site.left() <= 50 + BATCH
    _verify_once(site, tag, 50)


@pytest.mark.parametrize("broker", ["amqp", "redis"])
def test_stopped_beyond_its_lease(sites: Making, broker: str) -> None:
    site = sites(broker, **SETTINGS)
    tag = new_tag()
    site.points.arm("published", signal.SIGSTOP)
    web = _web(site, tag, "send(0, count)\nwait()", BATCH)
    site.points.wait_struck("published")
    relay = site.relay()
    _wait_empty(site)
    assert relay.terminate() == 0
    web.resume()
    web.wait_for_log(rf"the lease of {BATCH} message\(s\) was over")
    assert site.left() == 2 * BATCH
    _go(site)
    assert web.wait() == 0
    _verify_once(site, tag, BATCH)


def test_it_takes_nothing_back_from_a_relay_that_has_taken_over(sites: Making) -> None:
    """Stopped before the publish; when it goes on, a relay that is stopped has the rows."""
    site = sites("amqp", **SETTINGS)
    tag = new_tag()
    site.points.arm("published", signal.SIGSTOP)
    web = _web(site, tag, "send(0, count)\nwait()", 3)
    site.points.wait_struck("published")
    site.points.arm("claimed", signal.SIGSTOP)
    relay = site.relay(wait=False)
    site.points.wait_struck("claimed")
    before = site.rows()
    assert len(before) == 3
    web.resume()
    web.wait_for_log(r"the lease of 3 message\(s\) was over")
    assert site.rows() == before
    relay.resume()
    _go(site)
    assert web.wait() == 0
    _wait_empty(site)
    _verify_once(site, tag, 3)


def test_forked_in_the_middle(sites: Making) -> None:
    """gunicorn's preload: the parent publishes while it forks, and the children send at once."""
    site = sites("amqp", **SETTINGS)
    tag = new_tag()
    code = """
children = []
for child in range(8):
    for number in range(child * 10, child * 10 + 5):
        send(number, number + 1)
    pid = os.fork()
    if not pid:
        site.engine.dispose(close=False)
        for number in range(child * 10 + 5, child * 10 + 10):
            send(number, number + 1)
        sys.exit()
    children.append(pid)
for pid in children:
    assert os.waitpid(pid, 0)[1] == 0
print("all children ended well", flush=True)
"""
    web = _web(site, tag, code)
    assert web.wait(60) == 0
    assert "all children ended well" in web.log
    assert "Traceback" not in web.log
    assert site.outbox.store.counts()["in_flight"] == 0
    # What the threads were not told in time is left to it.
    site.relay()
    _wait_empty(site)
    assert site.left() == 80
    _verify_once(site, tag, 80)


def test_the_interpreter_ends_right_after_a_commit(sites: Making) -> None:
    """No relay runs: what is committed is published on the way out."""
    site = sites("amqp", **{**SETTINGS, "outbox_lease_seconds": 60.0})
    tag = new_tag()
    web = _web(site, tag, "send(0, count)", 3 * BATCH)
    assert web.wait() == 0
    assert "Traceback" not in web.log
    assert site.pending() == 0
    assert site.left() == 3 * BATCH
    _verify_once(site, tag, 3 * BATCH)


def test_the_broker_goes_and_comes_back(sites: Making) -> None:
    with RabbitMQ() as server:
        site = sites(rabbitmq(server), **SETTINGS)
        tag = new_tag()
        code = """
send(0, 10)
print("sent", flush=True)
for number in range(10, count - 1):
    wait() if number == 10 else None
    send(number, number + 1)
print("away", flush=True)
while not os.path.exists("back"):
    time.sleep(0.02)
send(count - 1, count)
while not os.path.exists("enough"):
    time.sleep(0.1)
    with site.Session.begin():
        site.step("more", "more").delay()
"""
        web = _web(site, tag, code, 310)
        web.wait_for_log("^waiting")
        wait_until(lambda: site.left() == 10, 30, "the first")
        server.kill()
        _go(site)
        web.wait_for_log("^away", timeout=60)
        # No storm, and no flood.
        assert 1 <= len(re.findall("the broker is away", web.log)) <= 20
        counts = site.outbox.store.counts()
        assert (counts["outgoing"], counts["in_flight"], counts["dead"]) == (299, 0, 0)
        assert all(row["attempts"] == 0 for row in site.rows())
        server.restart()
        (site.folder / "back").touch()
        # It publishes again, and by itself.
        wait_until(lambda: site.left() > 10, 60, "a message after the pause")
        (site.folder / "enough").touch()
        assert web.wait() == 0
        relay = site.relay()
        _wait_empty(site)
        _verify_once(site, tag, 310)
        assert relay.alive


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_many_commits_while_the_broker_is_silent(sites: Making) -> None:
    """Neither memory nor the app's threads pay for it."""
    with RabbitMQ() as server:
        site = sites(rabbitmq(server), **SETTINGS)
        tag = new_tag()
        code = """
import resource
send(0, 1)
wait()
path, most = site.outbox.fast_path, 0
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for number in range(1, count):
    send(number, number + 1)
    most = max(most, path._told.qsize() + len(path._open))
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(f"most {most}, grown {grown} kB", flush=True)
os._exit(0)
"""
        web = _web(site, tag, code, 10_000)
        web.wait_for_log("^waiting")
        wait_until(lambda: site.left() == 1, 30, "the first")
        server.pause()
        _go(site)
        try:
            found = web.wait_for_log(r"^most (\d+), grown (\d+) kB", timeout=240)
        finally:
            server.resume()
        assert int(found[1]) <= 1000
        assert int(found[2]) < 20_000
        assert web.wait() == 0
        # Given back, or leased until the lease is over; what was written into the silence may arrive.
        relay = site.relay()
        _wait_empty(site, 120)
        assert relay.alive
        assert 10_000 <= site.left() <= 10_000 + 2 * BATCH
        assert not site.dead()
