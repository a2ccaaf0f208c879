"""The contract that is part of the package, on each database."""

from celery_outbox.testing.contract import *
