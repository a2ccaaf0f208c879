"""What must hold before a worker or a relay starts, and what it says when it does not."""

import pytest

from tests.journeys.making import Making
from tests.support.processes import Process

CREATE = r"run `celery -A <your app> outbox schema create`"


def _ends(process: Process) -> str:
    assert process.wait() != 0
    return process.log


def test_a_worker_without_tables_names_the_command(sites: Making) -> None:
    site = sites(create=False)
    log = _ends(site.worker(ready_timeout=None))
    assert CREATE in log
    assert "table 'outbox' is missing" in log


@pytest.mark.parametrize("args", [(), ("--once",)])
def test_a_relay_without_tables_names_the_command(sites: Making, args: tuple[str, ...]) -> None:
    site = sites(create=False)
    log = _ends(site.relay(*args, wait=False))
    assert CREATE in log
    assert "Traceback" not in log


@pytest.mark.parametrize("option", ["acks_late", "reject_on_worker_lost"])
def test_a_worker_without_late_acknowledgement_names_the_task(sites: Making, option: str) -> None:
    """P16: a message must not be gone before its effects are committed."""
    name = "tests.journeys.tasks.step"
    site = sites(task_annotations={name: {option: False}})
    log = _ends(site.worker(ready_timeout=None))
    assert f"task {name} is durable" in log
    assert f"{option}=False" in log


def test_a_wrong_setting_is_named(sites: Making) -> None:
    site = sites(outbox_btach_size=3)
    log = _ends(site.relay(wait=False))
    assert "unknown setting outbox_btach_size; did you mean outbox_batch_size?" in log
    log = _ends(site.worker(ready_timeout=None))
    assert "unknown setting outbox_btach_size; did you mean outbox_batch_size?" in log


def test_a_worker_starts_without_its_database(sites: Making) -> None:
    """Deliveries wait in the broker."""
    site = sites(database="postgresql+psycopg://nobody@127.0.0.1:1/nothing", create=False)
    worker = site.worker()
    assert "the outbox's database can't be asked for its tables" in worker.log
    assert worker.terminate() == 0
