"""Where both journeys meet the database. Knows SQLAlchemy, neither Celery nor kombu's transports."""
