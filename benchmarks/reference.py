"""The reference: as little Python as it takes to publish messages to RabbitMQ with confirms.

kombu makes the connection, py-amqp writes the frames. No outbox, no database, no bookkeeping but the
set of delivery tags that are not confirmed yet.
"""

from collections.abc import Sequence

from kombu import Connection, Exchange, Queue

from celery_outbox.envelope import Envelope


class BarePublisher:
    """A channel with publisher confirms."""

    def __init__(self, url: str) -> None:
        self.connection = Connection(url, heartbeat=0)
        self.channel = self.connection.channel()
        self.channel.confirm_select()
        self.channel.events["basic_ack"].add(self._acked)
        self._tag = 0
        self._waiting: set[int] = set()

    def publish_pipelined(self, envelopes: Sequence[Envelope], batch: int) -> None:
        """Publish batches, the confirms of a batch all in flight at once."""
        for start in range(0, len(envelopes), batch):
            for envelope in envelopes[start : start + batch]:
                self._publish(envelope)
            self._wait()

    def publish_one_by_one(self, envelopes: Sequence[Envelope]) -> None:
        """Wait for the confirm of each message before the next one."""
        for envelope in envelopes:
            self._publish(envelope)
            self._wait()

    def close(self) -> None:
        """Drop the connection."""
        self.connection.release()

    def _publish(self, envelope: Envelope) -> None:
        message = self.channel.prepare_message(
            envelope.body.decode(),
            envelope.priority,
            envelope.content_type,
            envelope.content_encoding,
            envelope.headers,
            dict(envelope.properties),
        )
        self._tag += 1
        self._waiting.add(self._tag)
        self.channel._basic_publish(
            message, exchange=envelope.exchange, routing_key=envelope.routing_key, mandatory=True
        )

    def _wait(self) -> None:
        while self._waiting:
            self.connection.drain_events(timeout=15)

    def _acked(self, tag: int, multiple: bool) -> None:
        if multiple:
            self._waiting = {other for other in self._waiting if other > tag}
        else:
            self._waiting.discard(tag)


def empty_queue(url: str, name: str) -> None:
    """Declare a durable queue as Celery does, and empty it, so that each round finds it alike."""
    with Connection(url) as connection:
        queue = Queue(name, Exchange(name), name)(connection.default_channel)
        queue.declare()
        queue.purge()
