"""Matrix: flows, crash points, result backends and pools of workers, many runs at once on one site.

Each run of a flow has one crash point. Which flows are run with which backend and pool:

- Prefork and Redis, the combination that most people have: every flow at every point, and every
  execution of every task is struck.
- Prefork and the other result backends: every point, and the flows in which results matter; rpc
  can't join chords, and without results nobody can.
- Threads and solo, where a strike ends the whole worker and all that runs in it: every point, and
  the flows that differ in what follows a commit. Each run is struck once. With a database for the
  results too, for chords are polled for there, by a task.
- MariaDB instead of PostgreSQL, with prefork and Redis: every point, and flows of each kind.
- Gevent: whether it works at all, with one crash.

When all is over every message is delivered once more.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from tests.journeys.brokers import Broker
from tests.journeys.flows import FLOWS, PREFORK_FLOWS, Flow, Run
from tests.journeys.making import Making
from tests.journeys.memory import Memory
from tests.journeys.site import Site
from tests.support.processes import Process
from tests.support.waiting import WaitTimeout, wait_until

__all__ = ["PLACES", "POINTS", "Case", "Place", "Story"]

#: Where an accident happens, in the order in which an execution comes by.
POINTS = {
    "claiming": "killed before the inbox row is inserted",
    "handling": "killed before the body",
    "body": "killed inside the body",
    "committing": "killed before the commit",
    "commit_lost": "cut off before the database has the COMMIT",
    "answer_lost": "cut off before the database's answer to the COMMIT has come",
    "handled": "killed after the commit, before the result is stored",
    "acknowledging": "killed after the result is stored, before the acknowledgement",
    "redelivered": "no accident, but every message is delivered twice",
}

_ALL = {flow.name: flow for flow in (*FLOWS, *PREFORK_FLOWS)}


#: Other tests may run beside these: seconds for all runs of a place together.
_PATIENCE = 400

#: How often a run is started that was kept from its accident by the accident of another.
_ATTEMPTS = 5


@dataclass(frozen=True)
class Case:
    """A flow with a point, where it is run."""

    place: Place
    point: str
    flow: Flow

    def __str__(self) -> str:
        return f"{self.place.name}-{self.point}-{self.flow.name}"


@dataclass(frozen=True)
class Place:
    """A result backend and a pool, and the flows that are run there."""

    pool: str
    backend: str | None
    flows: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    #: Points and flows, where not each flow meets each point.
    only: tuple[tuple[str, str], ...] = ()
    database: str = "postgresql"

    @property
    def name(self) -> str:
        """What the tests are called by."""
        ours = "" if self.database == "postgresql" else f"-{self.database}"
        return f"{self.pool}-{self.backend}{ours}"

    def cases(self) -> list[Case]:
        """Return all that is run here."""
        pairs = self.only or [(point, flow) for point in POINTS for flow in self.flows]
        return [Case(self, point, _ALL[flow]) for point, flow in pairs]

    def worker(self, site: Site) -> Process:
        """Start a worker; one whose whole process is killed starts again by itself."""
        arguments = (f"--pool={self.pool}", "--without-heartbeat", *self.arguments)
        if self.pool in ("threads", "solo"):
            return site.reviving_worker(*arguments)
        return site.worker(*arguments)


_DATABASE = (
    *("plain", "chain", "links", "link_error", "group", "chord", "upgraded_chord"),
    *("chord_in_a_header", "failing_chord", "retry", "replace", "failure", "unserialisable"),
)
# Not replace: Celery sends the replacement's reply to the worker's own queue, not to the caller's.
_RPC = (
    *("plain", "chain", "links", "link_error_called", "group", "retry", "ignore"),
    *("failing_chain", "spawn", "unserialisable"),
)
_WITHOUT = ("plain", "chain", "links", "link_error", "group", "retry", "replace_by_chain", "ignore")
_WHOLE_WORKER = ("chain", "links", "chord", "retry", "failing_chain", "spawn", "link_error_called")
_MARIADB = ("plain", "chain", "links", "group", "chord", "retry", "replace", "failure", "spawn")
_SMOKE = ("plain", "chain", "links", "chord", "retry", "failure", "spawn")

PLACES = (
    Place("prefork", "redis", tuple(_ALL), ("--concurrency=10",)),
    Place("prefork", "database", _DATABASE, ("--concurrency=8",)),
    Place("prefork", "rpc", _RPC, ("--concurrency=8",)),
    Place("prefork", None, _WITHOUT, ("--concurrency=8",)),
    Place("threads", "redis", _WHOLE_WORKER, ("--concurrency=8",)),
    Place("threads", "database", ("plain", "chord"), ("--concurrency=8",)),
    # With a prefetch of 1 this pool may wait up to 10 s before it acknowledges (kombu's pull request
    # 1587), as it does for stock tasks.
    Place("solo", "redis", _WHOLE_WORKER, ("--prefetch-multiplier=4",)),
    Place("prefork", "redis", _MARIADB, ("--concurrency=8",), database="mariadb"),
    Place(
        "gevent",
        "redis",
        _SMOKE,
        ("--concurrency=20",),
        (("body", "chain"), *(("redelivered", flow) for flow in _SMOKE)),
    ),
)


@dataclass
class Story:
    """What became of all runs of a place: asked for by its tests when all is over."""

    site: Site
    runs: list[tuple[Case, Run]] = field(default_factory=list)
    #: What was found wrong with a run, by its case.
    wrong: dict[Case, str] = field(default_factory=dict)
    #: What was found wrong with the site.
    left: list[str] = field(default_factory=list)
    #: How often the runs had their accident, by their tags.
    struck: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, place: Place, sites: Making) -> Story:
        """Start every run, wait for their ends, and deliver every message once more."""
        site = _site(place, sites)
        story = cls(site)
        memory = Memory(site)
        worker = place.worker(site)
        site.relay()
        cases = place.cases()
        for again in range(_ATTEMPTS):
            story._start(cases)
            if place.pool == "gevent":
                # This one does not start again by itself.
                wait_until(lambda: not worker.alive, 90, "the end of the worker")
                worker.restart()
            story._end(f"at the first deliveries ({again})", _finish)
            story.struck = site.points.struck_runs()
            cases = [case for case in cases if not story.had_accident(case)]
            if not cases:
                break
        memory.deliver_again()
        story._end("after every message was delivered again", _finish_again)
        story.left += [f"dead letter: {row['task']} {row['error']}" for row in site.dead()]
        return story

    def had_accident(self, case: Case) -> bool:
        """Say whether a run of the case had the accident that it was to have, if any.

        A whole worker that dies takes along what it executes beside, perhaps something that has just
        been where its own accident was to be. That is run again.
        """
        if case.point == "redelivered" or case.point in case.flow.passes_not:
            return True
        return case in self.wrong or any(
            run.tag in self.struck for other, run in self.runs if other == case
        )

    def _start(self, cases: list[Case]) -> None:
        for case in cases:
            point = case.point
            if point != "redelivered" and case.place.pool != "prefork":
                point += ".once"
            self.runs.append((case, case.flow.start(self.site, point)))

    def _end(self, when: str, finish: Any) -> None:
        deadline = time.monotonic() + _PATIENCE
        # What a run waits for may never come. It must not take the others' time.
        for case, run in self.runs:
            self._note(case, when, run, lambda run=run: finish(run, deadline))
        try:
            self.site.wait_quiet(max(10, deadline - time.monotonic()))
        except WaitTimeout:
            self.left.append(
                f"{when}: outbox {[row['task'] for row in self.site.rows()]}, "
                f"broker {self.site.left()}"
            )
        for case, run in self.runs:
            self._note(case, when, run, run.verify)

    def _note(self, case: Case, when: str, run: Run, look: Any) -> None:
        if case in self.wrong:
            return
        try:
            look()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a result may be anything, and so may what it raises
            self.wrong[case] = f"{case}, {when}: {error!r}\n{run}"


def _site(place: Place, sites: Making) -> Site:
    backend = "rpc://" if place.backend == "rpc" else place.backend
    broker: str | Broker = "amqp"
    if place.backend == "rpc":
        # Replies that nobody asks for stay in the queue of the one who might.
        broker = sites.broker("amqp")
        vhost, server = broker.url, sites.rabbitmq
        broker = Broker(vhost, lambda: server.queue_depths(vhost).get("celery", 0))
    return sites(
        broker,
        place.database,
        backend=backend,
        worker_lost_wait=0.05,
    )


def _finish(run: Run, deadline: float) -> None:
    run.finish(max(1, deadline - time.monotonic()))


def _finish_again(run: Run, _deadline: float) -> None:
    # A reply is read once, a stock task's result may be of another execution.
    if run.site.setup.backend != "rpc://":
        run.ask_again()
