"""LocalQueues: the local queues of one app, wired together."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from datetime import tzinfo
from typing import TYPE_CHECKING, Any

from celery.signals import celeryd_init
from kombu import Connection

from celery_outbox.errors import EnvelopeError
from celery_outbox.local.hosts import SCHEME, URL, reach
from celery_outbox.local.message import queued
from celery_outbox.local.routing import Routing
from celery_outbox.relay.pruning import Pruning
from celery_outbox.storage.rows import row_of

if TYPE_CHECKING:
    from celery import Celery

    from celery_outbox.config import Config
    from celery_outbox.envelope import Envelope
    from celery_outbox.storage.local import LocalStore
    from celery_outbox.storage.store import Store

__all__ = ["LocalQueues"]

logger = logging.getLogger("celery_outbox.local")

#: Celery's, stronger than its settings.
_VARIABLE = "CELERY_BROKER_READ_URL"


class LocalQueues:
    """Which messages wait in the database for workers, and how workers reach them.

    All of the app's, with ``broker_url = "outbox://"``; else those of the queues that
    ``outbox_local_queues`` names. `make_store` gives a store of connections of its own.
    """

    def __init__(
        self, app: Celery, config: Callable[[], Config], make_store: Callable[[], Store]
    ) -> None:
        self._app = app
        self._config = config
        self._make_store = make_store
        self._own: tuple[int, Store, Pruning] | None = None
        self._routing: Routing | None = None
        self._name = ""

    def install(self) -> None:
        """Let the app's connections to ``outbox://`` lead here, and its workers choose what to read."""
        self._name = reach(self._app, self)
        celeryd_init.connect(self._choose_broker)

    # What a connection to outbox:// needs (`celery_outbox.local.hosts.Host`)

    @property
    def config(self) -> Config:
        """The settings."""
        return self._config()

    @property
    def time_zone(self) -> tzinfo:
        """The app's."""
        zone: tzinfo = self._app.timezone
        return zone

    @property
    def takes_ahead(self) -> bool:
        """Whether workers take more messages than they have slots, by the settings."""
        return int(self._app.conf.worker_prefetch_multiplier) > 1

    @property
    def local_store(self) -> LocalStore:
        """The queued messages, by connections that this process shares with no other use."""
        store, _ = self._of_this_process()
        return store.local

    def _of_this_process(self) -> tuple[Store, Pruning]:
        if self._own is None or self._own[0] != os.getpid():
            store, config = self._make_store(), self.config
            # The thread that prunes renews leases, too: it may not be late for that.
            pruning = Pruning(store, config, longest_seconds=config.local_lease_seconds / 3)
            self._own = (os.getpid(), store, pruning)
        return self._own[1:]

    def keep_house(self) -> None:
        """Prune, now and then: where there is no relay, nobody else does.

        Raises SQLAlchemy's errors.
        """
        _, pruning = self._of_this_process()
        pruning.keep()

    @property
    def routing(self) -> Routing:
        """Which local queues a message is for."""
        if self._routing is None:
            everything = str(self._app.conf.broker_write_url or "").startswith(f"{SCHEME}:")
            self._routing = Routing(
                None if everything else frozenset(self.config.local_queues),
                lambda: self._app.amqp.queues,
                self._channel,
            )
        return self._routing

    def _channel(self) -> Any:
        # Not connected: it knows exchanges and bindings, and asks no database.
        transport = Connection(URL, transport_options={"outbox": self._name}).transport
        return transport.create_channel(transport)

    # Sending

    def rows_of(self, envelope: Envelope) -> list[Mapping[str, Any]]:
        """Return a message as rows to stage: one for each local queue, or one for the relay.

        Raises `EnvelopeError` for a message that no queue is bound for, if there is no broker to ask.
        """
        routing, hold_scheduled = self.routing, self.config.hold_scheduled
        if queues := routing.queues_of(envelope):
            return [queued(envelope, queue, hold_scheduled=hold_scheduled) for queue in queues]
        if not routing.has_everything:
            row = row_of(envelope)
            return [row if hold_scheduled else {**row, "not_before": None}]
        if envelope.mandatory:
            raise EnvelopeError(
                f"{envelope.task}[{envelope.task_id}]: no queue is bound for "
                f"{envelope.destination!r}; define one in task_queues, with that exchange"
            )
        return []

    def takes(self, options: Mapping[str, Any]) -> bool:
        """Whether a message that Celery is about to publish belongs into the database instead.

        Not where there is no broker: what Celery publishes comes there by itself.
        """
        routing = self.routing
        if routing.has_everything or not routing.names:
            return False
        return routing.is_local(options, self._app.conf.task_default_queue)

    # Consuming

    def _choose_broker(self, instance: Any, options: dict[str, Any], **_: Any) -> None:
        """A worker of local queues reads from the database, any other one from the broker."""
        app, names = self._app, self.routing.names
        if instance.app is not app or not names:
            return
        given = _names(options.get("queues"))
        wanted = (given or set(app.amqp.queues)) - _names(options.get("exclude_queues"))
        if not (local := wanted & names):
            return
        if others := wanted - names:
            here, there = ", ".join(sorted(local)), ", ".join(sorted(others))
            if given:
                # An Exception would be logged by the signal, and the worker would go on.
                raise SystemExit(
                    f"worker: {here} is in the database and {there} in the broker: start one worker "
                    f"with -Q {','.join(sorted(local))}, and another one for the rest"
                )
            app.amqp.queues.deselect(sorted(local))
            logger.info("worker: %s needs a worker of its own", here)
            return
        app.conf.broker_read_url = URL
        if _VARIABLE in os.environ:
            os.environ[_VARIABLE] = URL


def _names(queues: Any) -> set[str]:
    names = queues.split(",") if isinstance(queues, str) else queues or ()
    return {name.strip() for name in names}
