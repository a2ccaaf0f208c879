"""Controls: how a test reaches into an emulator that runs in a process of its own, over HTTP."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.support.servicebus.faults import Fault
from tests.support.servicebus.queues import Options

if TYPE_CHECKING:
    from tests.support.servicebus.emulator import Emulator

__all__ = ["PATH", "control"]

PATH = "/$emulator/"


def control(emulator: Emulator, target: str, content: bytes) -> tuple[int, str]:
    """Carry out one order, and return what the emulator is like then."""
    order: dict[str, Any] = json.loads(content) if content else {}
    match target.removeprefix(PATH):
        case "state":
            pass
        case "queue":
            emulator.broker.create(order.pop("name"), Options(**order))
        case "faults":
            emulator.faults.planned.extend(Fault(**fault) for fault in order["faults"])
        case "no-faults":
            emulator.faults.planned.clear()
        case "ack-seconds":
            emulator.ack_seconds = order["seconds"]
        case "key":
            emulator.policies.keys[order["policy"]] = order["key"]
            if "rights" in order:
                emulator.policies.rights[order["policy"]] = frozenset(order["rights"])
        case "accept-tokens":
            emulator.policies.accept_tokens = True
        case "close-connections":
            emulator.end_connections(order.get("condition"))
        case unknown:
            return 404, json.dumps({"unknown": unknown})
    return 200, json.dumps(emulator.state())
