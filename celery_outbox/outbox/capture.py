"""Capture: where Celery would publish a task's message, an envelope is staged.

The seam is ``app.amqp.send_task_message``, in which every way of sending a task ends (``delay``,
``send_task``, canvas, links, retries, beat) and nothing else does (control, events of the worker).
Celery's own sender runs, against a producer that is kombu's but for its last hop (see
`celery_outbox.outbox.producers`): so routing, serializer, compression, headers, declarations and
signals are Celery's and kombu's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kombu import Connection, Exchange, Queue
from kombu.messaging import Producer

from celery_outbox.declaration import Declarations
from celery_outbox.envelope import ordering_key
from celery_outbox.outbox.bypass import Bypasses
from celery_outbox.outbox.ordering import OPTION, arguments_of
from celery_outbox.outbox.producers import AnyProducer, PooledProducer, Stage, StagingProducer
from celery_outbox.outbox.results import Results
from celery_outbox.outbox.signatures import tasks_of

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["Capture"]

logger = logging.getLogger("celery_outbox")

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
        self._acquire: Callable[..., Any] = app.producer_or_acquire
        self._results = Results(app, in_transaction, has_inbox, application)
        self._own_brokers: set[tuple[Any, ...]] | None = None
        self._declarations = Declarations()

    def install(self) -> None:
        """Replace the app's sender, and put off what it asks of the result backend."""
        app, amqp = self._app, self._app.amqp
        # Another plugin may have replaced it before us.
        self._sender = amqp.__dict__.get("send_task_message")
        amqp.send_task_message = self._send
        app.producer_or_acquire = self._producer
        self._results.install()
        self._bypasses.watch()

    def _producer(self, producer: Producer | None = None) -> Any:
        """Stand in for ``producer_or_acquire``."""
        if producer is not None:
            return self._acquire(producer)
        return PooledProducer(self._app, self._acquire)

    def _send(self, producer: AnyProducer, name: str, message: Any, **options: Any) -> Any:
        """Stand in for ``send_task_message``."""
        token = self._bypasses.enter_seam()
        try:
            return self._stage_or_publish(producer, name, message, options)
        finally:
            self._bypasses.leave_seam(token)

    def _stage_or_publish(
        self,
        producer: AnyProducer,
        name: str,
        message: Any,
        options: dict[str, Any],
    ) -> Any:
        given = options.pop(OPTION, None)
        ours, has_inbox = self._is_own_broker(producer), self._has_inbox(name)
        stage = self._choose(self._decisive(name, message)) if ours else None
        if ours and stage is None:
            stage = self._stage_of_local(options)
        if has_inbox and not ours:
            self._bypasses.report(name, "is durable, and goes around the outbox, to another broker")
        if stage is None:
            if isinstance(producer, PooledProducer):
                producer = producer.taken()
            self._results.ask_now(producer)
            return self._stock_sender()(producer, name, message, **options)
        described = _described(message)
        staging = StagingProducer(
            producer,
            stage,
            task=name,
            described=described,
            time_zone=lambda: self._app.timezone,
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

    def _is_own_broker(self, producer: AnyProducer) -> bool:
        """Whether a message by this producer is for the app's broker, and so ours to store."""
        if isinstance(producer, PooledProducer):
            return True
        if self._own_brokers is None:
            with self._app.connection_for_write() as own:
                # `alt`: every broker that it may fail over to.
                alternatives = [Connection(url) for url in own.alt]
                self._own_brokers = {_address(broker) for broker in (own, *alternatives)}
        return _address(producer.connection) in self._own_brokers

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
