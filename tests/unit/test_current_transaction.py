"""P1, P2: which transaction a message goes with, and what happens where there is none, or several."""

import contextvars
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import QueuePool

from celery_outbox import (
    AmbiguousTransaction,
    ConfigurationError,
    NoTransaction,
    UnusableTransaction,
)
from tests.unit.conftest import MakeShop
from tests.unit.shop import (
    Customer,
    Purpose,
    Shop,
    add_customer,
    begin_before_savepoints,
    engine_for,
    failing_on_purpose,
)

# Several


def test_two_open_sessions_are_ambiguous(shop: Shop) -> None:
    with shop.Session.begin(), shop.Session.begin():  # noqa: SIM117
        with pytest.raises(AmbiguousTransaction, match=r"shop\.notify.*2 transactions.*using"):
            shop.notify.delay("m")
    assert shop.stored() == []


def test_naming_one_of_two_sessions(shop: Shop) -> None:
    with shop.Session() as one, shop.Session() as two:
        one.begin()
        two.begin()
        with shop.outbox.using(one):
            shop.notify.delay("m1")
        shop.outbox.send(shop.notify.s("m2"), into=two)
        two.rollback()
        one.commit()
    assert shop.stored() == ["m1"]


def test_a_session_and_another_connection_are_ambiguous(postgresql_shop: Shop) -> None:
    shop = postgresql_shop
    with shop.Session.begin() as session, shop.engine.begin() as connection:
        add_customer(session)
        connection.execute(sa.select(1))
        with pytest.raises(AmbiguousTransaction):
            shop.notify.delay("m")
    assert shop.stored() == []


def test_a_session_and_its_own_connection_are_one(shop: Shop) -> None:
    with shop.Session.begin() as session:
        session.connection().execute(sa.insert(Customer).values(name="Ann"))
        shop.notify.delay("m")
    assert shop.stored() == ["m"]


def test_the_inner_of_two_sessions_ends_and_the_outer_is_current_again(shop: Shop) -> None:
    with shop.Session.begin():
        with shop.Session.begin() as inner:
            inner.execute(sa.select(1))
        shop.notify.delay("m")
        assert shop.stored() == []
    assert shop.stored() == ["m"]


def test_a_session_of_another_database_does_not_count(
    postgresql_shop: Shop, other_postgresql_url: str
) -> None:
    shop = postgresql_shop
    other = engine_for(other_postgresql_url)
    with Session(other) as elsewhere, elsewhere.begin():
        elsewhere.execute(sa.select(1))
        with shop.Session.begin() as session:
            add_customer(session)
            shop.notify.delay("with the shop's")
            assert shop.stored() == []
        assert shop.stored() == ["with the shop's"]
        shop.notify.delay("on its own")
        assert shop.stored() == ["with the shop's", "on its own"]
        elsewhere.rollback()


def test_two_outboxes_in_two_databases_keep_apart(
    make_shop: MakeShop, postgresql_url: str, other_postgresql_url: str
) -> None:
    here, there = make_shop(postgresql_url), make_shop(other_postgresql_url)
    with here.Session.begin() as ours, failing_on_purpose(), there.Session.begin() as theirs:
        add_customer(ours)
        add_customer(theirs)
        here.notify.delay("here")
        there.notify.delay("there")
        raise Purpose
    assert here.stored() == ["here"]
    assert there.stored() == []


def test_two_apps_share_a_database(make_shop: MakeShop, database_url: str) -> None:
    one, two = make_shop(database_url), make_shop(database_url)
    with one.Session.begin() as session:
        add_customer(session)
        one.notify.delay("1")
        two.notify.delay("2")
    assert one.stored() == ["1", "2"]


# None


def test_with_no_transaction_it_is_stored_on_its_own(shop: Shop) -> None:
    shop.notify.delay("m")
    assert shop.stored() == ["m"]
    assert shop.published() == []


def test_with_no_transaction_it_may_be_published(make_shop: MakeShop, database_url: str) -> None:
    shop = make_shop(database_url, outbox_no_transaction="publish")
    shop.notify.delay("m")
    assert shop.stored() == []
    assert shop.published() == ["shop.notify"]
    with shop.Session.begin():
        shop.notify.delay("m2")
    assert shop.stored() == ["m2"]
    assert shop.published() == ["shop.notify"]


def test_with_no_transaction_it_may_be_refused(make_shop: MakeShop, database_url: str) -> None:
    shop = make_shop(database_url, outbox_no_transaction="refuse")
    with pytest.raises(NoTransaction, match=r"shop\.notify.*outbox_no_transaction.*using"):
        shop.notify.delay("m")
    shop.plain.delay("m")
    assert shop.stored() == []
    assert shop.published() == ["shop.plain"]


def test_a_session_that_has_not_begun_is_no_transaction(
    make_shop: MakeShop, database_url: str
) -> None:
    """Autobegin: before its first operation nobody can tell that it will be used."""
    shop = make_shop(database_url, outbox_no_transaction="refuse")
    with shop.Session() as session:
        with pytest.raises(NoTransaction):
            shop.notify.delay("m")
        add_customer(session)
        shop.notify.delay("m2")
        session.commit()
    assert shop.stored() == ["m2"]


def test_another_thread_is_not_in_the_transaction(shop: Shop) -> None:
    """A thread does not inherit the context: what it sends is not this transaction's."""
    with failing_on_purpose(), shop.Session.begin():
        thread = threading.Thread(target=shop.notify.delay, args=("m",))
        thread.start()
        thread.join()
        raise Purpose
    assert shop.stored() == ["m"]


def test_another_thread_may_be_given_the_session(shop: Shop) -> None:
    def sends(session: Session) -> None:
        with shop.outbox.using(session):
            shop.notify.delay("m")

    with shop.Session.begin() as session, ThreadPoolExecutor(1) as pool:
        pool.submit(sends, session).result()
        assert shop.stored() == []
    assert shop.stored() == ["m"]


def test_a_session_made_in_another_thread_is_current_where_it_works(postgresql_shop: Shop) -> None:
    """Web frameworks make it in one thread of their pool and use it in another."""
    shop = postgresql_shop
    with ThreadPoolExecutor(1) as pool:
        session = pool.submit(shop.Session).result()
    add_customer(session)
    shop.notify.delay("m")
    assert shop.stored() == []
    session.commit()
    session.close()
    assert shop.stored() == ["m"]


def test_threads_with_sessions_of_their_own_keep_apart(postgresql_shop: Shop) -> None:
    shop = postgresql_shop
    together = threading.Barrier(4)

    def one(number: int) -> None:
        with failing_on_purpose(), shop.Session.begin() as session:
            add_customer(session)
            together.wait(10)
            shop.notify.delay(number)
            together.wait(10)
            if number % 2:
                raise Purpose

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(4)))
    assert sorted(shop.stored()) == [0, 2]


def test_a_session_that_ended_in_another_context_is_no_longer_current(shop: Shop) -> None:
    session = shop.Session()
    session.begin()
    add_customer(session)
    contextvars.copy_context().run(session.rollback)
    shop.notify.delay("m")
    assert shop.stored() == ["m"]
    session.close()


# Named


def test_using_begins_the_transaction_of_a_session(shop: Shop) -> None:
    with shop.Session() as session:
        with shop.outbox.using(session):
            shop.notify.delay("m")
        assert shop.stored() == []
        session.commit()
    assert shop.stored() == ["m"]


def test_using_a_session_that_rolls_back_stores_nothing(shop: Shop) -> None:
    with shop.Session() as session:
        with shop.outbox.using(session):
            shop.notify.delay("m")
        session.rollback()
    assert shop.stored() == []


def test_using_takes_every_task_durable_or_not(shop: Shop) -> None:
    with shop.Session.begin() as session:
        with shop.outbox.using(session):
            shop.plain.delay("plain")
            shop.app.send_task("unknown.task", args=["unknown"])
        shop.plain.delay("published")
    assert shop.stored() == ["plain", "unknown"]
    assert shop.published() == ["shop.plain"]


def test_using_may_be_nested(shop: Shop) -> None:
    with shop.Session() as one, shop.Session() as two:
        with shop.outbox.using(one):
            shop.notify.delay("1")
            with shop.outbox.using(two):
                shop.notify.delay("2")
            shop.notify.delay("1 again")
        two.rollback()
        one.commit()
    assert shop.stored() == ["1", "1 again"]


def test_using_a_scoped_session(shop: Shop) -> None:
    registry = scoped_session(shop.Session)
    with shop.outbox.using(registry):
        shop.notify.delay("m")
    registry.commit()
    registry.remove()
    assert shop.stored() == ["m"]


def test_using_a_connection(shop: Shop) -> None:
    with shop.engine.connect() as connection:
        with pytest.raises(NoTransaction, match="begin"), shop.outbox.using(connection):
            pass
        with connection.begin() as transaction:
            with shop.outbox.using(connection):
                shop.notify.delay("m1")
            transaction.rollback()
        with connection.begin(), shop.outbox.using(connection):
            shop.notify.delay("m2")
    assert shop.stored() == ["m2"]


def test_using_a_connection_of_an_engine_that_the_outbox_does_not_know(shop: Shop) -> None:
    begin_before_savepoints(engine := engine_for(shop.url))
    with engine.begin() as connection:
        connection.execute(sa.insert(Customer).values(name="Ann"))
        with shop.outbox.using(connection):
            shop.notify.delay("outer")
        with failing_on_purpose(), connection.begin_nested(), shop.outbox.using(connection):
            shop.notify.delay("inner")
            raise Purpose
        assert shop.stored() == []
    engine.dispose()
    assert shop.stored() == ["outer"]


def test_using_a_session_whose_transaction_is_over_is_refused(shop: Shop) -> None:
    """In after_commit nothing can be written any more."""
    seen: list[type] = []

    def sends(session: Session) -> None:
        try:
            shop.outbox.send(shop.notify.s("m"), into=session)
        except Exception as exc:
            seen.append(type(exc))

    sa.event.listen(shop.Session, "after_commit", sends)
    with shop.Session.begin() as session:
        add_customer(session)
    assert seen == [UnusableTransaction]
    assert shop.stored() == []


@pytest.mark.parametrize("wrong", [None, "session", 7, object()])
def test_using_something_else_is_refused(shop: Shop, wrong: object) -> None:
    with pytest.raises(ConfigurationError, match="session or a connection"):  # noqa: SIM117
        with shop.outbox.using(wrong):  # type: ignore[arg-type]
            pass


def test_using_the_sessionmaker_is_refused(shop: Shop) -> None:
    with pytest.raises(ConfigurationError, match="sessionmaker"):  # noqa: SIM117
        with shop.outbox.using(shop.Session):  # type: ignore[arg-type]
            pass


def test_send_takes_a_canvas(shop: Shop) -> None:
    with shop.Session.begin() as session:
        shop.outbox.send(shop.notify.si("1") | shop.notify.si("2"), into=session)
        from celery import group

        shop.outbox.send(group(shop.notify.si("3"), shop.notify.si("4")), into=session)
    assert shop.stored() == ["1", "3", "4"]


def test_send_returns_the_result(shop: Shop) -> None:
    with shop.Session.begin() as session:
        result = shop.outbox.send(shop.notify.s("m").set(task_id="my-id"), into=session)
    assert result.id == "my-id"


# Lifetimes


def test_a_dropped_session_gives_its_connection_back(shop: Shop) -> None:
    engine = sa.create_engine(shop.url, poolclass=QueuePool, pool_size=1, max_overflow=0)
    pool = engine.pool
    assert isinstance(pool, QueuePool)
    session = Session(engine)
    add_customer(session)
    shop.notify.delay("m")
    assert pool.checkedout() == 1
    gone = weakref.ref(session)
    del session
    gc.collect()
    assert gone() is None
    assert pool.checkedout() == 0
    engine.dispose()
    assert shop.stored() == []


def test_a_dropped_session_is_no_longer_current(shop: Shop) -> None:
    session = shop.Session()
    add_customer(session)
    del session
    gc.collect()
    shop.notify.delay("m")
    assert shop.stored() == ["m"]


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
def test_a_dropped_connection_is_no_longer_current(shop: Shop) -> None:
    connection = shop.engine.connect()
    connection.execute(sa.insert(Customer).values(name="Ann"))
    gone = weakref.ref(connection)
    del connection
    gc.collect()
    assert gone() is None
    shop.notify.delay("m")
    assert shop.stored() == ["m"]


def test_sessions_leave_nothing_behind(shop: Shop) -> None:
    def one() -> "weakref.ref[Session]":
        with shop.Session.begin() as session:
            shop.notify.delay("m")
        return weakref.ref(session)

    sessions = [one() for _ in range(3)]
    gc.collect()
    assert [session() for session in sessions] == [None] * 3


# Targets of the Outbox


def test_the_outbox_takes_an_engine(make_shop: MakeShop, database_url: str) -> None:
    engine = engine_for(database_url)
    shop = make_shop(database_url, target=engine)
    with failing_on_purpose(), engine.begin() as connection:
        connection.execute(sa.insert(Customer).values(name="Ann"))
        shop.notify.delay("dropped")
        raise Purpose
    with Session(engine) as session, session.begin():
        shop.notify.delay("kept")
    assert shop.outbox.engine is engine
    assert shop.stored() == ["kept"]


def test_the_outbox_takes_a_url(make_shop: MakeShop, database_url: str) -> None:
    shop = make_shop(database_url, target=database_url)
    with failing_on_purpose(), shop.Session.begin() as session:
        add_customer(session)
        shop.notify.delay("dropped")
        raise Purpose
    with shop.Session.begin():
        shop.notify.delay("kept")
        assert shop.stored() == []
    assert shop.stored() == ["kept"]


def test_a_connection_of_an_engine_that_the_outbox_was_not_given_is_followed(
    make_shop: MakeShop, database_url: str
) -> None:
    """Although the transaction begins before the outbox has an engine at all."""
    shop = make_shop(database_url, target=database_url)
    engine = engine_for(database_url)
    with failing_on_purpose(), engine.begin() as connection:
        connection.execute(sa.insert(Customer).values(name="Ann"))
        shop.notify.delay("dropped")
        raise Purpose
    with engine.begin() as connection, connection.begin_nested():
        shop.notify.delay("kept")
    with engine.execution_options(logging_token="x").begin():
        shop.notify.delay("kept, too")
    assert shop.stored() == ["kept", "kept, too"]


def test_the_outbox_takes_its_url_from_the_settings(make_shop: MakeShop, database_url: str) -> None:
    shop = make_shop(database_url, target=sessionmaker(), outbox_database_url=database_url)
    with shop.Session.begin():
        shop.notify.delay("m")
        assert shop.stored() == []
    assert shop.stored() == ["m"]


def test_the_outbox_takes_a_scoped_session(make_shop: MakeShop, database_url: str) -> None:
    registry = scoped_session(sessionmaker(engine_for(database_url)))
    shop = make_shop(database_url, target=registry)
    registry.add(Customer(name="Ann"))
    shop.notify.delay("m1")
    registry.commit()
    shop.notify.delay("m2")
    registry.remove()
    assert "m1" in shop.stored()


def test_the_outbox_takes_a_sessionmaker_that_is_bound_later(
    make_shop: MakeShop, database_url: str
) -> None:
    later = sessionmaker()
    shop = make_shop(database_url, target=later, tables=False)
    engine = engine_for(database_url)
    later.configure(bind=engine)
    shop.outbox.create_schema()
    with later.begin():
        shop.notify.delay("session")
        assert shop.stored() == []
    with failing_on_purpose(), engine.begin() as connection:
        connection.execute(sa.select(1))
        shop.notify.delay("dropped")
        raise Purpose
    assert shop.outbox.engine is engine
    assert shop.stored() == ["session"]


def test_a_sessionmaker_with_binds_for_each_class(make_shop: MakeShop, database_url: str) -> None:
    """Its sessions don't know where the outbox's tables are, so that must be said, or fail loudly."""
    engine = engine_for(database_url)
    maker = sessionmaker(binds={Customer: engine})
    shop = make_shop(database_url, target=maker, outbox_database_url=database_url)
    maker.configure(binds={Customer: engine, **dict.fromkeys(shop.outbox.tables.all(), engine)})
    with failing_on_purpose(), maker.begin() as session:
        add_customer(session)
        shop.notify.delay("dropped")
        raise Purpose
    with maker.begin() as session:
        add_customer(session)
        shop.notify.delay("kept")
        assert shop.stored() == []
    assert shop.stored() == ["kept"]


@pytest.mark.parametrize("spelling", ["localhost", "another user", "default port"])
def test_the_same_database_under_another_name_is_the_same(spelling: str) -> None:
    """P1: a session on it must not be taken for a stranger's, and its message stored apart."""
    from celery_outbox.storage.engine import is_same_database

    one = sa.create_engine("postgresql+psycopg://app@127.0.0.1:5432/shop")
    other = {
        "localhost": "postgresql+psycopg://app@localhost:5432/shop",
        "another user": "postgresql+psycopg://relay@127.0.0.1:5432/shop",
        "default port": "postgresql+psycopg://app@127.0.0.1/shop",
    }[spelling]
    assert is_same_database(one, sa.create_engine(other))
    for stranger in ("127.0.0.1:5433/shop", "127.0.0.1:5432/other", "10.0.0.1:5432/shop"):
        assert not is_same_database(one, sa.create_engine(f"postgresql+psycopg://app@{stranger}"))


def test_a_sessionmaker_bound_for_the_apps_classes_alone(
    make_shop: MakeShop, database_url: str
) -> None:
    """Its session works on a connection of the database all the same, and that will do."""
    engine = engine_for(database_url)
    maker = sessionmaker(binds={Customer: engine})
    shop = make_shop(database_url, target=maker, outbox_database_url=database_url)
    with failing_on_purpose(), maker.begin() as session:
        add_customer(session)
        session.flush()
        shop.notify.delay("dropped")
        raise Purpose
    with maker.begin() as session:
        add_customer(session)
        session.flush()
        shop.notify.delay("kept")
        assert shop.stored() == []
    assert shop.stored() == ["kept"]
