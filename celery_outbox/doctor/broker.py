"""Whether the broker takes messages, and says so."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from kombu.transport import pyamqp

from celery_outbox.doctor import servicebus
from celery_outbox.doctor.finding import Finding, error, fine, skipped, warning
from celery_outbox.errors import ConfigurationError
from celery_outbox.relay.publishers import is_servicebus

if TYPE_CHECKING:
    from kombu import Connection

    from celery_outbox.plugin import Outbox

__all__ = ["PROBES", "check_broker", "check_confirms", "check_queues", "connected", "probe"]

#: How many messages a probe is made of, all in flight at once.
PROBES = 20


@contextmanager
def connected(outbox: Outbox) -> Iterator[Connection]:
    """Lend a connection of its own to the broker; raise what the transport raises."""
    connection = outbox.app.connection_for_write(heartbeat=0)
    try:
        connection.ensure_connection(
            max_retries=1, interval_start=0, timeout=outbox.config.confirm_timeout_seconds
        )
        yield connection
    finally:
        connection.collect(socket_timeout=1)


def check_broker(outbox: Outbox) -> Iterator[Finding]:
    """The broker is one of which it is known what a publish means, and it takes connections."""
    try:
        outbox.check_broker()
    except ConfigurationError as exc:
        yield error(str(exc), "Use a broker that can be trusted with what leaves the outbox.")
        return
    place = outbox.app.connection_for_write().as_uri()
    try:
        with connected(outbox):
            pass
    except Exception as exc:
        yield error(
            f"{place} takes no connection: {type(exc).__name__}: {exc}",
            "Is the broker there, and broker_url right? Messages wait in the database meanwhile.",
        )
        return
    yield fine(f"{place} takes connections")


def check_confirms(outbox: Outbox) -> Iterator[Finding]:
    """What was published is confirmed, and what leads nowhere comes back; elsewhere: what is kept.

    The probe of RabbitMQ is addressed to a queue that does not exist, so that nothing is left of it.
    """
    with connected(outbox) as connection:
        if isinstance(connection.transport, pyamqp.Transport):
            yield from _confirms_of(connection, outbox.config.confirm_timeout_seconds)
        elif connection.transport.driver_type == "redis":
            yield from _memory_of(connection, keeps=outbox.config.keep_until_handled)
        elif is_servicebus(connection):
            yield from servicebus.sends(connection)
        elif outbox.config.trust_broker:
            yield warning(
                f"outbox_trust_broker is set for the transport {connection.transport.driver_type!r}, "
                "of which it is not known what a publish that returned means",
                "Find out what it does with a message when it crashes, and consider "
                "outbox_keep_until_handled.",
            )
        else:
            yield fine(
                f"the transport {connection.transport.driver_type!r} has written a message when its "
                "publish returns, and has no stronger answer"
            )


def _confirms_of(connection: Connection, seconds: float) -> Iterator[Finding]:
    try:
        returned = probe(connection, seconds)
    except TimeoutError:
        yield error(
            f"the broker takes connections, and has confirmed no message for {seconds:g} s",
            "Look at its alarms (`rabbitmq-diagnostics alarms`): it is short of memory or disk. "
            "Messages wait in the database meanwhile.",
        )
        return
    if returned < PROBES:
        yield error(
            f"of {PROBES} messages to a queue that does not exist {PROBES - returned} were confirmed "
            "and did not come back: the broker would lose messages in silence",
            "Is it RabbitMQ, and no proxy that speaks AMQP? It has to heed `mandatory`.",
        )
    else:
        yield fine(f"{PROBES} messages were confirmed; those that lead nowhere come back")


def probe(connection: Connection, seconds: float) -> int:
    """Publish to a queue that does not exist, wait for the confirms, return how many came back.

    Raises `TimeoutError` if they take too long. RabbitMQ only.
    """
    channel: Any = connection.channel()
    channel.confirm_select()
    returned: list[str] = []
    settled: set[int] = set()

    def settle(tag: int, multiple: bool) -> None:
        settled.update(range(1, tag + 1) if multiple else (tag,))

    channel.events["basic_return"].add(lambda *what: returned.append(what[2]))
    for name in ("basic_ack", "basic_nack"):
        channel.events[name].add(settle)
    nowhere = f"celery-outbox-doctor-{uuid.uuid4().hex}"
    for _ in range(PROBES):
        channel._basic_publish(
            channel.prepare_message(b"probe"), routing_key=nowhere, mandatory=True
        )
    deadline = time.monotonic() + seconds
    while len(settled) < PROBES:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"{PROBES - len(settled)} of {PROBES} were not confirmed")
        with suppress(TimeoutError):
            channel.connection.drain_events(timeout=left)
    return len(returned)


def _memory_of(connection: Connection, *, keeps: bool) -> Iterator[Finding]:
    """Redis confirms what it has in memory: whether it stays there is a matter of its settings."""
    client: Any = connection.default_channel.client
    memory, persistence = client.info("memory"), client.info("persistence")
    policy = memory.get("maxmemory_policy", "noeviction")
    is_fine = True
    if int(memory.get("maxmemory", 0)) and policy != "noeviction":
        is_fine = False
        yield error(
            f"Redis may drop whole queues when its memory is full: maxmemory-policy is {policy}",
            "Set it to noeviction for a Redis that is a broker; publishes are refused then, and wait.",
        )
    if not int(persistence.get("aof_enabled", 0)) and not keeps:
        is_fine = False
        yield warning(
            "Redis forgets what it has confirmed when it is restarted: appendonly is off",
            "Turn appendonly on, or set outbox_keep_until_handled, which sends again what was not "
            "handled.",
        )
    if is_fine:
        yield fine("Redis keeps what it has confirmed, or the outbox does")


def check_queues(outbox: Outbox) -> Iterator[Finding]:
    """Somebody consumes the app's queues, which only RabbitMQ can say; or they are made well."""
    with connected(outbox) as connection:
        if is_servicebus(connection):
            yield from servicebus.queues_of(outbox, connection)
            return
        if not isinstance(connection.transport, pyamqp.Transport):
            yield skipped(
                f"the transport {connection.transport.driver_type!r} does not know who consumes a queue"
            )
            return
        empty: list[str] = []
        for name in sorted(outbox.app.amqp.queues):
            channel: Any = connection.channel()
            try:
                answer = channel.queue_declare(name, passive=True)
            except connection.channel_errors:
                continue  # Not declared yet: the first message or worker does it.
            channel.close()
            if not answer.consumer_count:
                empty.append(f"{name} ({answer.message_count} waiting)")
    if empty:
        yield warning(
            f"nobody consumes: {', '.join(empty)}",
            "Start a worker for it, or see why none is connected.",
        )
    else:
        yield fine("the app's queues have consumers, or are not declared yet")
