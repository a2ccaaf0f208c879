"""The relay as a program: it runs until it is told to stop, and then ends its batch."""

from __future__ import annotations

import logging
import signal
from threading import Event
from types import FrameType

from celery_outbox.relay.loop import Relay

__all__ = ["run_until_told"]

logger = logging.getLogger("celery_outbox.relay")


def run_until_told(relay: Relay) -> None:
    """Run `relay` in the main thread until SIGTERM or SIGINT; a second one ends it at once."""
    stop = Event()

    def told(number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise SystemExit(128 + number)
        logger.info("relay: %s, ending the batch in hand", signal.Signals(number).name)
        stop.set()
        relay.wake()

    before = {number: signal.signal(number, told) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        logger.info("relay: ready")
        relay.run(stop)
        logger.info("relay: stopped")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
