"""Faults: what a broker, or a kill, may do to the relay and the worker of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from celery_outbox import events
from celery_outbox.envelope import Envelope
from celery_outbox.plugin import Outbox
from celery_outbox.relay.outcome import Outcome, Refused, Stalled, Undecided
from celery_outbox.relay.publishers import Publisher
from celery_outbox.relay.publishers.base import Meanwhile, nothing

__all__ = ["Faults", "Killed"]

_EVENTS = {
    value for name, value in vars(events).items() if name.isupper() and isinstance(value, str)
}


class Killed(BaseException):
    """The process was killed here. No `Exception`, so that nothing handles it on its way."""


class Faults:
    """Faults that hold for a block. Each concerns all tasks, or those whose name fits a pattern."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def lose_confirm(self, tasks: str = "*") -> Any:
        """The broker has the messages, and the relay does not hear of it: they are sent again."""

        def publish(real: Publisher, batch: Sequence[tuple[int, Envelope]]) -> dict[int, Outcome]:
            answers = real.publish(batch)
            return {number: Undecided("the confirm was lost") for number in answers}

        return self._publishing(publish, tasks)

    def return_message(self, tasks: str = "*") -> Any:
        """The broker returns the messages: no queue is bound where they go."""
        return self._refusing(Refused("unroutable, the broker returned it"), tasks)

    def refuse(self, tasks: str = "*") -> Any:
        """The broker refuses the messages, as a full queue does."""
        return self._refusing(Stalled("the broker refused it (nack: is the queue full?)"), tasks)

    @contextmanager
    def broker_away(self) -> Iterator[None]:
        """The broker can't be reached by the relay."""
        relay: Any = self._outbox.relay()
        real = relay._publisher
        relay._publisher = _Away()
        try:
            yield
        finally:
            relay._publisher = real
            relay.forget_failures()

    @contextmanager
    def kill(self, at: str, *, on: int = 1) -> Iterator[None]:
        """Raise `Killed` at an event of `celery_outbox.events`, the `on`-th time that it happens.

        As after a kill, leases last on and open transactions are gone. The block ends with the
        `Killed`; a block in which the event does not happen raises `AssertionError`.
        """
        if at not in _EVENTS:
            raise ValueError(f"{at!r} is no event: {', '.join(sorted(_EVENTS))}")
        count = 0

        def listen(event: str, details: dict[str, Any]) -> None:
            nonlocal count
            if event == at:
                count += 1
                if count == on:
                    raise Killed(f"{event} {details}")

        try:
            with events.listening(listen):
                yield
        except Killed:
            return
        raise AssertionError(
            f"nothing was killed: {at!r} happened {count} time(s)"
            if count < on
            else f"the kill at {at!r} was swallowed on its way"
        )

    def _refusing(self, outcome: Outcome, tasks: str) -> Any:
        def publish(_: Publisher, batch: Sequence[tuple[int, Envelope]]) -> dict[int, Outcome]:
            return {number: outcome for number, _ in batch}

        return self._publishing(publish, tasks)

    @contextmanager
    def _publishing(
        self,
        fault: Callable[[Publisher, Sequence[tuple[int, Envelope]]], dict[int, Outcome]],
        tasks: str,
    ) -> Iterator[None]:
        relay: Any = self._outbox.relay()
        real = relay._publisher
        relay._publisher = _Faulty(real, fault, tasks)
        try:
            yield
        finally:
            relay._publisher = real
            relay.forget_failures()


class _Faulty:
    """A publisher between the relay and its real one."""

    def __init__(
        self,
        real: Publisher,
        fault: Callable[[Publisher, Sequence[tuple[int, Envelope]]], dict[int, Outcome]],
        tasks: str,
    ) -> None:
        self._real = real
        self._fault = fault
        self._tasks = tasks

    def publish(
        self, batch: Sequence[tuple[int, Envelope]], _meanwhile: Meanwhile = nothing
    ) -> dict[int, Outcome]:
        struck = [entry for entry in batch if fnmatchcase(entry[1].task, self._tasks)]
        spared = [entry for entry in batch if not fnmatchcase(entry[1].task, self._tasks)]
        answers = self._real.publish(spared) if spared else {}
        return {**answers, **(self._fault(self._real, struck) if struck else {})}

    def late(self) -> dict[int, Outcome]:
        return self._real.late()

    def open(self) -> None:
        self._real.open()

    def close(self) -> None:
        self._real.close()


class _Away:
    """The publisher of a broker that is away."""

    def late(self) -> dict[int, Outcome]:
        return {}

    def open(self) -> None:
        raise ConnectionRefusedError("the broker is away, says the test")

    def close(self) -> None: ...
