"""``celery -A <app> outbox …``

Imported at every start of any ``celery`` command: what is heavy is imported where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from celery.bin.base import CeleryCommand, handle_preload_options

if TYPE_CHECKING:
    from celery_outbox.plugin import Outbox

__all__ = ["outbox"]


@click.group()
@click.pass_context
@handle_preload_options
def outbox(ctx: click.Context) -> None:
    """Durable messages: relay them, and administer their tables."""


def _outbox(ctx: click.Context) -> Outbox:
    from celery_outbox.errors import OutboxError
    from celery_outbox.plugin import outbox_of

    app = ctx.obj.app
    app.loader.import_default_modules()
    try:
        found = outbox_of(app)
        _ = found.config
        return found
    except OutboxError as exc:
        raise click.ClickException(str(exc)) from exc


@outbox.command(cls=CeleryCommand)
@click.option("--once", is_flag=True, help="Move one batch, print what became of it, and end.")
@click.option("--loglevel", "-l", default="INFO", show_default=True, help="What is logged.")
@click.pass_context
@handle_preload_options
def relay(ctx: click.Context, once: bool, loglevel: str) -> None:
    """Publish what is due, until TERM or INT says stop; the batch in hand is ended first."""
    import logging

    from celery_outbox.checks import check
    from celery_outbox.errors import OutboxError
    from celery_outbox.relay.process import run_until_told

    found = _outbox(ctx)
    ctx.obj.app.log.setup(loglevel=loglevel.upper())
    logging.getLogger("celery_outbox").setLevel(loglevel.upper())
    try:
        check(found.app, found)
        if once:
            click.echo(_sentence(found.relay_once()))
        else:
            run_until_told(found.relay())
    except OutboxError as exc:
        raise click.ClickException(str(exc)) from exc


def _sentence(tally: Any) -> str:
    return (
        f"claimed {tally.claimed}, confirmed {tally.confirmed}, retried {tally.retried}, "
        f"dead {tally.dead}, released {tally.released}"
    )


@outbox.group()
def schema() -> None:
    """The tables: create, print or verify them."""


@schema.command(cls=CeleryCommand)
@click.pass_context
@handle_preload_options
def create(ctx: click.Context) -> None:
    """Create the tables that are missing."""
    found = _outbox(ctx)
    _report(found.create_schema)
    names = ", ".join(table.fullname for table in found.tables.all())
    click.echo(f"the tables are there: {names}")


@schema.command(cls=CeleryCommand)
@click.option("--dialect", help="postgresql or sqlite; the database's own without it.")
@click.pass_context
@handle_preload_options
def script(ctx: click.Context, dialect: str | None) -> None:
    """Print the SQL that creates the tables."""
    found = _outbox(ctx)
    _report(lambda: click.echo(found.schema_script(dialect), nl=False))


@schema.command(cls=CeleryCommand)
@click.pass_context
@handle_preload_options
def verify(ctx: click.Context) -> None:
    """Say whether the tables are there, in the version that this release needs."""
    _report(_outbox(ctx).verify_schema)
    click.echo("the tables are as this release needs them")


def _report(action: Any) -> None:
    """Run `action`; an error that has a reason is told as a sentence, with exit code 1."""
    from sqlalchemy.exc import DBAPIError

    from celery_outbox.errors import OutboxError

    try:
        action()
    except OutboxError as exc:
        raise click.ClickException(str(exc)) from exc
    except DBAPIError as exc:
        raise click.ClickException(f"the database says: {exc.orig}") from exc
