"""What Prometheus is told."""

import json
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from sqlalchemy import update

from celery_outbox import events
from celery_outbox.observability.prometheus import OutboxCollector, count_events
from tests.unit.conftest import MakeShop
from tests.unit.shop import Shop

MONITORING = Path(__file__).parents[2] / "examples" / "monitoring"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    """An empty registry; who subscribes to events in the test is forgotten after it."""
    monkeypatch.setattr(events, "_listeners", [])
    return CollectorRegistry()


def exposed(registry: CollectorRegistry) -> list[str]:
    return generate_latest(registry).decode().splitlines()


def scrape(registry: CollectorRegistry) -> dict[str, float]:
    samples = (line.rpartition(" ") for line in exposed(registry) if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def state(name: str) -> str:
    return f'celery_outbox_messages{{state="{name}"}}'


def test_gauges_of_every_state(shop: Shop, registry: CollectorRegistry) -> None:
    registry.register(OutboxCollector(shop.outbox))
    assert scrape(registry) == {
        "celery_outbox_up": 1,
        "celery_outbox_lag_seconds": 0,
        "celery_outbox_relays": 0,
        **{
            state(name): 0
            for name in (
                *("outgoing", "scheduled", "in_flight", "published"),
                *("due", "taken", "dead", "incoming"),
            )
        },
    }
    shop.notify.delay("now")
    shop.notify.apply_async(("later",), countdown=1000)
    found = scrape(registry)
    assert found[state("outgoing")] == 1
    assert found[state("scheduled")] == 1


def test_the_lag_is_that_of_the_oldest_which_is_due(
    shop: Shop, registry: CollectorRegistry
) -> None:
    registry.register(OutboxCollector(shop.outbox))
    shop.notify.apply_async(("later",), countdown=1000)
    assert scrape(registry)["celery_outbox_lag_seconds"] == 0
    shop.notify.delay("now")
    an_hour_ago = datetime.now(timezone.utc) - timedelta(hours=1)
    outbox = shop.outbox.tables.outbox
    with shop.engine.begin() as connection:
        connection.execute(
            update(outbox).where(outbox.c.due_at.is_(None)).values(available_at=an_hour_ago)
        )
    assert 3600 <= scrape(registry)["celery_outbox_lag_seconds"] < 3700


def test_gauges_of_local_queues(
    make_shop: MakeShop, database_url: str, registry: CollectorRegistry
) -> None:
    """P17."""
    shop = make_shop(database_url, outbox_local_queues=["emails", "media"])
    registry.register(OutboxCollector(shop.outbox))
    for queue, count in (("emails", 2), ("media", 1)):
        for _ in range(count):
            shop.notify.apply_async(queue=queue)
    shop.notify.apply_async(queue="emails", countdown=1000)
    local = shop.outbox.tables.local
    an_hour_ago = datetime.now(timezone.utc) - timedelta(hours=1)
    with shop.engine.begin() as connection:
        old = update(local).where(local.c.queue == "media")
        connection.execute(old.values(available_at=an_hour_ago))
    found = scrape(registry)
    queued = 'celery_outbox_local_messages{{queue="{}",state="{}"}}'
    assert found[queued.format("emails", "due")] == 2
    assert found[queued.format("emails", "scheduled")] == 1
    assert found[queued.format("media", "taken")] == 0
    assert found[state("due")] == 3
    assert found['celery_outbox_local_lag_seconds{queue="emails"}'] < 3600
    assert 3600 <= found['celery_outbox_local_lag_seconds{queue="media"}'] < 3700


def test_a_database_that_is_away(make_shop: MakeShop, registry: CollectorRegistry) -> None:
    shop = make_shop("sqlite:////nowhere/at/all.sqlite", tables=False)
    registry.register(OutboxCollector(shop.outbox))
    assert scrape(registry) == {"celery_outbox_up": 0}


def test_counters_of_the_relay(shop: Shop, registry: CollectorRegistry) -> None:
    count_events(registry)
    for number in range(3):
        shop.notify.delay(number)
    shop.outbox.relay_all()
    assert scrape(registry)['celery_outbox_relayed_total{outcome="confirmed"}'] == 3


def test_counters_of_a_worker(registry: CollectorRegistry) -> None:
    count_events(registry)
    events.emit(events.HANDLED, key="k", state="SUCCESS")
    events.emit(events.DUPLICATE, key="k", state="SUCCESS")
    events.emit(events.BUSY, key="k", error="e")
    events.emit(events.BROKER_AWAY, error="e")
    events.emit(events.LEFT_TO_RELAY, count=3)
    found = scrape(registry)
    for outcome in ("success", "duplicate", "given_back"):
        assert found[f'celery_outbox_deliveries_total{{outcome="{outcome}"}}'] == 1
    assert found["celery_outbox_broker_away_total"] == 1
    assert found["celery_outbox_left_to_relay_total"] == 3


@pytest.mark.parametrize("name", ["dashboard.json", "alerts.yml"])
def test_the_examples_ask_for_what_there_is(
    shop: Shop, registry: CollectorRegistry, name: str
) -> None:
    registry.register(OutboxCollector(shop.outbox))
    count_events(registry)
    there_is = {line.split()[2] for line in exposed(registry) if line.startswith("# TYPE")}
    asked = set(re.findall(r"celery_outbox_[a-z_]+", (MONITORING / name).read_text()))
    assert asked
    assert asked <= there_is
    if name == "dashboard.json":
        # The other way round, too. prometheus_client adds when a counter was made.
        assert asked == {each for each in there_is if not each.endswith("_created")}


def test_panels_have_places_of_their_own() -> None:
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    places: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        taken = {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}
        assert not places & taken, panel["title"]
        places |= taken
