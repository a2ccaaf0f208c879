"""Flows: everything that a canvas can be, what it must leave behind, and what it must return."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery import chain, chord, group
from celery.result import AsyncResult, GroupResult

from celery_outbox.errors import OutboxError
from tests.journeys.site import Site, new_tag
from tests.support.waiting import wait_until

__all__ = ["FLOWS", "PREFORK_FLOWS", "Flow", "Run", "Runs"]

#: The flow has no result that anybody could wait for.
NOTHING = object()


#: The points of an execution, in the order in which it comes by.
_EVERYWHERE = (
    "claiming",
    "handling",
    "body",
    "committing",
    "commit_lost",
    "answer_lost",
    "handled",
    "acknowledging",
)


@dataclass(frozen=True, eq=False)
class Flow:
    """A canvas: `effects` are in the database once, when it is over; `result` is what it returns."""

    name: str
    build: Callable[[Site, str], Any]
    effects: tuple[str, ...]
    result: Any = NOTHING
    error: str | None = None
    #: It needs a result backend that can join (chords).
    joins: bool = False
    #: Effects that may be there more than once: those of stock tasks.
    repeats: tuple[str, ...] = ()
    #: The points that no execution of it comes by.
    passes_not: tuple[str, ...] = ()

    def start(self, site: Site, point: str = "") -> Run:
        """Send it in a transaction. At `point` its executions have an accident, if any is given."""
        tag = new_tag(f"{self.name}@{point}" if point else self.name)
        return Run(self, site, tag, site.send(self.build(site, tag)))


@dataclass(frozen=True)
class Run:
    """One run of a flow."""

    flow: Flow
    site: Site
    tag: str
    result: Any

    def is_over(self) -> bool:
        """Whether its result and all its effects are there."""
        waited_for = self.flow.error is not None or self.flow.result is not NOTHING
        if waited_for and self.site.setup.backend is not None and not _unread(self.result).ready():
            return False
        return len(self.site.effects(self.tag)) >= len(self.flow.effects)

    def finish(self, timeout: float = 90.0) -> None:
        """Wait for its end: its result and all its effects."""
        self._compare_result(self.result, timeout)
        wait_until(
            lambda: len(self.site.effects(self.tag)) >= len(self.flow.effects),
            timeout,
            f"the effects of {self.tag}",
        )

    def verify(self) -> None:
        """Say whether its effects are as they must be; when all is quiet."""
        flow, effects = self.flow, self.site.effects(self.tag)
        once = [name for name in flow.effects if name not in flow.repeats]
        assert [name for name in effects if name not in flow.repeats] == sorted(once), self
        # In pairs: each time a stock task repeats itself, it repeats what it does in a transaction.
        assert len({effects.count(name) for name in flow.repeats} - {0}) <= 1, self
        assert set(effects) >= set(flow.repeats), self

    def ask_again(self) -> None:
        """Compare what the result backend holds now."""
        self._compare_result(_unread(self.result), 60)

    def _compare_result(self, result: Any, timeout: float) -> None:
        flow = self.flow
        if self.site.setup.backend is None:
            return
        if flow.error is not None:
            with pytest.raises(Exception, match=flow.error) as caught:
                result.get(timeout=timeout)
            assert not isinstance(caught.value, OutboxError)
        elif flow.result is not NOTHING:
            assert result.get(timeout=timeout) == flow.result

    def __str__(self) -> str:
        effects, runs = self.site.effects(self.tag), self.site.runs(self.tag)
        return (
            f"{self.tag}: effects {effects}, should be {sorted(self.flow.effects)}; "
            f"bodies entered: {runs}"
        )


class Runs(dict[str, Run]):
    """The runs of `flows` at one site, started at once, by the names of the flows."""

    def __init__(self, site: Site, flows: Iterable[Flow], timeout: float = 90.0) -> None:
        super().__init__({flow.name: flow.start(site) for flow in flows})
        self.site = site
        self._deadline = time.monotonic() + timeout

    def finish(self, name: str) -> Run:
        """Wait for the end of one; a site that has come to a stop costs the time of all once."""
        run = self[name]
        run.finish(max(self._deadline - time.monotonic(), 1))
        return run


def _unread(result: Any) -> Any:
    """The result as one sees it who has not asked for it before."""
    if isinstance(result, GroupResult):
        return GroupResult(result.id, [_unread(part) for part in result], app=result.app)
    return AsyncResult(result.id, app=result.app)


def _frozen_twice(site: Site, tag: str) -> Any:
    signature = site.step(tag, "twin")
    signature.freeze()
    return group([signature, signature], app=site.app)


def _revoked(site: Site, tag: str) -> Any:
    signature = site.step(tag, "never").set(link=[site.step(tag, "never linked")])
    signature.freeze()
    # An answer says that a worker knows; later deliveries find no other worker.
    assert site.app.control.revoke(signature.id, reply=True, timeout=90, limit=1)
    return signature


def _parts(site: Site, tag: str, *names: str) -> list[Any]:
    return [site.step(tag, name) for name in names]


def _total(site: Site, tag: str) -> Any:
    return site.task("total").s(tag=tag)


def _failing(site: Site, tag: str, errback: str) -> Any:
    return site.task("failing").s(tag=tag).set(link_error=[site.task(errback).s(tag=tag)])


def _limited(site: Site, tag: str, name: str) -> Any:
    return site.task(name).s(tag=tag).set(link_error=[site.task("handle_error").s(tag=tag)])


def _past() -> datetime:
    return datetime.now(timezone.utc) - timedelta(seconds=5)


FLOWS = [
    Flow("plain", lambda s, t: s.step(t), ("done",), "done"),
    Flow(
        "chain",
        lambda s, t: chain(s.step(t, "a"), s.step(t, "b"), s.step(t, "c")),
        ("a", "b", "c"),
        "c",
    ),
    Flow(
        "link",
        lambda s, t: s.step(t, "a").set(link=[s.step(t, "linked")]),
        ("a", "linked"),
        "a",
    ),
    Flow(
        "links",
        lambda s, t: s.step(t, "a").set(link=[s.step(t, "link 1"), s.step(t, "link 2")]),
        ("a", "link 1", "link 2"),
        "a",
    ),
    Flow(
        "link_of_group",
        lambda s, t: s.step(t, "a").set(link=[group(_parts(s, t, "link 1", "link 2"))]),
        ("a", "link 1", "link 2"),
        "a",
    ),
    # Celery sends an error callback that takes an id, and calls one that takes the error itself.
    Flow(
        "link_error",
        lambda s, t: _failing(s, t, "handle_error"),
        ("error handled",),
        error="as told",
    ),
    Flow(
        "link_error_called",
        lambda s, t: _failing(s, t, "handle_error_here"),
        ("error handled",),
        error="as told",
    ),
    Flow(
        "group",
        lambda s, t: group([s.step(t, f"part {n}") for n in range(3)], app=s.app),
        ("part 0", "part 1", "part 2"),
        ["part 0", "part 1", "part 2"],
    ),
    # Celery itself can't join two results of one id.
    Flow("frozen_twice", _frozen_twice, ("twin", "twin")),
    Flow(
        "chord",
        lambda s, t: chord(
            [s.step(t, f"part {n}") for n in range(3)], s.task("total").s(tag=t), app=s.app
        ),
        ("part 0", "part 1", "part 2", "total"),
        ["part 0", "part 1", "part 2"],
        joins=True,
    ),
    Flow(
        "upgraded_chord",
        lambda s, t: chain(
            s.step(t, "a"), group(_parts(s, t, "part 1", "part 2"), app=s.app), _total(s, t)
        ),
        ("a", "part 1", "part 2", "total"),
        ["part 1", "part 2"],
        joins=True,
    ),
    Flow(
        "chord_in_a_header",
        lambda s, t: chord(
            [
                chord(_parts(s, t, "part 1", "part 2"), _total(s, t), app=s.app),
                s.step(t, "part 3"),
            ],
            _total(s, t),
            app=s.app,
        ),
        ("part 1", "part 2", "part 3", "total", "total"),
        [["part 1", "part 2"], "part 3"],
        joins=True,
    ),
    Flow(
        "chord_with_a_chain",
        lambda s, t: chord(
            _parts(s, t, "part 1", "part 2"), chain(_total(s, t), s.step(t, "last")), app=s.app
        ),
        ("part 1", "part 2", "total", "last"),
        "last",
        joins=True,
    ),
    Flow(
        "chord_with_a_chord",
        lambda s, t: chord(
            _parts(s, t, "part 1", "part 2"),
            chord(_parts(s, t, "part 3", "part 4"), _total(s, t), app=s.app),
            app=s.app,
        ),
        ("part 1", "part 2", "part 3", "part 4", "total"),
        ["part 3", "part 4"],
        joins=True,
    ),
    Flow(
        "failing_chord",
        lambda s, t: chord(
            [s.step(t, "part 1"), s.task("failing").s(tag=t), s.step(t, "part 2")],
            _total(s, t).set(link_error=[s.task("handle_error").s(tag=t)]),
            app=s.app,
        ),
        ("part 1", "part 2", "error handled"),
        error="as told",
        joins=True,
    ),
    Flow("retry", lambda s, t: s.task("retrying").s(tag=t), ("try 2",), "done"),
    Flow("autoretry", lambda s, t: s.task("autoretrying").s(tag=t), ("try 2",), "done"),
    Flow("backoff", lambda s, t: s.task("backing_off").s(tag=t), ("try 2",), "done"),
    Flow(
        "replace",
        lambda s, t: s.task("replaced").s(tag=t),
        ("host", "replacement"),
        "replacement",
    ),
    Flow(
        "replace_by_chain",
        lambda s, t: s.task("replaced_by_chain").s(tag=t),
        ("first", "host", "second"),
        "second",
    ),
    Flow(
        "replace_by_group",
        lambda s, t: s.task("replaced_by_group").s(tag=t),
        ("host", "part 1", "part 2"),
        ["part 1", "part 2"],
        joins=True,
    ),
    Flow("ignore", lambda s, t: s.task("ignoring").s(tag=t), ("ignored",)),
    Flow("requeue", lambda s, t: s.task("requeueing").s(tag=t), ("once more",), "done"),
    Flow(
        "reject",
        lambda s, t: s.task("rejecting").s(tag=t),
        (),
        passes_not=("committing", "commit_lost", "answer_lost", "handled"),
    ),
    Flow("failure", lambda s, t: s.task("failing").s(tag=t), (), error="as told"),
    Flow(
        "failing_chain",
        lambda s, t: chain(s.step(t, "a"), s.task("failing").s(tag=t), s.step(t, "never")),
        ("a",),
        error="as told",
    ),
    Flow(
        "unserialisable",
        lambda s, t: s.task("unserialisable").s(tag=t),
        (),
        error="not JSON serializable",
    ),
    Flow("ignore_result", lambda s, t: s.task("forgetting").s(tag=t), ("done",)),
    Flow(
        "spawn",
        lambda s, t: s.task("spawning").s(tag=t),
        ("child 1", "child 2", "parent"),
        "parent",
    ),
    Flow(
        "spawn_by_name",
        lambda s, t: s.task("spawning_by_name").s(tag=t),
        ("child 1", "child 2", "parent"),
        "parent",
    ),
    # What a stock task does happens at least once, and so does what it sends.
    Flow(
        "stock_calls_durable",
        lambda s, t: s.task("repeatable_calling_durable").s(tag=t),
        ("durable", "plain"),
        "plain",
        repeats=("durable", "plain"),
    ),
    Flow(
        "durable_calls_stock",
        lambda s, t: s.task("durable_calling_repeatable").s(tag=t),
        ("durable", "plain"),
        "durable",
        repeats=("plain",),
    ),
    Flow("eta", lambda s, t: s.step(t).set(countdown=1), ("done",), "done"),
    Flow(
        "expires",
        lambda s, t: s.step(t, "never").set(expires=_past()),
        (),
        error="expired",
        passes_not=_EVERYWHERE,
    ),
]

#: What only a pool of processes can do, or a worker that lives on while its executions die.
PREFORK_FLOWS = [
    Flow("revoked", _revoked, (), error="revoked", passes_not=_EVERYWHERE),
    # The worker's main process records that the limit was exceeded.
    Flow(
        "hard_limit",
        lambda s, t: _limited(s, t, "hanging"),
        ("error handled",),
        error="TimeLimitExceeded",
    ),
    Flow(
        "soft_limit",
        lambda s, t: _limited(s, t, "hanging_softly"),
        ("error handled",),
        error="SoftTimeLimitExceeded",
    ),
]
