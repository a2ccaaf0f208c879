"""``outbox storage``: the tables and everything in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from celery.bin.base import CeleryCommand, handle_preload_options

from celery_outbox.cli.audit import audited
from celery_outbox.cli.choosing import choice_of, confirm, dry_run, yes
from celery_outbox.cli.context import administration_of, errors_as_sentences, outbox_of_app
from celery_outbox.cli.output import as_json, print_json, table

if TYPE_CHECKING:
    from celery_outbox.plugin import Outbox

__all__ = ["storage"]

#: As `Administration.counts` names the states, and what they are called here.
_COUNTS = {
    "incoming": "persisted incoming",
    "outgoing": "outgoing",
    "scheduled": "scheduled",
    "in_flight": "in flight",
    "published": "published (kept)",
    "due": "due (local queues)",
    "taken": "taken (local queues)",
    "dead": "dead letters",
}
_CLEARED = ("incoming", "outgoing", "scheduled", "published", "due", "dead")
_CLAIMED = {"in_flight": "relay", "taken": "worker"}


@click.group()
def storage() -> None:
    """The tables: count, clear, release, prune, script, rebuild."""


@storage.command(cls=CeleryCommand)
@click.option("--by", type=click.Choice(["task", "destination"]), help="Count for each of them.")
@as_json
@click.pass_context
@handle_preload_options
def counts(ctx: click.Context, by: str | None, json_wanted: bool) -> None:
    """Count the messages in each state."""
    found = outbox_of_app(ctx)
    administration = administration_of(found)
    if by is not None:
        with errors_as_sentences():
            grouped = administration.counts_by(by)
        # The inbox does not know where a message came from.
        states = [state for state in _COUNTS if by == "task" or state != "incoming"]
        full = {name: {s: row.get(s, 0) for s in states} for name, row in grouped.items()}
        if json_wanted:
            print_json(full)
        else:
            rows = [[name, *row.values()] for name, row in full.items()]
            click.echo(table([by, *(_COUNTS[state] for state in states)], rows))
        return
    with errors_as_sentences():
        counted = administration.counts()
    if json_wanted:
        print_json(counted)
    else:
        click.echo(table(["state", "messages"], [(_COUNTS[s], counted[s]) for s in _COUNTS]))


@storage.command(cls=CeleryCommand)
@click.option(
    "--dialect", help="postgresql, mysql, mariadb, mssql or sqlite; default: the database's own."
)
@click.option("--file", type=click.Path(dir_okay=False, path_type=Path), help="Write it there.")
@click.pass_context
@handle_preload_options
def script(ctx: click.Context, dialect: str | None, file: Path | None) -> None:
    """Print the SQL that creates the tables; needs no connection."""
    found = outbox_of_app(ctx)
    with errors_as_sentences():
        text = found.schema_script(dialect)
    if file is None:
        click.echo(text, nl=False)
        return
    try:
        file.write_text(text)
    except OSError as exc:
        raise click.ClickException(f"{file} can't be written: {exc.strerror}") from exc
    click.echo(f"written: {file}")


@storage.command(cls=CeleryCommand)
@yes
@as_json
@click.pass_context
@handle_preload_options
def rebuild(ctx: click.Context, yes: bool, json_wanted: bool) -> None:
    """Drop all tables, with everything in them, and create them again."""
    found = outbox_of_app(ctx)
    lost = _rows_in(found)
    with errors_as_sentences():
        place = found.engine.url.render_as_string(hide_password=True)
    confirm(f"Drop {len(found.tables.all())} tables with {lost} rows in {place}?", given=yes)

    def change() -> Any:
        found.drop_schema()
        yield lost
        found.create_schema()

    with errors_as_sentences():
        audited(ctx, change())
    names = [each.fullname for each in found.tables.all()]
    if json_wanted:
        print_json({"rows": lost, "tables": names})
    else:
        click.echo(f"dropped with {lost} rows, and created: {', '.join(names)}")


def _rows_in(found: Outbox) -> int:
    """How many rows there are, in those tables that there are."""
    from sqlalchemy import func, inspect, select

    with errors_as_sentences():
        inspector = inspect(found.engine)
        # Relays write theirs again within seconds.
        passing = (found.tables.relay, found.tables.version)
        tables = [each for each in found.tables.all() if each not in passing]
        there = [each for each in tables if inspector.has_table(each.name, schema=each.schema)]
        with found.engine.connect() as connection:
            return sum(
                connection.execute(select(func.count()).select_from(each)).scalar_one()
                for each in there
            )


@storage.command(cls=CeleryCommand)
@click.argument("what", nargs=-1, required=True, type=click.Choice(_CLEARED))
@dry_run
@yes
@as_json
@click.pass_context
@handle_preload_options
def clear(
    ctx: click.Context, what: tuple[str, ...], dry_run: bool, yes: bool, json_wanted: bool
) -> None:
    """Delete everything that is in the states WHAT.

    What a relay or worker has claimed stays. Without its "incoming" rows a duplicate is executed again.
    """
    found = outbox_of_app(ctx)
    administration = administration_of(found)
    states = list(dict.fromkeys(what))
    with errors_as_sentences():
        counted = administration.counts()
    there = ", ".join(f"{counted[state]} {_COUNTS[state]}" for state in states)
    if not dry_run:
        confirm(f"Delete {there}?", given=yes)
    deleted: dict[str, int] = {}
    for state in states:
        if dry_run:
            deleted[state] = counted[state]
            continue
        with errors_as_sentences():
            deleted[state] = audited(ctx, administration.clear(state), {"what": state})
    if json_wanted:
        left = {state: counted[state] for state in _CLAIMED}
        print_json({"dry_run": dry_run, "deleted": deleted, **left})
        return
    said = ", ".join(f"{deleted[state]} {_COUNTS[state]}" for state in states)
    click.echo(f"{'would delete' if dry_run else 'deleted'}: {said}")
    for state, whose in _CLAIMED.items():
        if counted[state] and set(states) - {"incoming", "dead"}:
            click.echo(f"left alone: {counted[state]} {_COUNTS[state]}, which are a {whose}'s")


@storage.command(cls=CeleryCommand)
@click.option("--token", help="Those under this lease, though it may not be over.")
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Those claimed (by a worker: renewed) so long ago, though their lease may not be over.",
)
@dry_run
@yes
@as_json
@click.pass_context
@handle_preload_options
def release(
    ctx: click.Context,
    token: str | None,
    older_than: float | None,
    dry_run: bool,
    yes: bool,
    json_wanted: bool,
) -> None:
    """Give back what dead relays and workers have claimed: without options, where the lease is over.

    Others take such messages by themselves; with --token or --older-than they need not wait for the
    end of the lease. Is that relay or worker alive after all, they are published or executed twice.
    """
    if token is not None and older_than is not None:
        raise click.UsageError("--token or --older-than, not both")
    found = outbox_of_app(ctx)
    administration = administration_of(found)
    lasts = {
        "relay": found.config.lease_seconds,
        "worker": found.config.local_lease_seconds,
    }
    within = dict.fromkeys(lasts, 0.0)
    if older_than is not None:
        within = {holder: seconds - older_than for holder, seconds in lasts.items()}
    with errors_as_sentences():
        now = administration.now()
        leases = [
            lease
            for lease in administration.leases()
            if (
                lease["token"] == token
                if token is not None
                else (lease["ends_at"] - now).total_seconds() <= within[lease["holder"]]
            )
        ]
    messages = sum(lease["messages"] for lease in leases)
    live = [lease for lease in leases if not lease["is_over"]]
    if dry_run:
        if json_wanted:
            print_json({"dry_run": True, "rows": messages, "leases": leases})
        else:
            click.echo(f"would release {messages} message(s) of {len(leases)} lease(s)")
            if leases:
                heads = ["token", "of a", "messages", "ends at", "over"]
                names = ("token", "holder", "messages", "ends_at")
                cells = [
                    (*(each[name] for name in names), _yes_no(each["is_over"])) for each in leases
                ]
                click.echo(table(heads, cells))
        return
    if live:
        count = sum(lease["messages"] for lease in live)
        confirm(f"Release {count} message(s) whose lease is not over?", given=yes)
    with errors_as_sentences():
        chosen = choice_of(token=token, older_than=older_than)
        changes = administration.release(
            token=token,
            ends_within_seconds=within["relay"],
            workers_end_within_seconds=within["worker"],
        )
        rows = audited(ctx, changes, chosen)
    if json_wanted:
        print_json({"dry_run": False, "rows": rows})
    else:
        click.echo(f"released {rows} message(s)")


def _yes_no(value: object) -> str:
    return "yes" if value else "no"


@storage.command(cls=CeleryCommand)
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Handled so long ago; outbox_inbox_retention_seconds without it.",
)
@yes
@as_json
@click.pass_context
@handle_preload_options
def prune(ctx: click.Context, older_than: float | None, yes: bool, json_wanted: bool) -> None:
    """Delete what the inbox has remembered for longer than the retention.

    Relays do so by themselves. A duplicate of what was pruned is executed again. Dead letters go too
    if outbox_dead_letter_retention_seconds says when.
    """
    found = outbox_of_app(ctx)
    config = found.config
    retention = config.inbox_retention_seconds
    seconds = retention if older_than is None else older_than
    if seconds < retention:
        confirm(
            f"Forget what was handled {seconds:g} s ago? The retention is {retention:g} s.",
            given=yes,
        )
    administration = administration_of(found)
    dead = None
    with errors_as_sentences():
        rows = audited(ctx, administration.prune(seconds), {"older_than": seconds})
        if (dead_retention := config.dead_letter_retention_seconds) is not None:
            changes = administration.prune_dead_letters(dead_retention)
            dead = audited(ctx, changes, {"what": "dead", "older_than": dead_retention})
    if json_wanted:
        print_json({"rows": rows, **({} if dead is None else {"dead": dead})})
    else:
        also = "" if dead is None else f", and {dead} dead letter(s)"
        click.echo(f"pruned {rows} row(s) of the inbox{also}")
