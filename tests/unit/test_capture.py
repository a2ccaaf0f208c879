"""Which messages the outbox takes, and what it leaves to Celery."""

import json
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery, chord
from kombu import Connection

from celery_outbox import NotInstalled, Outbox, durable_task
from tests.unit import wire
from tests.unit.conftest import MakeShop
from tests.unit.shop import Purpose, Shop, failing_on_purpose


def tasks_stored(shop: Shop) -> list[str]:
    outbox = shop.outbox.tables.outbox
    with shop.outbox.engine.connect() as connection:
        return list(connection.execute(sa.select(outbox.c.task).order_by(outbox.c.id)).scalars())


def test_durable_tasks_are_stored_and_others_published(sqlite_shop: Shop) -> None:
    shop = sqlite_shop
    with shop.Session.begin():
        shop.notify.delay("1")
        shop.plain.delay("2")
    assert shop.stored() == ["1"]
    assert shop.published() == ["shop.plain"]


def test_capture_all_stores_every_task(make_shop: MakeShop, sqlite_url: str) -> None:
    shop = make_shop(sqlite_url, outbox_capture="all")
    with shop.Session.begin():
        shop.plain.delay("1")
        shop.app.send_task("of.another.project", args=["2"])
    assert shop.stored() == ["1", "2"]
    assert shop.published() == []


@pytest.mark.parametrize("kind", [list, tuple, set])
def test_capture_takes_patterns(make_shop: MakeShop, sqlite_url: str, kind: Any) -> None:
    """Besides the durable tasks."""
    shop = make_shop(sqlite_url, outbox_capture=kind(["mail.*", "exact"]))
    for name in ("mail.send", "exact", "exactly", "shop.plain", "shop.notify"):
        shop.app.send_task(name, args=[name])
    assert shop.stored() == ["mail.send", "exact", "shop.notify"]
    assert shop.published() == ["exactly", "shop.plain"]


def test_a_durable_task_sent_by_name_is_stored(sqlite_shop: Shop) -> None:
    with sqlite_shop.Session.begin():
        sqlite_shop.app.send_task("shop.notify", args=["m"])
        sqlite_shop.app.signature("shop.notify", args=["m2"]).delay()
    assert sqlite_shop.stored() == ["m", "m2"]
    assert sqlite_shop.published() == []


def test_a_durable_task_of_every_app_is_stored_when_sent_by_name_at_once(
    sqlite_url: str, make_shop: MakeShop
) -> None:
    """Declared as shared_task is: the app has not looked at its tasks yet."""

    @durable_task(name="shared.task")
    def shared(label: str) -> None: ...

    shop = make_shop(sqlite_url)
    with failing_on_purpose(), shop.Session.begin():
        shop.app.send_task("shared.task", args=["dropped"])
        raise Purpose
    with shop.Session.begin():
        shop.app.send_task("shared.task", args=["kept"])
    assert shop.stored() == ["kept"]
    assert shop.published() == []


def test_the_relays_own_task_is_never_stored(make_shop: MakeShop, sqlite_url: str) -> None:
    """It would wait for itself."""
    shop = make_shop(sqlite_url, outbox_capture="all", outbox_no_transaction="refuse")
    relay = shop.app.tasks["celery_outbox.relay"]
    with shop.Session.begin() as session:
        relay.delay()
        with shop.outbox.using(session):
            relay.delay()
    assert shop.stored() == []
    assert shop.published() == ["celery_outbox.relay"] * 2


def test_control_commands_and_plain_kombu_are_left_alone(
    make_shop: MakeShop, sqlite_url: str
) -> None:
    shop = make_shop(sqlite_url, outbox_capture="all")
    with shop.Session.begin():
        shop.app.control.revoke("an-id")
        shop.app.control.broadcast("shutdown")
        with shop.app.producer_or_acquire() as producer:
            producer.publish({"raw": True}, routing_key="raw")
    assert shop.stored() == []
    assert len(wire.broker(shop.broker_name).published) == 3


@pytest.mark.parametrize("how", ["connection", "producer"])
def test_a_message_for_another_broker_is_not_ours(
    sqlite_shop: Shop, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    shop = sqlite_shop
    name = wire.new_name()
    with shop.Session.begin(), Connection(f"recording://{name}") as elsewhere:
        given: dict[str, Any] = {"connection": elsewhere}
        if how == "producer":
            given = {"producer": shop.app.amqp.Producer(elsewhere)}
        shop.notify.apply_async(("m",), **given)
    assert shop.stored() == []
    assert [message.task for message in wire.broker(name).published] == ["shop.notify"]
    assert "shop.notify is durable, and goes around the outbox" in caplog.text


@pytest.mark.parametrize("how", ["connection", "producer"])
def test_a_message_for_the_apps_broker_on_a_connection_of_ones_own_is_ours(
    sqlite_shop: Shop, how: str
) -> None:
    shop = sqlite_shop
    with shop.Session.begin(), Connection(f"recording://{shop.broker_name}") as own:
        given: dict[str, Any] = {"connection": own}
        if how == "producer":
            given = {"producer": shop.app.amqp.Producer(own)}
        shop.notify.apply_async(("m",), **given)
    assert shop.stored() == ["m"]
    assert shop.published() == []


@pytest.mark.parametrize(
    "url",
    [
        "amqp://",
        "amqp://localhost",
        "amqp://127.0.0.1:5672//",
        "pyamqp://guest@localhost//",
        "redis://",
        "redis://localhost/0",
        "redis://127.0.0.1:6379/3",
        "memory://",
        "filesystem://",
        "amqp://u:p@a:1/v;amqp://u:p@b:2/v",
    ],
)
def test_the_apps_broker_is_known_however_its_url_is_written(
    make_shop: MakeShop, sqlite_url: str, url: str
) -> None:
    """A pool's connections have the defaults filled in that the URL leaves out."""
    shop = make_shop(sqlite_url)
    shop.app.conf.broker_url = url
    for _ in range(3):
        shop.notify.delay("m")
    assert shop.stored() == ["m"] * 3


def test_a_task_sent_event_is_staged_with_its_message(make_shop: MakeShop, sqlite_url: str) -> None:
    shop = make_shop(sqlite_url, task_send_sent_event=True)
    with failing_on_purpose(), shop.Session.begin():
        shop.notify.delay("dropped")
        raise Purpose
    with shop.Session.begin():
        shop.notify.apply_async(("kept",), task_id="my-id", countdown=0.001)
    assert wire.broker(shop.broker_name).published == []
    assert tasks_stored(shop) == ["shop.notify", "task-sent"]
    shop.outbox.relay_all()
    messages = wire.broker(shop.broker_name).published
    (event,) = [message for message in messages if message.exchange == "celeryev"]
    assert json.loads(event.body)["uuid"] == "my-id"
    assert json.loads(event.body)["type"] == "task-sent"
    assert "shop.notify" in shop.published()


def test_a_task_sent_event_of_a_published_task_is_published(
    make_shop: MakeShop, sqlite_url: str
) -> None:
    shop = make_shop(sqlite_url, task_send_sent_event=True)
    with shop.Session.begin():
        shop.plain.delay("m")
    assert tasks_stored(shop) == []
    assert len(wire.broker(shop.broker_name).published) == 2


@pytest.mark.parametrize("body", ["notify", "plain"])
def test_the_poll_of_a_chord_goes_the_way_of_its_body(
    make_shop: MakeShop, sqlite_url: str, tmp_path: Any, body: str
) -> None:
    shop = make_shop(sqlite_url, result_backend=f"file://{tmp_path}")
    bodies = {"notify": shop.notify, "plain": shop.plain}
    with shop.Session.begin():
        chord([shop.plain.si("1")], bodies[body].si("body")).delay()
    if body == "notify":
        assert tasks_stored(shop) == ["celery.chord_unlock"]
        assert shop.published() == ["shop.plain"]
    else:
        assert tasks_stored(shop) == []
        assert sorted(shop.published()) == ["celery.chord_unlock", "shop.plain"]


def test_signals_are_sent_at_the_call_and_may_change_the_headers(sqlite_shop: Shop) -> None:
    """P3: tracing libraries put their ids there."""
    from celery.signals import after_task_publish, before_task_publish

    seen: list[str] = []

    def before(headers: dict[str, Any], **_: Any) -> None:
        headers["x-trace"] = "abc"
        seen.append("before")

    def after(**_: Any) -> None:
        seen.append("after")

    before_task_publish.connect(before, sender="shop.notify", weak=False)
    after_task_publish.connect(after, sender="shop.notify", weak=False)
    try:
        with sqlite_shop.Session.begin():
            sqlite_shop.notify.delay("m")
            assert seen == ["before", "after"]
    finally:
        before_task_publish.disconnect(before, sender="shop.notify")
        after_task_publish.disconnect(after, sender="shop.notify")
    sqlite_shop.outbox.relay_all()
    (message,) = wire.broker(sqlite_shop.broker_name).published
    assert message.properties["application_headers"]["x-trace"] == "abc"
    assert seen == ["before", "after"]


def test_a_durable_task_without_an_outbox_says_so() -> None:
    app = Celery("bare", broker="memory://", set_as_current=False)

    @durable_task(app=app, name="bare.task")
    def task() -> None: ...

    for send in (task.delay, task.apply_async, task.s().delay):
        with pytest.raises(NotInstalled, match=r"bare\.task.*'bare'.*Outbox\(app, Session\)"):
            send()


def test_an_outbox_made_later_is_enough(sqlite_url: str) -> None:
    app = Celery("late", broker="memory://", set_as_current=False)

    @durable_task(app=app, name="late.task")
    def task() -> None: ...

    with pytest.raises(NotInstalled):
        task.delay()
    outbox = Outbox(app, sqlite_url)
    outbox.create_schema()
    task.delay()
    assert outbox.store.counts()["outgoing"] == 1
    outbox.engine.dispose()


def test_eager_tasks_are_run_and_not_stored(make_shop: MakeShop, sqlite_url: str) -> None:
    shop = make_shop(sqlite_url, task_always_eager=True)
    with shop.Session.begin():
        assert shop.notify.delay("m").successful()
    assert shop.stored() == []


def test_the_mandatory_flag_is_asked_for_where_a_queue_must_be_bound(
    make_shop: MakeShop, sqlite_url: str
) -> None:
    """P5: and not for a fanout, which may reach nobody."""
    from kombu import Exchange, Queue

    shop = make_shop(
        sqlite_url,
        task_queues=[
            Queue("celery"),
            Queue("topical", Exchange("topics", type="topic"), routing_key="a.*"),
            Queue("all", Exchange("everybody", type="fanout")),
        ],
    )
    shop.notify.apply_async(("m",), queue="celery")
    shop.notify.apply_async(("m",), queue="topical", routing_key="a.b")
    shop.notify.apply_async(("m",), queue="all")
    shop.notify.apply_async(("m",), exchange=Exchange("f", type="fanout"), routing_key="x")
    shop.outbox.relay_all()
    sent = wire.broker(shop.broker_name).published
    assert [message.mandatory for message in sent] == [True, True, False, False]


def test_the_backend_may_be_asked_itself_to_prepare_a_chord(
    make_shop: MakeShop, sqlite_url: str
) -> None:
    shop = make_shop(sqlite_url, result_backend="cache+memory://")
    backend = shop.app.backend
    header = shop.app.GroupResult("prepared", [shop.app.AsyncResult("part")])
    backend.apply_chord((header.id, header.results), None)
    assert shop.app.GroupResult.restore("prepared", backend) == header


def test_a_message_with_an_eta_goes_to_the_broker_if_workers_hold_it(
    make_shop: MakeShop, sqlite_url: str
) -> None:
    shop = make_shop(sqlite_url, outbox_hold_scheduled=False)
    with shop.Session.begin():
        shop.notify.apply_async(("in a transaction",), countdown=1000)
    shop.notify.apply_async(("alone",), countdown=1000)
    assert shop.outbox.relay_all().confirmed == 2
    assert shop.published() == ["shop.notify"] * 2
