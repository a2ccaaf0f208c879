"""``outbox schema``: the tables themselves."""

from __future__ import annotations

import click
from celery.bin.base import CeleryCommand, handle_preload_options

from celery_outbox.cli.context import errors_as_sentences, outbox_of_app

__all__ = ["schema"]


@click.group()
def schema() -> None:
    """The tables: create, print or verify them."""


@schema.command(cls=CeleryCommand)
@click.pass_context
@handle_preload_options
def create(ctx: click.Context) -> None:
    """Create the tables that are missing."""
    found = outbox_of_app(ctx)
    with errors_as_sentences():
        found.create_schema()
    names = ", ".join(table.fullname for table in found.tables.all())
    click.echo(f"the tables are there: {names}")


@schema.command(cls=CeleryCommand)
@click.option(
    "--dialect", help="postgresql, mysql, mariadb, mssql or sqlite; default: the database's own."
)
@click.pass_context
@handle_preload_options
def script(ctx: click.Context, dialect: str | None) -> None:
    """Print the SQL that creates the tables."""
    found = outbox_of_app(ctx)
    with errors_as_sentences():
        click.echo(found.schema_script(dialect), nl=False)


@schema.command(cls=CeleryCommand)
@click.pass_context
@handle_preload_options
def verify(ctx: click.Context) -> None:
    """Say whether the tables are there, in the version that this release needs."""
    found = outbox_of_app(ctx)
    with errors_as_sentences():
        found.verify_schema()
    click.echo("the tables are as this release needs them")
