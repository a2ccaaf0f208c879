"""Capture: where Celery would publish a task's message, an envelope is staged.

The seam is ``app.amqp.send_task_message``, in which every way of sending a task ends (``delay``,
``send_task``, canvas, links, retries, beat) and nothing else does (control, events of the worker).
Celery's own sender runs, against a producer that is kombu's but for its last hop: so routing,
serializer, compression, headers, declarations and signals are Celery's and kombu's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta, timezone, tzinfo
from typing import TYPE_CHECKING, Any

from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu import Connection, Exchange, Queue
from kombu.messaging import Producer

from celery_outbox.declaration import Declarations
from celery_outbox.envelope import Envelope, message_key, ordering_key
from celery_outbox.outbox.bypass import Bypasses
from celery_outbox.outbox.ordering import OPTION, arguments_of
from celery_outbox.outbox.results import Results
from celery_outbox.outbox.signatures import tasks_of

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["Capture", "Stage"]

logger = logging.getLogger("celery_outbox")

#: Takes an envelope into the transaction that it was sent in.
Stage = Callable[[Envelope], None]

#: A message to these reaches whoever is bound, and nobody is an answer too.
_MAY_REACH_NOBODY = ("fanout", "x-delayed-message")


class Capture:
    """The outgoing seam of one app.

    `choose` is asked for each task message, by task name, and answers with where to stage it, or
    None to let Celery publish it. `has_inbox` tells whether a task's worker will record that it has
    handled the message, so that the envelope may be kept until then. `application` gives an id to the
    application that a message of such a task comes from. `ordering_key` gives the key of a call, by
    task name and arguments. `in_transaction` tells whether the caller is in one. `stage_of_local` is
    asked for what `choose` leaves to Celery, by the sender's options: it answers like `choose`.
    """

    def __init__(
        self,
        app: Celery,
        choose: Callable[[str], Stage | None],
        has_inbox: Callable[[str], bool],
        application: Callable[[Mapping[str, Any]], str | None],
        ordering_key: Callable[[str, Sequence[Any], Mapping[str, Any]], str | None],
        in_transaction: Callable[[], bool],
        bypasses: Bypasses,
        stage_of_local: Callable[[Mapping[str, Any]], Stage | None],
    ) -> None:
        self._app = app
        self._bypasses = bypasses
        self._stage_of_local = stage_of_local
        self._choose = choose
        self._has_inbox = has_inbox
        self._application = application
        self._ordering_key = ordering_key
        self._in_transaction = in_transaction
        self._sender: Callable[..., Any] | None = None
        self._results = Results(app, in_transaction, has_inbox, application)
        self._own_brokers: set[tuple[Any, ...]] | None = None
        self._declarations = Declarations()

    def install(self) -> None:
        """Replace the app's sender, and put off what it asks of the result backend."""
        amqp = self._app.amqp
        # Another plugin may have replaced it before us.
        self._sender = amqp.__dict__.get("send_task_message")
        amqp.send_task_message = self._send
        self._results.install()
        self._bypasses.watch()

    def _send(self, producer: Producer, name: str, message: Any, **options: Any) -> Any:
        """Stand in for ``send_task_message``."""
        token = self._bypasses.enter_seam()
        try:
            return self._stage_or_publish(producer, name, message, options)
        finally:
            self._bypasses.leave_seam(token)

    def _stage_or_publish(
        self, producer: Producer, name: str, message: Any, options: dict[str, Any]
    ) -> Any:
        given = options.pop(OPTION, None)
        ours, has_inbox = self._is_own_broker(producer.connection), self._has_inbox(name)
        stage = self._choose(self._decisive(name, message)) if ours else None
        if ours and stage is None:
            stage = self._stage_of_local(options)
        if has_inbox and not ours:
            self._bypasses.report(name, "is durable, and goes around the outbox, to another broker")
        if stage is None:
            self._results.ask_now(producer)
            return self._stock_sender()(producer, name, message, **options)
        described = _described(message)
        staging = StagingProducer(
            producer,
            stage,
            task=name,
            described=described,
            time_zone=self._app.timezone,
            in_transaction=self._in_transaction,
            has_inbox=has_inbox,
            application=self._application(described) if has_inbox else None,
            key=ordering_key(given) or self._ordering_key(name, *arguments_of(message)),
            mandatory=self._exchange_type(options) not in _MAY_REACH_NOBODY,
            also_declare=self._results.reply_queues(),
            declarations=self._declarations,
        )
        return self._stock_sender()(staging, name, message, **options)

    def _decisive(self, name: str, message: Any) -> str:
        """The task whose capture decides: for a chord's poll, ``chord_unlock``, that of its body."""
        if name == "celery.chord_unlock" and isinstance(message.body, tuple):
            arguments = message.body[0]
            if len(arguments) > 1 and isinstance(arguments[1], Mapping):
                tasks = list(tasks_of(arguments[1]))
                return next(filter(self._has_inbox, tasks), tasks[0] if tasks else name)
        return name

    def _stock_sender(self) -> Callable[..., Any]:
        # Built with the first message: up to 5.6 Celery's sender keeps the list of signal receivers
        # that it finds when it is built.
        if self._sender is None:
            self._sender = self._app.amqp._create_task_sender()
        return self._sender

    def _is_own_broker(self, connection: Connection) -> bool:
        """Whether a message on this connection is for the app's broker, and so ours to store."""
        if self._own_brokers is None:
            with self._app.connection_for_write() as own:
                # `alt`: every broker that it may fail over to.
                alternatives = [Connection(url) for url in own.alt]
                self._own_brokers = {_address(broker) for broker in (own, *alternatives)}
        return _address(connection) in self._own_brokers

    def _exchange_type(self, options: Mapping[str, Any]) -> str:
        """The type of the exchange that Celery's sender will choose."""
        exchange, queue = options.get("exchange"), options.get("queue")
        if options.get("exchange_type"):
            return str(options["exchange_type"])
        if isinstance(exchange, Exchange):
            return str(exchange.type)
        if isinstance(queue, str):
            queue = self._app.amqp.queues[queue]
        elif queue is None and exchange is None:
            queue = self._app.amqp.default_queue
        return str(queue.exchange.type) if isinstance(queue, Queue) and queue.exchange else "direct"


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
        producer: Producer,
        stage: Stage,
        *,
        task: str,
        described: Mapping[str, Any],
        time_zone: tzinfo,
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
        aware: datetime = maybe_make_aware(maybe_iso8601(eta), self._time_zone)
        return aware


def _address(connection: Connection) -> tuple[Any, ...]:
    # Connection's own equality also compares transport options, which kombu's publish changes; and
    # a pool's connections have the transport's defaults filled in.
    defaults = connection.transport.default_connection_params
    host = connection.hostname or defaults.get("hostname")
    return (
        connection.get_transport_cls(),
        "127.0.0.1" if host in (None, "localhost") else host,
        connection.port or defaults.get("port"),
        connection.userid or defaults.get("userid"),
        connection.virtual_host or defaults.get("virtual_host"),
    )


def _described(message: Any) -> Mapping[str, Any]:
    """The part of a task message that says which task it is: protocol 2 headers, or protocol 1 body."""
    described: Mapping[str, Any] = message.headers if "id" in message.headers else message.body
    return described
