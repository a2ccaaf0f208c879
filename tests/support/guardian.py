"""The processes that tests start, as families, and the guardian that outlives the tests.

A *family* is a process, its descendants, and the members of the sessions that those lead:
PostgreSQL's backends and Celery's pool processes belong to it, whichever process group they are in.

The guardian is a small process of its own, one for each Python process that starts children. It
holds the reading end of a pipe whose writing end closes when that Python process ends, however it
ends (SIGKILL included), and then kills every family and removes every folder still in its charge.
This file runs as a script for that, so it imports the standard library only.
"""

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO


def family(root: int) -> list[int]:
    """Return the ids of ``root``'s family that are still running, ``root`` first."""
    parents: dict[int, int] = {}
    sessions: dict[int, int] = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            stat = Path(entry.path, "stat").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        # After the name, which is in parentheses and may hold anything: state ppid pgrp session.
        state, parent, _, session = stat[stat.rindex(b")") + 2 :].split()[:4]
        if state not in (b"Z", b"X"):
            parents[int(entry.name)] = int(parent)
            sessions[int(entry.name)] = int(session)
    members = {root}
    while True:
        more = {
            pid
            for pid, parent in parents.items()
            if pid not in members and (parent in members or sessions[pid] in members)
        }
        if not more:
            break
        members |= more
    return sorted(members & parents.keys(), key=lambda pid: (pid != root, pid))


def signal_family(root: int, number: signal.Signals) -> None:
    """Send a signal to each member of the family, ``root`` first."""
    for pid in family(root):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_family(root: int) -> None:
    """Kill the family (SIGKILL) and return when none of it runs any more."""
    # Stopped first, the root cannot start another child between the look and the kill.
    with contextlib.suppress(ProcessLookupError):
        os.kill(root, signal.SIGSTOP)
    doomed = family(root)
    while doomed:
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
        doomed = [pid for pid in {*doomed, *family(root)} if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return stat[stat.rindex(b")") + 2 :].split()[0] not in (b"Z", b"X")


class Guardian:
    """This process's end of the pipe: what is in the guardian's charge, and what no longer is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pipe: IO[bytes] | None = None
        self._owner: int | None = None

    def watch_process(self, pid: int) -> None:
        """Kill the family of ``pid`` when this process ends."""
        self._say(f"+process {pid}")

    def release_process(self, pid: int) -> None:
        """Forget ``pid``: it has ended and was waited for."""
        self._say(f"-process {pid}")

    def watch_folder(self, path: Path) -> None:
        """Remove the folder when this process ends."""
        self._say(f"+folder {path}")

    def release_folder(self, path: Path) -> None:
        """Forget the folder: it has been removed."""
        self._say(f"-folder {path}")

    def _say(self, line: str) -> None:
        with self._lock:
            if self._pipe is None or self._owner != os.getpid():  # the first time, or after a fork
                guard = subprocess.Popen(
                    [sys.executable, "-I", "-S", __file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    cwd="/",
                    start_new_session=True,  # out of reach of Ctrl-C and of kills of our group
                )
                assert guard.stdin is not None
                self._pipe, self._owner = guard.stdin, os.getpid()
                atexit.register(_let_go, guard)
            self._pipe.write(line.encode() + b"\n")
            self._pipe.flush()


def _let_go(guard: "subprocess.Popen[bytes]") -> None:
    if guard.stdin is not None:
        guard.stdin.close()
    guard.wait()


guardian = Guardian()


def main() -> None:
    """Keep the list until the other end of the pipe closes, then clear up."""
    processes: dict[str, None] = {}
    folders: dict[str, None] = {}
    charges = {"process": processes, "folder": folders}
    for line in sys.stdin:
        word, _, name = line.rstrip("\n").partition(" ")
        if word.startswith("+"):
            charges[word[1:]][name] = None
        else:
            charges[word[1:]].pop(name, None)
    for pid in reversed(processes):
        kill_family(int(pid))
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
