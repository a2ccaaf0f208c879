"""Until quiet: relay and execute in this thread, until nothing is left to do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import Empty
from typing import Any

from celery import _state
from celery.app.trace import build_tracer
from celery.concurrency.base import BasePool
from celery.exceptions import TaskRevokedError
from celery.utils.imports import symbol_by_name
from sqlalchemy import select

from celery_outbox.checks import check
from celery_outbox.inbox.task import DurableTask
from celery_outbox.plugin import Outbox
from celery_outbox.relay.loop import Tally

__all__ = ["NotQuiet", "Run", "run_until_quiet"]

_PAUSE = 0.02
_HOSTNAME = "celery_outbox.testing"


@dataclass
class Run:
    """What was done until nothing was left."""

    #: The names of the tasks whose deliveries were handled, in order.
    tasks: list[str] = field(default_factory=list)
    #: What the relay did.
    tally: Tally = field(default_factory=Tally)


class NotQuiet(AssertionError):
    """Something is left, and does not move."""


class _Here(BasePool):
    """A pool that is this thread. A `BaseException` ends the worker, as a kill would."""

    def on_apply(
        self,
        target: Any,
        args: Any = (),
        kwargs: Any = None,
        callback: Any = None,
        accept_callback: Any = None,
        **_: Any,
    ) -> None:
        if accept_callback:
            accept_callback(None, time.monotonic())
        answer = target(*args, **(kwargs or {}))
        if callback:
            callback(answer)


def run_until_quiet(outbox: Outbox, timeout: float = 10.0) -> Run:
    """Relay what is due and execute what arrives, by turns, until neither does anything.

    The deliveries are handled in this thread by Celery's own request and tracer, as a worker with a
    pool of one would: inbox, commit, retries, links, acknowledgement. Messages that are scheduled for
    later stay where they are (`Time.travel`). Returns what was done. Raises `NotQuiet`, with every
    row that is stuck, if after `timeout` seconds something is left, and at once for a dead letter.
    """
    app = outbox.app
    app.finalize()
    check(app, outbox)
    run = Run()
    deadline = time.monotonic() + timeout
    with _tracers(app), app.connection_for_read() as broker:
        channel = broker.default_channel
        while True:
            tally = outbox.relay_all()
            run.tally += tally
            moved = _execute_all(outbox, broker, channel, run, deadline)
            if not (moved or tally.claimed):
                counts = outbox.store.counts()
                if counts["dead"]:
                    raise NotQuiet(_dump(outbox, run, "there are dead letters"))
                if not counts["outgoing"] + counts["in_flight"]:
                    return run
                time.sleep(_PAUSE)
            if time.monotonic() > deadline:
                raise NotQuiet(_dump(outbox, run, f"not quiet after {timeout:g} s"))


def _execute_all(outbox: Outbox, broker: Any, channel: Any, run: Run, deadline: float) -> bool:
    moved = False
    for name in list(outbox.app.amqp.queues):
        queue = outbox.app.amqp.queues[name](channel)
        queue.declare()
        while time.monotonic() <= deadline:
            try:
                message = queue.get(no_ack=False, accept=outbox.app.conf.accept_content)
            except Empty:
                message = None
            if message is None:
                break
            moved = True
            _execute(outbox, broker, message, run)
    return moved


def _execute(outbox: Outbox, broker: Any, message: Any, run: Run) -> None:
    app = outbox.app
    name = message.headers.get("task")
    task = app.tasks.get(name)
    if task is None:
        message.reject()
        raise NotQuiet(f"a message for the task {name!r} arrived, which the app does not have")
    request = symbol_by_name(task.Request)(
        message,
        app=app,
        task=task,
        hostname=_HOSTNAME,
        on_ack=message.ack_log_error,
        on_reject=message.reject_log_error,
        connection_errors=broker.connection_errors,
    )
    try:
        with suppress(TaskRevokedError):
            request.execute_using_pool(_Here())
            run.tasks.append(name)
    except BaseException:
        # The worker is gone; the broker delivers again.
        if not message.acknowledged:
            message.requeue()
        raise


@contextmanager
def _tracers(app: Any) -> Iterator[None]:
    """Give each task its tracer, as a worker that starts does; the app is the current one."""
    before = {name: task.__trace__ for name, task in app.tasks.items()}
    previous = _state._tls.current_app
    app.set_current()
    for name, task in app.tasks.items():
        task.__trace__ = build_tracer(name, task, app.loader, _HOSTNAME, app=app)
    try:
        yield
    finally:
        _state._set_current_app(previous)
        for name, tracer in before.items():
            task = app.tasks[name]
            if isinstance(task, DurableTask):
                # It is wrapped already.
                task._tracer = tracer
            else:
                task.__trace__ = tracer


def _dump(outbox: Outbox, run: Run, title: str) -> str:
    """Every row that is left, for whom it may concern."""
    tables = outbox.tables
    lines = [f"{title}; {len(run.tasks)} delivery(ies) handled, {run.tally}"]
    with outbox.engine.connect() as connection:
        for heading, table in (("outbox", tables.outbox), ("dead letters", tables.dead_letter)):
            rows = connection.execute(select(table).order_by(table.c.id)).mappings().all()
            lines.append(f"{heading}: {len(rows)}")
            for row in rows:
                lines.append(
                    f"  {row['id']} {row['task']}[{row['task_id']}] → {row['destination']}"
                )
                lines.extend(
                    f"     {name}: {row[name]}"
                    for name in ("attempts", "due_at", "available_at", "lease_token", "last_error")
                    if name in row and row[name] is not None
                )
    if run.tasks:
        lines.append("handled last: " + ", ".join(run.tasks[-10:]))
    return "\n".join(lines)
