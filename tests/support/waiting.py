"""Waiting for something to become true, with a deadline and a name for what is awaited."""

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


class WaitTimeout(AssertionError):
    """What was awaited did not happen in time."""


def wait_until(
    predicate: Callable[[], Value],
    timeout: float = 90.0,
    what: str = "the condition",
    interval: float = 0.02,
) -> Value:
    """Return the first true value of ``predicate``; raise `WaitTimeout` that names ``what``.

    The predicate is asked at once, every ``interval`` seconds, and one last time at the deadline.
    What it raises ends the wait.
    """
    deadline = time.monotonic() + timeout
    while True:
        late = time.monotonic() >= deadline
        value = predicate()
        if value:
            return value
        if late:
            raise WaitTimeout(f"waited {timeout:g} s in vain for {what}; last answer: {value!r}")
        time.sleep(interval)
