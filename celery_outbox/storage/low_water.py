"""LowWater: where a claim begins, while a snapshot keeps what was claimed before from going away."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row

__all__ = ["LowWater", "Mark"]

#: A look from the beginning that takes longer, in seconds, has met rows that are dead and not yet gone.
_SLOW = 0.1
#: After so many slow looks in a row it is not a busy database that makes them slow.
_OFTEN = 5
#: Such looks take one part in so many of the time.
_SHARE = 20
#: The longest time between two of them, in seconds.
_RARELY = 30.0
#: A transaction that commits within this time of its begin is seen from the mark, too.
_MARGIN = timedelta(seconds=2)


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in the order of claims: rows before it have been claimed, as far as they were there."""

    available_at: datetime
    id: int


class LowWater:
    """Says where the next claim begins to look: at the beginning, or where the last one ended.

    A claim leaves dead versions of its rows at the head of the index. A transaction that holds an old
    snapshot (a report, a dump) keeps them there, and each claim reads all of them again. When that
    takes long, claims begin where the last one ended, and look from the beginning only now and then:
    for what was committed late, or was locked by somebody else.
    """

    def __init__(self) -> None:
        self._mark: Mark | None = None
        self._full_look_at = 0.0
        self._slow_looks = 0

    def start(self) -> Mark | None:
        """Return where to begin; None: at the beginning."""
        return self._mark if time.monotonic() < self._full_look_at else None

    def looked(self, start: Mark | None, rows: Sequence[Row[Any]], seconds: float) -> None:
        """Note a claim that began at `start`, took `rows`, and lasted `seconds`."""
        if start is None:
            self._slow_looks = self._slow_looks + 1 if seconds > _SLOW else 0
            if self._slow_looks >= _OFTEN:
                self._full_look_at = time.monotonic() + min(_SHARE * seconds, _RARELY)
        if rows:
            self._mark = _end_of(rows)


def _end_of(rows: Sequence[Row[Any]]) -> Mark:
    # The claim has overwritten when a row was available: not before it was stored, or due.
    last = max((min(row.created_at, row.due_at or row.created_at), row.id) for row in rows)
    safe = rows[0].now - _MARGIN
    return Mark(*last) if last[0] < safe else Mark(safe, 0)
