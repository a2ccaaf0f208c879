"""Finding: what a check has found, how bad it is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["Finding", "Level", "error", "fine", "skipped", "warning"]


class Level(str, Enum):
    """How bad a finding is."""

    #: Proved to be as it should be.
    OK = "ok"
    #: Could not be looked at; another finding says why.
    SKIPPED = "skipped"
    #: It works, at a cost or a risk that somebody should know of.
    WARNING = "warning"
    #: Messages stand still, get lost or are refused, now or after the next accident.
    ERROR = "error"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence on what was found and, unless all is well, one on what to do."""

    level: Level
    says: str
    advice: str = ""
    #: The name of the check that has found it.
    check: str = ""


def fine(says: str) -> Finding:
    """Return a finding that all is well, and how that was proved."""
    return Finding(Level.OK, says)


def skipped(says: str) -> Finding:
    """Return a finding that something could not be looked at."""
    return Finding(Level.SKIPPED, says)


def warning(says: str, advice: str) -> Finding:
    """Return a finding that somebody should know of."""
    return Finding(Level.WARNING, says, advice)


def error(says: str, advice: str) -> Finding:
    """Return a finding that somebody has to act on."""
    return Finding(Level.ERROR, says, advice)
