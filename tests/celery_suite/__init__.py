"""Celery's own integration tests, stock and with every task durable: `scripts/celery-suite`."""
