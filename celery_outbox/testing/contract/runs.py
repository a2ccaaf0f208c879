"""The runs of beat's entries, on every database."""

from datetime import datetime, timedelta, timezone

import pytest
from sqlalchemy import Engine

from celery_outbox.storage.runs import Run, Runs
from celery_outbox.storage.store import Store

NOON = datetime(2026, 11, 24, 12, tzinfo=timezone.utc)


@pytest.fixture
def runs(store: Store) -> Runs:
    return Runs(store.engine, store.tables.beat)


def test_the_first_to_remember_counts(runs: Runs) -> None:
    runs.remember([Run("daily", NOON, 0)])
    later = NOON + timedelta(hours=1)
    runs.remember([Run("daily", later, 0), Run("hourly", later, 0)])
    assert runs.all() == {"daily": Run("daily", NOON, 0), "hourly": Run("hourly", later, 0)}


def test_of_two_beats_one_advances(runs: Runs, engine: Engine) -> None:
    runs.remember([Run("daily", NOON, 0)])
    first = Run("daily", NOON + timedelta(days=1), 1)
    with engine.begin() as connection:
        assert runs.advance(connection, first)
    with engine.begin() as connection:
        assert not runs.advance(connection, Run("daily", NOON + timedelta(days=2), 1))
    assert runs.all() == {"daily": first}


def test_a_roll_back_undoes_the_run(runs: Runs, engine: Engine) -> None:
    runs.remember([Run("daily", NOON, 0)])
    with engine.connect() as connection:
        assert runs.advance(connection, Run("daily", NOON, 1))
        connection.rollback()
    assert runs.all() == {"daily": Run("daily", NOON, 0)}


def test_an_entry_that_was_deleted_does_not_advance(runs: Runs, engine: Engine) -> None:
    with engine.begin() as connection:
        assert not runs.advance(connection, Run("daily", NOON, 1))
