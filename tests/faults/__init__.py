"""Accidents: one file each, with real processes and servers."""
