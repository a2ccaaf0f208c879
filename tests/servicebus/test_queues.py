"""``outbox servicebus create|verify``, and what is said of queues that are not as they should be."""

import itertools
import json
from typing import Any

import pytest
from celery import Celery
from click.testing import Result
from kombu import Connection
from sqlalchemy import create_engine

from celery_outbox import Outbox
from celery_outbox.servicebus.queues import Queues
from tests.support.servicebus import ServiceBus
from tests.unit.test_cli import run

_numbers = itertools.count()
GOOD = {"duplicate_detection": True, "max_delivery_count": 100}


@pytest.fixture
def queue() -> str:
    return f"made{next(_numbers)}"


@pytest.fixture
def app(servicebus_server: ServiceBus, queue: str) -> Celery:
    app = Celery("servicebus", broker=servicebus_server.url, set_as_current=False)
    app.conf.task_default_queue = queue
    Outbox(app, create_engine("sqlite://"))
    return app


def servicebus(app: Celery, *words: str) -> Result:
    return run(app, "servicebus", *words)


def test_queues_are_created_once_and_are_as_they_should_be(
    app: Celery, servicebus_server: ServiceBus, queue: str
) -> None:
    """The app's queues, or those that are named."""
    assert servicebus(app, "create").output == f"{queue}: created\n"
    assert servicebus(app, "create", queue).output.endswith("exists, and is left as it is\n")
    named = servicebus(app, "create", f"{queue}@mail", "--lock", "30", "--window", "3600")
    assert named.output == f"{queue}_mail: created\n"
    verified = servicebus(app, "verify", queue, f"{queue}@mail")
    assert verified.output == f"{queue}: as it should be\n{queue}_mail: as it should be\n"
    assert verified.exit_code == 0
    with Connection(servicebus_server.url) as connection:
        found = Queues(connection)._admin.get_queue(f"{queue}_mail")
    assert found.requires_duplicate_detection
    assert found.lock_duration.total_seconds() == 30
    assert found.duplicate_detection_history_time_window.total_seconds() == 3600
    assert found.max_delivery_count == 100


@pytest.mark.parametrize(
    ("options", "level", "words"),
    [
        ({"status": "Disabled"}, "error", "status is Disabled"),
        ({"requires_session": True}, "error", "sessions"),
        ({"duplicate_detection": False}, "warning", "arrives twice"),
        ({"duplicate_window_seconds": 60.0}, "warning", "the relay may repeat a send after 360 s"),
        ({"partitioning": True}, "warning", "partitioned"),
        ({"lock_seconds": 10.0}, "warning", "locks messages for 0:00:10"),
        ({"max_delivery_count": 10}, "warning", "after 10 deliveries"),
        ({"default_ttl_seconds": 3600.0}, "warning", "wait for 1:00:00 are dropped"),
        (
            {"default_ttl_seconds": 3600.0, "dead_letter_on_expiry": True},
            "warning",
            "moved to its dead letters",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_with_a_queue(
    app: Celery,
    servicebus_server: ServiceBus,
    queue: str,
    options: dict[str, Any],
    level: str,
    words: str,
) -> None:
    servicebus_server.create_queue(queue, **{**GOOD, **options})
    said = servicebus(app, "verify")
    assert f"{queue}: {level}: " in said.output
    assert words in said.output
    assert "    -> " in said.output
    assert said.exit_code == (level == "error")
    (doubt,) = json.loads(servicebus(app, "verify", "--json").output)
    assert (doubt["queue"], doubt["level"]) == (queue, level)


def test_a_queue_that_is_missing(app: Celery, queue: str) -> None:
    said = servicebus(app, "verify")
    assert said.exit_code == 1
    assert f"{queue}: error: does not exist" in said.output


def test_a_policy_that_may_not_manage(
    app: Celery, servicebus_server: ServiceBus, queue: str
) -> None:
    app.conf.broker_url = servicebus_server.add_key("sends", "only", "Send")
    said = servicebus(app, "verify")
    assert said.exit_code == 3
    assert "the namespace says: ClientAuthenticationError" in said.output
    assert "only" not in said.output.replace("only if", "")


def test_another_broker() -> None:
    app = Celery("other", broker="memory://", set_as_current=False)
    Outbox(app, create_engine("sqlite://"))
    said = servicebus(app, "verify")
    assert said.exit_code == 1
    assert "broker_url is none of Azure Service Bus" in said.output


def test_doctor_knows_the_queues(app: Celery, queue: str) -> None:
    missing = run(app, "doctor", "--check", "queues", "--check", "confirms")
    assert f"error    queues: queue {queue}: does not exist" in missing.output
    assert "warning  confirms: " in missing.output
    servicebus(app, "create")
    app.conf.broker_transport_options = {"use_lock_renewal": True}
    made = run(app, "doctor", "--check", "queues", "--check", "confirms")
    assert f"ok       queues: the app's queues are as they should be: {queue}" in made.output
    assert "ok       confirms: " in made.output


def test_doctor_without_the_right_to_manage(
    app: Celery, servicebus_server: ServiceBus, queue: str
) -> None:
    app.conf.broker_url = servicebus_server.add_key("sends", "only", "Send")
    said = run(app, "doctor", "--check", "queues")
    assert "skipped  queues: the credentials may not manage" in said.output
