"""Hosts: whose local queues a connection to ``outbox://`` reaches.

A connection carries a name in its transport options, not the Outbox itself: the options are shown by
``celery inspect``, compared, and copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

from kombu.transport import TRANSPORT_ALIASES

from celery_outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import tzinfo

    from celery import Celery
    from kombu import Connection

    from celery_outbox.config import Config
    from celery_outbox.local.routing import Routing
    from celery_outbox.storage.local import LocalStore

__all__ = ["SCHEME", "URL", "Host", "host_of", "reach"]

SCHEME = "outbox"
#: The address of an app's own local queues.
URL = f"{SCHEME}://"
_OPTION = "outbox"

TRANSPORT_ALIASES[SCHEME] = "celery_outbox.local.transport:Transport"


class Host(Protocol):
    """The app's outbox, as a connection to its local queues sees it."""

    @property
    def config(self) -> Config:
        """The settings."""

    @property
    def time_zone(self) -> tzinfo:
        """The app's, for times that come without one."""

    @property
    def takes_ahead(self) -> bool:
        """Whether workers take more messages than they have slots."""

    @property
    def local_store(self) -> LocalStore:
        """The queued messages, by connections that this process shares with no other use."""

    @property
    def routing(self) -> Routing:
        """Which local queues a message is for."""

    def keep_house(self) -> None:
        """Do what is due once in a while. Raises SQLAlchemy's errors."""


_hosts: WeakValueDictionary[str, Host] = WeakValueDictionary()


def reach(app: Celery, host: Host) -> str:
    """Let the app's connections to ``outbox://`` lead to `host`; return its name in their options."""
    name = f"{app.main or 'app'}-{id(host):x}"
    _hosts[name] = host
    connect: Callable[..., Connection] = app.amqp.Connection

    def connection(url: Any, *args: Any, **options: Any) -> Connection:
        if options.get("transport") == SCHEME or str(url).startswith(f"{SCHEME}:"):
            own = {**(options.get("transport_options") or {}), _OPTION: name}
            options["transport_options"] = own
        return connect(url, *args, **options)

    app.amqp.Connection = connection
    return name


def host_of(transport_options: dict[str, Any]) -> Host:
    """Return the host of a connection, by its transport options.

    A connection that no app has made reaches the only Outbox of the process. Raises
    `ConfigurationError` if there is none, or more than one.
    """
    name = transport_options.get(_OPTION)
    hosts = dict(_hosts)
    if name is None and len(hosts) == 1:
        (host,) = hosts.values()
        return host
    if name in hosts:
        return hosts[name]
    raise ConfigurationError(
        f"the broker's address is {URL}, which is the database of the app's Outbox: "
        + (
            "take the connection from the app that is meant (app.connection()), as several apps of "
            "this process have an Outbox"
            if hosts
            else "add `outbox = Outbox(app, Session)` where the app is made"
        )
    )
