"""The documents are true: their listings run, their settings, commands and links exist."""
