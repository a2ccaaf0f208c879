"""``outbox list``, ``show``, ``cancel``, ``republish``: single messages."""

from __future__ import annotations

from collections.abc import Sequence
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
    is_named,
    selection_of,
    yes,
)
from celery_outbox.cli.context import administration_of, errors_as_sentences, outbox_of_app
from celery_outbox.cli.output import (
    ago,
    as_json,
    moment,
    print_json,
    printable,
    table,
    without,
)
from celery_outbox.cli.reason import why

__all__ = ["cancel", "list_messages", "print_messages", "republish", "show", "told"]

_STATES = ("outgoing", "scheduled", "in_flight", "published", "due", "taken")


@click.command("list", cls=CeleryCommand)
@click.option("--state", type=click.Choice(_STATES), help="In this state.")
@filters("task", "destination", "older_than", "error")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True)
@as_json
@click.pass_context
@handle_preload_options
def list_messages(
    ctx: click.Context, state: str | None, limit: int, json_wanted: bool, **chosen: Any
) -> None:
    """List what is in the outbox and in local queues, the oldest first."""
    administration = administration_of(outbox_of_app(ctx))
    selection = selection_of(state=state, **chosen)
    with errors_as_sentences():
        rows = administration.messages(selection, limit)
        total = administration.how_many(selection)
    print_messages(rows, total, json_wanted=json_wanted)


def print_messages(rows: Sequence[dict[str, Any]], total: int, *, json_wanted: bool) -> None:
    """Print rows of the outbox and of local queues."""
    if json_wanted:
        print_json({"messages": [told(row) for row in rows], "total": total})
        return
    heads = ["id", "task", "task id", "destination", "state", "age", "attempts", "why it waits"]
    cells = [
        (
            id_of(row),
            row["task"],
            row["task_id"],
            row["destination"],
            row["state"],
            ago((row["now"] - row["created_at"]).total_seconds()),
            row["attempts"],
            why(row),
        )
        for row in rows
    ]
    if cells:
        click.echo(table(heads, cells))
    click.echo(f"{len(rows)} of {total} message(s)")


def told(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as JSON has it."""
    return {**without(row, "message", "now"), "id": id_of(row)}


@click.command(cls=CeleryCommand)
@click.argument("message_id", metavar="ID")
@as_json
@click.pass_context
@handle_preload_options
def show(ctx: click.Context, message_id: str, json_wanted: bool) -> None:
    """Show the path of a message, by the id of its row or of its task.

    A row of a local queue is local:17, a task id of digits task:17. One task id may stand for several
    messages: each retry is one.
    """
    administration = administration_of(outbox_of_app(ctx))
    selection = selection_of([message_id])
    with errors_as_sentences():
        stored = administration.messages(selection)
        dead = administration.dead_letters(selection)
        for row in dead:
            row["state"] = "dead"
        keys = [row["key"] for row in (*stored, *dead)]
        task_id = selection.task_ids[0] if selection.task_ids else None
        handled = {row["key"]: row for row in administration.handled(keys=keys, task_id=task_id)}
    paths = [{**_path(row), "handled": handled.pop(row["key"], None)} for row in (*stored, *dead)]
    paths += [_handled_only(row) for row in handled.values()]
    if not paths:
        raise click.ClickException(
            f"{printable(message_id)} is not here: it was never committed, or it was published and "
            "its row deleted; if a worker has handled it, that was longer ago than the retention, or "
            "it has no inbox"
        )
    if json_wanted:
        print_json({"messages": paths})
        return
    click.echo("\n\n".join(_told(path) for path in paths))


def _path(row: dict[str, Any]) -> dict[str, Any]:
    path = told(row)
    path["why"] = f"dead letter: {row['last_error']}" if row["state"] == "dead" else why(row)
    path["lineage"] = _lineage(row)
    return path


def _lineage(row: dict[str, Any]) -> dict[str, Any]:
    """What the message's headers say of where it came from; empty if they can't be read."""
    from celery_outbox.envelope import Envelope
    from celery_outbox.errors import EnvelopeError

    try:
        envelope = Envelope.load(
            row["message"],
            task=row["task"],
            task_id=row["task_id"],
            key=row["key"],
            body=b"",
            due_at=None,
            expires_at=None,
        )
    except EnvelopeError:
        return {}
    names = ("root_id", "parent_id", "group", "retries", "origin")
    return {name: envelope.headers[name] for name in names if envelope.headers.get(name)}


def _handled_only(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": None,
        "task": row["task"],
        "task_id": row["task_id"],
        "key": row["key"],
        "state": "handled",
        "why": "published, its row deleted, and handled by a worker",
        "handled": row,
    }


def _told(path: dict[str, Any]) -> str:
    number = "" if path["id"] is None else f"{path['id']} "
    lines = [f"{number}{printable(path['task'])} [{printable(path['task_id'])}]"]

    def tell(name: str, value: object) -> None:
        if value is not None:
            lines.append(f"  {name:<12}{printable(value)}")

    tell("state", path["state"])
    tell("why", path["why"])
    tell("destination", path.get("destination"))
    tell("local queue", path.get("queue"))
    tell("priority", path.get("priority"))
    tell("stored", path.get("created_at"))
    tell("due", path.get("due_at"))
    tell("expires", path.get("expires_at"))
    tell("attempts", path.get("attempts"))
    if path["state"] in ("in_flight", "taken"):
        claimed = "taken" if path["state"] == "taken" else "claimed"
        tell(claimed, f"lease {path['lease_token']} until {moment(path['available_at'])}")
    tell("published", path.get("published_at"))
    tell("last error", path.get("last_error"))
    tell("dead since", path.get("died_at"))
    if handled := path.get("handled"):
        tell("handled", f"{moment(handled['handled_at'])} {handled['state']}")
    for name, value in (path.get("lineage") or {}).items():
        tell(name.replace("_", " "), value)
    return "\n".join(lines)


@click.command(cls=CeleryCommand)
@click.argument("message_ids", metavar="ID...", nargs=-1, required=True)
@dry_run
@yes
@as_json
@click.pass_context
@handle_preload_options
def cancel(
    ctx: click.Context, message_ids: tuple[str, ...], dry_run: bool, yes: bool, json_wanted: bool
) -> None:
    """Delete messages that no relay or worker has claimed; by the id of the row or of the task.

    1 is the exit code if one of them is not there, or can't be cancelled any more.
    """
    cancel_in(ctx, message_ids, None, dry_run=dry_run, given=yes, json_wanted=json_wanted)


def cancel_in(
    ctx: click.Context,
    names: Sequence[str],
    state: str | None,
    *,
    dry_run: bool,
    given: bool,
    json_wanted: bool,
) -> None:
    """Cancel messages by their ids; with `state`, only those in it."""
    administration = administration_of(outbox_of_app(ctx))
    with errors_as_sentences():
        found = administration.messages(selection_of(names))
    may = ("outgoing", "scheduled", "due") if state is None else (state,)
    free = [row for row in found if row["state"] in may]
    refused = {str(id_of(row)): why(row) for row in found if row["state"] not in may}
    unknown = [name for name in names if not is_named(name, found)]
    rows = 0
    if free and not dry_run:
        for row in free:
            tried = " (tried before: the broker may have it)"
            if not row["attempts"] or row.get("queue") is not None:
                tried = ""
            click.echo(
                f"{id_of(row)} {printable(row['task'])} [{printable(row['task_id'])}]{tried}",
                err=True,
            )
        confirm(f"Cancel {len(free)} message(s)?", given=given)
        with errors_as_sentences():
            chosen = selection_of([str(id_of(row)) for row in free])
            changes = administration.cancel(chosen, states=may)
            rows = audited(ctx, changes, {"ids": list(names)})
            left = administration.messages(chosen)
        refused |= {str(id_of(row)): why(row) for row in left}
    elif dry_run:
        rows = len(free)
    if json_wanted:
        print_json({"dry_run": dry_run, "rows": rows, "refused": refused, "unknown": unknown})
    else:
        click.echo(f"{'would cancel' if dry_run else 'cancelled'} {rows} message(s)")
        for number, reason in refused.items():
            click.echo(f"not {number}: {printable(reason)}", err=True)
        for name in unknown:
            click.echo(f"not {printable(name)}: it is not here", err=True)
    if refused or unknown or rows < len(free):
        ctx.exit(1)


@click.command(cls=CeleryCommand)
@filters("task", "destination", "older_than")
@dry_run
@as_json
@click.pass_context
@handle_preload_options
def republish(ctx: click.Context, dry_run: bool, json_wanted: bool, **chosen: Any) -> None:
    """Let what was published, and is kept because it was not handled, be published again now."""
    administration = administration_of(outbox_of_app(ctx))
    selection = selection_of(state="published", **chosen)
    with errors_as_sentences():
        if dry_run:
            rows = administration.how_many_to_republish(selection)
        else:
            rows = audited(ctx, administration.republish(selection), choice_of(**chosen))
    if json_wanted:
        print_json({"dry_run": dry_run, "rows": rows})
    else:
        click.echo(f"{'would republish' if dry_run else 'due now:'} {rows} message(s)")
