"""Links: one way between a client and an entity, or a node that answers requests."""

from __future__ import annotations

import struct
import uuid
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from tests.support.servicebus import frames
from tests.support.servicebus.faults import Fault
from tests.support.servicebus.frames import Request, error, outcome
from tests.support.servicebus.messages import Message, messages_of
from tests.support.servicebus.queues import BrokerError, Queue
from tests.support.servicebus.values import DecodeError, UInt

if TYPE_CHECKING:
    from tests.support.servicebus.sessions import Session

__all__ = ["EntitySender", "Link", "NodeSender", "Receiver", "Sender", "entity_of"]

_CREDIT = 1000
#: The role of the one who tells of a delivery's end.
RECEIVER = True


def entity_of(address: str) -> str:
    """Return the entity that ``amqps://host/queue`` or ``queue`` names."""
    if "://" in address:
        address = urlparse(address).path
    return unquote(address).strip("/")


class Link:
    """What both directions share."""

    def __init__(self, session: Session, attach: SimpleNamespace, address: str) -> None:
        self.session = session
        self.handle: int = attach.handle
        self.entity = entity_of(address)

    @property
    def is_open(self) -> bool:
        return not self.session.connection.closed and self.handle in self.session.links

    def on_flow(self, flow: SimpleNamespace) -> None:
        """Take note of the credit that the client gives."""

    def detach(self, condition: str, description: str = "") -> None:
        """End the link with an error."""
        self.session.detach(self, condition, description)


class Sender(Link):
    """The client sends, we receive."""

    def __init__(self, session: Session, attach: SimpleNamespace, address: str) -> None:
        super().__init__(session, attach, address)
        self._delivery_count = int(attach.initial_delivery_count or 0)
        self._credit = 0
        self._first: SimpleNamespace | None = None
        self._payload = bytearray()

    def on_transfer(self, transfer: SimpleNamespace) -> None:
        """Take one frame of a delivery."""
        if self._first is None:
            self._first, self._payload = transfer, bytearray()
        self._payload += transfer.payload
        first = self._first
        if transfer.aborted:
            self._first = None
        if transfer.aborted or transfer.more:
            return
        self._first = None
        self._delivery_count += 1
        self._credit -= 1
        self.on_delivery(first, bytes(self._payload))
        if self._credit < _CREDIT // 2:
            self.grant()

    def on_delivery(self, first: SimpleNamespace, payload: bytes) -> None:
        """Take a whole delivery, whose first frame is `first`."""
        raise NotImplementedError

    def grant(self) -> None:
        """Allow more deliveries."""
        self._credit = _CREDIT
        self.session.flow(
            handle=UInt(self.handle),
            delivery_count=UInt(self._delivery_count),
            link_credit=UInt(self._credit),
        )

    def settle(self, delivery_id: int, state: Any) -> None:
        """Tell what became of a delivery."""
        self.session.say(
            "disposition", role=RECEIVER, first=UInt(delivery_id), settled=True, state=state
        )

    def accept(self, delivery_id: int) -> None:
        """Tell that it is stored."""
        self.settle(delivery_id, outcome(frames.ACCEPTED))

    def reject(self, delivery_id: int, condition: str, description: str) -> None:
        """Tell that it is not, and why."""
        self.settle(delivery_id, outcome(frames.REJECTED, [error(condition, description)]))


class EntitySender(Sender):
    """Messages for a queue."""

    def on_delivery(self, first: SimpleNamespace, payload: bytes) -> None:
        emulator = self.session.emulator
        if emulator.ack_seconds:
            emulator.loop.call_later(emulator.ack_seconds, self._take, first, payload)
        else:
            self._take(first, payload)

    def _take(self, first: SimpleNamespace, payload: bytes) -> None:
        if not self.is_open:
            return
        fault = self.session.emulator.faults.take("send", self.entity)
        if fault is not None and not fault.action.startswith("store_"):
            self._misbehave(fault, fault.action, first.delivery_id)
        elif self._store(first, payload):
            if fault is not None:
                self._misbehave(fault, fault.action.removeprefix("store_"), first.delivery_id)
            elif not first.settled:
                self.accept(first.delivery_id)

    def _store(self, first: SimpleNamespace, payload: bytes) -> bool:
        """Store what came; if that can't be, say so and return False."""
        emulator, limit = self.session.emulator, self.session.emulator.max_message_bytes
        try:
            if len(payload) > limit:
                # The service rejects the delivery, and leaves the link open.
                raise BrokerError(
                    "amqp:link:message-size-exceeded",
                    f"The message ({len(payload)} bytes) exceeds the limit ({limit} bytes).",
                )
            queue = emulator.broker.find(self.entity)
            messages = messages_of(payload, first.message_format)
            queue.stats["transfers"] += 1
            queue.put(messages)
        except BrokerError as exc:
            if exc.condition == "amqp:not-found":
                self.detach(exc.condition, exc.description)
            else:
                self.reject(first.delivery_id, exc.condition, exc.description)
            return False
        except (DecodeError, struct.error, IndexError) as exc:
            self.reject(first.delivery_id, "amqp:decode-error", str(exc))
            return False
        return True

    def _misbehave(self, fault: Fault, action: str, delivery_id: int) -> None:
        match action:
            case "reject":
                self.reject(delivery_id, fault.condition, fault.description)
            case "release":
                self.settle(delivery_id, outcome(frames.RELEASED))
            case "detach":
                self.detach(fault.condition, fault.description)
            case "close":
                self.session.connection.close(fault.condition, fault.description)
            case "cut":
                self.session.connection.cut()
            case "silence":
                pass
            case _:
                raise ValueError(f"no such fault of a send: {action}")


class NodeSender(Sender):
    """Requests for ``$cbs``, or for ``<entity>/$management``."""

    def on_delivery(self, first: SimpleNamespace, payload: bytes) -> None:
        if not first.settled:
            self.accept(first.delivery_id)
        request = Request(payload)
        answer = self.session.connection.answer(self.entity, request)
        receivers = [
            link
            for link in self.session.links.values()
            if isinstance(link, Receiver) and link.entity.lower() == self.entity.lower()
        ]
        receivers.sort(key=lambda link: link.target != request.reply_to)
        if receivers:
            receivers[0].reply(answer)


class Receiver(Link):
    """We send, the client receives: messages of a queue, or a node's answers."""

    def __init__(
        self, session: Session, attach: SimpleNamespace, address: str, queue: Queue | None
    ) -> None:
        super().__init__(session, attach, address)
        self.target = attach.target.value[0] if attach.target and attach.target.value else None
        mode = attach.snd_settle_mode
        self.receive_and_delete = mode is not None and int(mode) == 1
        self.queued = False
        self._queue = queue
        self._delivery_count = 0
        self._credit = 0
        #: Delivery → the lock of its message.
        self._unsettled: dict[int, uuid.UUID] = {}
        self._answers: list[bytes] = []

    def can_send(self) -> bool:
        return self._credit > 0 and self.is_open

    def on_flow(self, flow: SimpleNamespace) -> None:
        count = int(flow.delivery_count or 0)
        self._credit = count + int(flow.link_credit or 0) - self._delivery_count
        if self._queue is not None:
            if self._credit > 0 and not self.queued:
                self.queued = True
                self._queue.waiting.append(self)
            self._queue.pump()
        while self._answers and self._credit > 0:
            self._send(self._answers.pop(0), uuid.uuid4().bytes, settled=True)
        if flow.drain:
            self._delivery_count += max(self._credit, 0)
            self._credit = 0
        if flow.drain or flow.echo:
            self.session.flow(
                handle=UInt(self.handle),
                delivery_count=UInt(self._delivery_count),
                link_credit=UInt(max(self._credit, 0)),
                drain=bool(flow.drain),
            )

    def send_message(self, message: Message) -> None:
        if message.lock_token is None:
            self._send(message.encode(), uuid.uuid4().bytes, settled=True)
        else:
            tag = message.lock_token.bytes_le
            self._unsettled[self._send(message.encode(), tag, settled=False)] = message.lock_token

    def reply(self, answer: bytes) -> None:
        """Send a node's answer, when the client wants it."""
        if self._credit > 0:
            self._send(answer, uuid.uuid4().bytes, settled=True)
        else:
            self._answers.append(answer)

    def _send(self, payload: bytes, tag: bytes, *, settled: bool) -> int:
        self._credit -= 1
        self._delivery_count += 1
        return self.session.transfer(self.handle, payload, tag, settled)

    def on_disposition(self, delivery_id: int, state: Any) -> Any:
        """Settle a delivery; return the state to echo, or None when it is not of this link."""
        token = self._unsettled.pop(delivery_id, None)
        if token is None or self._queue is None:
            return None
        fault = self.session.emulator.faults.take("settle", self.entity)
        try:
            if fault is not None:
                raise BrokerError(fault.condition, fault.description)
            return self._settle(self._queue, token, state)
        except BrokerError as exc:
            return outcome(frames.REJECTED, [error(exc.condition, exc.description)])

    @staticmethod
    def _settle(queue: Queue, token: uuid.UUID, state: Any) -> Any:
        fields = [*state.value, None, None, None] if state is not None else []
        match frames.outcome_code(state):
            case frames.ACCEPTED:
                queue.complete(token)
            case frames.MODIFIED:
                queue.abandon(token, count=bool(fields[0]))
            case frames.REJECTED:
                said = fields[0].value if fields[0] is not None else []
                info = (said[2] if len(said) > 2 else None) or {}
                why = info.get("DeadLetterReason"), info.get("DeadLetterErrorDescription")
                queue.bury(token, *why)
                return outcome(frames.REJECTED)
            case _:
                queue.abandon(token, count=False)
                return outcome(frames.RELEASED)
        return state
