"""Ways to send tasks, for hypothesis: data, so that two apps can be asked to do the same."""

import uuid
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import hypothesis.strategies as st
from celery import Celery, chain, chord, group
from kombu import Exchange, Queue, binding

TASKS = ("t.plain", "t.routed", "t.broadcast", "t.prioritised", "t.bound")

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
names = st.text("abcdefgh", min_size=1, max_size=6)
_FIRST, _LAST = datetime(1990, 1, 1), datetime(2100, 1, 1)  # noqa: DTZ001
moments = st.datetimes(_FIRST, _LAST, timezones=st.sampled_from([None, timezone.utc]))
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**70)
    | st.floats(allow_nan=False)
    | texts
    | st.binary(max_size=8)
    | st.uuids()
    | st.decimals(allow_nan=False, places=3)
    | moments
    | st.dates()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
#: What AMQP's tables hold.
header_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False)
    | texts
    | st.binary(max_size=8)
    # Without a zero at the end, which py-amqp drops as it reads a frame.
    | st.integers(0, 10**7).map(lambda number: Decimal(10 * number + 7) / 100)
    | st.datetimes(_FIRST, _LAST).map(lambda moment: moment.replace(microsecond=0)),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def exchanges(draw: st.DrawFn) -> Exchange:
    return Exchange(
        draw(names),
        type=draw(st.sampled_from(["direct", "topic", "fanout", "headers"])),
        durable=draw(st.booleans()),
        auto_delete=draw(st.booleans()),
        delivery_mode=draw(st.sampled_from([None, "transient", "persistent"])),
        arguments=draw(st.sampled_from([None, {"alternate-exchange": "elsewhere"}])),
        no_declare=draw(st.sampled_from([None, None, None, True])),
    )


@st.composite
def queues(draw: st.DrawFn) -> Queue:
    exchange = draw(exchanges())
    options: dict[str, Any] = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "durable": st.booleans(),
                "auto_delete": st.booleans(),
                "exclusive": st.booleans(),
                "expires": st.integers(1, 1000),
                "message_ttl": st.floats(1, 1000),
                "max_length": st.integers(1, 1000),
                "max_length_bytes": st.integers(1, 1000),
                "max_priority": st.integers(1, 10),
                "queue_arguments": st.sampled_from(
                    [{"x-queue-type": "quorum"}, {"x-overflow": "reject-publish", "x-n": 3}]
                ),
                "binding_arguments": st.just({"x-match": "all", "k": "v"}),
                "consumer_arguments": st.just({"x-priority": 3}),
                "no_declare": st.just(True),
                "alias": names,
            },
        )
    )
    if draw(st.booleans()):
        options["bindings"] = [
            binding(exchange, routing_key=key) for key in draw(st.lists(names, max_size=2))
        ]
    return Queue(draw(names), exchange, routing_key=draw(names), **options)


destinations: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"queue": st.sampled_from(["default", "topical", "quorate", "missing"])}),
    st.fixed_dictionaries({"queue": queues()}),
    st.fixed_dictionaries({"exchange": names, "routing_key": names}),
    st.fixed_dictionaries({"exchange": exchanges(), "routing_key": names}),
    st.fixed_dictionaries(
        {"exchange": names, "routing_key": names, "exchange_type": st.sampled_from(["topic"])}
    ),
    st.fixed_dictionaries({"routing_key": names}),
)

#: Relative to now: made absolute by `options_at`, in one of the forms that Celery takes.
_times = st.tuples(st.sampled_from(["seconds", "aware", "naive", "text"]), st.integers(-100, 10**6))

options: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "serializer": st.sampled_from(["json", "pickle", "yaml"]),
        "compression": st.sampled_from(["gzip", "bzip2"]),
        "priority": st.integers(0, 9),
        "expires": _times,
        "eta": _times,
        "time_limit": st.integers(1, 100) | st.floats(1, 100),
        "soft_time_limit": st.integers(1, 100),
        "headers": st.dictionaries(names, header_values, max_size=3),
        "shadow": names,
        "ignore_result": st.booleans(),
        "reply_to": names,
        "task_id": st.uuids().map(str) | names,
        "retry": st.booleans(),
        "delivery_mode": st.sampled_from([1, 2]),
        "message_id": names,
        "app_id": names,
        "type": names,
        "timestamp": st.integers(0, 2**31),
        "replaced_task_nesting": st.integers(0, 3),
        "root_id": names,
        "parent_id": names,
    },
)


def options_at(now: datetime, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with their times counted from `now`."""
    result = dict(given)
    for name in ("eta", "expires"):
        if name in result:
            form, seconds = result.pop(name)
            moment = now + timedelta(seconds=seconds)
            match form:
                case "seconds" if name == "eta":
                    result["countdown"] = seconds
                case "seconds":
                    result["expires"] = seconds
                case "naive":
                    result[name] = moment.replace(tzinfo=None)
                case "text":
                    result[name] = moment.isoformat()
                case _:
                    result[name] = moment
    return result


#: A signature: ("task", name, args, kwargs) or (kind of canvas, parts, ...).
leaves = st.tuples(
    st.just("task"),
    st.sampled_from(TASKS),
    st.lists(values, max_size=2),
    st.dictionaries(names, values, max_size=2),
)
canvases = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(st.just("chain"), st.lists(inner, min_size=1, max_size=3)),
        st.tuples(st.just("group"), st.lists(inner, min_size=1, max_size=3)),
        st.tuples(st.just("chord"), st.lists(inner, min_size=1, max_size=2), inner),
        st.tuples(st.just("link"), inner, leaves),
        st.tuples(st.just("link_error"), inner, leaves),
        st.tuples(st.just("stamp"), inner, st.dictionaries(names, texts, min_size=1, max_size=2)),
        st.tuples(st.just("set"), inner, st.fixed_dictionaries({"priority": st.integers(0, 9)})),
    ),
    max_leaves=5,
)


def build(app: Celery, description: Any) -> Any:
    """Make the signature."""
    match description:
        case ("task", name, args, kwargs):
            return app.signature(name, args=tuple(args), kwargs=dict(kwargs), immutable=True)
        case ("chain", parts):
            return chain(*(build(app, part) for part in parts), app=app)
        case ("group", parts):
            return group([build(app, part) for part in parts], app=app)
        case ("chord", parts, body):
            return chord([build(app, part) for part in parts], build(app, body), app=app)
        case ("link", inner, leaf):
            signature = build(app, inner)
            signature.link(build(app, leaf))
            return signature
        case ("link_error", inner, leaf):
            signature = build(app, inner)
            signature.link_error(build(app, leaf))
            return signature
        case ("stamp", inner, stamps):
            signature = build(app, inner)
            signature.stamp(**stamps)
            return signature
        case ("set", inner, given):
            return build(app, inner).set(**given)
    raise AssertionError(description)


#: Arguments that every serializer but YAML takes; some that none takes.
examples_of_arguments: tuple[list[Any], ...] = (
    [],
    [None, True, 1.5, "ä☃"],
    [uuid.UUID(int=7), Decimal("1.10"), datetime(2030, 1, 1, tzinfo=timezone.utc), b"\xff\x00"],
    [{"nested": [{"deep": (1, 2)}]}],
    [object()],
)
