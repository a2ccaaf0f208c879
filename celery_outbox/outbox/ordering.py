"""Ordering keys: which messages leave the outbox in the order of their commits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

from celery_outbox.envelope import ordering_key
from celery_outbox.errors import ConfigurationError

__all__ = ["OPTION", "arguments_of", "key_of_call"]

#: The option of `apply_async`, and the attribute of a task.
OPTION = "outbox_ordering_key"


def key_of_call(task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Return the key that the task's own rule, a text or a callable on its arguments, gives a call."""
    rule = getattr(task, OPTION, None)
    if rule is None:
        return None
    if isinstance(rule, MethodType):
        # A function among a task's options has become a method of its class.
        rule = rule.__func__
    if not callable(rule):
        return ordering_key(rule)
    try:
        return ordering_key(rule(*args, **kwargs))
    except Exception as exc:
        raise ConfigurationError(
            f"{OPTION} of task {task.name} failed for args={args!r}, kwargs={dict(kwargs)!r}: "
            f"{exc!r}; it takes a callable on the task's arguments that returns a text or a number"
        ) from exc


def arguments_of(message: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return the arguments in a task message of Celery's, before it is serialized."""
    body = message.body
    if isinstance(body, Mapping):  # protocol 1
        return body.get("args") or (), body.get("kwargs") or {}
    args, kwargs, _ = body
    return args or (), kwargs or {}
