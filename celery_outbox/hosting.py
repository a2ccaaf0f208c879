"""WorkerRelay: the relay in a thread of ``celery worker``, for apps that want no further process."""

from __future__ import annotations

import logging
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Protocol, cast

from celery import bootsteps

from celery_outbox.inbox.installation import installed_in

if TYPE_CHECKING:
    from celery_outbox.config import Config
    from celery_outbox.relay.loop import Relay

__all__ = ["WorkerRelay"]

logger = logging.getLogger("celery_outbox.relay")

#: How long a worker that stops waits for the batch in hand, in seconds, besides the confirms.
_PATIENCE = 5.0


class Host(Protocol):
    """The app's outbox, as its worker sees it."""

    @property
    def config(self) -> Config:
        """The settings."""

    def hosted_relay(self) -> Relay:
        """Return a relay that shares no connection and no pool with the rest of the process."""


class WorkerRelay(bootsteps.StartStopStep):
    """Runs a relay while the worker runs, with ``outbox_relay_in_worker``.

    The worker's pool of processes forks from this process at any time, also while the relay works:
    nothing that the relay holds or locks may be of use to a child.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self._stop = Event()
        self._thread: Thread | None = None
        self._relay: Relay | None = None
        self._host = cast("Host | None", installed_in(parent.app))

    def include_if(self, parent: Any) -> bool:
        """Only where the setting says so."""
        return self._host is not None and self._host.config.relay_in_worker

    def start(self, parent: Any) -> None:
        """Start the thread."""
        assert self._host is not None
        relay = self._relay = self._host.hosted_relay()
        self._thread = Thread(
            target=relay.run, args=(self._stop,), name="celery-outbox-relay", daemon=True
        )
        self._thread.start()
        logger.info("relay: runs in this worker")

    def stop(self, parent: Any) -> None:
        """Let the relay end its batch."""
        self._stop.set()
        if self._thread is not None and self._host is not None and self._relay is not None:
            self._relay.wake()
            self._thread.join(self._host.config.confirm_timeout_seconds + _PATIENCE)

    terminate = stop
