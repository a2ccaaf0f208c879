"""The Celery app: ``celery -A shop.app worker``, ``celery -A shop.app beat``."""

from functools import partial

from celery import Celery, shared_task
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from celery_outbox import Outbox, durable_task
from shop.models import Base
from shop.settings import Settings

settings = Settings.read()
app = Celery("shop", include=["shop.tasks"])
app.conf.update(settings.celery())

on_sqlite = settings.database_url.startswith("sqlite")
engine = create_engine(settings.database_url, connect_args={"timeout": 30} if on_sqlite else {})
Session = sessionmaker(engine)

if settings.outbox:
    outbox = Outbox(app, Session, metadata=Base.metadata)
    task = durable_task
else:
    task = partial(shared_task, acks_late=True, reject_on_worker_lost=True)


def create_tables() -> None:
    """Create what is missing."""
    if on_sqlite:
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    Base.metadata.create_all(engine)
    if settings.outbox:
        outbox.create_schema()
