"""The tables by name; each is measured in a process of its own."""

import logging
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from benchmarks import (
    after_commit,
    end_to_end,
    keep,
    latency,
    local,
    relay,
    scale,
    send,
    servicebus,
    worker,
)

TABLES = {
    "relay": relay.table,
    "send": send.table,
    "latency": latency.table,
    "after_commit": after_commit.table,
    "worker": worker.table,
    "local": local.table,
    "end_to_end": end_to_end.table,
    "keep": keep.table,
    "servicebus": servicebus.table,
    "scale": scale.table,
}

#: What takes more rounds than `--quick` has time for: measured then only if it is named.
SLOW = ("keep", "local", "servicebus")


def measure_table(name: str, database_url: str, broker_url: str, *, quick: bool) -> dict[str, Any]:
    """Measure a table, print it, and return its figures.

    In a new process, so that none finds what another has left behind.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_measure, name, database_url, broker_url, quick).result()


def _measure(name: str, database_url: str, broker_url: str, quick: bool) -> dict[str, Any]:
    # Several apps with tasks of one name are no mistake here.
    warnings.simplefilter("ignore")
    logging.getLogger("celery_outbox.bypass").setLevel(logging.ERROR)
    return TABLES[name](database_url, broker_url, quick=quick)
