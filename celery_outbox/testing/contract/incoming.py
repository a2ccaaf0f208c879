"""The store's incoming half: receive, handled, record, forget, prune."""

from datetime import datetime, timedelta, timezone

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.exc import OperationalError

from celery_outbox.errors import TransactionLost
from celery_outbox.storage.store import Handled, Store
from celery_outbox.testing.contract.database import Database
from celery_outbox.testing.contract.outgoing import claim, ids, stage


def receive(store: Store, key: str) -> bool:
    with store.engine.begin() as connection:
        return store.receive(connection, key, "shop.notify", "id")


def handled(store: Store, key: str) -> Handled | None:
    with store.engine.connect() as connection:
        return store.handled(connection, key)


def test_the_first_delivery_is_received_and_the_second_is_not(store: Store) -> None:
    """P13."""
    assert receive(store, "k") is True
    assert receive(store, "k") is False
    assert receive(store, "other") is True


def test_what_was_rolled_back_may_be_received_again(store: Store) -> None:
    """P13, P15."""
    with store.engine.connect() as connection:
        assert store.receive(connection, "k", "t", "id")
        connection.rollback()
    assert handled(store, "k") is None
    assert receive(store, "k") is True


def test_a_transaction_that_has_received_does_not_receive_again(store: Store) -> None:
    with store.engine.begin() as connection:
        assert store.receive(connection, "k", "t", "id")
        assert not store.receive(connection, "k", "t", "id")


def test_a_concurrent_delivery_does_not_wait(store: Store, database: Database) -> None:
    """P13: a worker's slot would be held as long. Where there is one writer it gives up instead."""
    with store.engine.connect() as connection, connection.begin():
        assert store.receive(connection, "k", "t", "id")
        if database.several_writers:
            assert receive(store, "k") is False
            assert handled(store, "k") is None
            assert receive(store, "other") is True
        else:
            with pytest.raises(OperationalError):
                receive(store, "k")
    assert receive(store, "k") is False


def test_the_outcome_is_read_back(store: Store) -> None:
    """P14."""
    outcome = "ä☃" * 10_000
    with store.engine.begin() as connection:
        store.receive(connection, "k", "t", "id")
        store.record(connection, "k", "SUCCESS", outcome, forget=False)
    assert handled(store, "k") == Handled("k", "SUCCESS", outcome)


def test_an_outcome_may_be_empty(store: Store) -> None:
    with store.engine.begin() as connection:
        store.receive(connection, "k", "t", "id")
        store.record(connection, "k", "IGNORED", None, forget=False)
    assert handled(store, "k") == Handled("k", "IGNORED", None)


def test_the_record_commits_with_the_transaction(store: Store) -> None:
    with store.engine.connect() as connection:
        store.receive(connection, "k", "t", "id")
        store.record(connection, "k", "SUCCESS", "x", forget=False)
        connection.rollback()
    assert handled(store, "k") is None


def test_a_transaction_that_was_rolled_back_under_its_body_records_nothing(store: Store) -> None:
    """P13: MySQL ends the transaction of a deadlock's victim; what comes next is another one."""
    with store.engine.connect() as connection:
        assert store.receive(connection, "k", "t", "id")
        connection.exec_driver_sql("ROLLBACK")
        with pytest.raises(TransactionLost):
            store.record(connection, "k", "SUCCESS", "x", forget=False)
    assert handled(store, "k") is None


def test_an_outcome_is_recorded_by_the_commit(store: Store) -> None:
    """P13, P14."""
    stage(store, "kept")
    with store.engine.connect() as connection:
        assert store.receive(connection, "kept:0:0:", "t", "kept")
        with store.recording(connection, "kept:0:0:", "SUCCESS", "x", forget=True):
            connection.commit()
    assert handled(store, "kept:0:0:") == Handled("kept:0:0:", "SUCCESS", "x")
    assert ids(claim(store)) == []


def test_an_outcome_is_not_recorded_without_a_commit(store: Store) -> None:
    with store.engine.connect() as connection:
        assert store.receive(connection, "k", "t", "id")
        with store.recording(connection, "k", "SUCCESS", "x", forget=False):
            connection.rollback()
        assert receive(store, "k")


def test_without_a_claim_the_commit_is_none(store: Store) -> None:
    """P13: not of what was written after the database had ended the claim's transaction, either."""
    with store.engine.connect() as connection:
        assert store.receive(connection, "k", "t", "id")
        connection.exec_driver_sql("ROLLBACK")
        assert store.receive(connection, "other", "t", "id")
        with (
            pytest.raises(TransactionLost),
            store.recording(connection, "k", "SUCCESS", "x", forget=False),
        ):
            connection.commit()
    assert handled(store, "other") is None


def test_a_delivery_has_names_that_are_too_long_for_their_columns_cut(store: Store) -> None:
    with store.engine.begin() as connection:
        assert store.receive(connection, "k", "t" * 1000, "i" * 1000)


def test_recording_drops_the_kept_envelope_if_asked(store: Store) -> None:
    stage(store, "kept", "other")
    with store.engine.begin() as connection:
        store.receive(connection, "kept:0:0:", "t", "kept")
        store.record(connection, "kept:0:0:", "SUCCESS", None, forget=True)
    assert ids(claim(store)) == ["other"]


def test_recording_leaves_envelopes_alone_unless_asked(store: Store) -> None:
    stage(store, "kept")
    with store.engine.begin() as connection:
        store.receive(connection, "kept:0:0:", "t", "kept")
        store.record(connection, "kept:0:0:", "SUCCESS", None, forget=False)
    assert ids(claim(store)) == ["kept"]


def test_forget_says_how_many(store: Store) -> None:
    stage(store, "m")
    stage(store, "m")
    with store.engine.begin() as connection:
        assert store.forget(connection, "m:0:0:") == 2
        assert store.forget(connection, "m:0:0:") == 0


# Prune


def age(store: Store, days: float) -> None:
    inbox = store.tables.inbox
    then = datetime.now(timezone.utc) - timedelta(days=days)
    with store.engine.begin() as connection:
        connection.execute(update(inbox).values(handled_at=then))


def remembered(store: Store) -> int:
    with store.engine.connect() as connection:
        return int(
            connection.execute(select(func.count()).select_from(store.tables.inbox)).scalar_one()
        )


def test_prune_keeps_what_is_younger_than_the_retention(store: Store) -> None:
    """P12."""
    for number in range(3):
        receive(store, f"old{number}")
    age(store, days=8)
    receive(store, "young")
    assert store.prune_inbox(7 * 86400) == 3
    assert remembered(store) == 1
    assert receive(store, "young") is False


def test_prune_goes_in_chunks(store: Store) -> None:
    """P12."""
    for number in range(5):
        receive(store, str(number))
    age(store, days=8)
    assert [store.prune_inbox(86400, chunk=2) for _ in range(4)] == [2, 2, 1, 0]
    assert remembered(store) == 0


def test_prune_passes_over_rows_that_are_locked(store: Store, database: Database) -> None:
    if not database.several_writers:
        pytest.skip("one writer at a time")
    for number in range(3):
        receive(store, str(number))
    age(store, days=8)
    inbox = store.tables.inbox
    with store.engine.connect() as connection, connection.begin():
        connection.execute(select(inbox).where(inbox.c.key == "1").with_for_update())
        assert store.prune_inbox(86400) == 2
    assert store.prune_inbox(86400) == 1
