"""Many messages of one transaction: each is stored as it was given, in its place."""

from typing import Any

import pytest

from celery_outbox.storage.rows import row_of
from celery_outbox.storage.store import Store
from celery_outbox.testing.contract.database import Database
from celery_outbox.testing.contract.outgoing import NOW, claim, envelope, ids, stored


def stage_many(store: Store, count: int, **changes: Any) -> list[str]:
    labels = [f"{number:04}" for number in range(count)]
    with store.engine.begin() as connection:
        store.stage(connection, [row_of(envelope(label, **changes)) for label in labels])
    return labels


@pytest.mark.parametrize("count", [1, 2, 20, 21, 99, 100, 101, 245])
def test_each_is_stored_once_and_in_order(store: Store, count: int) -> None:
    labels = stage_many(store, count, due_at=None)
    assert [row["task_id"] for row in stored(store)] == labels
    batch = claim(store, limit=count)
    assert ids(batch) == labels
    assert [row.envelope for row in batch.rows] == [envelope(label) for label in labels]


def test_each_has_its_own_values(store: Store) -> None:
    given = [
        envelope("a", due_at=NOW, ordering_key="k", body=b""),
        envelope("b", expires_at=NOW, body=b"\x00"),
        envelope("c %s %(key)s $1 :x"),
    ]
    with store.engine.begin() as connection:
        store.stage(connection, [row_of(each) for each in given])
    assert [row.envelope for row in claim(store).rows] == given


def test_bodies_of_many_megabytes(store: Store, database: Database) -> None:
    if database.name in ("mysql", "mariadb"):
        pytest.skip("its packets are limited: see max_allowed_packet")
    stage_many(store, 30, body=b"x" * 2_000_000)
    assert claim(store, limit=30).rows[29].envelope == envelope("0029", body=b"x" * 2_000_000)
