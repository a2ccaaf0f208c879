"""Which Outbox is tested: an address like ``shop:outbox``, or the Celery app that has one."""

from __future__ import annotations

import importlib
from typing import cast

from celery import Celery

from celery_outbox.errors import ConfigurationError
from celery_outbox.inbox.installation import installed_in
from celery_outbox.plugin import Outbox

__all__ = ["outbox_named"]


def outbox_named(address: str) -> Outbox:
    """Return the Outbox at ``module:name``, or that of the Celery app there.

    Raises `ConfigurationError` that says what is there instead.
    """
    module_name, _, name = address.strip().partition(":")
    if not module_name or not name:
        raise ConfigurationError(f"{address!r} names no Outbox: it looks like 'shop:outbox'")
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        if exc.name is None or not f"{module_name}.".startswith(f"{exc.name}."):
            raise
        raise ConfigurationError(
            f"{address!r}: there is no module {exc.name!r}; is its folder in pytest's 'pythonpath'?"
        ) from exc
    for word in name.split("."):
        if not hasattr(found, word):
            raise ConfigurationError(f"{address!r}: there is no {word!r} in {module_name}")
        found = getattr(found, word)
    if isinstance(found, Celery):
        if installed_in(found) is None:
            raise ConfigurationError(f"{address!r} is a Celery app without an Outbox")
        return cast("Outbox", installed_in(found))
    if not isinstance(found, Outbox):
        raise ConfigurationError(f"{address!r} is no Outbox, but {found!r}")
    return found
