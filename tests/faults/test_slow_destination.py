"""A queue that confirms late, or never, holds up its own messages only.

P7: a bad destination does not delay good ones. P8: nothing is published twice that the broker merely
took its time for.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tests.journeys.making import Making
from tests.journeys.site import Site, new_tag
from tests.support.processes import Process
from tests.support.servers import RabbitMQ
from tests.support.waiting import wait_until


@contextmanager
def _suspended(server: RabbitMQ, site: Site, queue: str) -> Iterator[None]:
    """Let the process of a queue stand still: it takes messages, and answers for none."""
    vhost = site.setup.broker.rpartition("/")[2]
    name = f'rabbit_misc:r(<<"{vhost}">>, queue, <<"{queue}">>)'
    pid = f"amqqueue:get_pid(element(2, rabbit_amqqueue:lookup({name})))"
    server.eval(f"sys:suspend({pid}).")
    try:
        yield
    finally:
        server.eval(f"sys:resume({pid}).")


def _send(site: Site, count: int, queue: str) -> list[str]:
    tags = [new_tag(f"{queue}{number}") for number in range(count)]
    with site.Session.begin():
        for tag in tags:
            site.step(tag).apply_async(queue=queue)
    return tags


def _verify_once(site: Site, tags: list[str], copies: int) -> None:
    assert site.left() == len(tags) + copies
    site.worker("--queues=good,slow")
    for tag in tags:
        site.wait_effects(tag, ["done"])
    site.wait_quiet()
    assert [site.effects(tag) for tag in tags] == [["done"]] * len(tags)
    assert not site.dead()


def _prepared(sites: Making, timeout: float) -> tuple[Site, Process, list[str]]:
    site = sites(
        "amqp",
        outbox_batch_size=20,
        outbox_confirm_timeout_seconds=timeout,
        outbox_lease_seconds=2 * timeout,
    )
    relay = site.relay()
    tags = _send(site, 1, "good") + _send(site, 1, "slow")
    wait_until(lambda: not site.pending(), 30, "two queues")
    return site, relay, tags


def test_a_late_confirm_is_settled_and_nothing_is_sent_twice(sites: Making) -> None:
    site, _, tags = _prepared(sites, timeout=60.0)
    with _suspended(sites.rabbitmq, site, "slow"):
        tags += _send(site, 5, "slow")
        tags += _send(site, 100, "good")
        # Far more than a batch, long before the confirm timeout.
        wait_until(lambda: site.pending() == 5, 30, "all good ones at the broker")
        tags += _send(site, 30, "good")
        wait_until(lambda: site.pending() == 5, 30, "the next good ones at the broker")
    wait_until(lambda: not site.pending(), 30, "an empty outbox")
    _verify_once(site, tags, copies=0)


def test_what_is_never_confirmed_is_sent_again_after_the_timeout(sites: Making) -> None:
    site, _, tags = _prepared(sites, timeout=3.0)
    with _suspended(sites.rabbitmq, site, "slow"):
        tags += _send(site, 5, "slow")
        tags += _send(site, 40, "good")
        wait_until(lambda: site.pending() == 5, 30, "all good ones at the broker")
        error = "not confirmed within 3 s"
        wait_until(
            lambda: all(error in (row["last_error"] or "") for row in site.rows()), 30, error
        )
        # P7: no attempt is counted, but for one that may be under way.
        assert all(row["attempts"] <= 1 for row in site.rows())
    wait_until(lambda: not site.pending(), 30, "an empty outbox")
    left = site.left()
    assert left > len(tags)
    _verify_once(site, tags, copies=left - len(tags))


def test_a_relay_that_is_told_to_stop_waits_for_late_confirms(sites: Making) -> None:
    """Accident 12."""
    site, relay, tags = _prepared(sites, timeout=30.0)
    with _suspended(sites.rabbitmq, site, "slow"):
        tags += _send(site, 5, "slow") + _send(site, 5, "good")
        wait_until(lambda: site.pending() == 5, 30, "the good ones at the broker")
        relay.signal(signal.SIGTERM)
        relay.wait_for_log("ending the batch in hand")
    assert relay.wait() == 0
    assert not site.pending()
    _verify_once(site, tags, copies=0)
