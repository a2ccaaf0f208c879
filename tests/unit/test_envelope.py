"""Envelope: its key, its times, and its way into the tables and back."""

from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from celery.canvas import Signature
from hypothesis import given

from celery_outbox.declaration import freeze, thaw
from celery_outbox.envelope import Envelope, message_key
from celery_outbox.errors import EnvelopeError
from celery_outbox.storage.rows import row_of
from celery_outbox.testing.contract.outgoing import envelope
from tests.unit import calls

NOW = datetime(2030, 1, 1, tzinfo=timezone.utc)


def calculate_routing_key(countdown: int, routing_key: str) -> str:
    """kombu's own, which came with 5.5."""
    native = pytest.importorskip("kombu.transport.native_delayed_delivery")
    return str(native.calculate_routing_key(countdown, routing_key))


# Times


@pytest.mark.parametrize("seconds", [-5, 0, 0.25, 1, 3600, 10**7])
def test_expiration_counts_from_the_publish(seconds: float) -> None:
    """P3: kept as an absolute time."""
    sent = envelope(expires_at=NOW + timedelta(seconds=seconds), properties={"expiration": "9"})
    assert sent.at(NOW).properties["expiration"] == str(max(0, int(seconds * 1000)))


def test_without_times_nothing_changes() -> None:
    sent = envelope(properties={"delivery_mode": 2})
    assert sent.at(NOW) is sent


@pytest.mark.parametrize("seconds", [-5, 0, 1, 27, 3600, 2**28 - 1])
@pytest.mark.parametrize("key", ["celery", "a.b.c", "0.1.x"])
def test_a_native_delay_counts_from_the_publish(seconds: int, key: str) -> None:
    """Quorum queues: the delay is in the routing key, in bits."""
    sent = envelope(
        exchange="celery_delayed_27",
        routing_key=calculate_routing_key(5000, key),
        due_at=NOW + timedelta(seconds=seconds),
    )
    expected = calculate_routing_key(seconds, key) if seconds > 0 else "0." * 28 + key
    assert sent.at(NOW).routing_key == expected


def test_a_delay_that_has_run_out_leaves_by_the_same_exchange_at_once() -> None:
    sent = envelope(
        exchange="celery_delayed_27", routing_key=calculate_routing_key(60, "celery"), due_at=NOW
    )
    late = sent.at(NOW + timedelta(days=3))
    assert late.routing_key == "0." * 28 + "celery"


def test_the_key_of_another_exchange_is_left_alone() -> None:
    key = calculate_routing_key(60, "celery")
    assert envelope(exchange="other", routing_key=key, due_at=NOW).at(NOW).routing_key == key


# Key


def test_a_retry_a_replacement_and_a_twin_in_a_group_have_keys_of_their_own() -> None:
    """P15."""
    headers: list[dict[str, Any]] = [
        {"id": "x"},
        {"id": "y"},
        {"id": "x", "retries": 1},
        {"id": "x", "retries": 2},
        {"id": "x", "replaced_task_nesting": 1},
        {"id": "x", "group_index": 0},
        {"id": "x", "group_index": 1},
        {"id": "x", "retries": 1, "group_index": 1},
    ]
    keys = [message_key(given) for given in headers]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "same", [{"retries": 0}, {"retries": None}, {"group_index": None}, {"other": 1}]
)
def test_what_says_nothing_changes_no_key(same: dict[str, Any]) -> None:
    assert message_key({"id": "x", **same}) == message_key({"id": "x"})


def test_a_long_key_is_replaced_by_its_digest() -> None:
    one, two = message_key({"id": "x" * 500}), message_key({"id": "x" * 501})
    assert one != two
    assert max(len(one), len(two)) <= 200


# Storing


def load(sent: Envelope) -> Envelope:
    row = row_of(sent)
    return Envelope.load(
        row["message"],
        task=sent.task,
        task_id=sent.task_id,
        key=row["key"],
        body=row["body"],
        due_at=row["due_at"],
        expires_at=row["expires_at"],
    )


def test_headers_keep_their_types() -> None:
    headers = {
        "moment": NOW,
        "decimal": Decimal("1.10"),
        "uuid": UUID(int=7),
        "bytes": b"\xff",
        "nested": {"list": [1, None, True, {"x": 1.5}]},
        "none": None,
    }
    assert load(envelope(headers=headers)).headers == headers


@given(calls.header_values)
def test_any_header_that_amqp_takes_comes_back(value: object) -> None:
    assert load(envelope(headers={"x": value})).headers == {"x": value}


@pytest.mark.parametrize("where", ["headers", "properties"])
def test_a_header_that_cannot_be_stored_names_the_task(where: str) -> None:
    given: dict[str, Any] = {where: {"x": object()}}
    sent = envelope(**given)
    with pytest.raises(EnvelopeError, match=r"shop\.notify\[m\].*header or property"):
        row_of(sent)


def test_a_newer_format_is_refused() -> None:
    """P19."""
    with pytest.raises(EnvelopeError, match="format 2, this version reads up to 1: upgrade"):
        Envelope.load(
            '{"format": 2}', task="t", task_id="i", key="k", body=b"", due_at=None, expires_at=None
        )


def test_an_envelope_is_frozen() -> None:
    with pytest.raises(AttributeError):
        envelope().task = "other"  # type: ignore[misc]


@pytest.mark.parametrize(("exchange", "shown"), [("", "celery"), ("topics", "topics/celery")])
def test_the_destination_is_as_operators_know_it(exchange: str, shown: str) -> None:
    assert envelope(exchange=exchange).destination == shown


# Declarations


def by_key(queue: Any) -> list[dict[str, Any]]:
    return sorted(
        (bound.as_dict(recurse=True) for bound in queue.bindings),
        key=lambda bound: str(bound["routing_key"]),
    )


@given(calls.queues())
def test_a_queue_survives_freezing(queue: Any) -> None:
    """kombu's own as_dict does not."""
    thawed = thaw(freeze(queue))
    assert thawed == queue
    assert by_key(thawed) == by_key(queue)
    assert thawed.exchange == queue.exchange  # None, where the bindings say it all
    if queue.exchange is not None:
        assert thawed.exchange.arguments == queue.exchange.arguments


@given(calls.exchanges())
def test_an_exchange_survives_freezing(exchange: Any) -> None:
    thawed = thaw(freeze(exchange))
    assert thawed == exchange
    assert thawed.arguments == exchange.arguments


def test_a_callback_of_the_apps_process_is_left_behind() -> None:
    from kombu import Queue

    assert "on_declared" not in freeze(Queue("q", on_declared=print))


def test_signatures_in_headers_are_stored_as_what_they_say() -> None:
    """Stamps and the like may hold them: a Signature is a dict."""
    signature = Signature("t", args=(1,))
    assert load(envelope(headers={"x": signature})).headers["x"]["task"] == "t"
