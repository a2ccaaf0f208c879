"""Journeys through pytest-celery's own fixtures, on containers or on local processes."""
