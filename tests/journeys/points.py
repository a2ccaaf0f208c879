"""Points: places in a process at which a test has told it to die or to stop.

A point is armed through a file, so that processes which run already obey; each strikes once, or once
for every execution of a task. A process that was told so strikes at every event of celery_outbox.

A run of a flow may have a point of its own: its tag says so (``chain@body-1a2b``), and whatever
executes one of its tasks is struck there, once for each execution. In ``chain@body.once-1a2b`` it is
struck once for the whole run.
"""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from urllib.parse import quote

from celery_outbox import events
from tests.support.waiting import wait_until

__all__ = ["Points"]

#: The tag of the run whose task is executed in this context.
_run: ContextVar[str] = ContextVar("run", default="")


class Points:
    """The points of the processes that share a folder."""

    def __init__(self, folder: Path) -> None:
        self._armed = folder / "armed"
        self._struck = folder / "struck"
        for path in (self._armed, self._struck):
            path.mkdir(parents=True, exist_ok=True)

    # In the test

    def arm(
        self,
        point: str,
        number: signal.Signals = signal.SIGKILL,
        *,
        only: str = "",
        each: bool = False,
        skip: int = 0,
    ) -> None:
        """Send `number` to the process that comes to `point`.

        Once, or once for `each` key; only for keys that contain `only`; not the first `skip` times.
        """
        order = {"signal": int(number), "only": only, "each": each, "skip": skip}
        draft = self._armed / f".{point}"
        draft.write_text(json.dumps(order))
        draft.rename(self._armed / point)

    def disarm(self, point: str) -> None:
        """Let processes pass again."""
        (self._armed / point).unlink()

    def struck(self, point: str) -> list[str]:
        """Return the keys for which a process was struck at `point`."""
        return sorted(path.name.partition("~")[2] for path in self._struck.glob(f"{point}~*"))

    def wait_struck(self, point: str, times: int = 1, timeout: float = 90.0) -> None:
        """Return when processes were struck at `point` so often."""
        wait_until(lambda: len(self.struck(point)) >= times, timeout, f"a strike at {point!r}")

    def struck_runs(self) -> dict[str, int]:
        """Return how often the runs with a point of their own were struck, by their tags."""
        times: dict[str, int] = {}
        for path in self._struck.glob("*~*@*"):
            tag = path.name.partition("~")[2].partition("~")[0]
            times[tag] = times.get(tag, 0) + 1
        return times

    # In the process

    @staticmethod
    def begin_run(tag: str) -> None:
        """Take what passes by in this context for a part of the run `tag`."""
        _run.set(tag)

    @staticmethod
    @contextmanager
    def running(tag: str) -> Iterator[None]:
        """Take what passes by in this block for a part of the run `tag`."""
        token = _run.set(tag)
        try:
            yield
        finally:
            _run.reset(token)

    def strikes_run(self, point: str, key: str = "") -> bool:
        """Say whether the run that passes by has its accident here, and now."""
        tag = _run.get()
        own, _, _ = tag.partition("@")[2].rpartition("-")
        own, _, once = own.partition(".")
        if own != point:
            return False
        return self._mark(f"{point}~{tag}" + ("" if once else f"~{quote(key, safe='')}"), 0)

    def pass_by(self, point: str, key: str = "") -> None:
        """Die or stop here, if told to."""
        if self.strikes_run(point, key):
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            order = json.loads((self._armed / point).read_text())
        except FileNotFoundError:
            return
        if order["only"] not in key:
            return
        if order["skip"] and not self._mark(f"{point}^", order["skip"]):
            return
        mark = f"{point}~{quote(key, safe='') if order['each'] else ''}"
        if self._mark(mark, 0):
            # Not os.kill: another thread may take it, and until that one runs this one goes on.
            signal.raise_signal(order["signal"])

    def _mark(self, name: str, skip: int) -> bool:
        """Leave a mark that was not there; with `skip`, say whether all numbered marks are there."""
        for number in range(skip) if skip else (None,):
            path = self._struck / (name if number is None else f"{name}{number}")
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                continue
            return not skip
        return bool(skip)

    def watch_events(self) -> None:
        """Pass by a point at each event of this process."""

        def listen(name: str, details: dict[str, Any]) -> None:
            self.pass_by(name, str(details.get("key", "")))

        events.subscribe(listen)
