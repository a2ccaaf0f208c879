"""Whole journeys: real workers, beats and relays, and what comes out at the other end."""
