"""Durable tasks through pytest-celery's setup: each with a RabbitMQ and with a Redis broker."""

from celery import chain, chord, group
from pytest_celery import RESULT_TIMEOUT, CeleryTestSetup  # type: ignore[import-untyped]

from tests.containers.shop import Gate, Shop
from tests.support.waiting import wait_until


def _wait_quiet(shop: Shop) -> None:
    wait_until(lambda: shop.waiting() == 0, RESULT_TIMEOUT, "an empty outbox")


def test_what_is_committed_runs_once_and_what_is_rolled_back_never(
    celery_setup: CeleryTestSetup, shop: Shop
) -> None:
    with shop.Session() as session:
        session.begin()
        shop.add.delay(1, 2, name="rolled back")
        session.rollback()
    with shop.Session.begin():
        result = shop.add.delay(3, 4, name="committed")
    assert result.get(timeout=RESULT_TIMEOUT) == 7
    _wait_quiet(shop)
    assert shop.effects() == ["committed"]


def test_chain_group_and_chord(celery_setup: CeleryTestSetup, shop: Shop) -> None:
    add, total = shop.add, shop.total
    with shop.Session.begin():
        chained = chain(add.s(1, 2, name="first"), add.s(10, name="second")).delay()
        grouped = group(add.s(n, n, name=f"member {n}") for n in range(3)).delay()
        joined = chord(
            [add.s(n, 1, name=f"part {n}") for n in range(3)], total.s(name="body")
        ).delay()
    assert chained.get(timeout=RESULT_TIMEOUT) == 13
    assert grouped.get(timeout=RESULT_TIMEOUT) == [0, 2, 4]
    assert joined.get(timeout=RESULT_TIMEOUT) == 6
    _wait_quiet(shop)
    members = [f"member {n}" for n in range(3)]
    parts = [f"part {n}" for n in range(3)]
    assert shop.effects() == sorted(["first", "second", *members, *parts, "body"])


def test_a_worker_is_killed_in_the_middle(celery_setup: CeleryTestSetup, shop: Shop) -> None:
    with shop.Session.begin():
        result = shop.pass_gate.delay("killed")
    celery_setup.worker.wait_for_log("at the gate: killed.")
    celery_setup.worker.kill()
    assert celery_setup.worker.container.status == "exited"
    assert shop.effects() == []
    with shop.Session.begin() as session:
        session.add(Gate(name="killed"))
    celery_setup.worker.restart()
    assert result.get(timeout=RESULT_TIMEOUT) == "killed"
    _wait_quiet(shop)
    assert shop.effects() == ["killed", "killed, sent"]
    assert celery_setup.worker.logs().count("at the gate: killed.") == 2


def test_a_retry_keeps_the_last_attempt_alone(celery_setup: CeleryTestSetup, shop: Shop) -> None:
    with shop.Session.begin():
        result = shop.try_again.delay("retried")
    assert result.get(timeout=RESULT_TIMEOUT) == 2
    _wait_quiet(shop)
    assert shop.effects() == ["retried"]
