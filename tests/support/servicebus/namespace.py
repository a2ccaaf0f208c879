"""A real namespace, with the same face as the stand-in; what only a stand-in can do is left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from types import TracebackType
from typing import Any

from kombu import Connection
from typing_extensions import Self

from tests.support.servicebus.faults import Fault
from tests.support.servicebus.server import ServiceBus

__all__ = ["Namespace", "namespace"]

#: The address for kombu, with a policy that may manage, send and listen.
VARIABLE = "CELERY_OUTBOX_SERVICEBUS_URL"


class Namespace:
    """A namespace that is there already. The queues that tests create are deleted at the end."""

    injects = False

    def __init__(self, url: str) -> None:
        self.url = url
        self._connection = Connection(url)
        self._admin: Any = self._connection.channel().queue_mgmt_service
        self._queues: list[str] = []

    def create_queue(
        self,
        name: str,
        *,
        duplicate_detection: bool = False,
        lock_seconds: int = 60,
        max_delivery_count: int = 10,
    ) -> None:
        """Create a queue."""
        self._admin.create_queue(
            name,
            requires_duplicate_detection=duplicate_detection,
            lock_duration=timedelta(seconds=lock_seconds),
            max_delivery_count=max_delivery_count,
        )
        self._queues.append(name)

    def counts(self, name: str) -> Counter[str]:
        """Return how many messages a queue has; what it has done, the service does not tell."""
        found = self._admin.get_queue_runtime_properties(name)
        return Counter(
            active=found.active_message_count, dead_letter=found.dead_letter_message_count
        )

    def plan(self, faults: Iterable[Fault]) -> None:
        """Leave it alone: it misbehaves when it wants to."""

    def behave(self) -> None:
        """Leave it alone."""

    def close(self) -> None:
        """Delete the queues."""
        for name in self._queues:
            self._admin.delete_queue(name)
        self._connection.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def namespace() -> ServiceBus | Namespace:
    """Return the real namespace whose address is in the environment, else a stand-in."""
    url = os.environ.get(VARIABLE)
    return Namespace(url) if url else ServiceBus()
