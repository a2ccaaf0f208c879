"""Local queues: workers take their messages straight from the database, without a broker."""
