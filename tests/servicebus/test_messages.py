"""Message ids: one for each row of an outbox, and the same whenever it is published."""

from dataclasses import replace

from celery_outbox.servicebus.messages import message_id
from tests.servicebus.envelopes import envelope


def test_a_row_keeps_its_id_when_its_expiration_counts_down() -> None:
    first = envelope(1)
    later = replace(first, properties={**first.properties, "expiration": "10"})
    assert message_id(7, first) == message_id(7, later)
    assert message_id(7, first).startswith(f"{first.task_id}:7:")


def test_rows_differ_also_those_of_two_outboxes() -> None:
    one = envelope(1)
    ids = {
        message_id(7, one),
        message_id(8, one),
        message_id(7, envelope(2)),
        message_id(7, replace(one, body=b"[1]")),
        message_id(7, replace(one, headers={**one.headers, "origin": "gen9@other"})),
        message_id(7, replace(one, properties={**one.properties, "reply_to": "other"})),
    }
    assert len(ids) == 6


def test_an_id_is_never_longer_than_the_service_takes() -> None:
    long = replace(envelope(1), task_id="x" * 190)
    assert len(message_id(7, long)) <= 128
    assert message_id(7, long) != message_id(8, long)
