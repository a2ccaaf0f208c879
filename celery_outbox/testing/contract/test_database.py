"""The contract, on the database that ``--outbox-database-url`` names."""

from celery_outbox.testing.contract import *
