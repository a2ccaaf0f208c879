"""Store: every transition of an envelope and of a delivery, one method each."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    Row,
    bindparam,
    case,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import OperationalError, ProgrammingError

from celery_outbox.envelope import Envelope
from celery_outbox.errors import TransactionLost
from celery_outbox.storage import schema
from celery_outbox.storage.dialects import dialect_for
from celery_outbox.storage.dialects.base import lock_of
from celery_outbox.storage.local import LocalStore
from celery_outbox.storage.low_water import LowWater
from celery_outbox.storage.notifications import Listener, channel_of, may_notify
from celery_outbox.storage.rows import envelope_of
from celery_outbox.storage.tables import NAME_LENGTH, Tables

__all__ = ["Batch", "Claimed", "FreshestFirst", "Handled", "Settlement", "Store"]

#: The state of an inbox row until it is recorded; no other transaction sees it before the commit. It
#: is the likeliest one, so that a task without a result needs no second statement.
_EXPECTED = "SUCCESS"


@dataclass(frozen=True, slots=True)
class Claimed:
    """A row under our lease: `envelope`, or the `error` for which it can't be read."""

    id: int
    attempts: int
    task: str
    task_id: str
    destination: str
    created_at: datetime
    envelope: Envelope | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """What one claim took: `token` proves the lease, `now` is the database's time of the claim."""

    token: str
    now: datetime | None
    rows: Sequence[Claimed]


@dataclass(slots=True)
class Settlement:
    """What becomes of each row of a batch, by row id."""

    confirmed: list[int] = field(default_factory=list)
    #: Confirmed, but kept until handled: id → seconds until it is sent again.
    kept: dict[int, float] = field(default_factory=dict)
    #: id → (seconds until the next attempt, error)
    retried: dict[int, tuple[float, str]] = field(default_factory=dict)
    #: id → error
    dead: dict[int, str] = field(default_factory=dict)
    #: Given back at once, uncounted: the broker was at fault, or nobody.
    released: list[int] = field(default_factory=list)
    #: Left alone for a while, uncounted: id → (seconds, error). Its destination takes nothing now, or
    #: it is not for this version to publish.
    postponed: dict[int, tuple[float, str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return (
            len(self.confirmed)
            + len(self.kept)
            + len(self.retried)
            + len(self.dead)
            + len(self.released)
            + len(self.postponed)
        )


@dataclass(frozen=True, slots=True)
class Handled:
    """The inbox's record of an execution that has committed."""

    key: str
    state: str
    outcome: str | None


class Store:
    """The tables of one outbox in one database.

    Methods that take a `connection` run in its transaction and never commit; the others run in a
    short transaction of their own. With `notifies`, a commit tells those who `listen`, where the
    database can.
    """

    #: Told of how many rows that could be published at once are about to be inserted, on which
    #: connection, in the caller's thread. True: this process will do it, and no relay need be woken.
    on_stage: Callable[[Connection, int], bool] | None = None

    def __init__(self, engine: Engine, tables: Tables, *, notifies: bool = True) -> None:
        self.engine = engine
        self.tables = tables
        self.dialect = dialect_for(engine.dialect.name)
        self.local = LocalStore(engine, tables, notifies=notifies)
        self._notifies = notifies
        self._channel = channel_of(tables.outbox.fullname)
        self._low_water = LowWater()
        # Built once: a worker runs these two for every task, and building costs as much as asking.
        self._receive = self.dialect.receive(tables.inbox)
        self._record = (
            update(tables.inbox)
            .where(tables.inbox.c.key == bindparam("row"))
            .values(state=bindparam("state"), outcome=bindparam("outcome"))
        )

    # Outgoing

    def stage(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Insert envelopes, as `row_of` gives them, into the caller's transaction.

        A row with a ``queue`` is a message of a local queue, which no relay takes.
        Raises `SchemaError` if it is the tables that are missing or of another version.
        """
        local = [row for row in rows if "queue" in row]
        published = [row for row in rows if "queue" not in row] if local else rows
        try:
            if keys := {row["ordering_key"] for row in published} - {None}:
                self.dialect.lock_keys(connection, self.tables.inbox, sorted(keys))
            if published:
                taken_care_of = self._is_taken_care_of(connection, published)
                notifies = self._notifies and not taken_care_of and may_notify(connection)
                channel = self._channel if notifies else None
                self.dialect.insert(connection, self.tables.outbox, published, channel)
            if local:
                self.local.put(connection, local)
        except (OperationalError, ProgrammingError):
            schema.compare(self.engine, self.tables)
            raise

    def _is_taken_care_of(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether this process publishes all of `rows` when they are committed."""
        if self.on_stage is None:
            return False
        # What is due later, or has its turn, is any relay's.
        count = sum(not (row["not_before"] or row["ordering_key"]) for row in rows)
        return count > 0 and self.on_stage(connection, count) and count == len(rows)

    def stage_alone(self, row: Mapping[str, Any]) -> None:
        """Insert one envelope in a transaction of its own, committed at the return."""
        with self.engine.begin() as connection:
            self.stage(connection, [row])

    def listen(self) -> Listener | None:
        """Hear of commits to the outbox from now on; None where the database tells nobody."""
        return self.dialect.listen(self.engine, self._channel)

    def notify(self) -> None:
        """Tell those who listen."""
        with self.engine.begin() as connection:
            self.dialect.notify(connection, self._channel)

    def claim(self, limit: int, lease_seconds: float) -> Batch:
        """Take up to `limit` available envelopes under a lease; each counts an attempt."""
        start, began = self._low_water.start(), time.monotonic()
        claim = partial(self.dialect.claim, start=start)
        token, rows = self._lease(claim, limit, lease_seconds)
        self._low_water.looked(start, rows, time.monotonic() - began)
        return _batch(token, rows)

    def _lease(
        self, claim: Callable[..., Sequence[Row[Any]]], limit: int, lease_seconds: float
    ) -> tuple[str, Sequence[Row[Any]]]:
        token = str(uuid.uuid4())
        with self.dialect.transaction(self.engine) as connection:
            rows = claim(
                connection,
                self.tables.outbox,
                limit=limit,
                lease_seconds=lease_seconds,
                token=token,
            )
        return token, rows

    def renew(self, batch: Batch, lease_seconds: float) -> int:
        """Let the lease of what is left of a batch last `lease_seconds` from now; return how many."""
        outbox = self.tables.outbox
        ids = [row.id for row in batch.rows]
        renewed = (
            update(outbox)
            .where(self.dialect.among(outbox.c.id, ids), outbox.c.lease_token == batch.token)
            .values(available_at=self.dialect.after(lease_seconds))
        )
        with self.dialect.transaction(self.engine) as connection:
            return connection.execute(renewed).rowcount

    def seconds_until_available(self) -> float | None:
        """Return how long it is until a row is available, by the database's clock; None: none waits.

        0 or less: one is. Looks from where the next claim begins.
        """
        outbox, now = self.tables.outbox, self.dialect.now()
        first = (
            select(outbox.c.available_at, now.label("now"))
            .where(
                outbox.c.ordering_key.is_(None),
                *self.dialect.begins_at(outbox, self._low_water.start()),
            )
            .order_by(outbox.c.available_at)
            .limit(1)
        )
        ordered = select(
            func.min(outbox.c.available_at).label("available_at"), now.label("now")
        ).where(outbox.c.id.in_(self.dialect.first_of_each_key(outbox)))
        with self.engine.connect() as connection:
            rows = [*connection.execute(first), *connection.execute(ordered)]
        left = [
            (row.available_at - row.now).total_seconds()
            for row in rows
            if row.available_at is not None
        ]
        return min(left, default=None)

    def settle(self, batch: Batch, settlement: Settlement) -> int:
        """Write what became of rows of the batch whose lease is ours; return how many were lost.

        What the settlement leaves out stays as it is, under its lease.
        """
        outbox = self.tables.outbox
        ours = outbox.c.lease_token == batch.token
        one = update(outbox).where(outbox.c.id == bindparam("row"), ours).values(lease_token=None)
        later = self.dialect.after(bindparam("seconds", type_=Float))
        settled = 0
        with self.dialect.transaction(self.engine) as connection:
            if settlement.confirmed:
                settled += self.dialect.delete(connection, outbox.c.id, settlement.confirmed, ours)
            if settlement.kept:
                kept = one.values(
                    attempts=0,
                    last_error=None,
                    published_at=self.dialect.now(),
                    available_at=later,
                    # It has left in its turn; what comes after it need not wait until it is handled.
                    ordering_key=None,
                )
                rows = [{"row": key, "seconds": after} for key, after in settlement.kept.items()]
                settled += (ours_still := connection.execute(kept, rows).rowcount)
                if ours_still < len(rows):
                    # A row that is gone was handled before we came to settle it: not a lost lease.
                    there = select(func.count()).where(outbox.c.id.in_(settlement.kept))
                    settled += len(rows) - connection.execute(there).scalar_one()
            later_with_error = one.values(last_error=bindparam("error"), available_at=later)
            if settlement.retried:
                failures = _failures(settlement.retried)
                settled += connection.execute(later_with_error, failures).rowcount
            if settlement.postponed:
                uncounted = later_with_error.values(attempts=outbox.c.attempts - 1)
                failures = _failures(settlement.postponed)
                settled += connection.execute(uncounted, failures).rowcount
            if settlement.released:
                released = update(outbox).where(
                    self.dialect.among(outbox.c.id, settlement.released), ours
                )
                released = released.values(
                    lease_token=None,
                    attempts=outbox.c.attempts - 1,
                    available_at=self.dialect.now(),
                )
                settled += connection.execute(released).rowcount
            for row_id, error in settlement.dead.items():
                settled += self._bury(connection, row_id, batch.token, error)
        return len(settlement) - settled

    def _bury(self, connection: Connection, row_id: int, token: str, error: str) -> int:
        """Move a row to the dead letters, if the lease is still ours."""
        outbox, dead = self.tables.outbox, self.tables.dead_letter
        ours = (outbox.c.id == row_id) & (outbox.c.lease_token == token)
        row = connection.execute(self.dialect.lock(select(outbox).where(ours))).first()
        if row is None:
            return 0
        values = {name: value for name, value in row._mapping.items() if name in dead.c}
        values |= {"last_error": error, "died_at": self.dialect.now()}
        connection.execute(insert(dead).values(values))
        return connection.execute(delete(outbox).where(ours)).rowcount

    # Incoming

    def receive(self, connection: Connection, key: str, task: str, task_id: str) -> bool:
        """Claim an execution for this transaction; False if it was handled or is being handled."""
        values = {
            "key": key,
            "task": task[:NAME_LENGTH],
            "task_id": task_id[:NAME_LENGTH],
            "state": _EXPECTED,
            "lock": lock_of("inbox", key),
        }
        return self.dialect.received(connection, self._receive, values)

    def handled(self, connection: Connection, key: str) -> Handled | None:
        """Return the record of an execution, if one has committed."""
        inbox = self.tables.inbox
        row = connection.execute(select(inbox).where(inbox.c.key == key)).first()
        return None if row is None else Handled(row.key, row.state, row.outcome)

    def record(
        self, connection: Connection, key: str, state: str, outcome: str | None, *, forget: bool
    ) -> None:
        """Write the outcome of the claimed execution; with `forget`, drop its kept envelope.

        Raises `TransactionLost` if the claim is gone: what follows it must not be committed.
        """
        if not self._is_recorded(connection, state, outcome):
            values = {"row": key, "state": state, "outcome": outcome}
            if not self.dialect.change(connection, self._record, values):
                # A deadlock, on MySQL, ends the transaction and lets the next statement begin another.
                raise TransactionLost
        if forget:
            self.forget(connection, key)

    def recording(
        self, connection: Connection, key: str, state: str, outcome: str | None, *, forget: bool
    ) -> AbstractContextManager[None]:
        """`record`, at the latest with the commit for which the block asks `connection`.

        Where the claim is gone nothing is committed.
        """
        if forget:
            self.forget(connection, key)
        if self._is_recorded(connection, state, outcome):
            return nullcontext()
        values = {"row": key, "state": state, "outcome": outcome}
        return self.dialect.change_with_commit(connection, self._record, values)

    def _is_recorded(self, connection: Connection, state: str, outcome: str | None) -> bool:
        """Whether the inbox row says all of it since the claim."""
        # The statement has a second use: in a transaction that the database has given up, for an
        # error that somebody has swallowed, it fails. COMMIT would not, and commit nothing.
        is_expected = state == _EXPECTED and outcome is None
        return is_expected and self.dialect.is_sound(connection)

    def forget(self, connection: Connection, key: str) -> int:
        """Delete the envelope of an execution that needs no further delivery."""
        return self.dialect.forget(connection, self.tables.outbox, key)

    # Keeping house

    def prune_inbox(self, retention_seconds: float, chunk: int = 1000) -> int:
        """Delete up to `chunk` inbox rows older than the retention; return how many."""
        inbox = self.tables.inbox
        return self._prune(inbox.c.key, inbox.c.handled_at, retention_seconds, chunk)

    def prune_dead_letters(self, retention_seconds: float, chunk: int = 1000) -> int:
        """Delete up to `chunk` dead letters older than the retention; return how many."""
        dead = self.tables.dead_letter
        return self._prune(dead.c.id, dead.c.died_at, retention_seconds, chunk)

    def _prune(self, key: Column[Any], since: Column[Any], seconds: float, chunk: int) -> int:
        old = select(key).where(since < self.dialect.after(-seconds)).order_by(since).limit(chunk)
        with self.dialect.transaction(self.engine) as connection:
            keys = connection.execute(self.dialect.skip_locked(old)).scalars().all()
            if not keys:
                return 0
            return self.dialect.delete(connection, key, keys)

    def counts(self) -> dict[str, int]:
        """Return how many messages are in each state; "published" are kept until handled."""
        outbox = self.tables.outbox
        leased = outbox.c.lease_token.is_not(None) & (outbox.c.available_at > self.dialect.now())
        kept = outbox.c.published_at.is_not(None) & ~leased
        scheduled = (outbox.c.due_at > self.dialect.now()) & ~leased & ~kept

        def count(condition: Any) -> Any:
            return func.count(case((condition, 1)))

        with self.engine.connect() as connection:
            total, in_flight, published, waiting = connection.execute(
                select(func.count(), count(leased), count(kept), count(scheduled)).select_from(
                    outbox
                )
            ).one()
            dead = connection.execute(select(func.count()).select_from(self.tables.dead_letter))
            incoming = connection.execute(select(func.count()).select_from(self.tables.inbox))
            return {
                "outgoing": total - in_flight - published - waiting,
                "scheduled": waiting,
                "in_flight": in_flight,
                "published": published,
                "dead": dead.scalar_one(),
                "incoming": incoming.scalar_one(),
            }


class FreshestFirst(Store):
    """A store that claims the newest envelopes, where relays begin with the oldest.

    So a process that publishes by itself takes what it has just stored, and stays out of the way of
    relays that work off a backlog.
    """

    #: How many envelopes the next claim may take.
    wanted = 0

    def claim(self, limit: int, lease_seconds: float) -> Batch:
        """Take up to `wanted` envelopes without an ordering key; each counts an attempt."""
        if not self.wanted:
            return Batch("", None, [])
        limit = min(limit, self.wanted)
        return _batch(*self._lease(self.dialect.claim_freshest, limit, lease_seconds))


def _batch(token: str, rows: Sequence[Row[Any]]) -> Batch:
    rows = sorted(rows, key=lambda row: int(row.id))
    return Batch(token, rows[0].now if rows else None, [_claimed(row) for row in rows])


def _claimed(row: Row[Any]) -> Claimed:
    return Claimed(
        row.id,
        row.attempts,
        row.task,
        row.task_id,
        row.destination,
        row.created_at,
        *envelope_of(row),
    )


def _failures(rows: Mapping[int, tuple[float, str]]) -> list[dict[str, Any]]:
    return [
        {"row": key, "seconds": seconds, "error": error} for key, (seconds, error) in rows.items()
    ]
