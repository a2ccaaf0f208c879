"""DurableRequest: what the worker's main process decides about a delivery."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from functools import partial
from typing import Any

from celery.exceptions import TimeLimitExceeded
from celery.worker.request import Request
from celery.worker.state import task_ready

from celery_outbox.envelope import message_key
from celery_outbox.inbox.parking import Busy, park

__all__ = ["DurableRequest"]


class DurableRequest(Request):
    """A delivery of a durable task.

    On a hard time limit billiard tells the main process first and kills the child afterwards, so
    that the child could still commit what is then recorded as failed. It is killed first here, and
    the inbox says what really happened.
    """

    def on_failure(
        self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
    ) -> Any:
        """Let a delivery wait that must; end the child before a hard time limit is recorded."""
        exception = getattr(exc_info.exception, "exc", exc_info.exception)
        # A local queue keeps it with a message that goes back.
        self.message.given_back_for = exception
        if isinstance(exception, Busy):
            task_ready(self)
            pause = self.task.installation.config.busy_pause_seconds
            return park(self.app, partial(self.reject, requeue=True), pause)
        if isinstance(exception, TimeLimitExceeded):
            self._end_child()
        return super().on_failure(exc_info, send_failed_event, return_ok)

    def on_timeout(self, soft: bool, timeout: float) -> Any:
        """End the child before a hard time limit is recorded."""
        if not soft:
            self._end_child()
        return super().on_timeout(soft, timeout)

    def _end_child(self) -> None:
        if self.worker_pid and self.worker_pid != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(self.worker_pid, signal.SIGKILL)

    def _success_was_stored(self) -> bool:
        # Celery's guard for lost workers goes by task id, which two messages may share (a group
        # that holds one frozen signature twice). The next delivery asks the inbox.
        return False

    def _announce_revoked(self, *args: Any, **kwargs: Any) -> Any:
        # A revoked or expired message will not be handled by anybody.
        installation = self.task.installation
        if installation.config.keep_until_handled:
            store = installation.store
            with store.engine.begin() as connection:
                store.forget(connection, message_key(self._request_dict))
        return super()._announce_revoked(*args, **kwargs)
