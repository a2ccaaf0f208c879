"""Queues: how they should be made, and whether they are, through the namespace's admin REST.

For that a policy needs the right to manage, which neither the relay nor a worker needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Literal

from azure.core.exceptions import ResourceExistsError, ResourceNotFoundError
from azure.servicebus.management import QueueProperties
from kombu import Connection

__all__ = ["Doubt", "Making", "Queues", "doubts_about"]

#: After so many deliveries, or fewer, the service would take a message out of the queue too early:
#: each worker that is killed, and each time a message is given back, counts.
_FEWEST_DELIVERIES: Final = 20
_SHORTEST_LOCK: Final = timedelta(seconds=30)
#: A lifetime beyond this is as good as none.
_FOR_EVER: Final = timedelta(days=365)
#: From this share of its size on, a queue is nearly full.
_NEARLY_FULL: Final = 0.8


@dataclass(frozen=True, slots=True)
class Making:
    """What a queue is made with."""

    lock_seconds: int = 60
    window_seconds: int = 600
    max_deliveries: int = 100


@dataclass(frozen=True, slots=True)
class Doubt:
    """What is wrong with a queue, and what to do about it."""

    queue: str
    level: Literal["error", "warning"]
    says: str
    advice: str


class Queues:
    """The queues of the namespace that a connection leads to, under the names that kombu gives them."""

    def __init__(self, connection: Connection) -> None:
        self._channel: Any = connection.channel()
        self._admin = self._channel.queue_mgmt_service

    def name(self, queue: str) -> str:
        """Return the service's name of a queue of the app."""
        prefixed = self._channel.queue_name_prefix + queue
        return str(self._channel.entity_name(prefixed))

    def create(self, queue: str, making: Making) -> bool:
        """Create a queue with duplicate detection; return False if there is one of that name.

        An existing one is left as it is: what matters most can't be changed.
        """
        try:
            self._admin.create_queue(
                self.name(queue),
                lock_duration=timedelta(seconds=making.lock_seconds),
                requires_duplicate_detection=True,
                duplicate_detection_history_time_window=timedelta(seconds=making.window_seconds),
                max_delivery_count=making.max_deliveries,
            )
        except ResourceExistsError:
            return False
        return True

    def verify(self, queue: str, repeat_seconds: float) -> Iterator[Doubt]:
        """Yield what is wrong with a queue; see `doubts_about`."""
        name = self.name(queue)
        try:
            found = self._admin.get_queue(name)
        except ResourceNotFoundError:
            yield Doubt(name, "error", "does not exist", "create it, for instance with `create`")
            return
        size = self._admin.get_queue_runtime_properties(name).size_in_bytes
        yield from doubts_about(found, size, repeat_seconds)

    def largest_message(self, queue: str) -> int | None:
        """Return how many kilobytes a message may have, where the service says so (Premium)."""
        found: int | None = self._admin.get_queue(self.name(queue)).max_message_size_in_kilobytes
        return found


def doubts_about(
    queue: QueueProperties, size_in_bytes: int, repeat_seconds: float
) -> Iterator[Doubt]:
    """Yield what is wrong with a queue.

    `repeat_seconds` is after how long the relay may repeat a send that is in doubt.
    """
    for level, says, advice in _findings(queue, size_in_bytes, repeat_seconds):
        yield Doubt(queue.name, level, says, advice)


_Findings = Iterator[tuple[Literal["error", "warning"], str, str]]


def _findings(queue: QueueProperties, size_in_bytes: int, repeat_seconds: float) -> _Findings:
    if queue.status != "Active":
        yield "error", f"its status is {_text(queue.status)}", "activate it"
    if queue.requires_session:
        yield "error", "it requires sessions, which kombu can't consume", "create it without"
    yield from _about_duplicates(queue, repeat_seconds)
    yield from _about_deliveries(queue)
    lifetime, most = queue.default_message_time_to_live, queue.max_size_in_megabytes
    if isinstance(lifetime, timedelta) and lifetime < _FOR_EVER:
        buried = queue.dead_lettering_on_message_expiration
        fate = "moved to its dead letters" if buried else "dropped"
        yield "warning", f"messages that wait for {lifetime} are {fate}", "let them live longer"
    if most and size_in_bytes > _NEARLY_FULL * most * 1024 * 1024:
        yield "warning", f"it is nearly full: {size_in_bytes} bytes", "see why nobody empties it"


def _about_duplicates(queue: QueueProperties, repeat_seconds: float) -> _Findings:
    if not queue.requires_duplicate_detection:
        yield (
            "warning",
            "it detects no duplicates: a send that was in doubt arrives twice, for the inbox to absorb",
            "that can't be changed later: create a new queue",
        )
        return
    window = queue.duplicate_detection_history_time_window
    if isinstance(window, timedelta) and window.total_seconds() < repeat_seconds:
        yield (
            "warning",
            (
                f"it remembers messages for {window}, and the relay may repeat a send after "
                f"{repeat_seconds:g} s"
            ),
            "lengthen duplicate_detection_history_time_window",
        )
    if queue.enable_partitioning:
        yield (
            "warning",
            "it is partitioned, where duplicates in batches are not detected reliably",
            "create it without partitions",
        )


def _about_deliveries(queue: QueueProperties) -> _Findings:
    lock, count = queue.lock_duration, queue.max_delivery_count
    if isinstance(lock, timedelta) and lock < _SHORTEST_LOCK:
        yield (
            "warning",
            f"it locks messages for {lock}, which a busy worker may be too slow to renew",
            "lock_duration should be a minute or more",
        )
    if count is not None and count < _FEWEST_DELIVERIES:
        yield (
            "warning",
            (
                f"the service takes a message out after {count} deliveries, and each worker that was "
                "killed counts as one"
            ),
            "raise max_delivery_count, for instance to 100",
        )


def _text(value: object) -> str:
    return str(getattr(value, "value", value))
