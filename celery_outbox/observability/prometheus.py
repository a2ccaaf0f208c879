"""Prometheus: gauges that are read from the database, and counters of this process's events.

Needs the extra ``prometheus``. The gauges say the same wherever they are read; one process that is
scraped is enough, and it need not be a relay: a relay that is dead can't report its own backlog.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from celery_outbox import events
from celery_outbox.observability.figures import read_figures
from celery_outbox.storage.selection import LOCAL_STATES

if TYPE_CHECKING:
    from celery_outbox.plugin import Outbox

__all__ = ["OutboxCollector", "count_events"]

logger = logging.getLogger("celery_outbox")


class OutboxCollector(Collector):
    """The gauges of one outbox, read from its database at each scrape.

    ``celery_outbox_up`` is 0 when the database can't be read; the others are missing then.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Say what there will be without asking the database, which may be away at the start."""
        yield from (_up(), _messages(), _lag(), _relays(), _local_messages(), _local_lag())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Read the database."""
        up, messages, lag, relays = _up(), _messages(), _lag(), _relays()
        local_messages, local_lag = _local_messages(), _local_lag()
        try:
            figures = read_figures(self._outbox.store)
        except SQLAlchemyError as exc:
            logger.error("the outbox's figures can't be read: %s", exc)
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        for state, count in figures.messages.items():
            messages.add_metric([state], count)
        lag.add_metric([], figures.lag_seconds)
        relays.add_metric([], figures.relays)
        for queue, each in figures.local_queues.items():
            for state in LOCAL_STATES:
                local_messages.add_metric([queue, state], getattr(each, state))
            local_lag.add_metric([queue], each.lag_seconds)
        yield from (up, messages, lag, relays, local_messages, local_lag)


def _up() -> GaugeMetricFamily:
    return GaugeMetricFamily("celery_outbox_up", "Whether the outbox's database can be read.")


def _messages() -> GaugeMetricFamily:
    return GaugeMetricFamily(
        "celery_outbox_messages", "Messages in the tables, by state.", labels=["state"]
    )


def _lag() -> GaugeMetricFamily:
    return GaugeMetricFamily(
        "celery_outbox_lag_seconds",
        "How long the oldest message that is due has waited for a relay.",
    )


def _relays() -> GaugeMetricFamily:
    return GaugeMetricFamily(
        "celery_outbox_relays", "Relays that have given a sign of life in the last minute."
    )


def _local_messages() -> GaugeMetricFamily:
    return GaugeMetricFamily(
        "celery_outbox_local_messages",
        "Messages in local queues, by queue and state.",
        labels=["queue", "state"],
    )


def _local_lag() -> GaugeMetricFamily:
    return GaugeMetricFamily(
        "celery_outbox_local_lag_seconds",
        "How long the oldest message of a local queue that is due has waited.",
        labels=["queue"],
    )


def count_events(registry: CollectorRegistry = REGISTRY) -> None:
    """Count what happens in this process; call it once, in relays and in workers.

    The counters are plain ones, so that prometheus_client's multiprocess mode adds up the children
    of a prefork pool.
    """
    relayed = Counter(
        "celery_outbox_relayed",
        "Messages that this process has relayed, by what became of them.",
        ["outcome"],
        registry=registry,
    )
    handled = Counter(
        "celery_outbox_deliveries",
        "Deliveries of durable tasks, by what became of them.",
        ["outcome"],
        registry=registry,
    )
    broker_away = Counter(
        "celery_outbox_broker_away",
        "How often the relay has found the broker away.",
        registry=registry,
    )

    left = Counter(
        "celery_outbox_left_to_relay",
        "Messages that this process stored and did not get to publish after the commit.",
        registry=registry,
    )

    def listen(name: str, details: dict[str, Any]) -> None:
        match name:
            case events.SETTLED:
                for outcome in ("confirmed", "retried", "dead", "released", "postponed", "lost"):
                    relayed.labels(outcome).inc(getattr(details["tally"], outcome))
            case events.HANDLED:
                handled.labels(details["state"].lower()).inc()
            case events.DUPLICATE:
                handled.labels("duplicate").inc()
            case events.BUSY:
                handled.labels("given_back").inc()
            case events.BROKER_AWAY:
                broker_away.inc()
            case events.LEFT_TO_RELAY:
                left.inc(details["count"])

    events.subscribe(listen)
