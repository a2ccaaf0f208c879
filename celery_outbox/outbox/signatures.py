"""Signatures: which tasks a canvas holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["tasks_of"]


def tasks_of(signature: Mapping[str, Any]) -> Iterator[str]:
    """Return the names of all tasks in a signature, be it an object or what JSON made of it."""
    nested = signature.get("kwargs") or {}
    match signature.get("subtask_type"):
        case "chain" | "group":
            held = list(nested["tasks"])
        case "chord":
            header = nested["header"]
            held = [*([header] if isinstance(header, Mapping) else header), nested["body"]]
        case _:
            yield str(signature["task"])
            return
    for each in held:
        yield from tasks_of(each)
