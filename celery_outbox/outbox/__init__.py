"""Outgoing, first half: in the caller's transaction."""
