"""P1, P2: a message shares the fate of the connection's transaction that it was sent in."""

import logging

import pytest
import sqlalchemy as sa

from celery_outbox import NoTransaction, UnusableTransaction
from tests.unit.shop import Customer, Purpose, Shop, begin_before_savepoints, failing_on_purpose


def insert(connection: sa.Connection, name: str = "Ann") -> None:
    connection.execute(sa.insert(Customer).values(name=name))


def test_begin_and_commit_stores(shop: Shop) -> None:
    with shop.engine.begin() as connection:
        insert(connection)
        shop.notify.delay("m")
        assert shop.stored() == []
    assert shop.stored() == ["m"]
    assert shop.published() == []


def test_autobegin_by_a_statement_and_commit_stores(shop: Shop) -> None:
    with shop.engine.connect() as connection:
        insert(connection)
        shop.notify.delay("m")
        connection.commit()
    assert shop.stored() == ["m"]


def test_each_transaction_of_a_connection_has_its_own_messages(shop: Shop) -> None:
    with shop.engine.connect() as connection:
        insert(connection)
        shop.notify.delay("m1")
        connection.commit()
        insert(connection)
        shop.notify.delay("m2")
        connection.rollback()
        insert(connection)
        shop.notify.delay("m3")
        connection.commit()
    assert shop.stored() == ["m1", "m3"]


def test_an_exception_stores_nothing_and_says_nothing(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    with failing_on_purpose(), shop.engine.begin() as connection:
        insert(connection)
        shop.notify.delay("m")
        raise Purpose
    assert shop.stored() == []
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_close_without_commit_stores_nothing_and_names_the_task(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """P2."""
    with shop.engine.connect() as connection:
        insert(connection)
        shop.notify.delay("m")
    assert shop.stored() == []
    assert [r for r in caplog.records if "shop.notify" in r.getMessage()]


def test_a_rolled_back_savepoint_takes_its_messages_along(shop: Shop) -> None:
    with shop.engine.begin() as connection:
        insert(connection)
        shop.notify.delay("outer")
        with failing_on_purpose(), connection.begin_nested():
            insert(connection, "Bob")
            shop.notify.delay("inner")
            raise Purpose
        shop.notify.delay("outer2")
    assert shop.stored() == ["outer", "outer2"]
    assert shop.customers() == ["Ann"]


def test_a_released_savepoint_keeps_its_messages(shop: Shop) -> None:
    with shop.engine.begin() as connection:
        insert(connection)
        with connection.begin_nested():
            shop.notify.delay("inner")
        shop.notify.delay("outer")
    assert shop.stored() == ["inner", "outer"]


def test_released_inside_rolled_back_is_rolled_back(shop: Shop) -> None:
    with shop.engine.begin() as connection:
        insert(connection)
        shop.notify.delay("outer")
        with failing_on_purpose(), connection.begin_nested():
            with connection.begin_nested():
                shop.notify.delay("innermost")
            shop.notify.delay("inner")
            raise Purpose
    assert shop.stored() == ["outer"]


def test_rolled_back_inside_released_takes_only_its_own(shop: Shop) -> None:
    with shop.engine.begin() as connection:
        insert(connection)
        with connection.begin_nested():
            shop.notify.delay("inner")
            with failing_on_purpose(), connection.begin_nested():
                shop.notify.delay("innermost")
                raise Purpose
            shop.notify.delay("inner2")
    assert shop.stored() == ["inner", "inner2"]


def test_a_savepoint_as_the_first_statement(shop: Shop) -> None:
    begin_before_savepoints(shop.engine)
    with shop.engine.begin() as connection:
        with failing_on_purpose(), connection.begin_nested():
            shop.notify.delay("inner")
            raise Purpose
        with connection.begin_nested():
            shop.notify.delay("inner2")
    assert shop.stored() == ["inner2"]


def test_a_savepoint_that_outlives_the_outer_rollback(shop: Shop) -> None:
    begin_before_savepoints(shop.engine)
    with shop.engine.connect() as connection:
        outer = connection.begin()
        with connection.begin_nested():
            insert(connection)
            shop.notify.delay("inner")
        outer.rollback()
    assert shop.stored() == []
    assert shop.customers() == []


def test_a_textual_savepoint_is_refused(shop: Shop) -> None:
    """P4."""
    with shop.engine.begin() as connection:
        insert(connection)
        shop.notify.delay("outer")
        connection.execute(sa.text("savepoint x"))
        with pytest.raises(UnusableTransaction, match="SAVEPOINT written as text"):
            shop.notify.delay("inner")
        connection.execute(sa.text("rollback to savepoint x"))
    assert shop.stored() == ["outer"]


@pytest.mark.parametrize("how", ["engine", "connection"])
def test_autocommit_is_refused(shop: Shop, how: str) -> None:
    """P4."""
    engine = shop.engine
    if how == "engine":
        engine = engine.execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        if how == "connection":
            connection.execution_options(isolation_level="AUTOCOMMIT")
        insert(connection)
        with pytest.raises(UnusableTransaction, match="AUTOCOMMIT"):
            shop.notify.delay("m")
    assert shop.stored() == []


def test_an_engine_with_options_counts_once(shop: Shop) -> None:
    """Also its savepoints, which the engine beneath tells of too."""
    engine = shop.engine.execution_options(isolation_level="SERIALIZABLE")
    for _ in range(2):
        with engine.begin() as connection:
            insert(connection)
            shop.notify.delay("outer")
            with failing_on_purpose(), connection.begin_nested():
                shop.notify.delay("inner")
                raise Purpose
            shop.notify.delay("outer2")
    assert shop.stored() == ["outer", "outer2"] * 2


def test_two_phase_commit_and_rollback(postgresql_shop: Shop) -> None:
    shop = postgresql_shop
    with shop.engine.connect() as connection:
        transaction = connection.begin_twophase()
        insert(connection)
        shop.notify.delay("m1")
        transaction.prepare()
        assert shop.stored() == []
        transaction.commit()
        transaction = connection.begin_twophase()
        insert(connection)
        shop.notify.delay("m2")
        transaction.rollback()
        transaction = connection.begin_twophase()
        shop.notify.delay("m3")
        transaction.commit()
    assert shop.stored() == ["m1", "m3"]


def test_a_send_after_prepare_is_not_silently_lost(postgresql_shop: Shop) -> None:
    """P1, P4."""
    shop = postgresql_shop
    with shop.engine.connect() as connection:
        transaction = connection.begin_twophase()
        insert(connection)
        transaction.prepare()
        with pytest.raises((UnusableTransaction, NoTransaction)):
            shop.notify.delay("m")
        transaction.commit()
    assert shop.stored() == []


def test_a_swallowed_error_of_the_database_is_not_a_silent_loss(postgresql_shop: Shop) -> None:
    shop = postgresql_shop
    with pytest.raises(sa.exc.InternalError), shop.engine.begin() as connection:  # noqa: PT012
        shop.notify.delay("m")
        with pytest.raises(sa.exc.DBAPIError):
            connection.execute(sa.text("SELECT 1/0"))
    assert shop.stored() == []
