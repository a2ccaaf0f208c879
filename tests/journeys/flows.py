"""Flows: everything that a canvas can be, what it must leave behind, and what it must return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from celery import chain, chord, group

from celery_outbox.errors import OutboxError
from tests.journeys.site import Site, new_tag
from tests.support.waiting import wait_until

__all__ = ["FLOWS", "Flow", "Run"]

#: The flow has no result that anybody could wait for.
NOTHING = object()


@dataclass(frozen=True)
class Flow:
    """A canvas: `effects` are in the database once, when it is over; `result` is what it returns."""

    name: str
    build: Callable[[Site, str], Any]
    effects: tuple[str, ...]
    result: Any = NOTHING
    error: str | None = None
    #: It needs a result backend that can join (chords).
    joins: bool = False

    def start(self, site: Site) -> Run:
        """Send it in a transaction."""
        tag = new_tag(self.name)
        return Run(self, site, tag, site.send(self.build(site, tag)))


@dataclass(frozen=True)
class Run:
    """One run of a flow."""

    flow: Flow
    site: Site
    tag: str
    result: Any

    def finish(self, timeout: float = 30.0) -> None:
        """Wait for its end: its result and all its effects."""
        flow = self.flow
        if flow.error is not None:
            with pytest.raises(Exception, match=flow.error) as caught:
                self.result.get(timeout=timeout)
            assert not isinstance(caught.value, OutboxError)
        elif flow.result is not NOTHING:
            assert self.result.get(timeout=timeout) == flow.result
        wait_until(
            lambda: len(self.site.effects(self.tag)) >= len(flow.effects),
            timeout,
            f"the effects of {self.tag}",
        )

    def verify(self) -> None:
        """Say whether its effects are as they must be; when all is quiet."""
        assert self.site.effects(self.tag) == sorted(self.flow.effects)


def _frozen_twice(site: Site, tag: str) -> Any:
    signature = site.step(tag, "twin")
    signature.freeze()
    return group([signature, signature], app=site.app)


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
        "link_error",
        lambda s, t: s.task("failing").s(tag=t).set(link_error=[s.task("handle_error").s(tag=t)]),
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
    Flow("retry", lambda s, t: s.task("retrying").s(tag=t), ("try 2",), "done"),
    Flow("autoretry", lambda s, t: s.task("autoretrying").s(tag=t), ("try 2",), "done"),
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
    Flow("ignore", lambda s, t: s.task("ignoring").s(tag=t), ("ignored",)),
    Flow("requeue", lambda s, t: s.task("requeueing").s(tag=t), ("once more",), "done"),
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
]
