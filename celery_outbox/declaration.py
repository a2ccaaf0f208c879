"""Declaration: a queue or exchange as plain data, and back.

kombu's ``Queue.as_dict()`` does not survive ``Queue.from_dict()``: its exchange stays a dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kombu import Exchange, Queue
from kombu.entity import binding

__all__ = ["freeze", "thaw"]


def freeze(entity: Queue | Exchange) -> dict[str, Any]:
    """Return `entity` as data that JSON can hold."""
    data = {k: v for k, v in entity.as_dict(recurse=True).items() if v is not None}
    # A callback of the app's process, which the relay's has not.
    data.pop("on_declared", None)
    return {"kind": "queue" if isinstance(entity, Queue) else "exchange", **data}


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


def _exchange(data: Mapping[str, Any] | None) -> Exchange | None:
    return Exchange(**data) if data else None
