"""What monitoring sees: figures that any process reads from the database, and counts of events."""
