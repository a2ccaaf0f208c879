"""Parking: what waits outside the slots is given back once, in the worker's loop, and counted."""

from collections.abc import Callable
from pickle import dumps, loads
from typing import Any

import pytest
from celery import Celery
from kombu.common import QoS

from celery_outbox.inbox.parking import Busy, Parking, park


class Timer:
    def __init__(self) -> None:
        self.due: list[tuple[float, Callable[[], None]]] = []

    def call_after(self, seconds: float, function: Callable[[], None]) -> None:
        self.due.append((seconds, function))

    def fire(self) -> None:
        due, self.due = self.due, []
        for _, function in due:
            function()


class Consumer:
    """What a parking needs of Celery's: its loop is run by the test."""

    def __init__(self, hub: bool) -> None:
        self.app = Celery(set_as_current=False)
        self.hub = hub
        self.timer = Timer()
        self.qos = QoS(lambda prefetch_count: None, 4)
        self.soon: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def call_soon(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.soon.append((function, arguments))

    def run(self) -> None:
        soon, self.soon = self.soon, []
        for function, arguments in soon:
            function(*arguments)


@pytest.fixture(params=[True, False], ids=["hub", "no hub"])
def consumer(request: pytest.FixtureRequest) -> Consumer:
    consumer = Consumer(request.param)
    Parking(consumer)
    return consumer


def _wait(consumer: Consumer) -> None:
    consumer.run()
    consumer.timer.fire()
    consumer.run()


def test_it_is_given_back_after_the_pause(consumer: Consumer) -> None:
    given: list[str] = []
    park(consumer.app, lambda: given.append("back"), 3)
    assert consumer.qos.value == 5
    assert given == []
    consumer.run()
    assert [seconds for seconds, _ in consumer.timer.due] == [3]
    _wait(consumer)
    assert given == ["back"]
    assert consumer.qos.value == 4


def test_no_more_than_a_hundred_are_fetched_beside_the_others(consumer: Consumer) -> None:
    given: list[int] = []
    for number in range(150):
        park(consumer.app, lambda number=number: given.append(number), 1)  # type: ignore[misc]
    assert consumer.qos.value == 104
    _wait(consumer)
    assert given == list(range(150))
    assert consumer.qos.value == 4


def test_after_a_reconnection_what_was_parked_before_is_not_counted(consumer: Consumer) -> None:
    park(consumer.app, lambda: None, 1)
    consumer.qos = QoS(lambda prefetch_count: None, 4)
    _wait(consumer)
    assert consumer.qos.value == 4


def test_without_a_worker_it_goes_back_at_once() -> None:
    given: list[str] = []
    park(Celery(set_as_current=False), lambda: given.append("back"), 3)
    assert given == ["back"]


def test_the_answer_comes_whole_out_of_another_process() -> None:
    answer = loads(dumps(Busy("is being executed", requeue=True)))
    assert isinstance(answer, Busy)
    assert (answer.reason, answer.requeue) == ("is being executed", True)
