"""Breaker: after a failure it is better to wait than to try, each time for longer.

M. Nygard, "Release It!", 2007: closed while all goes well, open after a failure, and then one try
decides. What failed together must not come back together, so the pauses have full jitter (M. Brooker,
"Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial

__all__ = ["Breaker", "Breakers", "backoff"]


def backoff(
    attempts: int, *, base: float, cap: float, random: Callable[[], float] = random.random
) -> float:
    """Return the seconds to wait after the `attempts`-th failure: exponential, with full jitter."""
    return random() * min(cap, base * 2.0 ** min(attempts - 1, 60))


class Breaker:
    """Open for a time after each failure; the first pause is about `base` seconds, none above `cap`."""

    def __init__(
        self, *, base: float, cap: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._base = base
        self._cap = cap
        self._clock = clock
        self._failures = 0
        self._closes_at = 0.0

    @property
    def seconds_left(self) -> float:
        """How long it stays open; 0 when it is closed, or when it is time to try."""
        return max(0.0, self._closes_at - self._clock()) if self._failures else 0.0

    def failed(self) -> float:
        """Open it; return for how many seconds. A failure while it is open is the same failure."""
        if not self.seconds_left:
            self._failures += 1
            # Not less than half: a pause of almost nothing would be none.
            pause = backoff(self._failures, base=self._base, cap=self._cap)
            longest = min(self._cap, self._base * 2.0 ** min(self._failures - 1, 60))
            self._closes_at = self._clock() + (longest + pause) / 2
        return self.seconds_left

    def succeeded(self) -> None:
        """Close it."""
        self._failures = 0


class Breakers:
    """A breaker for each destination that has failed and not succeeded since."""

    def __init__(
        self, *, base: float, cap: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._make = partial(Breaker, base=base, cap=cap, clock=clock)
        self._breakers: dict[str, tuple[Breaker, str]] = {}

    def seconds_left(self, name: str) -> float:
        """How long `name` is to be left alone; 0: not at all."""
        entry = self._breakers.get(name)
        return 0.0 if entry is None else entry[0].seconds_left

    def error(self, name: str) -> str:
        """Why `name` is left alone."""
        return self._breakers[name][1]

    def failed(self, name: str, error: str) -> float:
        """Leave `name` alone for a while; return for how many seconds."""
        breaker = self._breakers[name][0] if name in self._breakers else self._make()
        self._breakers[name] = (breaker, error)
        return breaker.failed()

    def succeeded(self, name: str) -> None:
        """All is well with `name`."""
        self._breakers.pop(name, None)

    def clear(self) -> None:
        """All is well with all of them."""
        self._breakers.clear()
