"""What a relay does besides relaying: it prunes, and gives signs of life."""

import logging
from threading import Event, Thread
from typing import Any

import pytest
import sqlalchemy as sa

from celery_outbox import events
from celery_outbox.relay.housekeeping import Housekeeping
from celery_outbox.relay.pruning import Pruning
from celery_outbox.storage.relays import Relays, SeenRelay
from tests.support.waiting import wait_until
from tests.unit.conftest import MakeShop
from tests.unit.shop import Shop
from tests.unit.test_cli import run
from tests.unit.test_cli_storage import EVERY, answer, fill


def seen(shop: Shop) -> list[SeenRelay]:
    return Relays(shop.outbox.engine, shop.outbox.tables).all()


def due(house: Housekeeping) -> Housekeeping:
    """Let all that it does be due."""
    house._pruning._next = house._next_sign = 0.0
    return house


def test_a_relay_is_seen_while_it_runs_and_gone_when_it_has_ended(shop: Shop) -> None:
    """P17."""
    relay, stop = shop.outbox.hosted_relay(), Event()
    thread = Thread(target=relay.run, args=(stop,))
    thread.start()
    try:
        wait_until(lambda: seen(shop), what="the relay is seen")
        (found,) = seen(shop)
        assert found.is_alive
    finally:
        stop.set()
        relay.wake()
        thread.join(30)
    assert seen(shop) == []


def test_what_it_has_done_and_its_last_error(shop: Shop) -> None:
    house = Housekeeping(shop.outbox.store, shop.outbox.config)
    house.count(confirmed=3, dead=1, lost=2)
    house.failed("the broker is away: no route")
    due(house).keep()
    (found,) = seen(shop)
    assert (found.confirmed, found.dead, found.lost) == (3, 1, 2)
    assert found.per_second > 0
    assert found.last_error == "the broker is away: no route"
    due(house).keep()
    (found,) = seen(shop)
    assert found.per_second == 0
    house.end()
    assert seen(shop) == []


def test_a_sign_of_life_is_not_given_all_the_time(shop: Shop) -> None:
    house = Housekeeping(shop.outbox.store, shop.outbox.config)
    house.keep()
    house.count(confirmed=3, dead=0, lost=0)
    house.keep()
    (found,) = seen(shop)
    assert found.confirmed == 0


def test_dead_letters_stay_unless_a_setting_says_for_how_long(
    make_shop: MakeShop, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    shop = make_shop(database_url)
    fill(shop)
    with shop.engine.begin() as connection:
        long_ago = shop.outbox.store.dialect.after(-3600 * 24 * 365)
        connection.execute(sa.update(shop.outbox.tables.dead_letter).values(died_at=long_ago))
    due(Housekeeping(shop.outbox.store, shop.outbox.config)).keep()
    assert shop.outbox.store.counts()["dead"] == 1
    other = make_shop(database_url, outbox_dead_letter_retention_seconds=3600.0, tables=False)
    told: list[tuple[str, dict[str, Any]]] = []
    with (
        events.listening(lambda name, details: told.append((name, details))),
        caplog.at_level(logging.WARNING),
    ):
        due(Housekeeping(other.outbox.store, other.outbox.config)).keep()
    assert shop.outbox.store.counts()["dead"] == 0
    assert told == [("pruned", {"table": "dead_letter", "count": 1})]
    assert "1 dead letter(s) deleted" in caplog.text


def test_workers_of_local_queues_prune_as_relays_do(make_shop: MakeShop, database_url: str) -> None:
    """P12: also dead letters, which local queues have too."""
    shop = make_shop(database_url, outbox_dead_letter_retention_seconds=3600.0)
    fill(shop)
    long_ago = shop.outbox.store.dialect.after(-3600 * 24 * 365)
    with shop.engine.begin() as connection:
        connection.execute(sa.update(shop.outbox.tables.dead_letter).values(died_at=long_ago))
        connection.execute(sa.update(shop.outbox.tables.inbox).values(handled_at=long_ago))
    _, pruning = shop.outbox._local._of_this_process()
    pruning._next = 0.0
    shop.outbox._local.keep_house()
    assert shop.outbox.store.counts() == {**EVERY, "dead": 0, "incoming": 0}


def test_pruning_ends_in_time(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever prunes has leases to renew."""
    monkeypatch.setattr("celery_outbox.relay.pruning._CHUNK", 1)
    store = shop.outbox.store
    with shop.engine.begin() as connection:
        for key in "abc":
            store.receive(connection, key, "shop.notify", key)
        long_ago = store.dialect.after(-3600 * 24 * 365)
        connection.execute(sa.update(shop.outbox.tables.inbox).values(handled_at=long_ago))
    pruning = Pruning(store, shop.outbox.config, longest_seconds=0)
    for left in (2, 1, 0):
        pruning._next = 0.0
        pruning.keep()
        assert store.counts()["incoming"] == left


def test_storage_prune_takes_dead_letters_where_a_setting_says_so(
    make_shop: MakeShop, database_url: str
) -> None:
    shop = make_shop(database_url, outbox_dead_letter_retention_seconds=3600.0)
    fill(shop)
    assert answer(shop, "storage", "prune") == {"rows": 0, "dead": 0}
    with shop.engine.begin() as connection:
        long_ago = shop.outbox.store.dialect.after(-7200)
        connection.execute(sa.update(shop.outbox.tables.dead_letter).values(died_at=long_ago))
    assert answer(shop, "storage", "prune") == {"rows": 0, "dead": 1}
    assert "and 0 dead letter(s)" in run(shop.app, "storage", "prune").output
    assert shop.outbox.store.counts()["dead"] == 0


# status


def test_status_shows_relays_and_rates(shop: Shop) -> None:
    """P17."""
    house = Housekeeping(shop.outbox.store, shop.outbox.config)
    house.count(confirmed=60, dead=0, lost=0)
    house.failed("the broker is away: no route")
    house.keep()
    fill(shop)
    said = answer(shop, "status")
    assert said["relays_alive"] == 1
    assert said["published_per_second"] > 0
    assert said["handled_per_second"] == pytest.approx(1 / 60, abs=0.001)
    (relay,) = said["relays"]
    assert (relay["confirmed"], relay["is_alive"]) == (60, True)
    text = run(shop.app, "status").output
    assert "relays alive" in text
    assert "no route" in text


def test_the_number_of_relays_is_an_exit_code(shop: Shop) -> None:
    """Liveness, beside the progress that --max-lag tells of."""
    assert run(shop.app, "status", "--min-relays", "1").exit_code == 1
    house = Housekeeping(shop.outbox.store, shop.outbox.config)
    house.keep()
    assert run(shop.app, "status", "--min-relays", "1").exit_code == 0
    with shop.engine.begin() as connection:
        then = shop.outbox.store.dialect.after(-3600)
        connection.execute(sa.update(shop.outbox.tables.relay).values(seen_at=then))
    result = run(shop.app, "status", "--min-relays", "1")
    assert result.exit_code == 1
    assert "lost?" in result.output
