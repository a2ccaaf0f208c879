"""The tests of celery_outbox."""
