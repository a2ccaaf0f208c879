"""Faults: planned misbehaviour, served in the order in which it was planned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Where = Literal["send", "attach", "cbs", "admin", "settle"]


@dataclass
class Fault:
    """One planned misbehaviour.

    On a send, the broker may ``reject``, ``release``, ``detach`` the link, ``close`` the connection
    with an error, ``cut`` it, or say nothing (``silence``); with ``store_`` before the word it does so
    after it has stored the message. An attach is refused (``detach``), a token and a call of the admin
    REST are answered with `status`, and a settlement is refused (``reject``).
    """

    where: Where
    action: str
    #: Only for this entity.
    entity: str | None = None
    condition: str = "amqp:internal-error"
    description: str = "injected by the test"
    status: int = 500
    #: How many it hits; -1: all.
    times: int = 1
    #: How many it lets pass before.
    skip: int = 0


@dataclass
class FaultPlan:
    """What is still to come, and what has hit."""

    planned: list[Fault] = field(default_factory=list)
    hits: dict[str, int] = field(default_factory=dict)

    def take(self, where: Where, entity: str) -> Fault | None:
        """Return the fault that hits here and now, if there is one."""
        for fault in self.planned:
            if fault.where != where or not _concerns(fault, entity) or fault.times == 0:
                continue
            if fault.skip:
                fault.skip -= 1
                return None
            fault.times -= 1
            name = f"{where} {fault.action}"
            self.hits[name] = self.hits.get(name, 0) + 1
            return fault
        return None


def _concerns(fault: Fault, entity: str) -> bool:
    return fault.entity is None or fault.entity.lower() == entity.lower()
