"""``outbox status``: how it goes."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import click
from celery.bin.base import CeleryCommand, handle_preload_options

from celery_outbox.cli.context import administration_of, errors_as_sentences, outbox_of_app
from celery_outbox.cli.output import ago, as_json, print_json, printable, table

if TYPE_CHECKING:
    from celery_outbox.plugin import Outbox
    from celery_outbox.storage.administration import Administration
    from celery_outbox.storage.relays import SeenRelay

__all__ = ["status"]

_HEADS = {
    "outgoing": "backlog",
    "lag_seconds": "lag",
    "in_flight": "in flight",
    "scheduled": "scheduled",
    "published": "published (kept)",
    "due": "due in local queues",
    "taken": "taken from local queues",
    "dead": "dead letters",
    "incoming": "remembered by the inbox",
    "relays_alive": "relays alive",
    "published_per_second": "published per second",
    "handled_per_second": "handled per second",
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
    help="Exit with 1 if the oldest message that is due, for a relay or in a local queue, has waited "
    "longer: no progress.",
)
@click.option(
    "--min-relays",
    type=click.IntRange(min=0),
    metavar="NUMBER",
    help="Exit with 1 if fewer relays were seen alive in the last minute.",
)
@as_json
@click.pass_context
@handle_preload_options
def status(
    ctx: click.Context,
    watch: float | None,
    max_lag: float | None,
    min_relays: int | None,
    json_wanted: bool,
) -> None:
    """Show backlog, lag, rates, local queues, relays and the last errors, as the database has them.

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
    wrong = []
    if max_lag is not None and read["lag_seconds"] > max_lag:
        wrong.append(f"the lag is more than {max_lag:g} s")
    for queue, each in read["local_queues"].items():
        if max_lag is not None and each["lag_seconds"] > max_lag:
            wrong.append(
                f"the lag of the local queue {printable(queue)} is more than {max_lag:g} s"
            )
    if min_relays is not None and read["relays_alive"] < min_relays:
        wrong.append(f"{read['relays_alive']} relay(s) are alive, and not {min_relays}")
    for sentence in wrong:
        click.echo(sentence, err=True)
    ctx.exit(int(bool(wrong)))


def _read(found: Outbox, administration: Administration) -> dict[str, Any]:
    from celery_outbox.observability.figures import read_figures
    from celery_outbox.storage.relays import Relays

    figures = read_figures(found.store)
    return {
        **figures.messages,
        "lag_seconds": figures.lag_seconds,
        "local_queues": {
            queue: dataclasses.asdict(each) for queue, each in figures.local_queues.items()
        },
        "relays_alive": figures.relays,
        "published_per_second": round(figures.published_per_second, 3),
        "handled_per_second": round(figures.handled_per_second, 3),
        "relays": [_relay(each) for each in Relays(found.engine, found.tables).all()],
        "errors": administration.errors(),
    }


def _relay(seen: SeenRelay) -> dict[str, Any]:
    return {**dataclasses.asdict(seen), "is_alive": seen.is_alive}


def _print(read: dict[str, Any]) -> None:
    rows = [(head, _cell(name, read[name])) for name, head in _HEADS.items()]
    click.echo(table(["what", "now"], rows))
    if read["local_queues"]:
        click.echo("\nlocal queues")
        heads = ["queue", "due", "lag", "scheduled", "taken"]
        cells = [
            (queue, each["due"], ago(each["lag_seconds"]), each["scheduled"], each["taken"])
            for queue, each in read["local_queues"].items()
        ]
        click.echo(table(heads, cells))
    if read["relays"]:
        click.echo("\nrelays")
        heads = ["relay", "seen", "confirmed", "per second", "last error"]
        cells = [
            (
                f"{each['host']}:{each['pid']}",
                f"{ago(each['silent_seconds'])} ago" + ("" if each["is_alive"] else ", lost?"),
                each["confirmed"],
                f"{each['per_second']:.1f}",
                each["last_error"],
            )
            for each in read["relays"]
        ]
        click.echo(table(heads, cells, width=80))
    if read["errors"]:
        click.echo("\nlast errors")
        errors = [(each["messages"], each["dead"], each["error"]) for each in read["errors"]]
        click.echo(table(["messages", "dead", "error"], errors, width=100))


def _cell(name: str, value: float) -> object:
    if name == "lag_seconds":
        return ago(value)
    return f"{value:.1f}" if name.endswith("_per_second") else value
