"""Figures: the state of an outbox, read from its database by whichever process asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import select

if TYPE_CHECKING:
    from celery_outbox.storage.store import Store

__all__ = ["Figures", "read_figures"]


@dataclass(frozen=True, slots=True)
class Figures:
    """How much there is, and how long the oldest has waited."""

    #: Messages by state, as `Store.counts` names them.
    messages: Mapping[str, int]
    #: For how long the longest waiting message could have been taken by a relay, by the database's
    #: clock. It grows when no relay runs, or none keeps pace; 0: nobody waits.
    lag_seconds: float


def read_figures(store: Store) -> Figures:
    """Read them, in transactions of its own. The counts read the whole outbox table, the lag an index.

    Raises SQLAlchemy's errors when the database is away.
    """
    available, now = store.tables.outbox.c.available_at, store.dialect.now()
    oldest = select(available, now.label("now")).where(available <= now)
    with store.engine.connect() as connection:
        row = connection.execute(oldest.order_by(available).limit(1)).first()
    lag = 0.0 if row is None else (row.now - row.available_at).total_seconds()
    return Figures(store.counts(), lag)
