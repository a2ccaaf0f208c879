"""Fleet: the shop's processes, each started again whenever it has ended."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.support.processes import Process

__all__ = ["Fleet", "Member"]


@dataclass(eq=False)
class Member:
    """One process of the shop, as a supervisor sees it.

    `ready` is the pattern by which its log says that it is at work.
    """

    name: str
    launch: Callable[[], Process]
    ready: re.Pattern[bytes]
    kills: int = 0
    crashes: int = 0
    _process: Process | None = field(default=None, repr=False)
    _log_start: int = 0
    _ready_at: float | None = None

    def start(self) -> None:
        """Start it; the log goes on where it ended."""
        if self._process is None:
            self._process = self.launch()
        else:
            self._log_start = self._process.log_path.stat().st_size
            self._process.restart()
        self._ready_at = None

    @property
    def process(self) -> Process:
        """The process that runs, or ran last."""
        if self._process is None:
            raise RuntimeError(f"{self.name} was never started")
        return self._process

    def at_work_for(self) -> float:
        """Return for how many seconds it has been at work; 0.0 while it is not."""
        if not self.process.alive:
            return 0.0
        if self._ready_at is None:
            with self.process.log_path.open("rb") as log:
                log.seek(self._log_start)
                if not self.ready.search(log.read()):
                    return 0.0
            self._ready_at = time.monotonic()
        return time.monotonic() - self._ready_at

    def kill(self) -> None:
        """Kill the process and all its children (SIGKILL), and start it again."""
        self.process.kill()
        self.kills += 1
        self.start()

    def tend(self) -> bool:
        """Start it again if it ended by itself; return whether it had."""
        if self.process.alive:
            return False
        self.crashes += 1
        self.start()
        return True

    def stop(self, timeout: float) -> None:
        """Ask it to end (SIGTERM): it finishes what it is doing."""
        if self.process.alive:
            self.process.terminate(timeout)

    def close(self) -> None:
        """Kill what still runs, for good."""
        if self._process is not None:
            self._process.close()


@dataclass(frozen=True)
class Fleet:
    """All processes of one run."""

    web: Member
    workers: list[Member]
    relays: list[Member]

    def __iter__(self) -> Iterator[Member]:
        return iter([self.web, *self.workers, *self.relays])

    def start_back_office(self) -> None:
        """Start workers and relays."""
        for member in (*self.workers, *self.relays):
            member.start()

    def close(self) -> None:
        """Kill everything, for good."""
        for member in self:
            member.close()
