"""``outbox scheduled``: messages with an eta or a countdown, which rest in the database until then."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import click
from celery.bin.base import CeleryCommand, handle_preload_options

from celery_outbox.cli.audit import audited
from celery_outbox.cli.choosing import dry_run, filters, selection_of, yes
from celery_outbox.cli.context import administration_of, errors_as_sentences, outbox_of_app
from celery_outbox.cli.messages import cancel_in, print_messages
from celery_outbox.cli.output import as_json, moment, print_json, printable

__all__ = ["scheduled"]

_IDS = click.argument("message_ids", metavar="ID...", nargs=-1, required=True)


def _moment(_ctx: click.Context, _option: click.Parameter, value: str | None) -> datetime | None:
    if value is None:
        return None
    try:
        found = datetime.fromisoformat(value.replace("Z", "+00:00"))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no time like 2030-01-31T18:00:00+01:00") from None
    if found.tzinfo is None:
        raise click.BadParameter(f"{value!r} has no time zone, like …+01:00, or …Z for UTC")
    return found.astimezone(timezone.utc)


@click.group()
def scheduled() -> None:
    """Messages that are not due yet."""


@scheduled.command("list", cls=CeleryCommand)
@filters("task", "destination", "older_than")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True)
@as_json
@click.pass_context
@handle_preload_options
def list_scheduled(ctx: click.Context, limit: int, json_wanted: bool, **chosen: Any) -> None:
    """List what is not due yet."""
    administration = administration_of(outbox_of_app(ctx))
    selection = selection_of(state="scheduled", **chosen)
    with errors_as_sentences():
        rows = administration.messages(selection, limit)
        total = administration.how_many(selection)
    print_messages(rows, total, json_wanted=json_wanted)


@scheduled.command(cls=CeleryCommand)
@_IDS
@dry_run
@yes
@as_json
@click.pass_context
@handle_preload_options
def cancel(
    ctx: click.Context, message_ids: tuple[str, ...], dry_run: bool, yes: bool, json_wanted: bool
) -> None:
    """Delete messages that are not due yet."""
    cancel_in(ctx, message_ids, "scheduled", dry_run=dry_run, given=yes, json_wanted=json_wanted)


@scheduled.command(cls=CeleryCommand)
@_IDS
@click.option("--at", "due_at", callback=_moment, metavar="TIME", help="2030-01-31T18:00:00+01:00")
@click.option("--in", "seconds", type=click.FloatRange(min=0), metavar="SECONDS")
@dry_run
@as_json
@click.pass_context
@handle_preload_options
def reschedule(
    ctx: click.Context,
    message_ids: tuple[str, ...],
    due_at: datetime | None,
    seconds: float | None,
    dry_run: bool,
    json_wanted: bool,
) -> None:
    """Let messages be due at another time."""
    if (due_at is None) == (seconds is None):
        raise click.UsageError("say when: --at or --in")
    _move(ctx, message_ids, due_at, seconds or 0.0, dry_run, json_wanted)


@scheduled.command("run-now", cls=CeleryCommand)
@_IDS
@dry_run
@as_json
@click.pass_context
@handle_preload_options
def run_now(
    ctx: click.Context, message_ids: tuple[str, ...], dry_run: bool, json_wanted: bool
) -> None:
    """Let messages be due now."""
    _move(ctx, message_ids, None, 0.0, dry_run, json_wanted)


def _move(
    ctx: click.Context,
    names: tuple[str, ...],
    due_at: datetime | None,
    seconds: float,
    dry_run: bool,
    json_wanted: bool,
) -> None:
    administration = administration_of(outbox_of_app(ctx))
    selection = selection_of(names, state="scheduled")
    with errors_as_sentences():
        if due_at is None:
            try:
                due_at = administration.now() + timedelta(seconds=seconds)
            except OverflowError:
                raise click.UsageError("that is too far off") from None
        found = administration.how_many(selection)
        chosen = {"ids": list(names), "due_at": due_at}
        if dry_run:
            rows = administration.how_many_to_reschedule(selection, due_at)
        else:
            rows = audited(ctx, administration.reschedule(selection, due_at), chosen)

    if json_wanted:
        print_json({"dry_run": dry_run, "rows": rows, "found": found, "due_at": due_at})
    else:
        words = "would be due" if dry_run else "due"
        click.echo(f"{words} at {moment(due_at)}: {rows} message(s)")
        if found == 0:
            said = ", ".join(printable(name) for name in names)
            click.echo(f"not scheduled, or not here: {said}", err=True)
        elif rows < found:
            click.echo(
                f"{found - rows} passed over: expired by then, claimed meanwhile, or in a form whose "
                "eta can't be changed",
                err=True,
            )
    if not rows or rows < found:
        ctx.exit(1)
