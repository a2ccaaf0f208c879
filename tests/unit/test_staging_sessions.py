"""P1, P2: a message shares the fate of the session's transaction that it was sent in."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError, InternalError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_outbox import NoTransaction, UnusableTransaction
from tests.unit.conftest import MakeShop
from tests.unit.shop import (
    Customer,
    Purpose,
    Shop,
    add_customer,
    begin_before_savepoints,
    failing_on_purpose,
)


@contextmanager
def listening(target: Any, name: str, listener: Any) -> Iterator[None]:
    event.listen(target, name, listener)
    try:
        yield
    finally:
        event.remove(target, name, listener)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# Commit and roll-back


def test_begin_and_commit_stores(shop: Shop) -> None:
    with shop.Session.begin() as session:
        add_customer(session)
        shop.notify.delay("m")
        assert shop.stored() == []
    assert shop.stored() == ["m"]
    assert shop.published() == []


def test_a_send_may_be_the_first_operation_of_begin(shop: Shop) -> None:
    with shop.Session.begin():
        shop.notify.delay("m")
    assert shop.stored() == ["m"]


def test_messages_keep_their_order(shop: Shop) -> None:
    with shop.Session.begin():
        for number in range(5):
            shop.notify.delay(number)
    assert shop.stored() == [0, 1, 2, 3, 4]


def test_autobegin_by_add_and_commit_stores(shop: Shop) -> None:
    with shop.Session() as session:
        session.add(Customer(name="Ann"))
        shop.notify.delay("m")
        session.commit()
    assert shop.stored() == ["m"]


def test_each_transaction_of_a_session_has_its_own_messages(shop: Shop) -> None:
    with shop.Session() as session:
        add_customer(session, "1")
        shop.notify.delay("m1")
        session.commit()
        add_customer(session, "2")
        shop.notify.delay("m2")
        session.rollback()
        add_customer(session, "3")
        shop.notify.delay("m3")
        session.commit()
    assert shop.stored() == ["m1", "m3"]


def test_rollback_stores_nothing_and_says_nothing(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    with shop.Session() as session:
        add_customer(session)
        shop.notify.delay("m")
        session.rollback()
    assert shop.stored() == []
    assert warnings_of(caplog) == []


def test_an_exception_in_begin_stores_nothing_and_says_nothing(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    with failing_on_purpose(), shop.Session.begin() as session:
        add_customer(session)
        shop.notify.delay("m")
        raise Purpose
    assert shop.stored() == []
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("flushed", [True, False])
def test_close_without_commit_stores_nothing_and_names_the_task(
    shop: Shop, caplog: pytest.LogCaptureFixture, flushed: bool
) -> None:
    """P2."""
    with shop.Session() as session:
        session.add(Customer(name="Ann"))
        shop.notify.delay("m")
        if flushed:
            session.flush()
    assert shop.stored() == []
    (warning,) = warnings_of(caplog)
    assert "shop.notify" in warning


def test_close_without_messages_says_nothing(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    with shop.Session() as session:
        add_customer(session)
    assert warnings_of(caplog) == []


def test_what_was_committed_is_not_warned_of_later(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    with shop.Session() as session:
        add_customer(session)
        shop.notify.delay("m")
        session.commit()
        session.execute(sa.select(Customer))
    assert warnings_of(caplog) == []


def test_a_refused_commit_stores_nothing(postgresql_shop: Shop) -> None:
    """A constraint that is checked at the commit."""
    shop = postgresql_shop
    with shop.engine.begin() as connection:
        connection.execute(
            sa.text("CREATE TABLE unique_name (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        )
    with pytest.raises(IntegrityError), shop.Session.begin() as session:  # noqa: PT012
        session.execute(sa.text("INSERT INTO unique_name VALUES (1), (1)"))
        shop.notify.delay("m")
    assert shop.stored() == []


def test_a_failed_flush_takes_the_messages_of_the_transaction_along(shop: Shop) -> None:
    with shop.Session.begin() as session:
        session.add(Customer(id=100, name="Ann"))
    with shop.Session() as session:
        session.add(Customer(id=100, name="Bob"))
        shop.notify.delay("m1")
        with pytest.raises(IntegrityError):
            session.flush()
        session.rollback()
        add_customer(session, "Cy")
        shop.notify.delay("m2")
        session.commit()
    assert shop.stored() == ["m2"]
    assert sorted(shop.customers()) == ["Ann", "Cy"]


# Savepoints


def test_a_rolled_back_savepoint_takes_its_messages_along(shop: Shop) -> None:
    with shop.Session.begin() as session:
        shop.notify.delay("outer")
        with failing_on_purpose(), session.begin_nested():
            add_customer(session)
            shop.notify.delay("inner")
            raise Purpose
        shop.notify.delay("outer2")
    assert shop.stored() == ["outer", "outer2"]
    assert shop.customers() == []


def test_a_rolled_back_savepoint_without_sql_takes_its_messages_along(shop: Shop) -> None:
    with shop.Session.begin() as session:
        shop.notify.delay("outer")
        with failing_on_purpose(), session.begin_nested():
            shop.notify.delay("inner")
            raise Purpose
    assert shop.stored() == ["outer"]


def test_a_savepoint_rolled_back_by_hand_takes_its_messages_along(shop: Shop) -> None:
    with shop.Session.begin() as session:
        add_customer(session)
        savepoint = session.begin_nested()
        shop.notify.delay("inner")
        savepoint.rollback()
        shop.notify.delay("outer")
    assert shop.stored() == ["outer"]


def test_a_released_savepoint_keeps_its_messages(shop: Shop) -> None:
    with shop.Session.begin() as session:
        with session.begin_nested():
            add_customer(session)
            shop.notify.delay("inner")
        shop.notify.delay("outer")
    assert shop.stored() == ["inner", "outer"]


def test_released_inside_rolled_back_is_rolled_back(shop: Shop) -> None:
    with shop.Session.begin() as session:
        shop.notify.delay("outer")
        with failing_on_purpose(), session.begin_nested():
            with session.begin_nested():
                shop.notify.delay("innermost")
            shop.notify.delay("inner")
            raise Purpose
    assert shop.stored() == ["outer"]


def test_rolled_back_inside_released_takes_only_its_own(shop: Shop) -> None:
    with shop.Session.begin() as session, session.begin_nested():
        shop.notify.delay("inner")
        with failing_on_purpose(), session.begin_nested():
            add_customer(session)
            shop.notify.delay("innermost")
            raise Purpose
        shop.notify.delay("inner2")
    assert shop.stored() == ["inner", "inner2"]


@pytest.mark.parametrize(("depth", "undone"), [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)])
def test_only_what_is_inside_the_rolled_back_savepoint_goes(
    shop: Shop, depth: int, undone: int
) -> None:
    def descend(session: Session, level: int) -> None:
        shop.notify.delay(level)
        if level == depth:
            return
        with failing_on_purpose(), session.begin_nested():
            descend(session, level + 1)
            if level + 1 == undone:
                raise Purpose

    with shop.Session.begin() as session:
        descend(session, 0)
    assert shop.stored() == list(range(undone))


def test_a_failed_flush_inside_a_savepoint_takes_only_its_messages(shop: Shop) -> None:
    with shop.Session.begin() as session:
        session.add(Customer(id=1, name="Ann"))
    with shop.Session.begin() as session:
        shop.notify.delay("outer")
        with pytest.raises(IntegrityError), session.begin_nested():  # noqa: PT012
            shop.notify.delay("inner")
            session.add(Customer(id=1, name="Bob"))
            session.flush()
        shop.notify.delay("outer2")
    assert shop.stored() == ["outer", "outer2"]


def test_a_closed_savepoint_takes_its_messages_along(shop: Shop) -> None:
    with shop.Session.begin() as session:
        add_customer(session)
        savepoint = session.begin_nested()
        add_customer(session, "Bob")
        shop.notify.delay("inner")
        savepoint.close()
        shop.notify.delay("outer")
    assert shop.customers() == ["Ann"]
    assert shop.stored() == ["outer"]


def test_a_savepoint_whose_release_fails_takes_its_messages_along(shop: Shop) -> None:
    def refuses(session: Session) -> None:
        if session.in_nested_transaction():
            raise Purpose

    with listening(shop.Session, "before_commit", refuses), shop.Session.begin() as session:
        shop.notify.delay("outer")
        with failing_on_purpose(), session.begin_nested():
            add_customer(session)
            shop.notify.delay("inner")
    assert shop.customers() == []
    assert shop.stored() == ["outer"]


def test_a_send_at_the_release_of_a_savepoint_belongs_to_what_is_around_it(shop: Shop) -> None:
    def sends(session: Session) -> None:
        if session.in_nested_transaction():
            shop.notify.delay("at the release")

    with listening(shop.Session, "after_commit", sends), shop.Session.begin() as session:  # noqa: SIM117
        with session.begin_nested():
            add_customer(session)
    assert shop.stored() == ["at the release"]


def test_rollback_of_the_session_inside_a_savepoint_takes_all(shop: Shop) -> None:
    with shop.Session() as session:
        add_customer(session)
        shop.notify.delay("outer")
        session.begin_nested()
        shop.notify.delay("inner")
        session.rollback()
    assert shop.stored() == []


def test_commit_of_the_session_inside_a_savepoint_keeps_all(shop: Shop) -> None:
    with shop.Session() as session:
        add_customer(session)
        shop.notify.delay("outer")
        session.begin_nested()
        shop.notify.delay("inner")
        session.commit()
    assert shop.stored() == ["outer", "inner"]


def test_a_savepoint_behind_the_sessions_back_is_refused(shop: Shop) -> None:
    """P4: the session does not know of it, so its roll-back would leave the message."""
    with shop.Session.begin() as session:
        shop.notify.delay("outer")
        savepoint = session.connection().begin_nested()
        with pytest.raises(UnusableTransaction, match=r"shop\.notify.*begin_nested"):
            shop.notify.delay("inner")
        savepoint.rollback()
        shop.notify.delay("outer2")
    assert shop.stored() == ["outer", "outer2"]


@pytest.mark.parametrize(
    "statement", ["savepoint x", "SAVEPOINT x", "  savepoint x", "\n    savepoint x"]
)
def test_a_textual_savepoint_is_refused(shop: Shop, statement: str) -> None:
    """P4."""
    with shop.Session.begin() as session:
        shop.notify.delay("outer")
        session.execute(sa.text(statement))
        with pytest.raises(UnusableTransaction, match="SAVEPOINT written as text"):
            shop.notify.delay("inner")
        session.execute(sa.text("rollback to savepoint x"))
    assert shop.stored() == ["outer"]


def test_a_textual_savepoint_binds_its_own_transaction_only(shop: Shop) -> None:
    with shop.Session() as session:
        session.execute(sa.text("savepoint x"))
        session.commit()
        add_customer(session)
        shop.notify.delay("m")
        session.commit()
    assert shop.stored() == ["m"]


# Events of the session


def test_a_mapper_event_may_send_during_the_flush_of_the_commit(shop: Shop) -> None:
    def sends(*_: object) -> None:
        shop.notify.delay("from after_insert")

    with listening(Customer, "after_insert", sends), shop.Session.begin() as session:
        session.add(Customer(name="Ann"))
    assert shop.stored() == ["from after_insert"]


def test_a_mapper_event_may_send_during_a_flush_before_the_commit(shop: Shop) -> None:
    def sends(*_: object) -> None:
        shop.notify.delay("from after_insert")

    with listening(Customer, "after_insert", sends), shop.Session.begin() as session:
        add_customer(session)
        session.execute(sa.select(Customer))
    assert shop.stored() == ["from after_insert"]


@pytest.mark.parametrize("name", ["before_flush", "after_flush", "after_flush_postexec"])
def test_a_flush_event_may_send(shop: Shop, name: str) -> None:
    def sends(*_: object) -> None:
        shop.notify.delay(f"from {name}")

    with listening(shop.Session, name, sends), shop.Session.begin() as session:
        session.add(Customer(name="Ann"))
    assert shop.stored() == [f"from {name}"]


def test_a_before_commit_event_may_send(shop: Shop) -> None:
    def sends(session: Session) -> None:
        shop.notify.delay("from before_commit")

    with listening(shop.Session, "before_commit", sends), shop.Session.begin() as session:
        add_customer(session)
    assert shop.stored() == ["from before_commit"]


def test_a_before_commit_event_that_makes_the_session_dirty_is_flushed(shop: Shop) -> None:
    def sends(*_: object) -> None:
        shop.notify.delay("from after_insert")

    def adds(session: Session) -> None:
        session.add(Customer(name="Bob"))

    with (
        listening(Customer, "after_insert", sends),
        listening(shop.Session, "before_commit", adds),
        shop.Session.begin(),
    ):
        pass
    assert shop.customers() == ["Bob"]
    assert shop.stored() == ["from after_insert"]


def test_a_send_in_after_commit_is_not_part_of_the_transaction(
    make_shop: MakeShop, database_url: str
) -> None:
    """It can't be written any more: it counts as sent with no transaction."""
    shop = make_shop(database_url, outbox_no_transaction="refuse")
    seen: list[type] = []

    def sends(*_: object) -> None:
        try:
            shop.notify.delay("m")
        except Exception as exc:
            seen.append(type(exc))

    with listening(shop.Session, "after_commit", sends), shop.Session.begin() as session:
        add_customer(session)
    assert seen == [NoTransaction]
    assert shop.stored() == []


def test_a_send_after_the_commit_is_not_part_of_the_transaction(
    make_shop: MakeShop, database_url: str
) -> None:
    shop = make_shop(database_url, outbox_no_transaction="refuse")
    with shop.Session() as session:
        add_customer(session)
        session.commit()
        with pytest.raises(NoTransaction, match=r"shop\.notify"):
            shop.notify.delay("m")
        session.commit()
    assert shop.stored() == []


def test_a_send_in_after_rollback_is_not_part_of_the_transaction(
    make_shop: MakeShop, database_url: str
) -> None:
    shop = make_shop(database_url, outbox_no_transaction="refuse")
    seen: list[type] = []

    def sends(*_: object) -> None:
        try:
            shop.notify.delay("m")
        except Exception as exc:
            seen.append(type(exc))

    with listening(shop.Session, "after_rollback", sends), shop.Session() as session:
        add_customer(session)
        session.rollback()
    assert seen == [NoTransaction]
    assert shop.stored() == []


def test_expunge_all_and_expire_all_keep_the_messages(shop: Shop) -> None:
    with shop.Session.begin() as session:
        session.add(Customer(name="Ann"))
        shop.notify.delay("m1")
        session.flush()
        session.expunge_all()
        shop.notify.delay("m2")
        session.expunge_all()
        session.expire_all()
    assert shop.stored() == ["m1", "m2"]


def test_no_autoflush_keeps_the_messages(shop: Shop) -> None:
    with shop.Session.begin() as session, session.no_autoflush:
        shop.notify.delay("m")
        session.execute(sa.select(Customer))
    assert shop.stored() == ["m"]


def test_a_swallowed_error_of_the_database_is_not_a_silent_loss(postgresql_shop: Shop) -> None:
    """PostgreSQL would make the COMMIT a ROLLBACK and say nothing."""
    shop = postgresql_shop
    with pytest.raises(InternalError), shop.Session.begin() as session:  # noqa: PT012
        shop.notify.delay("m")
        add_customer(session)
        with pytest.raises(DBAPIError):
            session.execute(sa.text("SELECT 1/0"))
    assert shop.stored() == []


# Kinds of session


def test_scoped_session_commits(shop: Shop) -> None:
    registry = scoped_session(shop.Session)
    registry.add(Customer(name="Ann"))
    shop.notify.delay("m")
    registry.commit()
    registry.remove()
    assert shop.stored() == ["m"]


def test_scoped_session_removed_without_commit_names_the_task(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """P2."""
    registry = scoped_session(shop.Session)
    registry.add(Customer(name="Ann"))
    shop.notify.delay("m")
    registry.remove()
    assert shop.stored() == []
    assert "shop.notify" in warnings_of(caplog)[0]


@pytest.mark.parametrize("first", ["sql", "nothing"])
def test_a_session_joined_into_an_external_transaction(shop: Shop, first: str) -> None:
    def prepare(session: Session) -> None:
        session.add(Customer(name="Ann"))
        if first == "sql":
            session.flush()

    begin_before_savepoints(shop.engine)
    with shop.engine.connect() as connection, connection.begin():
        for label, keep in (("kept", True), ("dropped", False)):
            with shop.Session(bind=connection, join_transaction_mode="create_savepoint") as session:
                prepare(session)
                shop.notify.delay(label)
                if keep:
                    session.commit()
                else:
                    session.rollback()
        assert shop.stored() == []
    assert shop.stored() == ["kept"]


def test_an_external_transaction_that_rolls_back_takes_what_its_sessions_committed(
    shop: Shop,
) -> None:
    begin_before_savepoints(shop.engine)
    with shop.engine.connect() as connection:
        outer = connection.begin()
        with shop.Session(bind=connection, join_transaction_mode="create_savepoint") as session:
            add_customer(session)
            shop.notify.delay("m")
            session.commit()
        outer.rollback()
    assert shop.stored() == []
    assert shop.customers() == []


@pytest.mark.parametrize("mode", ["conditional_savepoint", "rollback_only", "control_fully"])
def test_other_ways_to_join_an_external_transaction(shop: Shop, mode: Any) -> None:
    with shop.engine.connect() as connection, connection.begin() as outer:
        with shop.Session(bind=connection, join_transaction_mode=mode) as session:
            add_customer(session)
            shop.notify.delay("m")
            session.commit()
        if outer.is_active:
            outer.commit()
    assert shop.stored() == ["m"]


def test_two_phase_commit(postgresql_shop: Shop) -> None:
    shop = postgresql_shop
    with shop.Session(twophase=True) as session:
        add_customer(session)
        shop.notify.delay("m")
        session.prepare()
        assert shop.stored() == []
        session.commit()
    assert shop.stored() == ["m"]


def test_two_phase_commit_without_an_explicit_prepare(postgresql_shop: Shop) -> None:
    shop = postgresql_shop
    with shop.Session(twophase=True) as session:
        session.begin()
        shop.notify.delay("m")
        session.commit()
    assert shop.stored() == ["m"]


def test_two_phase_rollback(postgresql_shop: Shop) -> None:
    shop = postgresql_shop
    with shop.Session(twophase=True) as session:
        add_customer(session)
        shop.notify.delay("m")
        session.prepare()
        session.rollback()
    assert shop.stored() == []


def test_a_send_after_prepare_is_not_silently_lost(postgresql_shop: Shop) -> None:
    """P1, P4: a prepared transaction takes nothing more."""
    shop = postgresql_shop
    with shop.Session(twophase=True) as session:
        add_customer(session)
        session.prepare()
        with pytest.raises((UnusableTransaction, NoTransaction)):
            shop.notify.delay("m")
        session.rollback()
    assert shop.stored() == []


# Engines


@pytest.mark.parametrize("when", ["before the first statement", "after it"])
def test_an_autocommit_engine_is_refused(shop: Shop, when: str) -> None:
    """P4: there is no transaction to share."""
    autocommit = shop.engine.execution_options(isolation_level="AUTOCOMMIT")
    with shop.Session(bind=autocommit) as session:
        session.begin()
        if when == "after it":
            add_customer(session)
            with pytest.raises(UnusableTransaction, match="AUTOCOMMIT"):
                shop.notify.delay("m")
        else:
            with pytest.raises(UnusableTransaction, match="AUTOCOMMIT"):  # noqa: PT012
                shop.notify.delay("m")
                session.commit()
    assert shop.stored() == []


def test_an_engine_made_with_autocommit_is_refused(make_shop: MakeShop, database_url: str) -> None:
    shop = make_shop(database_url)
    engine = sa.create_engine(database_url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with sessionmaker(engine)() as session:
        add_customer(session)
        with pytest.raises(UnusableTransaction, match="AUTOCOMMIT"):
            shop.notify.delay("m")
    engine.dispose()
    assert shop.stored() == []


def test_an_engine_with_another_isolation_level_is_one_of_the_outbox(shop: Shop) -> None:
    serializable = shop.engine.execution_options(isolation_level="SERIALIZABLE")
    with shop.Session(bind=serializable) as session, session.begin():
        add_customer(session)
        shop.notify.delay("outer")
        with failing_on_purpose(), session.begin_nested():
            add_customer(session, "Bob")
            shop.notify.delay("inner")
            raise Purpose
        shop.notify.delay("outer2")
    assert shop.stored() == ["outer", "outer2"]


def test_another_sessionmaker_of_the_same_engine_counts(shop: Shop) -> None:
    with sessionmaker(shop.engine).begin() as session:
        add_customer(session)
        shop.notify.delay("m")
        assert shop.stored() == []
    assert shop.stored() == ["m"]


def test_a_session_without_sessionmaker_counts(shop: Shop) -> None:
    with Session(shop.engine) as session, session.begin():
        add_customer(session)
        shop.notify.delay("m")
        assert shop.stored() == []
    assert shop.stored() == ["m"]


def test_a_session_of_another_engine_of_the_same_database_counts(shop: Shop) -> None:
    engine = sa.create_engine(shop.url, poolclass=sa.NullPool)
    with failing_on_purpose(), Session(engine) as session, session.begin():
        add_customer(session)
        shop.notify.delay("m")
        raise Purpose
    engine.dispose()
    assert shop.stored() == []
