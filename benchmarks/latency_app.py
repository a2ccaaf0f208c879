"""The app of table `latency`: one task, which writes down when it began.

``BENCHMARK_MODE`` says who relays; all modes but ``stock`` send it through the outbox. The worker
handles it as Celery alone does, so that the relays are all that differs.
"""

import os
import time

from celery import Celery
from sqlalchemy import create_engine

from celery_outbox import Outbox

#: Mode → its settings. What runs besides the worker is in `benchmarks.latency`.
MODES = {
    "stock": {},
    "daemon": {},
    "in worker": {"outbox_relay_in_worker": True},
    "beat": {},
    "fast path": {"outbox_publish_after_commit": True},
}


def make_app(mode: str, database_url: str, broker_url: str) -> Celery:
    """Return the app of a mode, with a queue and tables of its own."""
    name = mode.replace(" ", "_")
    app = Celery(name, broker=broker_url, set_as_current=False)
    app.conf.update(task_default_queue=f"latency_{name}", task_ignore_result=True)
    if mode != "stock":
        app.conf.update(outbox_capture="all", **MODES[mode])
        Outbox(app, create_engine(database_url), prefix=f"latency_{name}_")

    @app.task(name="benchmarks.note", shared=False)
    def note(number: int, text: str) -> None:
        line = f"{number} {time.monotonic()}\n"
        os.write(notes, line.encode())

    return app


if "BENCHMARK_MODE" in os.environ:
    notes = os.open(os.environ["BENCHMARK_NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    app = make_app(
        os.environ["BENCHMARK_MODE"],
        os.environ["BENCHMARK_DATABASE"],
        os.environ["BENCHMARK_BROKER"],
    )
