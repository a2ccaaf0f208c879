"""Choosing: the options that say which messages, and the question before they are destroyed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from celery_outbox.storage.administration import Selection

__all__ = [
    "choice_of",
    "confirm",
    "dry_run",
    "filters",
    "id_of",
    "is_named",
    "selection_of",
    "yes",
]

_Command = TypeVar("_Command", bound=Callable[..., Any])

#: Longer numbers are no row's.
_DIGITS = 18
#: What stands before the id of a row of a local queue, and of a task.
_LOCAL, _TASK = "local:", "task:"


def _name(_ctx: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    if value is not None and (value == "" or "*" in value[:-1]):
        raise click.BadParameter(
            f"{value!r}: a name, or its beginning and a * as the last character"
        )
    return value


def filters(*names: str) -> Callable[[_Command], _Command]:
    """Give a command some of the options that choose messages."""
    options = {
        "task": click.option(
            "--task", callback=_name, help="Of this task; shop.* for all of the shop."
        ),
        "destination": click.option(
            "--destination",
            "--queue",
            "destination",
            callback=_name,
            help="To this queue, or exchange/routing key; * may stand last.",
        ),
        "older_than": click.option(
            "--older-than",
            type=click.FloatRange(min=0),
            metavar="SECONDS",
            help="In the table for at least so long.",
        ),
        "error": click.option(
            "--error", help="Whose last error has this in it, whatever its case."
        ),
    }

    def decorate(command: _Command) -> _Command:
        for name in reversed(names):
            command = options[name](command)
        return command

    return decorate


def yes(command: _Command) -> _Command:
    """Give a command the option ``--yes``."""
    return click.option("--yes", "-y", is_flag=True, help="Don't ask.")(command)


def dry_run(command: _Command) -> _Command:
    """Give a command the option ``--dry-run``."""
    return click.option("--dry-run", is_flag=True, help="Say what would change, change nothing.")(
        command
    )


def choice_of(names: Sequence[str] = (), **filters: Any) -> dict[str, Any]:
    """Return what was chosen, as the audit has it: only what was given."""
    chosen = {"ids": list(names) or None, **filters}
    return {name: value for name, value in chosen.items() if value is not None}


def selection_of(names: Sequence[str] = (), state: str | None = None, **filters: Any) -> Selection:
    """Return what the words of a command choose.

    A name of digits is a row's id, ``local:17`` that of a row of a local queue, any other a task's;
    ``task:17`` is the task whose id is 17.
    """
    from celery_outbox.storage.administration import Selection

    ids: list[int] = []
    local_ids: list[int] = []
    task_ids: list[str] = []
    for name in names:
        if _is_number(name):
            ids.append(int(name))
        elif _is_number(number := name.removeprefix(_LOCAL)):
            local_ids.append(int(number))
        else:
            task_ids.append(name.removeprefix(_TASK))
    return Selection(
        ids=ids if names else None,
        local_ids=local_ids if names else None,
        task_ids=task_ids if names else None,
        state=state,
        task=filters.get("task"),
        destination=filters.get("destination"),
        error=filters.get("error"),
        older_than_seconds=filters.get("older_than"),
    )


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) <= _DIGITS


def id_of(row: Mapping[str, Any]) -> int | str:
    """Return the id by which commands know a row of the outbox, of a local queue, or a dead letter."""
    if row.get("queue") is None:
        number: int = row["id"]
        return number
    # A dead letter has its row's with a minus.
    return f"{_LOCAL}{abs(row['id'])}"


def is_named(name: str, rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether one of the rows is what a word of a command names."""
    named = {str(id_of(row)) for row in rows} | {row["task_id"] for row in rows}
    return bool({name, name.removeprefix(_TASK)} & named)


def confirm(question: str, *, given: bool) -> None:
    """Ask, unless ``--yes`` was given; no, or nobody to answer, ends the command with 1."""
    if not given:
        click.confirm(question, abort=True, err=True)
