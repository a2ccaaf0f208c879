"""The frames that the relay writes are py-amqp's own, to the byte."""

from collections.abc import Callable
from datetime import datetime, timezone
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
from amqp.basic_message import Message
from amqp.exceptions import FrameSyntaxError
from amqp.method_framing import frame_writer
from amqp.serialization import dumps
from hypothesis import given
from hypothesis import strategies as st

from celery_outbox.relay.publishers.frames import frames
from celery_outbox.testing.contract.outgoing import envelope

FRAME_MAX = 4096

names = st.text(max_size=40)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(max_size=300),
    st.binary(max_size=50),
    st.integers(0, 2**32).map(lambda seconds: datetime.fromtimestamp(seconds, timezone.utc)),
    st.decimals(-1000, 1000, places=3),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)
shorts = st.text(max_size=60)


def by_amqp(sent: Any, channel: int) -> bytes:
    """What py-amqp writes for the same message."""
    written: list[bytes] = []
    connection = SimpleNamespace(frame_max=FRAME_MAX, bytes_sent=0)
    transport = SimpleNamespace(write=lambda data: written.append(bytes(data)))
    write: Callable[..., Any] = frame_writer(connection, transport)
    message = Message(
        sent.body.decode() if sent.is_text else sent.body,
        priority=sent.priority,
        content_type=sent.content_type,
        content_encoding=sent.content_encoding,
        application_headers=dict(sent.headers),
        **sent.properties,
    )
    arguments = dumps("Bssbb", (0, sent.exchange, sent.routing_key, sent.mandatory, False))
    write(1, channel, (60, 40), arguments, message)
    return b"".join(written)


@given(
    headers=st.dictionaries(names, values, max_size=8),
    body=st.binary(max_size=3 * FRAME_MAX),
    priority=st.none() | st.integers(0, 255),
    properties=st.fixed_dictionaries(
        {},
        optional={
            "delivery_mode": st.integers(1, 2),
            "correlation_id": shorts,
            "reply_to": shorts,
            "expiration": shorts,
            "message_id": shorts,
            "timestamp": st.integers(0, 2**64 - 1),
            "type": shorts,
            "user_id": shorts,
            "app_id": shorts,
            "cluster_id": shorts,
            "unknown": shorts,
        },
    ),
    exchange=shorts,
    routing_key=shorts,
    mandatory=st.booleans(),
    channel=st.integers(1, 65535),
)
def test_any_message(
    headers: Any, body: bytes, priority: Any, properties: Any, channel: int, **address: Any
) -> None:
    """P3."""
    sent = envelope(headers=headers, body=body, priority=priority, properties=properties, **address)
    assert frames(sent, channel=channel, frame_max=FRAME_MAX) == by_amqp(sent, channel)


@pytest.mark.parametrize("charset", ["utf-8", "latin-1", "utf-16"])
@pytest.mark.parametrize("text", ["", "é" * 10, "é" * FRAME_MAX])
def test_a_text_in_its_charset(text: str, charset: str) -> None:
    sent = envelope(body=text.encode(), is_text=True, content_encoding=charset)
    assert frames(sent, channel=1, frame_max=FRAME_MAX) == by_amqp(sent, 1)


class Odd(str):
    """A kind of text that only an app's own process knows."""


def test_values_of_subclasses() -> None:
    sent = envelope(headers={"odd": Odd("x"), "exact": Decimal("1.5")})
    assert frames(sent, channel=1, frame_max=FRAME_MAX) == by_amqp(sent, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"headers": {"strange": object()}},
        {"headers": {"deep": {"strange": [object()]}}},
        {"headers": {"large": 2**63}},
        {"headers": {"n" * 256: 1}},
        {"properties": {"correlation_id": "x" * 256}},
        {"routing_key": "x" * 256},
        {"priority": 256},
    ],
)
def test_what_amqp_can_not_say_is_an_error(changes: Any) -> None:
    sent = envelope(**changes)
    with pytest.raises(Exception) as theirs:
        by_amqp(sent, 1)
    with pytest.raises(type(theirs.value)):
        frames(sent, channel=1, frame_max=FRAME_MAX)


def test_the_error_names_the_header() -> None:
    with pytest.raises(FrameSyntaxError, match="'strange'"):
        frames(envelope(headers={"strange": object()}), channel=1, frame_max=FRAME_MAX)
