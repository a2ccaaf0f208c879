"""``outbox status``: how it goes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click
from celery.bin.base import CeleryCommand, handle_preload_options

from celery_outbox.cli.context import administration_of, errors_as_sentences, outbox_of_app
from celery_outbox.cli.output import ago, as_json, print_json, table

if TYPE_CHECKING:
    from celery_outbox.plugin import Outbox
    from celery_outbox.storage.administration import Administration

__all__ = ["status"]

_HEADS = {
    "outgoing": "backlog",
    "lag_seconds": "lag",
    "in_flight": "in flight",
    "scheduled": "scheduled",
    "published": "published (kept)",
    "dead": "dead letters",
    "incoming": "remembered by the inbox",
}


@click.command(cls=CeleryCommand)
@click.option(
    "--watch",
    type=click.FloatRange(min=0.1),
    metavar="SECONDS",
    help="Look again every so often, until interrupted.",
)
@click.option(
    "--max-lag",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Exit with 1 if the oldest message that is due has waited longer.",
)
@as_json
@click.pass_context
@handle_preload_options
def status(
    ctx: click.Context, watch: float | None, max_lag: float | None, json_wanted: bool
) -> None:
    """Show backlog, lag, dead letters and the last errors, as the database knows them.

    The lag is for how long the oldest message that is due has waited for a relay.
    """
    found = outbox_of_app(ctx)
    administration = administration_of(found)
    while True:
        with errors_as_sentences():
            read = _read(found, administration)
        if watch is not None and not json_wanted:
            click.clear()
        if json_wanted:
            print_json(read)
        else:
            _print(read)
        if watch is None:
            break
        time.sleep(watch)
    if max_lag is not None and read["lag_seconds"] > max_lag:
        if not json_wanted:
            click.echo(f"the lag is more than {max_lag:g} s", err=True)
        ctx.exit(1)


def _read(found: Outbox, administration: Administration) -> dict[str, Any]:
    from celery_outbox.observability.figures import read_figures

    figures = read_figures(found.store)
    return {
        **figures.messages,
        "lag_seconds": figures.lag_seconds,
        "errors": administration.errors(),
    }


def _print(read: dict[str, Any]) -> None:
    rows = [
        (head, ago(read[name]) if name == "lag_seconds" else read[name])
        for name, head in _HEADS.items()
    ]
    click.echo(table(["what", "now"], rows))
    if read["errors"]:
        click.echo("\nlast errors")
        heads = ["messages", "dead", "error"]
        cells = [(each["messages"], each["dead"], each["error"]) for each in read["errors"]]
        click.echo(table(heads, cells, width=100))
