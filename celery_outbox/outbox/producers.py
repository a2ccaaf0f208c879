"""Producers: what Celery is handed in place of kombu's producer.

The app's own takes a connection of the app's pool for each message, also for one that is stored: with
the broker away, and the pool's slots with those who wait for it, a message would wait too that needs
no broker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta, timezone, tzinfo
from typing import TYPE_CHECKING, Any, TypeAlias

from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu import Connection, Exchange, Queue
from kombu.messaging import Producer

from celery_outbox.declaration import Declarations
from celery_outbox.envelope import Envelope, message_key

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["AnyProducer", "PooledProducer", "Stage", "StagingProducer"]

#: Takes an envelope into the transaction that it was sent in.
Stage = Callable[[Envelope], None]


class PooledProducer:
    """Stands for a producer of the app's pool, and takes it from there when it is used.

    `acquire` is the app's own ``producer_or_acquire``.
    """

    #: As a producer of the pool has them.
    serializer = None
    compression = None

    def __init__(self, app: Celery, acquire: Callable[[], Any]) -> None:
        self._app = app
        self._acquire = acquire
        self._context: Any = None
        self._producer: Any = None

    @property
    def connection(self) -> Connection:
        """The connection that the pool's connections are made after, or the one that is taken."""
        if self._producer is not None:
            return self._producer.connection
        return self._app.producer_pool.connections.connection

    def taken(self) -> Producer:
        """Return the producer, and hold it until the end of the block."""
        if self._producer is None:
            self._context = self._acquire()
            self._producer = self._context.__enter__()
        return self._producer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.taken(), name)

    def __enter__(self) -> PooledProducer:
        return self

    def __exit__(self, *exc: object) -> Any:
        context, self._context, self._producer = self._context, None, None
        return context.__exit__(*exc) if context is not None else None


#: What Celery is handed: the stand-in, or what its caller gave it.
AnyProducer: TypeAlias = Producer | PooledProducer


class StagingProducer(Producer):
    """kombu's Producer, with another last hop.

    The first message is the task's. With ``task_send_sent_event`` a ``task-sent`` event follows
    through the same producer. In a transaction it is staged like the message that it speaks of, so
    that it is not seen for one that was rolled back; elsewhere it is published at once, as ever.
    """

    auto_declare = False
    exchange = Exchange("")
    _channel = None

    def __init__(
        self,
        producer: AnyProducer,
        stage: Stage,
        *,
        task: str,
        described: Mapping[str, Any],
        time_zone: Callable[[], tzinfo],
        in_transaction: Callable[[], bool],
        has_inbox: bool,
        application: str | None,
        key: str | None,
        mandatory: bool,
        also_declare: Sequence[Queue],
        declarations: Declarations,
    ) -> None:
        self._real = producer
        self._stage_envelope = stage
        self._task = task
        self._described: Mapping[str, Any] | None = described
        self._time_zone = time_zone
        self._in_transaction = in_transaction
        self._has_inbox = has_inbox
        self._application = application
        self._ordering_key = key
        self._mandatory = mandatory
        self._also_declare = also_declare
        self._declarations = declarations
        # Not kombu's __init__, which takes longer than all of this: it would make an exchange, and
        # what batches of a channel need.
        self.serializer = producer.serializer
        self.compression = producer.compression

    @property
    def connection(self) -> Connection:
        """The connection on which stock Celery would publish. Nothing is sent on it."""
        return self._real.connection

    def publish(self, body: Any, **options: Any) -> Any:
        """Run kombu's publish without its retries: they belong to the relay."""
        if self._described is None and not self._in_transaction():
            return self._real.publish(body, **options)
        options.update(retry=False, retry_policy=None)
        return super().publish(body, **options)

    def _publish(
        self,
        body: str | bytes,
        priority: int | None,
        content_type: str,
        content_encoding: str,
        headers: Mapping[str, Any],
        properties: dict[str, Any],
        routing_key: str,
        mandatory: bool,
        _immediate: bool,
        exchange: str,
        declare: Sequence[Queue | Exchange] | None,
        *_: Any,
        **__: Any,
    ) -> None:
        described, self._described = self._described, None
        reply_to = properties.get("reply_to")
        if isinstance(reply_to, Queue):
            properties["reply_to"] = reply_to.name
        entities = [*(declare or ()), *(self._also_declare if described else ())]
        milliseconds = properties.get("expiration")
        expires_at = due_at = None
        if milliseconds is not None:
            expires_at = datetime.now(timezone.utc) + timedelta(milliseconds=int(milliseconds))
        if described is not None and described.get("eta"):
            due_at = self._due(described["eta"])
        has_inbox = self._has_inbox and described is not None
        if has_inbox:
            # The broker would drop the message without a word; a worker answers for it (REVOKED).
            properties.pop("expiration", None)
            if self._application is not None:
                properties.setdefault("message_id", self._application)
        identity = described or {"id": f"task-sent:{self._task}"}
        self._stage_envelope(
            Envelope(
                task=self._task if described else "task-sent",
                task_id=str(identity["id"]),
                key=message_key({**identity, "properties": properties}),
                body=body.encode() if isinstance(body, str) else bytes(body),
                is_text=isinstance(body, str),
                content_type=content_type,
                content_encoding=content_encoding,
                priority=priority,
                headers=dict(headers),
                properties=properties,
                exchange=exchange,
                routing_key=routing_key,
                mandatory=bool(mandatory or (described and self._mandatory)),
                declare=tuple([self._declarations.of(entity) for entity in entities]),
                keep=has_inbox,
                due_at=due_at,
                expires_at=expires_at,
                ordering_key=self._ordering_key if described else None,
            )
        )

    def _due(self, eta: datetime | str) -> datetime:
        # A time without a zone is the app's, as the worker reads it.
        aware: datetime = maybe_make_aware(maybe_iso8601(eta), self._time_zone())
        return aware
