"""The doctor's checks of the database: each finds its fault when that is put there on purpose."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery

from celery_outbox import Outbox, durable_task
from celery_outbox.doctor import clocks, content, database, leases, progress, snapshots
from celery_outbox.doctor.examination import CHECKS, examine, worst_of
from celery_outbox.doctor.finding import Finding, Level
from celery_outbox.doctor.notifications import check_notifications
from celery_outbox.doctor.retention import check_retention, check_time_limits
from celery_outbox.doctor.tasks import check_durable_tasks
from celery_outbox.storage.dialects.base import Dialect
from tests.unit.conftest import MakeShop
from tests.unit.shop import Shop
from tests.unit.test_cli_storage import fill


def only(findings: Iterable[Finding], level: Level) -> str:
    """The one finding that there is, of that level: what it says and advises."""
    (found,) = findings
    assert found.level is level, found
    assert bool(found.advice) == (level in (Level.WARNING, Level.ERROR)), found
    return f"{found.says} {found.advice}"


def sql(shop: Shop, statement: str) -> None:
    with shop.engine.begin() as connection:
        connection.exec_driver_sql(statement)


def test_nothing_is_wrong_with_a_fresh_database(shop: Shop) -> None:
    """All checks that need no broker; the shop's own records, and answers for one."""
    names = {each.name for each in CHECKS} - {"broker", "confirms", "queues", "lease"}
    findings = list(examine(shop.outbox, names))
    assert {each.check for each in findings} == names
    assert worst_of(findings) is Level.OK, [each for each in findings if each.level is not Level.OK]


def test_each_check_has_a_name_of_its_own_and_needs_what_comes_before() -> None:
    before: list[str] = []
    for each in CHECKS:
        assert each.name not in before
        assert set(each.needs) <= set(before)
        before.append(each.name)


# database, schema, writing


def test_a_database_that_is_away(make_shop: MakeShop) -> None:
    shop = make_shop("postgresql+psycopg://ann:s3cret@127.0.0.1:9/none", tables=False)
    findings = list(examine(shop.outbox, ["schema", "content"]))
    assert [(each.check, each.level) for each in findings] == [
        ("database", Level.ERROR),
        ("schema", Level.SKIPPED),
        ("content", Level.SKIPPED),
    ]
    assert "can't be asked" in findings[0].says
    assert "s3cret" not in str(findings)


def test_a_table_that_is_missing(shop: Shop) -> None:
    sql(shop, "DROP TABLE inbox")
    assert "'inbox' is missing" in only(database.check_schema(shop.outbox), Level.ERROR)


def test_tables_of_another_version(shop: Shop) -> None:
    sql(shop, "UPDATE outbox_schema SET version = 0")
    assert "of version 0" in only(database.check_schema(shop.outbox), Level.ERROR)


def test_an_index_that_is_missing(shop: Shop) -> None:
    sql(shop, "DROP INDEX ix_outbox_available")
    assert "ix_outbox_available" in only(database.check_schema(shop.outbox), Level.WARNING)


def test_a_user_who_may_not_write(postgresql_shop: Shop) -> None:
    sql(postgresql_shop, "CREATE ROLE reader LOGIN")
    sql(postgresql_shop, "GRANT USAGE ON SCHEMA public TO reader")
    sql(postgresql_shop, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
    try:
        app = Celery("reader", broker="memory://", set_as_current=False)
        engine = sa.create_engine(
            postgresql_shop.url.replace("postgres@", "reader@"), poolclass=sa.pool.NullPool
        )
        said = only(database.check_writing(Outbox(app, engine)), Level.ERROR)
        assert "permission denied" in said
    finally:
        sql(postgresql_shop, "DROP OWNED BY reader")
        sql(postgresql_shop, "DROP ROLE reader")


def test_a_file_that_can_only_be_read(sqlite_shop: Shop) -> None:
    app = Celery("reader", broker="memory://", set_as_current=False)
    url = sqlite_shop.url.replace("sqlite:///", "sqlite:///file:") + "?mode=ro&uri=true"
    outbox = Outbox(app, sa.create_engine(url, poolclass=sa.pool.NullPool))
    assert "readonly" in only(database.check_writing(outbox), Level.ERROR)


def test_what_is_written_for_proof_is_rolled_back(shop: Shop) -> None:
    fill(shop)
    before = shop.outbox.store.counts()
    only(database.check_writing(shop.outbox), Level.OK)
    assert shop.outbox.store.counts() == before


# notifications


def test_a_pooler_that_swallows_listen(
    postgresql_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a pooler in transaction mode does: the session that LISTENs is somebody else's next."""
    store = postgresql_shop.outbox.store
    listen = store.listen

    def listen_in_vain() -> Any:
        listener: Any = listen()
        listener._driver.execute("UNLISTEN *")
        return listener

    monkeypatch.setattr(store, "listen", listen_in_vain)
    said = only(check_notifications(postgresql_shop.outbox), Level.WARNING)
    assert "did not arrive" in said


def test_notifications_arrive(postgresql_shop: Shop) -> None:
    assert "has arrived" in only(check_notifications(postgresql_shop.outbox), Level.OK)


# clocks


@pytest.mark.parametrize(
    ("seconds", "level", "words"),
    [
        (-5, Level.WARNING, "ahead of"),
        (5, Level.WARNING, "behind"),
        (-100, Level.ERROR, "ahead of"),
        (100, Level.ERROR, "behind"),
        (0, Level.OK, "agree"),
    ],
)
def test_clocks_that_do_not_agree(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, seconds: int, level: Level, words: str
) -> None:
    """The database's clock goes wrong, as the dialect reads it."""
    dialect: Dialect = shop.outbox.store.dialect
    monkeypatch.setattr(dialect, "now", lambda: dialect.after(seconds))
    assert words in only(clocks.check_clocks(shop.outbox), level)


# snapshots


def test_an_old_snapshot(postgresql_shop: Shop) -> None:
    engine = sa.create_engine(postgresql_shop.url, isolation_level="REPEATABLE READ")
    with engine.connect() as connection:
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        said = only(snapshots.check_snapshots(postgresql_shop.outbox, 0.0), Level.WARNING)
        assert f"session {pid} " in said
        only(snapshots.check_snapshots(postgresql_shop.outbox, 300.0), Level.OK)
    engine.dispose()


def test_a_prepared_transaction_that_was_forgotten(postgresql_shop: Shop) -> None:
    with postgresql_shop.engine.connect() as connection:
        transaction = connection.begin_twophase("forgotten")
        connection.exec_driver_sql("INSERT INTO customer (id, name) VALUES (1, 'Ann')")
        transaction.prepare()
        try:
            said = only(snapshots.check_snapshots(postgresql_shop.outbox, 0.0), Level.WARNING)
            assert "prepared transaction forgotten" in said
        finally:
            transaction.rollback()


def test_autovacuum_that_is_off(postgresql_shop: Shop) -> None:
    sql(postgresql_shop, "ALTER TABLE outbox SET (autovacuum_enabled = false)")
    said = only(snapshots.check_snapshots(postgresql_shop.outbox), Level.WARNING)
    assert "autovacuum is off" in said


# tasks and their time limits


def test_a_task_that_is_acknowledged_early(make_shop: MakeShop, sqlite_url: str) -> None:
    shop = make_shop(sqlite_url, task_annotations={"shop.notify": {"acks_late": False}})
    _ = shop.app.tasks["shop.notify"].run
    shop.app.finalize()
    shop.notify.annotate()
    assert "acks_late=False" in only(check_durable_tasks(shop.outbox), Level.ERROR)


def test_a_task_that_may_run_for_longer_than_the_broker_waits(
    make_shop: MakeShop, sqlite_url: str
) -> None:
    shop = make_shop(sqlite_url, outbox_redelivery_window_seconds=10.0)
    only(check_time_limits(shop.outbox), Level.OK)
    shop.notify.time_limit = 60
    assert "shop.notify" in only(check_time_limits(shop.outbox), Level.WARNING)


# retention


@pytest.mark.parametrize(
    ("window", "level"), [(3600.0, Level.ERROR), (2000.0, Level.WARNING), (100.0, Level.OK)]
)
def test_an_inbox_that_forgets_before_the_broker_does(
    make_shop: MakeShop, sqlite_url: str, window: float, level: Level
) -> None:
    shop = make_shop(
        sqlite_url,
        outbox_inbox_retention_seconds=3600.0,
        outbox_redelivery_window_seconds=window,
    )
    only(check_retention(shop.outbox), level)


# content


def test_a_stored_message_that_workers_would_refuse(shop: Shop) -> None:
    shop.app.conf.accept_content = ["json", "pickle"]
    shop.notify.apply_async((1,), serializer="pickle")
    shop.notify.delay(2)
    only(content.check_content(shop.outbox), Level.OK)
    shop.app.conf.accept_content = ["json"]
    said = only(content.check_content(shop.outbox), Level.ERROR)
    assert "1 of 2" in said
    assert "application/x-python-serialize" in said


def test_a_dead_letter_that_workers_would_refuse(shop: Shop) -> None:
    fill(shop)
    shop.app.conf.accept_content = ["yaml"]
    assert "5 of 5" in only(content.check_content(shop.outbox), Level.ERROR)


def test_a_stored_message_of_a_newer_version(shop: Shop) -> None:
    shop.notify.delay(1)
    outbox = shop.outbox.tables.outbox
    with shop.engine.begin() as connection:
        text = connection.execute(sa.select(outbox.c.message)).scalar_one()
        newer = json.dumps({**json.loads(text), "format": 99})
        connection.execute(sa.update(outbox).values(message=newer))
    assert "does not know" in only(content.check_content(shop.outbox), Level.WARNING)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"task_serializer": "yaml"}, "accept_content does not"),
        ({"result_serializer": "pickle"}, "result_accept_content does not"),
    ],
)
def test_a_serializer_that_is_not_accepted(
    sqlite_shop: Shop, settings: dict[str, Any], words: str
) -> None:
    only(content.check_serializers(sqlite_shop.outbox), Level.OK)
    sqlite_shop.app.conf.update(settings)
    findings = list(content.check_serializers(sqlite_shop.outbox))
    assert {each.level for each in findings} == {Level.ERROR}
    assert words in findings[-1].says


def test_stored_messages_of_a_task_that_was_renamed(shop: Shop) -> None:
    @durable_task(app=shop.app, name="shop.old")
    def old() -> None: ...

    old.delay()
    only(content.check_tasks(shop.outbox), Level.OK)
    del shop.app.tasks["shop.old"]
    assert "shop.old (1)" in only(content.check_tasks(shop.outbox), Level.WARNING)


# progress


def test_a_relay_that_does_not_run(shop: Shop) -> None:
    shop.notify.delay(1)
    only(progress.check_lag(shop.outbox), Level.OK)
    outbox, store = shop.outbox.tables.outbox, shop.outbox.store
    with shop.engine.begin() as connection:
        connection.execute(sa.update(outbox).values(available_at=store.dialect.after(-120)))
    assert "1 wait" in only(progress.check_lag(shop.outbox), Level.ERROR)


def test_a_relay_that_was_killed(shop: Shop) -> None:
    shop.notify.delay(1)
    shop.outbox.store.claim(1, 60)
    only(leases.check_leases(shop.outbox), Level.OK)
    outbox, store = shop.outbox.tables.outbox, shop.outbox.store
    with shop.engine.begin() as connection:
        connection.execute(sa.update(outbox).values(available_at=store.dialect.after(-1)))
    assert "of 1 message" in only(leases.check_leases(shop.outbox), Level.WARNING)


def test_dead_letters(shop: Shop) -> None:
    fill(shop)
    assert "1 dead letter" in only(progress.check_dead_letters(shop.outbox), Level.WARNING)


def test_a_message_that_is_sent_again_though_it_was_handled(shop: Shop) -> None:
    fill(shop)
    only(progress.check_kept(shop.outbox), Level.OK)
    outbox, store = shop.outbox.tables.outbox, shop.outbox.store
    with shop.engine.begin() as connection:
        kept = sa.select(outbox.c.key).where(outbox.c.published_at.is_not(None))
        store.receive(connection, connection.execute(kept).scalar_one(), "shop.notify", "1")
    assert "though they were handled" in only(progress.check_kept(shop.outbox), Level.WARNING)


# The examination


def test_a_check_that_fails_itself_is_a_finding(
    sqlite_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_outbox: Outbox) -> Iterable[Finding]:
        raise RuntimeError("of all things")

    checks = [
        dataclasses.replace(each, run=broken) if each.name == "clocks" else each for each in CHECKS
    ]
    monkeypatch.setattr("celery_outbox.doctor.examination.CHECKS", checks)
    (found,) = [e for e in examine(sqlite_shop.outbox, ["clocks"]) if e.check == "clocks"]
    assert found.level is Level.ERROR
    assert "of all things" in found.says
