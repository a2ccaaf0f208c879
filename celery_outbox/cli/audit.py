"""Audit: who changed which rows, one line of JSON for each command that did."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import click

__all__ = ["audited", "logger"]

logger = logging.getLogger("celery_outbox.audit")


def audited(
    ctx: click.Context, changes: Iterable[int], chosen: Mapping[str, Any] | None = None
) -> int:
    """Make the changes, write the audit line, and return how many rows were changed.

    The line tells what was committed, also where an error has ended the rest.
    """
    rows, ended = 0, False
    try:
        for count in changes:
            rows += count
        ended = True
    finally:
        _write(
            {
                "user": _user(),
                "command": ctx.command_path.partition("outbox ")[2],
                "filter": {k: v for k, v in (chosen or {}).items() if v not in (None, (), [])},
                "rows": rows,
                "completed": ended,
            }
        )
    return rows


def _write(line: Mapping[str, Any]) -> None:
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
    alone = None
    if not logger.hasHandlers():
        # The app has not said where logs go: to the terminal, beside what the command prints.
        alone = logging.StreamHandler()
        alone.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        logger.addHandler(alone)
    try:
        text = json.dumps(line, ensure_ascii=False, default=str, sort_keys=False)
        logger.info("%s", text, extra={"audit": dict(line)})
    finally:
        if alone is not None:
            logger.removeHandler(alone)


def _user() -> str:
    """The operating system's user; not $USER, which anybody can set."""
    try:
        import pwd

        return pwd.getpwuid(os.getuid()).pw_name
    except (ImportError, KeyError):
        return str(os.getuid()) if hasattr(os, "getuid") else os.environ.get("USERNAME", "?")
