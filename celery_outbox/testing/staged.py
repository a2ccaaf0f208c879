"""Staged: which messages a block of code stages, and what became of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import select

from celery_outbox.envelope import Envelope
from celery_outbox.outbox.scope import Scope
from celery_outbox.plugin import Outbox
from celery_outbox.storage.store import Batch
from celery_outbox.testing.message import Expected, Message, expected

__all__ = ["Messages", "Staged"]


class Messages(list[Message]):
    """The messages that were committed, in the order in which they were sent.

    Filled when the block ends: `rolled_back` has those whose transaction or savepoint was rolled
    back, `undecided` those whose transaction is still open.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rolled_back: list[Message] = []
        self.undecided: list[Message] = []

    def __eq__(self, other: object) -> bool:
        # For type checkers: a list of messages may well equal one of expectations.
        return super().__eq__(other)

    __hash__ = None

    def check(self, wanted: Sequence[Expected]) -> None:
        """Raise `AssertionError` with the differences unless these were committed, in this order."""
        if list(self) == list(wanted):
            return
        lines = [f"staged {len(self)} message(s), expected {len(wanted)}:"]
        for number in range(max(len(self), len(wanted))):
            if number >= len(wanted):
                lines.append(f"  {number}: not expected: {self[number]!r}")
            elif number >= len(self):
                lines.append(f"  {number}: not staged: {wanted[number]!r}")
            elif differences := wanted[number].differences(self[number]):
                lines.append(f"  {number}: {self[number].task}")
                lines.extend(f"     {difference}" for difference in differences)
        for title, others in (
            ("rolled back", self.rolled_back),
            ("in a transaction that is still open", self.undecided),
        ):
            if others:
                lines.append(f"besides, {title}:")
                lines.extend(f"  {message!r}" for message in others)
        raise AssertionError("\n".join(lines))


class Staged:
    """Tells which messages a block stages::

        with staged() as messages:
            place_order(7)
        assert messages == [expected("shop.charge", args=(7,))]

        with staged.exactly("shop.charge", args=(7,)):
            place_order(7)

    It sees what this process sends, in any of its threads, while the block runs.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    @contextmanager
    def __call__(self, within: Any = None) -> Iterator[Messages]:
        """Collect what the block stages.

        Committed is what others can see. With `within`, a session or connection, it is what is to be
        seen there: for tests that roll back one transaction around everything.
        """
        messages = Messages()
        seen: list[tuple[Envelope, Scope | None]] = []
        relayed: set[str] = set()
        with self._hearing(seen, relayed):
            yield messages
        there = relayed | self._keys({envelope.key for envelope, _ in seen}, within)
        for envelope, scope in seen:
            message = Message.of(envelope)
            if envelope.key in there:
                messages.append(message)
            elif scope is not None and scope.is_open() and _still_holds(scope, envelope.key):
                messages.undecided.append(message)
            else:
                messages.rolled_back.append(message)

    @contextmanager
    def exactly(self, *messages: Any, within: Any = None, **said: Any) -> Iterator[Messages]:
        """Raise `AssertionError` unless the block stages exactly these, in this order.

        Either one task with what is said of its message (see `expected`), or any number of tasks,
        task names and `expected` messages. None at all: nothing may be staged.
        """
        if said:
            if len(messages) != 1 or isinstance(messages[0], Expected):
                raise TypeError("to say something of several messages, give expected(...) for each")
            wanted = [expected(messages[0], **said)]
        else:
            wanted = [
                message if isinstance(message, Expected) else expected(message)
                for message in messages
            ]
        with self(within) as found:
            yield found
        found.check(wanted)

    def waiting(self) -> list[Message]:
        """Return all committed messages that wait in the outbox, oldest first, due or not."""
        outbox = self._outbox.tables.outbox
        with self._outbox.engine.connect() as connection:
            rows = connection.execute(select(outbox).order_by(outbox.c.id)).all()
        return [_message(row._mapping) for row in rows]

    @contextmanager
    def _hearing(
        self, seen: list[tuple[Envelope, Scope | None]], relayed: set[str]
    ) -> Iterator[None]:
        outbox: Any = self._outbox
        store: Any = outbox.store
        # In this order: what `row_of` makes of an envelope says too little of it.
        stage_in, stage_alone, claim = outbox._stage_in, store.stage_alone, store.claim

        def hear_in(scope: Scope, envelope: Envelope) -> None:
            stage_in(scope, envelope)
            seen.append((envelope, scope))

        def hear_alone(row: Mapping[str, Any]) -> None:
            stage_alone(row)
            seen.append((_envelope(row), None))

        def hear_claim(*args: Any, **kwargs: Any) -> Batch:
            batch: Batch = claim(*args, **kwargs)
            relayed.update(row.envelope.key for row in batch.rows if row.envelope is not None)
            return batch

        replaced = [
            (outbox, "_stage_in", hear_in),
            (store, "stage_alone", hear_alone),
            (store, "claim", hear_claim),
        ]
        before = [(owner, name, vars(owner).get(name)) for owner, name, _ in replaced]
        for owner, name, heard in replaced:
            setattr(owner, name, heard)
        try:
            yield
        finally:
            for owner, name, own in before:
                if own is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, own)

    def _keys(self, keys: set[str], within: Any) -> set[str]:
        """Those of the keys that are stored."""
        if not keys:
            return set()
        tables = self._outbox.tables
        queries = [
            select(table.c.key).where(table.c.key.in_(keys))
            for table in (tables.outbox, tables.dead_letter, tables.inbox)
        ]
        if within is not None:
            return {key for query in queries for key in within.execute(query).scalars()}
        with self._outbox.engine.connect() as connection:
            return {key for query in queries for key in connection.execute(query).scalars()}


def _still_holds(scope: Any, key: str) -> bool:
    """Whether a transaction that is open has the message, or has written it."""
    held = [entry[-1] if isinstance(entry, tuple) else entry for entry in scope._staged]
    return any(row["key"] == key for row in held) or bool(getattr(scope, "_written", ()))


def _envelope(row: Mapping[str, Any]) -> Envelope:
    return Envelope.load(
        row["message"],
        task=row["task"],
        task_id=row["task_id"],
        key=row["key"],
        body=row["body"],
        due_at=row["due_at"],
        expires_at=row["expires_at"],
    )


def _message(row: Mapping[Any, Any]) -> Message:
    return Message.of(_envelope(row))
