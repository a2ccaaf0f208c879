"""Beat with the outbox's scheduler is killed while entries are due: each run is staged once."""

import random
import time

import pytest
from sqlalchemy import func, select

from tests.journeys.making import Making
from tests.journeys.site import Site, new_tag

pytestmark = pytest.mark.slow

KILLS = 50


def test_each_run_is_staged_once(sites: Making) -> None:
    """Half of the kills strike between the message and the commit, the others at any moment."""
    tag = new_tag()
    entries = {
        f"entry {number}": {
            "task": "tests.journeys.tasks.step",
            "schedule": 0.05 * (number + 1),
            "kwargs": {"tag": tag, "name": f"entry {number}"},
        }
        for number in range(5)
    }
    site = sites(beat_schedule=entries)
    chance = random.Random(7)
    for kill in range(KILLS):
        runs = _runs(site)
        if kill % 2:
            site.points.arm("sending", skip=chance.randrange(20))
        beat = site.beat("--scheduler=outbox")
        if kill % 2:
            site.points.wait_struck("sending")
            for mark in site.folder.glob("struck/sending*"):
                mark.unlink()
        else:
            while _runs(site) == runs:
                time.sleep(0.01)
            time.sleep(chance.random() / 10)
            beat.kill()
        beat.wait()
        assert _staged(site) == _runs(site)
    assert len(_runs(site)) == len(entries)
    assert min(_runs(site).values()) >= KILLS / 2


def _runs(site: Site) -> dict[str, int]:
    """How often each entry has run, by what beat has recorded."""
    beat = site.outbox.tables.beat
    with site.engine.connect() as connection:
        counts = connection.execute(select(beat.c.name, beat.c.run_count))
        return {name: count for name, count in counts if count}


def _staged(site: Site) -> dict[str, int]:
    """How many messages of each entry there are."""
    outbox = site.outbox.tables.outbox
    with site.engine.connect() as connection:
        counts = connection.execute(select(outbox.c.body, func.count()).group_by(outbox.c.body))
        return {body.decode().split('"name": "')[1].split('"')[0]: n for body, n in counts}
