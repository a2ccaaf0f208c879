"""Accident 10 for chords: each part counts once, and the body is executed once, on any redelivery.

The runs of a result backend go on at the same time, each with its own accident; then every message
is delivered once more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
from celery import chord

from tests.journeys.flows import FLOWS, Flow, Run
from tests.journeys.making import Making
from tests.journeys.memory import Memory
from tests.journeys.site import Site, new_tag
from tests.support.record import used
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BACKENDS = ("redis", "database")

#: Where whatever executes a task of the chord is killed, once for each execution or message.
POINTS = {
    "handled": "after the commit, before the part is counted",
    "acknowledging": "after the part is counted, before the acknowledgement",
    "sending": "before each message that is sent: the body, the poll, the error callback",
    "sent": "after each of them",
    "redelivered": "nobody is killed",
}


def _with_a_stock_part(site: Site, tag: str) -> Any:
    parts = [site.step(tag, "part 1"), site.task("plain").s(tag=tag), site.step(tag, "part 2")]
    return chord(parts, site.task("total").s(tag=tag), app=site.app)


_NAMES = ("chord", "upgraded_chord", "chord_in_a_header", "chord_with_a_chord", "failing_chord")
CHORDS = {
    **{flow.name: flow for flow in FLOWS if flow.name in _NAMES},
    "stock_part": Flow(
        "stock_part",
        _with_a_stock_part,
        ("part 1", "part 2", "plain", "total"),
        ["part 1", "part 2", "plain"],
        joins=True,
    ),
}
#: Stock Celery loses a stock task with its worker, so that only the durable parts are killed.
CASES = [
    (flow, point)
    for flow in CHORDS
    for point in POINTS
    if flow != "stock_part" or point in ("handled", "redelivered")
]


@dataclass
class Story:
    """What became of the runs of a result backend."""

    site: Site
    runs: dict[tuple[str, str], Run] = field(default_factory=dict)
    wrong: dict[tuple[str, str], str] = field(default_factory=dict)
    struck: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, backend: str, sites: Making) -> Story:
        """Start every run, wait for their ends, and deliver every message once more."""
        site = _site(backend, sites)
        story = cls(site)
        memory = Memory(site)
        site.worker("--concurrency=6", module="tests.faults.chord_worker")
        site.relay()
        for flow, point in CASES:
            story.runs[flow, point] = _start(CHORDS[flow], site, point)
        story._end(_finish)
        story.struck = site.points.struck_runs()
        memory.deliver_again()
        story._end(_ask_again)
        return story

    def _end(self, finish: Callable[[Run, float], None]) -> None:
        # All go on at once, so they share the time: the first may well be the last to end.
        deadline = time.monotonic() + 240
        for case, run in self.runs.items():
            self._note(case, partial(finish, run, deadline))
        self.site.wait_quiet(240)
        for case, run in self.runs.items():
            self._note(case, run.verify)

    def _note(self, case: tuple[str, str], look: Callable[[], None]) -> None:
        if case not in self.wrong:
            try:
                look()
            except (Exception, pytest.fail.Exception) as error:
                self.wrong[case] = f"{error!r}\n{self.runs[case]}"


@pytest.fixture(scope="module")
def stories(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Story]:
    """Tell what became of all runs. They are started by the first test that asks."""

    @cache
    def told(backend: str) -> Story | Exception:
        try:
            with Making(request, tmp_path_factory) as sites:
                return Story.of(backend, sites)
        except Exception as error:
            return error

    def story(backend: str) -> Story:
        found = told(backend)
        if isinstance(found, Exception):
            raise found
        used(found.site.setup.broker, found.site.setup.database)
        return found

    return story


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("flow", "point"), CASES, ids=[f"{f}-{p}" for f, p in CASES])
def test_once(stories: Callable[[str], Story], backend: str, flow: str, point: str) -> None:
    story = stories(backend)
    wrong = story.wrong.get((flow, point))
    assert wrong is None, wrong
    if point != "redelivered":
        tag = story.runs[flow, point].tag
        assert story.struck.get(tag), f"{tag} had no accident"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_is_delivered_twice_at_once(sites: Making, backend: str) -> None:
    """While the first one is held, and when both have been told to go on."""
    site = _site(backend, sites)
    tag = new_tag()
    parts = [site.task("held").s(tag=tag, name="part 1"), site.step(tag, "part 2")]
    result = site.send(chord(parts, site.task("total").s(tag=tag), app=site.app))
    site.insert_again([row for row in site.rows() if row["task"] == site.task("held").name])
    workers = [site.worker("--concurrency=2", f"--hostname={name}@%h") for name in ("one", "two")]
    site.relay()
    site.wait_for_body(tag)
    wait_until(lambda: any("goes back" in worker.log for worker in workers), 90, "a duplicate")
    assert site.runs(tag).count("part 1") == 1
    assert not result.ready()
    site.open_gate(tag)
    assert result.get(timeout=90) == ["part 1", "part 2"]
    site.wait_quiet()
    assert site.effects(tag) == ["part 1", "part 2", "total"]
    assert site.runs(tag) == ["part 1", "part 2", "total"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_part_fails_and_is_killed_with_the_claim(sites: Making, backend: str) -> None:
    """One slot, so that the parts come in their order: nobody but the killed one can tell."""
    site = _site(backend, sites)
    tag = new_tag("failing_last@sending")
    parts = [site.step(tag, "part 1"), site.task("failing").s(tag=tag)]
    body = site.task("total").s(tag=tag).set(link_error=[site.task("handle_error").s(tag=tag)])
    site.send(chord(parts, body, app=site.app))
    site.relay_all()
    site.worker("--concurrency=1", module="tests.faults.chord_worker")
    site.relay()
    site.wait_effects(tag, ["error handled", "part 1"])
    site.wait_quiet()
    assert site.effects(tag) == ["error handled", "part 1"]


def _finish(run: Run, deadline: float) -> None:
    run.finish(max(1, deadline - time.monotonic()))


def _ask_again(run: Run, _deadline: float) -> None:
    run.ask_again()


def _site(backend: str, sites: Making) -> Site:
    return sites(
        "amqp",
        backend=backend,
        worker_lost_wait=0.05,
        result_chord_retry_interval=0.2,
        # Celery's claim to send a body from Redis lasts for some seconds, or as long as this:
        broker_connection_timeout=1,
    )


def _start(flow: Flow, site: Site, point: str) -> Run:
    if flow.name != "stock_part":
        return flow.start(site, point)
    # A stock part does not wait for the commit.
    tag = new_tag(f"{flow.name}@{point}")
    return Run(flow, site, tag, flow.build(site, tag).apply_async())
