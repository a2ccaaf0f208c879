"""Output: tables for people, JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, TypeVar

import click

__all__ = ["ago", "as_json", "moment", "print_json", "printable", "table"]

_Command = TypeVar("_Command", bound=Callable[..., Any])

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


def as_json(command: _Command) -> _Command:
    """Give a command the option ``--json``."""
    option = click.option("--json", "json_wanted", is_flag=True, help="For machines.")
    return option(command)


def print_json(value: Any) -> None:
    """Print one line of JSON; times are in ISO 8601, in UTC."""
    click.echo(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(timezone.utc).isoformat()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], width: int = 60) -> str:
    """Lay out rows in columns; numbers to the right, cells cut to `width`."""
    cells = [[printable(cell, width) for cell in row] for row in rows]
    numeric = [
        bool(cells) and all(row[i].isdigit() or row[i] == "" for row in cells)
        for i in range(len(heads))
    ]
    widths = [max(len(row[i]) for row in [list(heads), *cells]) for i in range(len(heads))]
    lines = []
    for row in [list(heads), *cells]:
        columns = zip(row, widths, numeric, strict=True)
        laid = (cell.rjust(size) if right else cell.ljust(size) for cell, size, right in columns)
        lines.append("  ".join(laid).rstrip())
    return "\n".join(lines)


def printable(value: object, width: int | None = None) -> str:
    """Return a value as one line without control characters, which a terminal would obey."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        return moment(value)
    text = " ".join(str(value).split())
    text = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)
    return text if width is None or len(text) <= width else text[: width - 1] + "…"


def moment(when: datetime) -> str:
    """Return a time in UTC, to the second."""
    return when.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")


def ago(seconds: float) -> str:
    """Return a span for people: ``4 min``."""
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def without(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return the row without some of its columns."""
    return {name: value for name, value in row.items() if name not in names}
