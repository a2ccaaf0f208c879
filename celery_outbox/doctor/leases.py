"""Whether a batch is done before its lease is over."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kombu.transport import pyamqp
from sqlalchemy import select

from celery_outbox.doctor.broker import PROBES, connected, probe
from celery_outbox.doctor.finding import Finding, error, fine, skipped, warning
from celery_outbox.storage.administration import Administration

if TYPE_CHECKING:
    from celery_outbox.plugin import Outbox

__all__ = ["check_lease", "check_leases"]

_TRIES = 5


def check_lease(outbox: Outbox) -> Iterator[Finding]:
    """A whole batch is claimed, published and settled in half of its lease, as measured now."""
    config = outbox.config
    each = _seconds_a_message(outbox)
    if each is None:
        yield skipped("how long this transport takes for a message can't be measured")
        return
    taken = config.batch_size * each + 2 * _round_trip(outbox)
    says = (
        f"a batch of {config.batch_size} takes about {taken:.2g} s, the lease is "
        f"{config.lease_seconds:g} s"
    )
    advice = (
        "Make outbox_batch_size smaller or outbox_lease_seconds longer: a relay whose lease is over "
        "publishes what another one publishes as well."
    )
    if taken >= config.lease_seconds:
        yield error(says, advice)
    elif taken >= config.lease_seconds / 2:
        yield warning(says, advice)
    else:
        yield fine(says)


def _seconds_a_message(outbox: Outbox) -> float | None:
    """What one message of a batch takes: RabbitMQ's are all in flight, elsewhere one by one."""
    with connected(outbox) as connection:
        if isinstance(connection.transport, pyamqp.Transport):
            begun = time.monotonic()
            probe(connection, outbox.config.confirm_timeout_seconds)
            return (time.monotonic() - begun) / PROBES
        if connection.transport.driver_type != "redis":
            return None
        client = connection.default_channel.client
        client.ping()
        begun = time.monotonic()
        for _ in range(_TRIES):
            client.ping()
        return (time.monotonic() - begun) / _TRIES


def _round_trip(outbox: Outbox) -> float:
    with outbox.engine.connect() as connection:
        connection.execute(select(1))
        begun = time.monotonic()
        for _ in range(_TRIES):
            connection.execute(select(1))
        return (time.monotonic() - begun) / _TRIES


def check_leases(outbox: Outbox) -> Iterator[Finding]:
    """No relay has left a batch behind, and no worker what it took from a local queue."""
    leases = Administration(outbox.engine, outbox.tables).leases()
    over = {"relay": 0, "worker": 0}
    for lease in leases:
        over[lease["holder"]] += lease["messages"] if lease["is_over"] else 0
    if count := over["relay"]:
        yield warning(
            f"the lease of {count} message(s) is over: a relay was killed, or is slower than its lease",
            "The next relay takes them. If none does, none is running; if it happens again and again, "
            "make outbox_lease_seconds longer or outbox_batch_size smaller.",
        )
    if count := over["worker"]:
        yield warning(
            f"the lease of {count} message(s) of local queues is over: a worker was killed",
            "The next worker of the queue takes them. If none does, none is running.",
        )
    if not any(over.values()):
        yield fine(f"{len(leases)} lease(s), none of them over")
