"""Queues: peek-lock, dead letters, duplicate detection. On one event loop; not safe for threads."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
import uuid
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from typing import Any, Protocol

from tests.support.servicebus.messages import Message, now_ms

__all__ = ["Broker", "BrokerError", "Options", "Queue", "Taker"]

_DEAD_LETTERS = "/$deadletterqueue"
LOCK_LOST = "com.microsoft:message-lock-lost"


class BrokerError(Exception):
    """What the broker says no with."""

    def __init__(self, condition: str, description: str = "") -> None:
        super().__init__(condition, description)
        self.condition = condition
        self.description = description


class Taker(Protocol):
    """A receiver that has asked for messages."""

    receive_and_delete: bool
    queued: bool

    def can_send(self) -> bool:
        """Return whether it still wants one."""

    def send_message(self, message: Message) -> None:
        """Hand it over."""


@dataclass
class Options:
    """What a queue is created with."""

    lock_seconds: float = 60.0
    max_delivery_count: int = 10
    duplicate_detection: bool = False
    duplicate_window_seconds: float = 600.0
    default_ttl_seconds: float | None = None
    dead_letter_on_expiry: bool = False
    requires_session: bool = False
    partitioning: bool = False
    max_bytes: int | None = None
    max_message_kilobytes: int | None = None
    status: str = "Active"


class Queue:
    """One queue, and the dead-letter queue that belongs to it."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, name: str, options: Options, *, dead: bool = False
    ) -> None:
        self._loop = loop
        self.name = name
        self.options = options
        self.created = time.time()
        self.size = 0
        self.stats: Counter[str] = Counter()
        self.waiting: deque[Taker] = deque()
        self.locked: dict[uuid.UUID, Message] = {}
        self._ready: list[tuple[int, Message]] = []
        self._seen: OrderedDict[Any, float] = OrderedDict()
        self._numbers = itertools.count(1)
        self.dead_letters: Queue | None = None
        if not dead:
            never = Options(lock_seconds=options.lock_seconds, max_delivery_count=2**31)
            self.dead_letters = Queue(loop, f"{name}/$DeadLetterQueue", never, dead=True)

    def put(self, messages: list[Message]) -> None:
        """Store all of them, without those that were seen before, or none."""
        if self.options.status in ("Disabled", "SendDisabled"):
            raise BrokerError("com.microsoft:entity-disabled", f"'{self.name}' is disabled.")
        limit = self.options.max_bytes
        if limit is not None and self.size + sum(message.size for message in messages) > limit:
            raise BrokerError("amqp:resource-limit-exceeded", f"'{self.name}' is full.")
        for message in messages:
            if self.options.duplicate_detection and self._was_seen(message.message_id):
                self.stats["duplicates_dropped"] += 1
            else:
                self._store(message)
        self.pump()

    def _was_seen(self, message_id: Any) -> bool:
        now = time.monotonic()
        while self._seen and next(iter(self._seen.values())) <= now:
            self._seen.popitem(last=False)
        if message_id is None or message_id in self._seen:
            return message_id is not None
        self._seen[message_id] = now + self.options.duplicate_window_seconds
        return False

    def _store(self, message: Message) -> None:
        message.sequence_number, message.enqueued_ms = next(self._numbers), now_ms()
        default = (self.options.default_ttl_seconds or 0) * 1000
        ttl = message.ttl_ms if message.ttl_ms is not None else default
        message.expires_ms = message.enqueued_ms + int(ttl) if ttl else None
        self.size += message.size
        self.stats["stored"] += 1
        heapq.heappush(self._ready, (message.sequence_number, message))

    def pump(self) -> None:
        """Hand what is ready to receivers that want it, oldest first, in turn."""
        while self._ready and self.waiting:
            taker = self.waiting[0]
            if not taker.can_send():
                self.waiting.popleft()
                taker.queued = False
                continue
            _, message = heapq.heappop(self._ready)
            if message.expires_ms and message.expires_ms <= now_ms():
                self._expire(message)
                continue
            self.waiting.rotate(-1)
            if taker.receive_and_delete:
                self.size -= message.size
                self.stats["completed"] += 1
            else:
                self._lock(message)
            taker.send_message(message)

    def _expire(self, message: Message) -> None:
        if self.options.dead_letter_on_expiry:
            self._bury(message, "TTLExpiredException", "The message expired.")
        else:
            self.size -= message.size

    def _lock(self, message: Message) -> None:
        message.lock_token = uuid.uuid4()
        self.locked[message.lock_token] = message
        self._arm(message, message.lock_token)

    def _arm(self, message: Message, token: uuid.UUID) -> None:
        if message.timer is not None:
            message.timer.cancel()
        seconds = self.options.lock_seconds
        message.locked_until_ms = now_ms() + int(seconds * 1000)
        message.timer = self._loop.call_later(seconds, self._lock_ends, token)

    def _lock_ends(self, token: uuid.UUID) -> None:
        message = self.locked.pop(token, None)
        if message is not None:
            self.stats["expired_locks"] += 1
            self._redeliver(message)

    def _redeliver(self, message: Message) -> None:
        message.delivery_count += 1
        if message.delivery_count >= self.options.max_delivery_count:
            reason = f"{message.delivery_count} deliveries"
            self._bury(message, "MaxDeliveryCountExceeded", reason)
        else:
            self._give_back(message)

    def _give_back(self, message: Message) -> None:
        message.lock_token = message.locked_until_ms = None
        heapq.heappush(self._ready, (message.sequence_number, message))
        self.pump()

    def _unlock(self, token: uuid.UUID) -> Message:
        message = self.locked.pop(token, None)
        if message is None:
            raise BrokerError(LOCK_LOST, "The lock expired, or the message was removed.")
        if message.timer is not None:
            message.timer.cancel()
            message.timer = None
        return message

    def complete(self, token: uuid.UUID) -> None:
        """Forget a locked message: it was handled."""
        self.size -= self._unlock(token).size
        self.stats["completed"] += 1

    def abandon(self, token: uuid.UUID, *, count: bool = True) -> None:
        """Give a locked message back, as a failed delivery (`count`) or as none."""
        message = self._unlock(token)
        self.stats["abandoned"] += 1
        if count:
            self._redeliver(message)
        else:
            self._give_back(message)

    def bury(self, token: uuid.UUID, reason: str | None, description: str | None) -> None:
        """Move a locked message to the dead letters."""
        self._bury(self._unlock(token), reason, description)

    def _bury(self, message: Message, reason: str | None, description: str | None) -> None:
        self.size -= message.size
        self.stats["dead_lettered"] += 1
        given = {"DeadLetterReason": reason, "DeadLetterErrorDescription": description}
        message.add_properties({name: text for name, text in given.items() if text})
        message.timer = message.lock_token = message.locked_until_ms = message.expires_ms = None
        target = self.dead_letters or self
        target._store(message)
        target.pump()

    def renew(self, token: uuid.UUID) -> int:
        """Lock a message for longer; return until when, in milliseconds."""
        message = self.locked.get(token)
        if message is None:
            raise BrokerError(LOCK_LOST, "The lock expired.")
        self._arm(message, token)
        return message.locked_until_ms or 0

    def counts(self) -> dict[str, int]:
        """Return how many messages there are, by what they wait for."""
        dead = self.dead_letters
        return {
            "active": len(self._ready) + len(self.locked),
            "ready": len(self._ready),
            "locked": len(self.locked),
            "dead_letter": len(dead._ready) + len(dead.locked) if dead is not None else 0,
        }

    def clear_timers(self) -> None:
        """Let no lock end any more."""
        for message in self.locked.values():
            if message.timer is not None:
                message.timer.cancel()


class Broker:
    """The queues of a namespace."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.queues: dict[str, Queue] = {}

    def create(self, name: str, options: Options) -> Queue:
        """Create a queue; there is none of that name yet."""
        if name.lower() in self.queues:
            raise BrokerError("com.microsoft:entity-already-exists", name)
        queue = self.queues[name.lower()] = Queue(self._loop, name, options)
        return queue

    def find(self, path: str) -> Queue:
        """Return a queue, or the dead letters of one."""
        key = path.strip("/").lower()
        queue = self.queues.get(key.removesuffix(_DEAD_LETTERS))
        if queue is None:
            raise BrokerError("amqp:not-found", f"The entity '{path}' could not be found.")
        if key.endswith(_DEAD_LETTERS):
            assert queue.dead_letters is not None
            return queue.dead_letters
        return queue

    def delete(self, name: str) -> Queue:
        """Delete a queue with all that is in it."""
        queue = self.find(name)
        del self.queues[queue.name.lower()]
        queue.clear_timers()
        return queue
