"""Strikes: the ways in which a process of the fleet dies, each with SIGKILL."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rehearsal.fleet import Member
from rehearsal.plan import Plan
from rehearsal.witness import RELAYING
from tests.support.guardian import family

__all__ = ["Strike", "Victim", "victims_of"]

#: Tries to kill; False: nobody was there to be killed, try again later.
Strike = Callable[[Member, Random], bool]
#: A victim is at work for a random time below this before the next strike.
MERCY_SECONDS = 0.6
#: How long a strike waits for the victim to be busy, and then for a relay to start.
PATIENCE_SECONDS = 2.0
AMBUSH_SECONDS = 1.2
#: How far into its run a relay is struck, at random below this.
DELAY_SECONDS = 0.005
#: How far into its work a victim is struck, at random below this.
SURPRISE_SECONDS = 0.03


@dataclass
class Victim:
    """Who is struck, in which way, and after how many orders each time."""

    name: str
    member: Member
    strike: Strike
    moments: list[float]
    random: Random
    struck: int = 0
    _mercy: float = MERCY_SECONDS / 2

    @property
    def next_moment(self) -> float | None:
        """After how many orders the next strike is due; None after the last one."""
        return self.moments[self.struck] if self.struck < len(self.moments) else None

    def strike_if_due(
        self, placed: int, *, busy: bool, lie_in_wait: Callable[[], None] | None = None
    ) -> bool:
        """Strike if it is time and the victim has been at work, best while there is work for it.

        `lie_in_wait` returns when it is in the middle of it; without, a random time passes.
        """
        moment = self.next_moment
        if moment is None or placed < moment:
            return False
        seconds = self.member.at_work_for()
        if seconds <= self._mercy or not (busy or seconds > self._mercy + PATIENCE_SECONDS):
            return False
        if lie_in_wait is None:
            time.sleep(self.random.uniform(0, SURPRISE_SECONDS))
        else:
            lie_in_wait()
            time.sleep(self.random.uniform(0, DELAY_SECONDS))
        return self.strike_now()

    def strike_now(self) -> bool:
        """Strike; return whether it hit."""
        hit = self.strike(self.member, self.random)
        if hit:
            self.struck += 1
            self._mercy = self.random.uniform(0, MERCY_SECONDS)
        return hit


def victims_of(plan: Plan, member: Member, folder: Path) -> Iterator[Victim]:
    """Yield the ways in which the plan has this member killed."""
    ways = {
        member.name: kill_whole,
        f"{member.name}'s pool process": kill_pool_process,
        f"{member.name}'s relaying process": kill_relaying_process(folder),
    }
    for name, strike in ways.items():
        if plan.kills.get(name):
            random = Random(f"{plan.seed}/{name}/details")
            yield Victim(name, member, strike, plan.moments(name), random)


def kill_whole(member: Member, random: Random) -> bool:
    """Kill the process with all its children, and start it again."""
    member.kill()
    return True


def kill_pool_process(member: Member, random: Random) -> bool:
    """Kill one of a worker's pool processes; the worker notices, and replaces it."""
    children = family(member.process.pid)[1:]
    if not children:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(random.choice(children), signal.SIGKILL)
        return True
    return False


def kill_relaying_process(folder: Path) -> Strike:
    """Return the strike that kills the pool process which is just running the relay.

    Only that one: without an event loop (brokers that are no servers), a pool process that idles
    holds a lock on the queue which all pool processes share, and takes it to the grave.
    """

    def strike(member: Member, random: Random) -> bool:
        children = set(family(member.process.pid)[1:])
        deadline = time.monotonic() + AMBUSH_SECONDS
        while time.monotonic() < deadline:
            for sign in folder.glob(f"{RELAYING}*"):
                pid = int(sign.name.removeprefix(RELAYING))
                if pid not in children:
                    continue
                # Half of the times at once, for a relay with little to do has ended soon.
                time.sleep(max(0.0, random.uniform(-1, 1) * DELAY_SECONDS))
                if _kill_if_there(pid, sign):
                    return True
            time.sleep(0.0005)
        return False

    return strike


def _kill_if_there(pid: int, sign: Path) -> bool:
    """Kill the process if its sign is still there, after stopping it: it can't get away between."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        there = _stopped(pid) and sign.exists()
        os.kill(pid, signal.SIGKILL if there else signal.SIGCONT)
        if there:
            sign.unlink(missing_ok=True)
        return there
    return False


def _stopped(pid: int) -> bool:
    """Wait until the process stands still; False if it is gone."""
    for _ in range(1000):
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return False
        state = stat[stat.rindex(b")") + 2 :].split()[0]
        if state in (b"T", b"t"):
            return True
        if state in (b"Z", b"X"):
            return False
        time.sleep(0.0005)
    return False
