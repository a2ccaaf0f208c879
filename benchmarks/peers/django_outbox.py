"""django-celery-outbox: a Celery class that stores calls by Django's ORM, and a relay that sends them.

With publisher confirms on, and its metrics off. It knows one app and one database a process.
"""

import logging
import math
from pathlib import Path
from typing import Any

import django
import structlog
from django.conf import settings
from django.core.management import call_command
from django.db import connections, transaction
from sqlalchemy.engine import make_url

QUEUE = "bench"
TASK = "benchmarks.task"


class DjangoOutbox:
    """The peer's app, tables and relay. One a process."""

    def __init__(self, database_url: str, broker_url: str) -> None:
        url = make_url(database_url)
        settings.configure(
            DATABASES={
                "default": {
                    "ENGINE": "django.db.backends.postgresql",
                    "NAME": url.database,
                    "USER": url.username,
                    "HOST": url.host,
                    "PORT": url.port,
                    "CONN_MAX_AGE": None,
                }
            },
            INSTALLED_APPS=["django_celery_outbox"],
            DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
            USE_TZ=True,
            MONITORING_METRICS_ENABLED=False,
        )
        django.setup()
        # It logs a line for each message.
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
        call_command("migrate", verbosity=0)
        from django_celery_outbox.app import OutboxCelery

        self.app = OutboxCelery("django", broker=broker_url, set_as_current=False)
        self.app.conf.update(
            task_default_queue=QUEUE,
            task_ignore_result=True,
            broker_transport_options={"confirm_publish": True},
        )

        @self.app.task(name=TASK, shared=False)
        def task(number: int, text: str) -> None: ...

        self._task = task
        with connections["default"].cursor() as cursor:
            cursor.execute("CREATE TABLE IF NOT EXISTS django_orders (id serial, cents integer)")

    def work(self, size: int, transactions: int, text: str) -> None:
        """Commit transactions of one row and `size` messages each."""
        for number in range(transactions):
            with transaction.atomic():
                with connections["default"].cursor() as cursor:
                    cursor.execute("INSERT INTO django_orders (cents) VALUES (%s)", [number])
                for _ in range(size):
                    self._task.delay(number, text)

    def fill(self, messages: int, text: str) -> None:
        """Empty the tables, store messages, and let the planner know."""
        self.clear()
        with transaction.atomic():
            for number in range(messages):
                self._task.delay(number, text)
        with connections["default"].cursor() as cursor:
            cursor.execute("VACUUM ANALYZE celery_outbox")

    def clear(self) -> None:
        """Empty the tables."""
        with connections["default"].cursor() as cursor:
            cursor.execute("TRUNCATE celery_outbox, django_orders")

    def relay(self, messages: int, batch: int) -> None:
        """Relay what is stored, in this process: as many cycles of its relay as that takes."""
        from django_celery_outbox.models import CeleryOutbox
        from django_celery_outbox.relay import Relay, RelayConfig

        relay: Any = Relay(self.app, RelayConfig.init(batch_size=batch, idle_time=0))
        for _ in range(math.ceil(messages / batch)):
            relay._processing()
        left = CeleryOutbox.objects.count()
        assert left == 0, f"{left} messages were not relayed (see {Path(__file__).name})"
