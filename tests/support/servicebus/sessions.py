"""Sessions: links are attached here, and deliveries are numbered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tests.support.servicebus.frames import error, performative
from tests.support.servicebus.links import (
    EntitySender,
    Link,
    NodeSender,
    Receiver,
    Sender,
    entity_of,
)
from tests.support.servicebus.queues import BrokerError, Queue
from tests.support.servicebus.values import Symbol, UInt, ULong

if TYPE_CHECKING:
    from tests.support.servicebus.connections import Connection
    from tests.support.servicebus.emulator import Emulator

__all__ = ["Session"]

WINDOW = 5000
_MANAGEMENT = "$management"


class Session:
    """One session of a connection."""

    def __init__(self, connection: Connection, channel: int, begin: SimpleNamespace) -> None:
        self.connection = connection
        self.links: dict[int, Link] = {}
        self._channel = channel
        self._detached: set[int] = set()
        # Transfer ids count frames, delivery ids count deliveries.
        self._next_transfer = 1
        self._next_delivery = 1
        self._next_incoming = int(begin.next_outgoing_id or 0)
        self._window = WINDOW

    @property
    def emulator(self) -> Emulator:
        return self.connection.emulator

    def say(self, kind: str, /, **fields: Any) -> None:
        """Send a frame."""
        self.connection.write(self._channel, performative(kind, **fields))

    def flow(self, **of_link: Any) -> None:
        """Send a flow: of the session, or of a link."""
        self._window = WINDOW
        self.say(
            "flow",
            next_incoming_id=UInt(self._next_incoming),
            incoming_window=UInt(WINDOW),
            next_outgoing_id=UInt(self._next_transfer),
            outgoing_window=UInt(WINDOW),
            **of_link,
        )

    def transfer(self, handle: int, payload: bytes, tag: bytes, settled: bool) -> int:
        """Send one delivery, in as many frames as the client's limit asks for; return its number."""
        delivery_id = self._next_delivery
        self._next_delivery += 1
        room = self.connection.peer_max_frame - 128
        of_first = {
            "delivery_id": UInt(delivery_id),
            "delivery_tag": tag,
            "message_format": UInt(0),
            "settled": settled,
        }
        for start in range(0, len(payload), room):
            said = performative(
                "transfer",
                handle=UInt(handle),
                more=start + room < len(payload),
                **(of_first if start == 0 else {}),
            )
            self.connection.write(self._channel, said, payload[start : start + room])
            self._next_transfer += 1
        return delivery_id

    def on_attach(self, attach: SimpleNamespace) -> None:
        """Open a link; one that is refused is attached, and detached at once."""
        client_sends = not attach.role
        terminus = attach.target if client_sends else attach.source
        answer = {
            "name": attach.name,
            "handle": UInt(attach.handle),
            "role": client_sends,
            "snd_settle_mode": attach.snd_settle_mode,
            "rcv_settle_mode": attach.rcv_settle_mode,
            "source": attach.source,
            "target": attach.target,
            "initial_delivery_count": None if client_sends else UInt(0),
        }
        try:
            if terminus is None or not terminus.value or terminus.value[0] is None:
                raise BrokerError("amqp:invalid-field", "an address is required")
            address = terminus.value[0]
            queue = self._entity(entity_of(address), client_sends)
        except BrokerError as exc:
            answer["target" if client_sends else "source"] = None
            self.say("attach", **answer)
            self._detached.add(attach.handle)
            self._say_detached(attach.handle, exc.condition, exc.description)
            return
        answer["max_message_size"] = ULong(self.emulator.max_message_bytes)
        link: Link
        if not client_sends:
            link = Receiver(self, attach, address, queue)
        elif queue is None:
            link = NodeSender(self, attach, address)
        else:
            link = EntitySender(self, attach, address)
            if self.emulator.max_batch_bytes is not None:
                name = Symbol("com.microsoft:max-message-batch-size")
                answer["properties"] = {name: ULong(self.emulator.max_batch_bytes)}
        self.links[attach.handle] = link
        self.say("attach", **answer)
        if isinstance(link, Sender):
            link.grant()

    def _entity(self, name: str, client_sends: bool) -> Queue | None:
        """Return the queue that a link is for, None for a node; raise `BrokerError` to refuse it."""
        if name.lower() == "$cbs":
            return None
        is_node = name.lower().endswith(_MANAGEMENT)
        self.connection.authorize(name, "Send" if client_sends else "Listen", is_node=is_node)
        fault = self.emulator.faults.take("attach", name)
        if fault is not None:
            raise BrokerError(fault.condition, fault.description)
        queue = self.emulator.broker.find(name[: -len(_MANAGEMENT)] if is_node else name)
        if queue.options.requires_session and not is_node and not client_sends:
            raise BrokerError("amqp:not-allowed", "sessions are not emulated")
        return None if is_node else queue

    def on_flow(self, flow: SimpleNamespace) -> None:
        if flow.handle is not None:
            if (link := self.links.get(flow.handle)) is not None:
                link.on_flow(flow)
        elif flow.echo:
            self.flow()

    def on_transfer(self, transfer: SimpleNamespace) -> None:
        self._next_incoming += 1
        self._window -= 1
        link = self.links.get(transfer.handle)
        if isinstance(link, Sender):
            link.on_transfer(transfer)
        elif transfer.handle not in self._detached:
            self.say("end", error=error("amqp:session:unattached-handle", str(transfer.handle)))
        if self._window < WINDOW // 2:
            self.flow()

    def on_disposition(self, said: SimpleNamespace) -> None:
        """Settle what the client has received, and tell it so."""
        if not said.role:
            return
        first = int(said.first)
        for delivery_id in range(first, int(said.last if said.last is not None else first) + 1):
            for link in list(self.links.values()):
                if not isinstance(link, Receiver):
                    continue
                state = link.on_disposition(delivery_id, said.state)
                if state is not None and not said.settled:
                    number = UInt(delivery_id)
                    echo = {"first": number, "last": number, "settled": True, "state": state}
                    self.say("disposition", role=False, **echo)

    def detach(self, link: Link, condition: str, description: str) -> None:
        """End a link with an error."""
        if self.links.pop(link.handle, None) is not None:
            self._detached.add(link.handle)
            self._say_detached(link.handle, condition, description)

    def _say_detached(self, handle: int, condition: str, description: str) -> None:
        why = error(condition, description)
        self.say("detach", handle=UInt(handle), closed=True, error=why)

    def on_detach(self, detach: SimpleNamespace) -> None:
        if self.links.pop(detach.handle, None) is not None:
            self.say("detach", handle=UInt(detach.handle), closed=bool(detach.closed))
        self._detached.discard(detach.handle)
