"""Azure Service Bus at its worst: every fault, while relays and workers are killed.

P5, P6, P13, P14, P16: nothing is lost, nothing takes effect twice.
"""

import itertools
import signal
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import func, select

from tests.journeys import brokers
from tests.journeys.making import Making
from tests.journeys.site import Effect, Site, new_tag
from tests.support.processes import Process
from tests.support.servicebus import Fault, ServiceBus
from tests.support.servicebus.namespace import namespace
from tests.support.waiting import wait_until

TASKS, ROUNDS = 2000, 10

#: The service refuses, ends the link, the connection or the wire, before and after it has stored a
#: batch, says nothing, throttles; and refuses tokens, links and settlements.
FAULTS = [
    Fault("send", "reject"),
    Fault("send", "cut"),
    Fault("send", "store_cut"),
    Fault("send", "detach"),
    Fault("send", "store_detach"),
    Fault("send", "close"),
    Fault("send", "store_close"),
    Fault("send", "silence"),
    Fault("send", "store_silence"),
    Fault("send", "reject", condition="com.microsoft:server-busy"),
    Fault("send", "reject", condition="amqp:resource-limit-exceeded"),
    Fault("send", "release"),
    Fault("cbs", "status", status=401),
    Fault("attach", "detach", condition="com.microsoft:server-busy"),
    Fault("settle", "reject", condition="com.microsoft:message-lock-lost", times=5),
]
SETTINGS: dict[str, Any] = {
    "outbox_batch_size": 50,
    "outbox_lease_seconds": 4.0,
    "outbox_confirm_timeout_seconds": 2.0,
}


def _effects(site: Site) -> Counter[str]:
    with site.engine.connect() as connection:
        rows = connection.execute(
            select(Effect.tag, func.count().label("times")).group_by(Effect.tag)
        )
        return Counter({row.tag: row.times for row in rows})


def _commit(site: Site, numbers: range) -> None:
    for start in range(numbers.start, numbers.stop, 20):
        with site.Session.begin():
            for number in range(start, start + 20):
                site.step(f"task-{number}").delay()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_thousand_tasks_through_every_fault(sites: Making) -> None:
    with namespace() as server:
        prefix = f"{new_tag('faults')}-"
        site = sites(brokers.servicebus(server, prefix), backend=None, **SETTINGS)
        relays = [site.relay() for _ in range(2)]
        workers = [site.worker() for _ in range(2)]
        victims = itertools.cycle([*relays, *workers])
        # A relay that has published and not settled, one that has claimed and not published, a pool's
        # process that has committed and not acknowledged, and one that has not committed.
        points = itertools.cycle(["published", "claimed", "handled", "committing"])
        faults = itertools.cycle(FAULTS)
        each = TASKS // ROUNDS
        for number in range(ROUNDS):
            server.plan(itertools.islice(faults, 3 * len(FAULTS) // ROUNDS + 1))
            site.points.arm(next(points), signal.SIGKILL)
            _commit(site, range(number * each, (number + 1) * each))
            _kill(next(victims))
            _await(site, relays, (number + 1) * each - each // 2)
        server.behave()
        _await(site, relays, TASKS)
        site.wait_quiet(60)
        effects = _effects(site)
        assert set(effects.values()) == {1}
        assert effects.keys() == {f"task-{number}" for number in range(TASKS)}
        assert not site.dead()
        if isinstance(server, ServiceBus):
            _check_the_service(server, f"{prefix}celery")
        for point in ("published", "claimed", "handled", "committing"):
            site.points.wait_struck(point)


def _check_the_service(server: ServiceBus, queue: str) -> None:
    """It has every message once, though many were sent twice, and every fault has hit."""
    state = server.state()
    counts = state["queues"][queue]
    assert counts.get("dead_letter", 0) == 0
    assert counts["stored"] == TASKS
    assert counts["duplicates_dropped"] > 0
    assert state["hits"].keys() >= {f"{fault.where} {fault.action}" for fault in FAULTS}


def _await(site: Site, relays: list[Process], effects: int) -> None:
    wait_until(
        lambda: _alive(relays) and len(_effects(site)) >= effects, 120, f"{effects} effects", 0.2
    )


def _kill(process: Process) -> None:
    process.kill()
    process.restart()


def _alive(relays: list[Process]) -> bool:
    """Start again what a point has killed."""
    for relay in relays:
        if not relay.alive:
            relay.restart()
    return True
