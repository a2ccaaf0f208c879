"""Incoming: in the Celery worker."""
