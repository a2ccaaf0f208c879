"""``outbox dead-letters``: what was refused, or delivered in vain, too often."""

from __future__ import annotations

from typing import Any

import click
from celery.bin.base import CeleryCommand, handle_preload_options

from celery_outbox.cli.audit import audited
from celery_outbox.cli.choosing import (
    choice_of,
    confirm,
    dry_run,
    filters,
    id_of,
    selection_of,
    yes,
)
from celery_outbox.cli.context import administration_of, errors_as_sentences, outbox_of_app
from celery_outbox.cli.messages import show, told
from celery_outbox.cli.output import ago, as_json, print_json, table

__all__ = ["dead_letters"]

_CHOICE = filters("task", "destination", "older_than", "error")
_IDS = click.argument("message_ids", metavar="[ID]...", nargs=-1)


@click.group("dead-letters")
def dead_letters() -> None:
    """Messages that will not be tried again by themselves."""


dead_letters.add_command(show)


@dead_letters.command("list", cls=CeleryCommand)
@_CHOICE
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True)
@as_json
@click.pass_context
@handle_preload_options
def list_dead_letters(ctx: click.Context, limit: int, json_wanted: bool, **chosen: Any) -> None:
    """List dead letters, the oldest first."""
    administration = administration_of(outbox_of_app(ctx))
    selection = selection_of(**chosen)
    with errors_as_sentences():
        rows = administration.dead_letters(selection, limit)
        total = administration.how_many(selection, dead=True)
    _print(rows, total, json_wanted=json_wanted)


def _print(rows: list[dict[str, Any]], total: int, *, json_wanted: bool) -> None:
    if json_wanted:
        print_json({"messages": [told(row) for row in rows], "total": total})
        return
    heads = ["id", "task", "task id", "destination", "dead for", "attempts", "last error"]
    cells = [
        (
            id_of(row),
            row["task"],
            row["task_id"],
            row["destination"],
            ago((row["now"] - row["died_at"]).total_seconds()),
            row["attempts"],
            row["last_error"],
        )
        for row in rows
    ]
    if cells:
        click.echo(table(heads, cells))
    click.echo(f"{len(rows)} of {total} dead letter(s)")


@dead_letters.command(cls=CeleryCommand)
@_IDS
@_CHOICE
@click.option("--all", "everything", is_flag=True, help="All of them.")
@dry_run
@as_json
@click.pass_context
@handle_preload_options
def replay(
    ctx: click.Context,
    message_ids: tuple[str, ...],
    everything: bool,
    dry_run: bool,
    json_wanted: bool,
    **chosen: Any,
) -> None:
    """Put dead letters back where they were, due now, with no attempt counted."""
    _change(ctx, "replay", message_ids, everything, dry_run, True, json_wanted, chosen)


@dead_letters.command(cls=CeleryCommand)
@_IDS
@_CHOICE
@click.option("--all", "everything", is_flag=True, help="All of them.")
@dry_run
@yes
@as_json
@click.pass_context
@handle_preload_options
def discard(
    ctx: click.Context,
    message_ids: tuple[str, ...],
    everything: bool,
    dry_run: bool,
    yes: bool,
    json_wanted: bool,
    **chosen: Any,
) -> None:
    """Delete dead letters."""
    _change(ctx, "discard", message_ids, everything, dry_run, yes, json_wanted, chosen)


def _change(
    ctx: click.Context,
    what: str,
    names: tuple[str, ...],
    everything: bool,
    dry_run: bool,
    given: bool,
    json_wanted: bool,
    filters: dict[str, Any],
) -> None:
    chosen = choice_of(names, **filters)
    if bool(chosen) == everything:
        raise click.UsageError("say which: ids, options that choose, or --all")
    selection = selection_of(names, **filters)
    administration = administration_of(outbox_of_app(ctx))
    with errors_as_sentences():
        found = administration.how_many(selection, dead=True)
    if dry_run:
        with errors_as_sentences():
            rows = administration.dead_letters(selection, 50)
        if json_wanted:
            ids = [id_of(row) for row in rows]
            print_json({"dry_run": True, "rows": found, "ids": ids})
        else:
            click.echo(f"would {what} {found} dead letter(s)")
            _print(rows, found, json_wanted=False)
        return
    if found:
        confirm(f"Delete {found} dead letter(s)?", given=given)
    with errors_as_sentences():
        change = administration.replay if what == "replay" else administration.discard
        rows_changed = audited(ctx, change(selection), chosen or {"all": True})
    if json_wanted:
        print_json({"dry_run": False, "rows": rows_changed})
    else:
        click.echo(
            f"{'replayed' if what == 'replay' else 'discarded'} {rows_changed} dead letter(s)"
        )
    if names and not rows_changed:
        ctx.exit(1)
