"""Outcome: what a broker made of one message, and the rule that says what follows."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Confirmed", "Outcome", "Refused", "Undecided", "backoff"]


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The broker has taken responsibility."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The broker does not take this message: returned, refused, or the channel closed for it."""

    error: str


@dataclass(frozen=True, slots=True)
class Undecided:
    """The broker went away, or was silent, before it said anything. No fault of the message."""

    error: str


Outcome: TypeAlias = Confirmed | Refused | Undecided


def backoff(
    attempts: int, *, base: float, cap: float, random: Callable[[], float] = random.random
) -> float:
    """Return the seconds to wait after the `attempts`-th failure.

    Exponential with full jitter (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture
    Blog, 2015), so that what failed together does not come back together.
    """
    return random() * min(cap, base * 2.0 ** min(attempts - 1, 60))
