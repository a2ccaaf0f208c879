"""Figures: the state of an outbox, read from its database by whichever process asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sqlalchemy import func, select

from celery_outbox.storage.administration import Administration
from celery_outbox.storage.relays import Relays

if TYPE_CHECKING:
    from celery_outbox.storage.store import Store

__all__ = ["Figures", "QueueFigures", "read_figures"]

_LATELY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class QueueFigures:
    """How many messages of a local queue are in each state, and how long the oldest has waited."""

    due: int
    scheduled: int
    taken: int
    #: For how long the longest waiting message could have been taken by a worker.
    lag_seconds: float


@dataclass(frozen=True, slots=True)
class Figures:
    """How much there is, and how long the oldest has waited."""

    #: Messages by state, as `Administration.counts` names them.
    messages: Mapping[str, int]
    #: For how long the longest waiting message could have been taken by a relay, by the database's
    #: clock. It grows when no relay runs, or none keeps pace; 0: nobody waits.
    lag_seconds: float
    #: The local queues that have messages.
    local_queues: Mapping[str, QueueFigures] = field(default_factory=dict)
    #: Relays that have given a sign of life lately. 0 says nothing of beat's first ten seconds.
    relays: int = 0
    #: Messages that these relays have published lately, per second.
    published_per_second: float = 0.0
    #: Executions that workers have recorded in the last minute, per second.
    handled_per_second: float = 0.0


def read_figures(store: Store) -> Figures:
    """Read them, in transactions of its own. The counts read whole tables, the rest indexes.

    Raises SQLAlchemy's errors when the database is away.
    """
    available, now = store.tables.outbox.c.available_at, store.dialect.now()
    oldest = select(available, now.label("now")).where(available <= now)
    with store.engine.connect() as connection:
        row = connection.execute(oldest.order_by(available).limit(1)).first()
    lag = 0.0 if row is None else (row.now - row.available_at).total_seconds()
    alive = [relay for relay in Relays(store.engine, store.tables).all() if relay.is_alive]
    return Figures(
        Administration(store.engine, store.tables).counts(),
        lag,
        local_queues=_local_queues(store),
        relays=len(alive),
        published_per_second=sum(relay.per_second for relay in alive),
        handled_per_second=_handled_per_second(store),
    )


def _local_queues(store: Store) -> dict[str, QueueFigures]:
    lags = store.local.lags()
    return {
        queue: QueueFigures(**counts, lag_seconds=lags.get(queue, 0.0))
        for queue, counts in sorted(store.local.counts().items())
    }


def _handled_per_second(store: Store) -> float:
    handled = store.tables.inbox.c.handled_at
    lately = select(func.count()).where(handled > store.dialect.after(-_LATELY_SECONDS))
    with store.engine.connect() as connection:
        return connection.execute(lately).scalar_one() / _LATELY_SECONDS
