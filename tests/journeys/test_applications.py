"""A signature applied twice is meant twice, and a message delivered twice is meant once."""

from typing import Any

import pytest

from tests.journeys.making import Making
from tests.journeys.site import Site, new_tag


@pytest.fixture(scope="module")
def site(module_sites: Making) -> Site:
    """A site whose relay is the test."""
    site = module_sites("amqp")
    site.worker("--concurrency=2")
    return site


def _twice(site: Site, signature: Any) -> list[dict[str, Any]]:
    signature.freeze()
    site.send(signature)
    site.send(signature)
    return site.rows()


def test_one_frozen_signature_applied_twice(site: Site) -> None:
    tag = new_tag()
    rows = _twice(site, site.step(tag))
    assert len({row["task_id"] for row in rows}) == 1
    site.insert_again(rows)
    site.relay_all()
    site.wait_effects(tag, ["done", "done"])
    site.wait_quiet()
    assert site.effects(tag) == ["done", "done"]


def test_both_retry(site: Site) -> None:
    tag = new_tag()
    _twice(site, site.task("retrying").s(tag=tag, times=2))
    while len(site.effects(tag)) < 2:
        site.relay_all()
    site.wait_quiet()
    assert site.effects(tag) == ["try 2", "try 2"]
    assert site.runs(tag) == sorted(["try 0", "try 1", "try 2"] * 2)


def test_both_are_replaced(site: Site) -> None:
    tag = new_tag()
    _twice(site, site.task("replaced").s(tag=tag))
    while len(site.effects(tag)) < 4:
        site.relay_all()
    site.wait_quiet()
    assert site.effects(tag) == ["host", "host", "replacement", "replacement"]


def test_a_stock_task_that_is_delivered_again_sends_the_same(site: Site) -> None:
    """The next step of its chain has a frozen id, and is one execution however often it is sent."""
    tag = new_tag()
    step = site.step(tag, "next")
    step.freeze()
    for _ in range(2):
        site.task("plain").apply_async(kwargs={"tag": tag}, chain=[step])
    while len(site.effects(tag)) < 3 or not site.is_quiet():
        site.relay_all()
    assert site.effects(tag) == ["next", "plain", "plain"]
