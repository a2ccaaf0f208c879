"""The doctor's checks of the broker: each finds its fault when that is put there on purpose."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from celery_outbox import ConfigurationError, Outbox
from celery_outbox.checks import check
from celery_outbox.doctor import broker, leases
from celery_outbox.doctor.examination import examine, worst_of
from celery_outbox.doctor.finding import Level
from celery_outbox.doctor.retention import check_retention
from tests.support.ports import free_port
from tests.support.proxy import TcpProxy
from tests.support.servers import RabbitMQ, Redis
from tests.unit.test_doctor_database import only


class MakeOutbox:
    """Makes outboxes whose app has this or that broker."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._apps: list[Celery] = []

    def __call__(self, broker_url: str, **settings: Any) -> Outbox:
        app = Celery("doctors", set_as_current=False)
        app.conf.update(broker_url=broker_url, outbox_relay_tick_seconds=0, **settings)
        engine = create_engine(f"sqlite:///{self._folder / 'doctor.sqlite'}", poolclass=NullPool)
        outbox = Outbox(app, engine)
        outbox.create_schema()
        self._apps.append(app)
        return outbox

    def close(self) -> None:
        for app in self._apps:
            app.close()


@pytest.fixture
def make_outbox(tmp_path: Path) -> Iterator[MakeOutbox]:
    made = MakeOutbox(tmp_path)
    yield made
    made.close()


@pytest.fixture
def amqp_proxy(rabbitmq_server: RabbitMQ) -> Iterator[TcpProxy]:
    with TcpProxy(rabbitmq_server.host, rabbitmq_server.port) as proxy:
        yield proxy


def through(url: str, server: RabbitMQ, proxy: TcpProxy) -> str:
    return url.replace(f":{server.port}", f":{proxy.port}")


def test_nothing_is_wrong_with_rabbitmq(make_outbox: MakeOutbox, amqp_url: str) -> None:
    findings = list(examine(make_outbox(amqp_url)))
    assert worst_of(findings) is Level.OK, [each for each in findings if each.level is not Level.OK]


def test_a_broker_that_is_not_there(make_outbox: MakeOutbox) -> None:
    outbox = make_outbox(f"amqp://ann:s3cret@127.0.0.1:{free_port()}//")
    findings = list(examine(outbox, ["confirms"]))
    assert [(each.check, each.level) for each in findings] == [
        ("broker", Level.ERROR),
        ("confirms", Level.SKIPPED),
    ]
    assert "takes no connection" in findings[0].says
    assert "s3cret" not in str(findings)


def test_a_broker_of_which_nothing_is_known(make_outbox: MakeOutbox) -> None:
    assert "it is not known" in only(
        broker.check_broker(make_outbox("pyro://127.0.0.1")), Level.ERROR
    )


def test_a_broker_that_confirms_nothing(
    make_outbox: MakeOutbox, amqp_url: str, rabbitmq_server: RabbitMQ, amqp_proxy: TcpProxy
) -> None:
    """What it says after it has opened the channel is lost, as in a memory alarm."""
    outbox = make_outbox(
        through(amqp_url, rabbitmq_server, amqp_proxy), outbox_confirm_timeout_seconds=0.5
    )
    with broker.connected(outbox) as connection:
        channel: Any = connection.channel()
        channel.confirm_select()
        amqp_proxy.swallow_replies()
        connection.channel = lambda: channel
        channel.confirm_select = lambda: None
        findings = broker._confirms_of(connection, 0.5)
        assert "confirmed no message" in only(findings, Level.ERROR)


def test_a_broker_that_sends_nothing_back(make_outbox: MakeOutbox, amqp_url: str) -> None:
    """It confirms what leads nowhere: returns are lost on the way."""
    with broker.connected(make_outbox(amqp_url)) as connection:
        channel: Any = connection.channel()
        publish = channel._basic_publish
        channel._basic_publish = lambda *a, **k: publish(*a, **{**k, "mandatory": False})
        connection.channel = lambda: channel
        assert "did not come back" in only(broker._confirms_of(connection, 10), Level.ERROR)


def test_a_queue_that_nobody_consumes(make_outbox: MakeOutbox, amqp_url: str) -> None:
    outbox = make_outbox(amqp_url)
    only(broker.check_queues(outbox), Level.OK)
    with outbox.app.connection_for_write() as connection:
        channel = connection.default_channel
        channel.queue_declare("celery", durable=True, auto_delete=False)
        said = only(broker.check_queues(outbox), Level.WARNING)
        assert "celery (0 waiting)" in said
        channel.basic_consume("celery")
        only(broker.check_queues(outbox), Level.OK)


def test_a_queue_whose_consumers_may_take_longer_than_the_inbox_remembers(
    make_outbox: MakeOutbox, amqp_url: str
) -> None:
    from kombu import Queue

    queues = [Queue("slow", queue_arguments={"x-consumer-timeout": 7200 * 1000})]
    outbox = make_outbox(amqp_url, task_queues=queues, outbox_inbox_retention_seconds=7200.0)
    assert "the queue 'slow'" in only(check_retention(outbox), Level.ERROR)
    with pytest.raises(ConfigurationError, match="the queue 'slow'"):
        check(outbox.app, outbox)


def test_a_retention_that_may_be_too_short_is_told_when_a_worker_starts(
    make_outbox: MakeOutbox, amqp_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """RabbitMQ's own timeout can't be asked: no reason to refuse."""
    outbox = make_outbox(amqp_url, outbox_inbox_retention_seconds=1800.0)
    check(outbox.app, outbox)
    assert "not longer than the 1800 s" in caplog.text
    caplog.clear()
    outbox = make_outbox(
        amqp_url, outbox_inbox_retention_seconds=1800.0, outbox_redelivery_window_seconds=600.0
    )
    check(outbox.app, outbox)
    assert "not longer" not in caplog.text


# Redis


def test_a_redis_that_forgets_when_it_is_restarted(make_outbox: MakeOutbox, redis_url: str) -> None:
    outbox = make_outbox(redis_url)
    assert "appendonly is off" in only(broker.check_confirms(outbox), Level.WARNING)
    kept = make_outbox(redis_url, outbox_keep_until_handled=True)
    only(broker.check_confirms(kept), Level.OK)


def test_a_redis_that_drops_queues_when_it_is_full(make_outbox: MakeOutbox) -> None:
    with Redis(appendonly=True) as server:
        outbox = make_outbox(server.url)
        only(broker.check_confirms(outbox), Level.OK)
        server._ask("CONFIG SET maxmemory 100mb", "CONFIG SET maxmemory-policy allkeys-lru")
        assert "allkeys-lru" in only(broker.check_confirms(outbox), Level.ERROR)


def test_a_batch_that_takes_longer_than_its_lease(
    make_outbox: MakeOutbox, redis_url: str, amqp_url: str
) -> None:
    for url in (redis_url, amqp_url):
        only(leases.check_lease(make_outbox(url)), Level.OK)
        outbox = make_outbox(url, outbox_batch_size=10**9)
        assert "outbox_batch_size smaller" in only(leases.check_lease(outbox), Level.ERROR)


def test_an_inbox_that_forgets_before_redis_does(make_outbox: MakeOutbox, redis_url: str) -> None:
    outbox = make_outbox(
        redis_url,
        outbox_inbox_retention_seconds=3600.0,
        broker_transport_options={"visibility_timeout": 7200},
    )
    assert "visibility_timeout" in only(check_retention(outbox), Level.ERROR)
    with pytest.raises(ConfigurationError, match="visibility_timeout"):
        check(outbox.app, outbox)


def test_a_transport_that_is_trusted_on_the_users_word(make_outbox: MakeOutbox) -> None:
    outbox = make_outbox("memory://", outbox_trust_broker=True)
    assert "outbox_trust_broker is set" in only(broker.check_confirms(outbox), Level.WARNING)


def test_a_broker_that_takes_connections_and_says_nothing(make_outbox: MakeOutbox) -> None:
    """It does not hang the doctor."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        outbox = make_outbox(f"amqp://127.0.0.1:{port}//", outbox_confirm_timeout_seconds=0.5)
        assert "takes no connection" in only(broker.check_broker(outbox), Level.ERROR)
