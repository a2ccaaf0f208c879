"""Bypasses: messages that go around the outbox, and the line that sends them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any
from weakref import WeakSet

from celery.signals import before_task_publish

__all__ = ["Bypassed", "Bypasses"]

logger = logging.getLogger("celery_outbox.bypass")

#: Whose frames are not the line that sends.
_NOT_THE_CALLER = {"celery", "kombu", "celery_outbox", "sqlalchemy", "contextlib", "vine"}

_in_seam: ContextVar[bool] = ContextVar("celery_outbox_in_seam", default=False)


class Bypassed(BaseException):
    """A message goes around the outbox, and ``outbox_bypass`` is ``"refuse"``: a setting for tests.

    No `Exception`, so that neither Celery's signals nor the code under test swallow it.
    """


class Bypasses:
    """What happens to a message that goes around the outbox of one app, as its settings say.

    `policy` is ``"warn"``, once for each line of the app, ``"refuse"`` or ``"allow"``; `has_inbox`
    tells which tasks are durable.
    """

    def __init__(self, policy: Callable[[], str], has_inbox: Callable[[str], bool]) -> None:
        self._policy = policy
        self._has_inbox = has_inbox
        self._reported: set[tuple[str, str]] = set()

    def watch(self) -> None:
        """Watch the other apps of this process, in which a task of ours may be sent by name."""
        _watching.add(self)
        before_task_publish.connect(_look, weak=False, dispatch_uid="celery_outbox.bypass")

    def enter_seam(self) -> Token[bool]:
        """What is published until `leave_seam` has been seen by the outbox, which let it pass."""
        return _in_seam.set(True)

    def leave_seam(self, token: Token[bool]) -> None:
        """End what `enter_seam` began."""
        _in_seam.reset(token)

    def report(self, task: str, how: str) -> None:
        """Warn of a message, or raise `Bypassed`."""
        policy = self._policy()
        if policy == "allow":
            return
        where = _caller()
        sentence = f"{task} {how} (sent at {where})"
        if policy == "refuse":
            raise Bypassed(sentence)
        if (task, where) not in self._reported:
            self._reported.add((task, where))
            logger.warning("%s", sentence)

    def look(self, task: str) -> None:
        """Report a message of another app, if its task is durable here."""
        if self._has_inbox(task):
            self.report(task, "is durable, and goes around the outbox, through another Celery app")


_watching: WeakSet[Bypasses] = WeakSet()


def _look(sender: Any = None, **_: Any) -> None:
    if not _in_seam.get() and isinstance(sender, str):
        for bypasses in tuple(_watching):
            bypasses.look(sender)


def _caller() -> str:
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_THE_CALLER:
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"
