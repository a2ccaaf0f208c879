"""Outgoing, second half: in the relay's process. Knows kombu, not the user's tasks."""
