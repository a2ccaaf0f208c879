"""Child processes of a test: started with a log, awaited by it, killed with all their children."""

import contextlib
import itertools
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

from tests.support.guardian import guardian, kill_family, signal_family
from tests.support.waiting import wait_until

_numbers = itertools.count(1)


class ProcessEnded(AssertionError):
    """A process ended while something was still expected of it."""


class Process:
    """A child process in a session of its own, its output in a log file.

    It starts when it is made. As a context manager it is killed at the end of the block, and prints
    its log if the block failed. It never outlives the Python process that started it.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        name: str | None = None,
        log: Path | None = None,
        user: str | None = None,
    ) -> None:
        """Start ``command``.

        ``env`` is laid over this process's environment, ``log`` is appended to (default: a file
        that is removed on close), and ``user`` is whom to run as (with that user's own group).
        """
        self.command = [str(word) for word in command]
        self.cwd = cwd
        self.env = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        self.name = name or f"{Path(self.command[0]).name}-{next(_numbers)}"
        self._user = user
        self._own_log = log is None
        if log is None:
            folder = Path(tempfile.mkdtemp(prefix=f"outbox-{self.name}-"))
            guardian.watch_folder(folder)
            log = folder / "log"
        self.log_path = log
        self._start()

    def _start(self) -> None:
        with self.log_path.open("ab") as log:
            self._child = subprocess.Popen(
                self.command,
                cwd=self.cwd,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=self._user,
                group=None if self._user is None else pwd.getpwnam(self._user).pw_gid,
                extra_groups=None if self._user is None else [],
            )
        self._cleared = False
        guardian.watch_process(self._child.pid)

    @property
    def pid(self) -> int:
        """The id of the process itself (not of its children)."""
        return self._child.pid

    @property
    def alive(self) -> bool:
        """Whether the process itself still runs (also while paused)."""
        return self._child.poll() is None

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._child.poll()

    @property
    def log(self) -> str:
        """All that the process wrote so far, over its restarts."""
        return self.log_path.read_text(errors="replace")

    def wait_for_log(self, pattern: str, timeout: float = 90.0, after: int = 0) -> re.Match[str]:
        """Return the first match of ``pattern`` in the log, from the character ``after`` on.

        Raises `ProcessEnded` with the end of the log when the process ends without it.
        """
        regex = re.compile(pattern, re.MULTILINE)

        def look() -> re.Match[str] | None:
            ended = not self.alive  # asked before the log is read, so that the last words count
            found = regex.search(self.log, after)
            if found is None and ended:
                raise ProcessEnded(f"{self.describe()} while /{pattern}/ was awaited")
            return found

        try:
            found = wait_until(look, timeout, f"/{pattern}/ in the log of {self.name}")
        except ProcessEnded:
            raise
        except AssertionError as error:
            raise type(error)(f"{error}\n{self.tail()}") from None
        assert found is not None
        return found

    def wait(self, timeout: float = 90.0) -> int:
        """Wait until the process ends by itself; return its exit code."""
        wait_until(lambda: not self.alive, timeout, f"the end of {self.name}")
        code = self._child.wait()
        self._clear()
        return code

    def kill(self) -> None:
        """Kill it and all its descendants (SIGKILL); return when they ended."""
        self._clear()

    def terminate(self, timeout: float = 90.0) -> int:
        """Ask the process itself to end (SIGTERM) and wait for it; return its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process itself."""
        self._child.send_signal(number)

    def pause(self) -> None:
        """Stop it and its descendants (SIGSTOP) where they are."""
        signal_family(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it and its descendants go on (SIGCONT)."""
        signal_family(self.pid, signal.SIGCONT)

    def restart(self) -> None:
        """Run the same command again, after killing what still runs; the log goes on."""
        self._clear()
        self._start()

    def close(self) -> None:
        """Kill it, and remove the log if nobody asked for it."""
        self._clear()
        if self._own_log:
            shutil.rmtree(self.log_path.parent, ignore_errors=True)
            guardian.release_folder(self.log_path.parent)

    def describe(self) -> str:
        """Return one line of state and the end of the log."""
        code = self.returncode
        state = "runs" if code is None else f"ended with code {code}"
        return f"{self.name} {state} ({' '.join(self.command)})\n{self.tail()}"

    def tail(self, lines: int = 40) -> str:
        """Return the last lines of the log."""
        return "\n".join(f"  {self.name} | {line}" for line in self.log.splitlines()[-lines:])

    def _clear(self) -> None:
        if self._cleared:  # from here on the id may be somebody else's
            return
        kill_family(self._child.pid)
        self._child.wait()
        guardian.release_process(self._child.pid)
        self._cleared = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):
                print(f"--- log of {self.describe()}")
        self.close()


def celery_worker(
    app_module: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    *args: str,
    log: Path | None = None,
    ready_timeout: float | None = 90.0,
) -> Process:
    """Start ``celery -A app_module worker``; return when it is ready (``None``: at once).

    Two pool processes, no gossip and no mingle unless ``args`` say otherwise.
    """
    name = f"worker-{next(_numbers)}"
    process = _celery(
        app_module,
        "worker",
        "--loglevel=INFO",
        "--concurrency=2",
        "--without-gossip",
        "--without-mingle",
        f"--hostname={name}-{os.getpid()}@%h",
        *args,
        cwd=cwd,
        env=env,
        name=name,
        log=log,
    )
    if ready_timeout is not None:
        _await_start(process, r"\bready\.$", ready_timeout)
    return process


def celery_beat(
    app_module: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    *args: str,
    log: Path | None = None,
    ready_timeout: float | None = 90.0,
) -> Process:
    """Start ``celery -A app_module beat``, its schedule in ``cwd``; return when it is ready."""
    name = f"beat-{next(_numbers)}"
    process = _celery(
        app_module,
        "beat",
        "--loglevel=INFO",
        "--pidfile=",
        f"--schedule={(cwd or Path.cwd()) / f'{name}.schedule'}",
        *args,
        cwd=cwd,
        env=env,
        name=name,
        log=log,
    )
    if ready_timeout is not None:
        _await_start(process, r"beat: Starting\.\.\.", ready_timeout)
    return process


def outbox_relay(
    app_module: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    *args: str,
    log: Path | None = None,
) -> Process:
    """Start ``celery -A app_module outbox relay``; return at once."""
    name = f"relay-{next(_numbers)}"
    return _celery(app_module, "outbox", "relay", *args, cwd=cwd, env=env, name=name, log=log)


def _celery(
    app_module: str,
    *words: str,
    cwd: Path | None,
    env: Mapping[str, str] | None,
    name: str,
    log: Path | None,
) -> Process:
    command = [sys.executable, "-m", "celery", "-A", app_module, *words]
    # Celery as root warns at length; the pickle it warns about is not in use here.
    overlay = {"C_FORCE_ROOT": "1", **(env or {})}
    return Process(command, cwd=cwd, env=overlay, name=name, log=log)


def _await_start(process: Process, pattern: str, timeout: float) -> None:
    try:
        process.wait_for_log(pattern, timeout)
    except BaseException:
        process.close()
        raise


__all__ = [
    "Process",
    "ProcessEnded",
    "celery_beat",
    "celery_worker",
    "outbox_relay",
]
