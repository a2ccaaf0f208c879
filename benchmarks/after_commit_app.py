"""The processes of table `after_commit`: a worker that tells when each task arrives, and a relay.

``BENCHMARK_SOCKET`` is where arrivals are told of; the outbox is that of table prefix ``daemon_``.
"""

import os
import socket
import time

from celery import Celery
from sqlalchemy import create_engine

from celery_outbox import Outbox

app = Celery("benchmarks", broker=os.environ["BENCHMARK_BROKER"])
app.conf.outbox_relay_tick_seconds = 0
outbox = Outbox(app, create_engine(os.environ["BENCHMARK_DATABASE"]), prefix="daemon_")
_told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


@app.task(name="benchmarks.arrived", ignore_result=True)
def arrived(number: int) -> None:
    # CLOCK_MONOTONIC is one for all processes.
    _told.sendto(f"{number} {time.monotonic()}".encode(), os.environ["BENCHMARK_SOCKET"])
