"""Declaration: a queue or exchange as plain data, and back.

kombu's ``Queue.as_dict()`` does not survive ``Queue.from_dict()``: its exchange stays a dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any
from weakref import ref

from kombu import Exchange, Queue
from kombu.entity import binding
from kombu.utils.json import dumps

__all__ = ["Declaration", "Declarations", "freeze", "json_of", "thaw"]


class Declaration(dict[str, Any]):
    """A queue or exchange as data that JSON can hold, but for kombu's defaults. Nobody changes it."""

    @cached_property
    def json(self) -> str:
        """The data as JSON text."""
        return str(dumps(self))


class Declarations:
    """The declarations of the entities of this process, each frozen once.

    An app's queues are the same objects in every message. One that is changed after its first message
    stays as it was declared, as in kombu, which declares an entity once.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[ref[Any], Declaration]] = {}

    def of(self, entity: Queue | Exchange) -> Declaration:
        """Return `freeze(entity)`."""
        known = self._known.get(id(entity))
        if known is not None and known[0]() is entity:
            return known[1]
        number, frozen = id(entity), freeze(entity)
        self._known[number] = (ref(entity, lambda _: self._known.pop(number, None)), frozen)
        return frozen


def freeze(entity: Queue | Exchange) -> Declaration:
    """Return `entity` as data."""
    data = _data(entity)
    # A callback of the app's process, which the relay's has not.
    data.pop("on_declared", None)
    return Declaration(kind="queue" if isinstance(entity, Queue) else "exchange", **data)


def json_of(declaration: Mapping[str, Any]) -> str:
    """Return a declaration as JSON text, encoded once where it is frozen once."""
    if isinstance(declaration, Declaration):
        return declaration.json
    return str(dumps(declaration))


def thaw(data: Mapping[str, Any]) -> Queue | Exchange:
    """Return what `freeze` was given."""
    fields = dict(data)
    if fields.pop("kind") == "exchange":
        return Exchange(**fields)
    fields["exchange"] = _exchange(fields.get("exchange"))
    fields["bindings"] = [
        binding(**{**bound, "exchange": _exchange(bound.get("exchange"))})
        for bound in fields.get("bindings") or ()
    ]
    return Queue(**fields)


def _data(entity: Any) -> dict[str, Any]:
    kind = next(kind for kind in (Queue, Exchange, binding) if isinstance(entity, kind))
    data: dict[str, Any] = {}
    for name, value in entity.as_dict().items():
        if isinstance(value, Exchange):
            data[name] = _data(value)
        elif name == "bindings" and value:
            data[name] = [_data(bound) for bound in value]
        elif value not in (None, []) and value != getattr(kind, name, None):
            data[name] = value
    return data


def _exchange(data: Mapping[str, Any] | None) -> Exchange | None:
    return None if data is None else Exchange(**data)
