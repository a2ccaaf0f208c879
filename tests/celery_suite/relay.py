"""The relay of one run, as a program: makes the tables, then moves what all its apps send."""

import os

from celery import Celery

from celery_outbox.plugin import outbox_of
from celery_outbox.relay.process import run_until_told

if __name__ == "__main__":
    # The overlay gives it an Outbox.
    outbox = outbox_of(Celery(broker=os.environ["TEST_BROKER"], set_as_current=False))
    outbox.create_schema()
    print("relay: tables made", flush=True)
    run_until_told(outbox.relay())
