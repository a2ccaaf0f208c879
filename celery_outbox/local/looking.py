"""Looking: when a consumer looks for messages, in a loop of its own and in kombu's event loop."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from threading import Condition
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from celery_outbox.storage.notifications import Listener

__all__ = ["Bell", "LoopBell", "Pause"]

logger = logging.getLogger("celery_outbox.local")

#: The pause after the first look that found nothing, in seconds; doubled with each.
_SHORTEST = 0.005
#: When it is tried again to listen to the database, in seconds.
_LISTEN_AGAIN = 10.0


class Pause:
    """How long to wait before the next look: the longer, the longer nothing was found."""

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._next = _SHORTEST

    def found(self) -> None:
        """Something was found, or has changed."""
        self._next = _SHORTEST

    def next(self) -> float:
        """Return the pause that is due."""
        pause = min(self._next, self._longest)
        self._next = 2 * pause
        return pause


class Bell:
    """Ends the wait of one thread. Any other one rings."""

    def __init__(self) -> None:
        self._condition = Condition()
        self._rung = False

    def ring(self) -> None:
        """Let who waits, or waits next, go on."""
        with self._condition:
            self._rung = True
            self._condition.notify()

    def wait(self, seconds: float) -> bool:
        """Wait; return whether it has rung."""
        with self._condition:
            rung = self._rung or self._condition.wait(seconds)
            self._rung = False
            return rung


class LoopBell:
    """Looks for messages in kombu's event loop: when it is rung, and after pauses.

    The database rings as well, where `listen` gives a listener. It is not relied upon: a pooler may
    swallow what it says. `look` returns how long it may take until the next look, if nothing rings;
    what it raises is the loop's to handle.
    """

    def __init__(
        self, loop: Any, look: Callable[[], float], listen: Callable[[], Listener | None]
    ) -> None:
        self._loop = loop
        self._look = look
        self._listen = listen
        self._listener: Listener | None = None
        self._listening = -1
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._timer: Any = None
        self._closed = False
        loop.add_reader(self._reader, self._answer)
        self._begin_to_listen()
        self.ring()

    def ring(self) -> None:
        """Let the loop look. By any thread."""
        # Full: it will look. Closed: nobody does.
        with suppress(BlockingIOError, OSError):
            os.write(self._writer, b"!")

    def _answer(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._reader, 4096)
        self._look_again()

    def _look_again(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        pause = self._look()
        if not self._closed:
            self._timer = self._loop.call_later(pause, self._look_again)

    # What the database says

    def _begin_to_listen(self) -> None:
        self._listener = self._listen()
        if self._listener is not None:
            # Remembered: a connection that is gone does not know it any more.
            self._listening = self._listener.fileno()
            self._loop.add_reader(self._listening, self._hear)

    def _hear(self) -> None:
        assert self._listener is not None
        try:
            heard = self._listener.heard()
        except SQLAlchemyError as exc:
            logger.warning("notifications of the database have ended: %s", exc)
            self._stop_listening()
            self._loop.call_later(_LISTEN_AGAIN, self._listen_again)
            return
        if heard:
            self._look_again()

    def _listen_again(self) -> None:
        if self._closed or self._listener is not None:
            return
        try:
            self._begin_to_listen()
        except SQLAlchemyError as exc:
            logger.warning("no notifications of the database: %s", exc)
            self._loop.call_later(_LISTEN_AGAIN, self._listen_again)

    def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            self._loop.remove_reader(self._listening)
            listener.close()

    def close(self) -> None:
        """Look no more."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._stop_listening()
        self._loop.remove_reader(self._reader)
        os.close(self._reader)
        # The last one, so that no other thread writes into what somebody else has opened since.
        writer, self._writer = self._writer, -1
        os.close(writer)
