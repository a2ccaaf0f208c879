"""ServiceBusPublisher, with kombu and the SDK as they are, over TLS."""

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from azure.core.credentials import AccessToken
from azure.servicebus.exceptions import OperationTimeoutError
from kombu import Connection, Exchange, Queue
from kombu.transport import azureservicebus

from celery_outbox.declaration import freeze
from celery_outbox.relay.outcome import Confirmed, Outcome, Refused, Stalled, Undecided, Unknown
from celery_outbox.relay.publishers import publisher_for
from celery_outbox.relay.publishers.servicebus import ServiceBusPublisher
from tests.servicebus.envelopes import batch, envelope
from tests.support.servicebus import Fault, ServiceBus
from tests.support.waiting import wait_until

_numbers = itertools.count()
Publishing = Callable[..., ServiceBusPublisher]


@pytest.fixture
def publisher_to(servicebus_server: ServiceBus) -> Iterator[Publishing]:
    made = []

    def make(url: str | None = None, timeout: float = 10.0) -> ServiceBusPublisher:
        publisher = publisher_for(lambda: Connection(url or servicebus_server.url), timeout)
        assert isinstance(publisher, ServiceBusPublisher)
        made.append(publisher)
        return publisher

    yield make
    for publisher in made:
        publisher.close()


@pytest.fixture
def publisher(publisher_to: Publishing) -> ServiceBusPublisher:
    return publisher_to()


@pytest.fixture
def queue(servicebus_server: ServiceBus) -> str:
    """A queue of the test's own, with duplicate detection."""
    name = f"q{next(_numbers)}"
    servicebus_server.create_queue(name, duplicate_detection=True)
    return name


def kinds(outcomes: dict[int, Outcome]) -> set[type]:
    return {type(outcome) for outcome in outcomes.values()}


def test_a_batch_goes_in_few_deliveries(
    publisher: ServiceBusPublisher, servicebus_server: ServiceBus, queue: str
) -> None:
    publisher.open()
    outcomes = publisher.publish(batch(1000, queue))
    assert len(outcomes) == 1000
    assert kinds(outcomes) == {Confirmed}
    counts = servicebus_server.counts(queue)
    assert counts["stored"] == 1000
    assert counts["transfers"] < 10


def test_a_message_is_the_one_that_kombu_would_have_sent(
    publisher: ServiceBusPublisher, servicebus_server: ServiceBus, queue: str
) -> None:
    sent = envelope(1, queue)
    publisher.publish([(1, sent)])
    with Connection(servicebus_server.url) as connection:
        channel = connection.channel()
        message = publisher._message(channel, sent)
        channel.basic_publish(message, exchange="", routing_key=queue)
        ours, theirs = (_wire(channel, queue) for _ in range(2))
    for each in (ours, theirs):
        each["properties"].pop("delivery_tag")
    assert ours == theirs


def _wire(channel: Any, queue: str) -> Any:
    message = channel.basic_get(queue)
    content = b"".join(message.delivery_info["azure_message"].body)
    message.ack()
    return json.loads(content)


def test_a_repeated_send_has_the_same_id(
    publisher: ServiceBusPublisher,
    publisher_to: Publishing,
    servicebus_server: ServiceBus,
    queue: str,
) -> None:
    """The relay that published died before it could write that down; another one does it again."""
    publisher.publish(batch(20, queue))
    assert kinds(publisher_to().publish(batch(20, queue))) == {Confirmed}
    counts = servicebus_server.counts(queue)
    assert (counts["stored"], counts["duplicates_dropped"]) == (20, 20)


@pytest.mark.parametrize(
    "action",
    ["cut", "detach", "close", "silence", "reject", "release"],
)
@pytest.mark.parametrize("stored", [False, True], ids=["not-stored", "stored"])
def test_what_is_in_doubt_is_sent_again_and_stored_once(
    publisher_to: Publishing, servicebus_server: ServiceBus, queue: str, action: str, stored: bool
) -> None:
    fault = Fault("send", f"store_{action}" if stored else action, entity=queue)
    publisher = publisher_to(timeout=2.0)
    publisher.open()
    servicebus_server.plan([fault])
    assert kinds(publisher.publish(batch(5, queue))) == {Undecided}
    assert servicebus_server.counts(queue)["stored"] == (5 if stored else 0)
    publisher.open()
    assert kinds(publisher.publish(batch(5, queue))) == {Confirmed}
    assert servicebus_server.counts(queue)["stored"] == 5


def test_a_message_that_is_too_large_is_refused_alone(
    publisher: ServiceBusPublisher, servicebus_server: ServiceBus, queue: str
) -> None:
    sent = [(1, envelope(1, queue)), (2, envelope(2, queue, size=300_000)), (3, envelope(3, queue))]
    outcomes = publisher.publish(sent)
    assert [type(outcomes[number]) for number in (1, 2, 3)] == [Confirmed, Refused, Confirmed]
    assert servicebus_server.counts(queue)["stored"] == 2


def test_a_batch_that_is_refused_is_sent_one_by_one(
    publisher: ServiceBusPublisher, servicebus_server: ServiceBus, queue: str
) -> None:
    bad = Fault("send", "reject", entity=queue, condition="com.microsoft:argument-error", times=2)
    servicebus_server.plan([bad])
    outcomes = publisher.publish(batch(5, queue))
    assert isinstance(outcomes.pop(0), Refused)
    assert kinds(outcomes) == {Confirmed}
    assert servicebus_server.counts(queue)["stored"] == 4


def test_a_message_for_which_the_link_ends_is_found(
    publisher: ServiceBusPublisher, servicebus_server: ServiceBus, queue: str
) -> None:
    """A service that ends the link for a message does not tell which one it means."""
    servicebus_server.plan([Fault("send", "detach", entity=queue, times=3)])
    for _ in range(2):
        assert kinds(publisher.publish(batch(5, queue))) == {Undecided}
    outcomes = publisher.publish(batch(5, queue))
    assert isinstance(outcomes.pop(0), Refused)
    assert kinds(outcomes) == {Confirmed}


def test_a_link_that_ends_for_every_message_is_nobodys_fault(
    publisher: ServiceBusPublisher, servicebus_server: ServiceBus, queue: str
) -> None:
    servicebus_server.plan([Fault("send", "detach", entity=queue, times=5)])
    for _ in range(3):
        assert kinds(publisher.publish(batch(3, queue))) == {Undecided}
    assert kinds(publisher.publish(batch(3, queue))) == {Confirmed}


@pytest.mark.parametrize("trouble", ["missing", "disabled", "full", "no right"])
def test_a_queue_that_takes_nothing_is_no_fault_of_its_messages(
    publisher_to: Publishing, servicebus_server: ServiceBus, queue: str, trouble: str
) -> None:
    other = f"{queue}-other"
    match trouble:
        case "disabled":
            servicebus_server.create_queue(other, status="SendDisabled")
        case "full":
            servicebus_server.create_queue(other, max_bytes=10)
        case "no right":
            servicebus_server.create_queue(other)
            condition = "amqp:unauthorized-access"
            servicebus_server.plan([Fault("attach", "detach", entity=other, condition=condition)])
    publisher = publisher_to()
    outcomes = publisher.publish([(1, envelope(1, other)), (2, envelope(2, queue))])
    assert isinstance(outcomes[1], Stalled)
    assert isinstance(outcomes[2], Confirmed)
    publisher.open()


def test_a_queue_that_is_silent_does_not_stop_the_others(
    publisher_to: Publishing, servicebus_server: ServiceBus, queue: str
) -> None:
    other = f"{queue}-other"
    servicebus_server.create_queue(other, duplicate_detection=True)
    publisher = publisher_to(timeout=2.0)
    servicebus_server.plan([Fault("send", "silence", entity=other)])
    outcomes = publisher.publish([(1, envelope(1, other)), (2, envelope(2, queue))])
    assert isinstance(outcomes[1], Stalled)
    assert isinstance(outcomes[2], Confirmed)


def test_who_has_lost_the_lease_sends_no_more(
    publisher_to: Publishing, servicebus_server: ServiceBus, queue: str
) -> None:
    servicebus_server.plan([Fault("send", "reject", entity=queue, condition="amqp:not-allowed")])
    publisher = publisher_to(timeout=20.0)
    servicebus_server.delay_acknowledgements(0.2)

    def none_is_stored() -> bool:
        return not servicebus_server.counts(queue)["stored"]

    try:
        # Refused as a batch, they go one by one, which takes its time.
        outcomes = publisher.publish(batch(50, queue), none_is_stored)
    finally:
        servicebus_server.delay_acknowledgements(0)
    assert kinds(outcomes) == {Confirmed, Unknown}


def test_the_right_to_send_is_enough(
    publisher_to: Publishing, servicebus_server: ServiceBus, queue: str
) -> None:
    url = servicebus_server.add_key("sender", "send-key", "Send")
    before = servicebus_server.state()["stats"]
    assert kinds(publisher_to(url).publish(batch(3, queue))) == {Confirmed}
    after = servicebus_server.state()["stats"]
    assert after.get("admin PUT", 0) == before.get("admin PUT", 0)


def test_a_wrong_key_and_a_missing_right_dead_letter_nothing(
    publisher_to: Publishing, servicebus_server: ServiceBus, queue: str
) -> None:
    listener = publisher_to(servicebus_server.add_key("listener", "listen-key", "Listen"))
    assert kinds(listener.publish(batch(3, queue))) == {Stalled}
    stranger = publisher_to(servicebus_server.url_of("listener:another-key"))
    assert kinds(stranger.publish(batch(3, queue))) == {Undecided}
    # The broker has not answered yet, so it is asked before anything is claimed.
    with pytest.raises(Exception, match="client-error"):
        stranger.open()


def test_a_token_of_an_identity(
    publisher_to: Publishing,
    servicebus_server: ServiceBus,
    queue: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Identity:
        def get_token(self, *scopes: str, **_: Any) -> AccessToken:
            return AccessToken("a token", int(time.time()) + 3600)

    monkeypatch.setattr(azureservicebus, "DefaultAzureCredential", Identity)
    servicebus_server.accept_tokens()
    publisher = publisher_to(servicebus_server.url_of("DefaultAzureCredential"))
    assert kinds(publisher.publish(batch(3, queue))) == {Confirmed}


def test_a_namespace_that_throttles_is_left_alone(
    publisher: ServiceBusPublisher, servicebus_server: ServiceBus, queue: str
) -> None:
    busy = Fault("send", "reject", entity=queue, condition="com.microsoft:server-busy")
    servicebus_server.plan([busy])
    assert kinds(publisher.publish(batch(3, queue))) == {Undecided}
    with pytest.raises(ConnectionRefusedError, match="throttled"):
        publisher.open()
    wait_until(lambda: _opens(publisher), 10, "the end of the throttling")
    assert kinds(publisher.publish(batch(3, queue))) == {Confirmed}


def _opens(publisher: ServiceBusPublisher) -> bool:
    try:
        publisher.open()
    except Exception:
        return False
    return True


def test_a_broker_that_answers_nothing_is_abandoned(publisher_to: Publishing) -> None:
    with ServiceBus() as server:
        server.create_queue("q", duplicate_detection=True)
        publisher = publisher_to(server.url, timeout=1.0)
        assert kinds(publisher.publish(batch(3))) == {Confirmed}
        server.pause()
        # First it is silent with a message under way, then it does not even shake hands.
        for _ in range(3):
            assert kinds(publisher.publish(batch(3))) == {Undecided}
        with pytest.raises(OperationTimeoutError, match="did not answer"):
            publisher.open()
        wait_until(lambda: not _hanging(), 20, "the end of the threads that hung")
        server.resume()
        wait_until(lambda: _opens(publisher), 20, "the broker")
        assert kinds(publisher.publish(batch(3))) == {Confirmed}
        assert server.counts("q")["stored"] == 3
        publisher.close()


def _hanging() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("servicebus q")]


def _bound(exchange: Exchange, queue: str) -> dict[str, Any]:
    target = Queue(queue, exchange, routing_key="key")
    return {
        "exchange": exchange.name,
        "routing_key": "key",
        "declare": (freeze(target),),
    }


def test_exchanges_are_followed_without_a_word_to_the_broker(
    publisher: ServiceBusPublisher, servicebus_server: ServiceBus, queue: str
) -> None:
    direct = envelope(1, **_bound(Exchange("direct", "direct"), queue))
    fanout = envelope(2, **_bound(Exchange("all", "fanout"), queue))
    nowhere = envelope(3, exchange="direct", routing_key="other")
    outcomes = publisher.publish([(1, direct), (2, fanout), (3, nowhere)])
    assert [type(outcomes[number]) for number in (1, 2, 3)] == [Confirmed, Refused, Refused]
    assert servicebus_server.counts(queue)["stored"] == 1


def test_a_message_for_two_queues_is_confirmed_when_both_have_it(
    publisher: ServiceBusPublisher, servicebus_server: ServiceBus, queue: str
) -> None:
    topic = Exchange("topic", "topic")
    frozen = tuple(
        freeze(Queue(name, topic, routing_key=pattern))
        for name, pattern in ((queue, "a.*"), (f"{queue}-other", "*.b"))
    )
    sent = envelope(1, exchange="topic", routing_key="a.b", declare=frozen)
    assert isinstance(publisher.publish([(1, sent)])[1], Stalled)
    servicebus_server.create_queue(f"{queue}-other", duplicate_detection=True)
    assert isinstance(publisher.publish([(1, sent)])[1], Confirmed)
    assert servicebus_server.counts(queue)["stored"] == 1
    assert servicebus_server.counts(f"{queue}-other")["stored"] == 1


def test_queue_names_are_those_of_kombu(
    publisher_to: Publishing, servicebus_server: ServiceBus, queue: str
) -> None:
    options = {"queue_name_prefix": "pre-"}

    def connect() -> Connection:
        return Connection(servicebus_server.url, transport_options=options)

    servicebus_server.create_queue(f"pre-{queue}_a")
    publisher = ServiceBusPublisher(connect, 10.0)
    assert kinds(publisher.publish([(1, envelope(1, f"{queue}@a"))])) == {Confirmed}
    publisher.close()
    with connect() as connection:
        channel = connection.channel()
        message = publisher._message(channel, envelope(2))
        channel.basic_publish(message, exchange="", routing_key=f"{queue}@a")
    assert servicebus_server.counts(f"pre-{queue}_a")["stored"] == 2


def test_a_connection_that_the_service_ended_is_made_again(
    publisher: ServiceBusPublisher, queue: str
) -> None:
    """It ends those that are idle; a lane that has been idle is not used again."""
    assert kinds(publisher.publish(batch(2, queue))) == {Confirmed}
    lane = publisher._lanes[queue]
    lane.used_at -= 300
    assert kinds(publisher.publish(batch(2, queue))) == {Confirmed}
    assert publisher._lanes[queue] is not lane
    wait_until(lambda: not lane.is_alive, 10, "the end of the idle lane")
