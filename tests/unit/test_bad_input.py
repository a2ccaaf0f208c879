"""What is wrong is said as early as it can be known, by name, and nothing is lost."""

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery
from kombu.exceptions import EncodeError
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import sessionmaker

from celery_outbox import (
    ConfigurationError,
    EnvelopeError,
    Outbox,
    OutboxError,
    SchemaError,
    durable_task,
)
from celery_outbox.checks import check
from celery_outbox.config import Config
from celery_outbox.plugin import outbox_of
from tests.unit import wire
from tests.unit.conftest import MakeShop
from tests.unit.shop import Shop, add_customer


def app_with(**settings: Any) -> Celery:
    app = Celery("wrong", broker=f"recording://{wire.new_name()}", set_as_current=False)
    app.conf.update(settings)
    return app


# Settings


def test_the_settings_have_defaults() -> None:
    assert Config.read({}, []) == Config()


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("outbox_batch_sise", "outbox_batch_size"),
        ("outbox_relay_tick", "outbox_relay_tick_seconds"),
        ("outbox_lease_second", "outbox_lease_seconds"),
        ("CELERY_OUTBOX_CAPTUR", "outbox_capture"),
    ],
)
def test_an_unknown_setting_is_named_with_the_nearest_one(name: str, near: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{name}.*did you mean {near}\?"):
        Config.read({name: 1}, [name])


def test_a_setting_that_resembles_nothing_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown setting outbox_zzz$"):
        Config.read({"outbox_zzz": 1}, ["outbox_zzz"])


def test_settings_of_others_are_left_alone() -> None:
    settings = {"outboxes": 1, "task_x": 2}
    assert Config.read(settings, [*settings, "broker_url"]) == Config()


WRONG: dict[str, list[Any]] = {
    "no_transaction": ["stored", "", 1, True],
    "capture": ["durables", "", "shop.*", 7],
    "batch_size": [0, -1, "500", 1.5, True],
    "max_attempts": [0, -1, "3", 1.5, True],
    "local_max_attempts": [0, -1, "3", 1.5, True],
    "relay_tick_seconds": [-1, "1", True],
    "lease_seconds": [0, -1, "60", True],
    "confirm_timeout_seconds": [0, -1, "x"],
    "backoff_base_seconds": [-1, "1"],
    "backoff_cap_seconds": [0, -1, "1"],
    "poll_seconds": [0, -1, "1"],
    "inbox_retention_seconds": [0, -1, "1"],
    "redelivery_window_seconds": [0, -1, "1"],
    "dead_letter_retention_seconds": [0, -1, "1"],
    "busy_pause_seconds": [-1, "1"],
    "redeliver_after_seconds": [0, -1, "1"],
    "database_url": [7, True],
    "relay_queue": [7],
    "keep_until_handled": ["yes", 1, "false"],
    "bypass": ["shout", True],
    "hold_scheduled": ["yes", 1, "false"],
    "notify": ["yes", 1, "false"],
    "local_queues": ["emails", 7, [""], [7]],
    "local_lease_seconds": [0, -1, "30"],
    "publish_after_commit": ["yes", 1, "false"],
    "relay_in_worker": ["yes", 1, "false"],
    "trust_broker": ["yes", 1, "false"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, wrong in WRONG.items() for v in wrong])
def test_a_wrong_value_is_named_with_what_is_right(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"outbox_{name}"):
        Config.read({f"outbox_{name}": value}, [f"outbox_{name}"])


def test_every_setting_has_a_wrong_value() -> None:
    from dataclasses import fields

    assert {field.name for field in fields(Config)} == set(WRONG)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["lease_seconds", "poll_seconds", "inbox_retention_seconds"])
def test_no_number_is_no_duration(name: str, seconds: float) -> None:
    with pytest.raises(ConfigurationError, match=f"outbox_{name}"):
        Config.read({f"outbox_{name}": seconds}, [])


def test_a_lease_shorter_than_the_confirms_is_refused() -> None:
    """P8: each batch would be published twice."""
    with pytest.raises(
        ConfigurationError,
        match=r"outbox_lease_seconds=20.*twice outbox_confirm_timeout_seconds=15",
    ):
        Config.read({"outbox_lease_seconds": 20, "outbox_confirm_timeout_seconds": 15}, [])


def test_what_is_kept_until_handled_must_rest_until_it_is_due() -> None:
    with pytest.raises(ConfigurationError, match="needs outbox_hold_scheduled=True"):
        Config.read({"outbox_keep_until_handled": True, "outbox_hold_scheduled": False}, [])


def test_a_wrong_setting_is_told_at_the_send_and_nothing_is_stored(
    make_shop: MakeShop, sqlite_url: str
) -> None:
    shop = make_shop(sqlite_url, outbox_batch_size=0)
    with (  # noqa: PT012
        pytest.raises(ConfigurationError, match="outbox_batch_size"),
        shop.Session.begin() as session,
    ):
        add_customer(session)
        shop.notify.delay("m")
    assert shop.stored() == []
    assert shop.customers() == []
    assert shop.published() == []


def test_a_wrong_setting_is_told_before_a_worker_or_relay_starts(
    make_shop: MakeShop, sqlite_url: str
) -> None:
    shop = make_shop(sqlite_url, outbox_btch_size=5)
    with pytest.raises(ConfigurationError, match="did you mean outbox_batch_size"):
        check(shop.app, shop.outbox)


@pytest.mark.parametrize("prefix", ["CELERY_OUTBOX_", "outbox_"])
def test_settings_may_be_spelled_under_a_namespace(prefix: str) -> None:
    name = f"{prefix}BATCH_SIZE" if prefix.isupper() else f"{prefix}batch_size"
    module = type("settings", (), {name: 7})
    app = Celery("spelled", set_as_current=False)
    app.config_from_object(module, namespace="CELERY" if prefix.isupper() else None)
    outbox = Outbox(app, "sqlite://")
    assert outbox.config.batch_size == 7
    outbox.engine.dispose()


# Databases


@pytest.mark.parametrize("url", ["not a url", "postgresql", "://", "", "postgresql+psycopg//x"])
def test_a_wrong_url_says_how_one_looks(url: str) -> None:
    outbox = Outbox(app_with(outbox_database_url=url))
    with pytest.raises(ConfigurationError, match=r"postgresql\+psycopg://user@host/database"):
        _ = outbox.engine


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://user:s3cret@host:port/db",
        "oracel://user:s3cret@host/db",
        "postgresql+nodriver://user:s3cret@host/db",
        "oracle://user:s3cret@host/db",
        "user:s3cret@host/db",
    ],
)
@pytest.mark.parametrize("where", ["argument", "setting"])
def test_a_password_is_never_printed(url: str, where: str) -> None:
    outbox = (
        Outbox(app_with(), url)
        if where == "argument"
        else Outbox(app_with(outbox_database_url=url))
    )
    with pytest.raises(ConfigurationError) as caught:
        _ = outbox.store
    error: BaseException | None = caught.value
    while error is not None:
        assert "s3cret" not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_a_password_is_not_printed_by_the_checks_of_the_schema(postgresql_url: str) -> None:
    url = postgresql_url.replace("postgres@", "postgres:s3cret@")
    outbox = Outbox(app_with(), url)
    with pytest.raises(SchemaError) as caught:
        outbox.verify_schema()
    assert "s3cret" not in str(caught.value)
    assert "***" in str(caught.value)
    outbox.engine.dispose()


def test_an_unknown_kind_of_database_is_named() -> None:
    outbox = Outbox(app_with(), "oracel://host/db")
    with pytest.raises(ConfigurationError, match="oracel"):
        _ = outbox.engine


def test_a_database_that_the_outbox_does_not_speak_is_named() -> None:
    engine = sa.create_engine("sqlite://")
    engine.dialect.name = "oracle"
    outbox = Outbox(app_with(), engine)
    with pytest.raises(ConfigurationError, match=r"'oracle'.*it speaks"):
        _ = outbox.store


def test_a_missing_driver_says_what_to_install() -> None:
    outbox = Outbox(app_with(), "postgresql+psycopg2://host/db")
    with pytest.raises(ConfigurationError, match=r"psycopg2.*pip install"):
        _ = outbox.engine


def test_no_database_says_what_to_give() -> None:
    outbox = Outbox(app_with())
    with pytest.raises(
        ConfigurationError, match=r"no database.*Outbox\(app, Session\).*database_url"
    ):
        _ = outbox.engine


@pytest.mark.parametrize("where", ["in a transaction", "on its own"])
def test_missing_tables_are_told_when_they_are_written_to(
    make_shop: MakeShop, sqlite_url: str, where: str
) -> None:
    shop = make_shop(sqlite_url, tables=False)
    with pytest.raises(SchemaError, match=r"'outbox' is missing.*outbox schema create"):  # noqa: PT012
        if where == "on its own":
            shop.notify.delay("m")
        else:
            with shop.Session.begin():
                shop.notify.delay("m")
    assert shop.published() == []


def test_missing_tables_are_told_before_a_worker_or_relay_starts(
    make_shop: MakeShop, database_url: str
) -> None:
    shop = make_shop(database_url, tables=False)
    with pytest.raises(SchemaError, match=r"'outbox' is missing.*outbox schema create"):
        check(shop.app, shop.outbox)


def test_a_database_that_is_away_does_not_keep_a_worker_from_starting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    outbox = Outbox(app_with(), "postgresql+psycopg://nobody@127.0.0.1:9/none")
    check(outbox.app, outbox)
    assert "can't be asked" in caplog.text


def test_a_sqlite_file_in_no_folder_is_told(tmp_path: Path) -> None:
    outbox = Outbox(app_with(), f"sqlite:///{tmp_path}/missing/file.sqlite")
    with pytest.raises(ConfigurationError, match=r"missing/file\.sqlite.*can't be written"):
        outbox.create_schema()


def test_a_sqlite_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    path = tmp_path / "read.sqlite"
    Shop(f"sqlite:///{path}").close()
    # Also root is told: it is the connection that may only read.
    outbox = Outbox(app_with(), f"sqlite:///file:{path}?mode=ro&uri=true")

    @durable_task(app=outbox.app, name="t")
    def task() -> None: ...

    with pytest.raises(OperationalError, match="readonly"):
        task.delay()
    outbox.engine.dispose()


# Messages


def test_arguments_that_cannot_be_serialised_are_told_at_the_call(shop: Shop) -> None:
    """And the transaction can still be used."""
    with shop.Session.begin() as session:
        add_customer(session)
        with pytest.raises(EncodeError):
            shop.notify.delay(object())
        shop.notify.delay("m")
    assert shop.stored() == ["m"]
    assert shop.customers() == ["Ann"]


@pytest.mark.parametrize("where", ["headers", "properties"])
def test_a_header_that_cannot_be_stored_is_told_at_the_call(shop: Shop, where: str) -> None:
    given = {"headers": {"x": object()}} if where == "headers" else {"app_id": object()}
    with shop.Session.begin() as session:
        add_customer(session)
        with pytest.raises(EnvelopeError, match=r"shop\.notify\["):
            shop.notify.apply_async(("m",), **given)
        shop.notify.delay("m2")
    assert shop.stored() == ["m2"]


def test_wrong_arguments_are_told_at_the_call(sqlite_shop: Shop) -> None:
    @durable_task(app=sqlite_shop.app, name="shop.strict")
    def strict(one: int) -> None: ...

    with sqlite_shop.Session.begin(), pytest.raises(TypeError):
        strict.delay()
    assert sqlite_shop.stored() == []


def test_an_unknown_queue_is_told_at_the_call(make_shop: MakeShop, sqlite_url: str) -> None:
    """Where the app does not make queues as it needs them."""
    from celery.exceptions import QueueNotFound

    shop = make_shop(sqlite_url, task_create_missing_queues=False)
    with shop.Session.begin(), pytest.raises(QueueNotFound, match="nowhere"):
        shop.notify.apply_async(("m",), queue="nowhere")
    assert shop.stored() == []


def test_a_message_for_an_exchange_that_does_not_exist_is_stored_and_tried(
    make_shop: MakeShop, sqlite_url: str
) -> None:
    """P7: only the broker can tell; until then it waits, with the reason."""
    shop = make_shop(sqlite_url, outbox_max_attempts=2, outbox_backoff_base_seconds=0)
    shop.app.conf.broker_url = "memory://nowhere"
    shop.notify.apply_async(("m",), exchange="no-such-exchange", routing_key="k")
    assert shop.outbox.relay_once().retried == 1
    outbox = shop.outbox.tables.outbox
    with shop.outbox.engine.connect() as connection:
        error = connection.execute(sa.select(outbox.c.last_error)).scalar_one()
    assert "no-such-exchange" in error
    assert shop.outbox.relay_once().dead == 1
    assert shop.outbox.store.counts()["dead"] == 1


# The Outbox and its tasks


def test_two_outboxes_on_one_app_are_refused() -> None:
    app = app_with()
    Outbox(app, "sqlite://")
    with pytest.raises(ConfigurationError, match="'wrong' has an Outbox already"):
        Outbox(app, "sqlite://")


@pytest.mark.parametrize("target", [7, object(), {}, sa.make_url("sqlite://"), Celery])
def test_a_target_of_a_wrong_type_is_refused(target: Any) -> None:
    app = app_with()
    with pytest.raises(ConfigurationError, match=rf"{type(target).__name__}.*takes a sessionmaker"):
        Outbox(app, target)
    # And the app is as it was.
    Outbox(app, "sqlite://")


def test_a_session_is_no_target() -> None:
    session: Any = sessionmaker(sa.create_engine("sqlite://"))()
    with pytest.raises(ConfigurationError, match=r"Session.*takes a sessionmaker"):
        Outbox(app_with(), session)


def test_an_app_without_an_outbox_says_so() -> None:
    with pytest.raises(ConfigurationError, match=r"'wrong' has no Outbox.*Outbox\(app, Session\)"):
        outbox_of(app_with())


@pytest.mark.parametrize("option", ["acks_late", "reject_on_worker_lost"])
def test_a_durable_task_that_acknowledges_early_is_refused(option: str) -> None:
    """P16."""
    early: dict[str, Any] = {option: False}
    with pytest.raises(ConfigurationError, match=rf"durable_task\({option}=False\)"):
        durable_task(**early)
    durable_task(**early, inbox=False)


def test_without_an_inbox_a_task_is_acknowledged_late_all_the_same() -> None:
    """P16: it may run twice, but a killed worker does not lose it."""
    app = Celery("late", broker="memory://", set_as_current=False)
    task = durable_task(app=app, inbox=False, name="late.task")(nothing)
    assert (task.acks_late, task.reject_on_worker_lost) == (True, True)
    early = durable_task(app=app, inbox=False, name="late.early", acks_late=False)(nothing)
    assert early.acks_late is False


def nothing() -> None: ...


@pytest.mark.parametrize("option", ["acks_late", "reject_on_worker_lost"])
def test_annotations_that_make_it_acknowledge_early_keep_a_worker_from_starting(
    make_shop: MakeShop, sqlite_url: str, option: str
) -> None:
    """P16."""
    shop = make_shop(sqlite_url, task_annotations={"shop.notify": {option: False}})
    with pytest.raises(ConfigurationError, match=rf"shop\.notify.*{option}=False"):
        check(shop.app, shop.outbox)


@pytest.mark.parametrize("name", ["task_acks_late", "task_reject_on_worker_lost"])
def test_settings_of_celery_do_not_make_it_acknowledge_early(
    make_shop: MakeShop, sqlite_url: str, name: str
) -> None:
    shop = make_shop(sqlite_url, **{name: False})
    check(shop.app, shop.outbox)
    assert shop.notify.acks_late
    assert shop.notify.reject_on_worker_lost


def test_a_transport_that_confirms_nothing_is_refused(make_shop: MakeShop, sqlite_url: str) -> None:
    """P5."""
    import kombu.transport
    from kombu.transport import base

    class Silent(base.Transport):
        driver_name = "silent"

    shop = make_shop(sqlite_url)
    kombu.transport.TRANSPORT_ALIASES["silent"] = f"{__name__}:Silent"
    globals()["Silent"] = Silent
    shop.app.conf.broker_url = "silent://"
    with pytest.raises(ConfigurationError, match=r"broker_url.*silent"):
        shop.outbox.relay()


def test_every_error_is_one_of_ours() -> None:
    """One except clause catches what the outbox refuses."""
    import celery_outbox.errors

    for name in celery_outbox.errors.__all__:
        assert issubclass(getattr(celery_outbox.errors, name), OutboxError)
