"""``outbox servicebus``: the queues of Azure Service Bus."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from celery.bin.base import CeleryCommand, handle_preload_options

from celery_outbox.cli.context import Unreachable, outbox_of_app
from celery_outbox.cli.output import as_json, print_json, printable

if TYPE_CHECKING:
    from celery_outbox.plugin import Outbox
    from celery_outbox.servicebus.queues import Doubt, Queues

__all__ = ["servicebus"]


@click.group()
def servicebus() -> None:
    """The queues of Azure Service Bus: create or verify them. Needs the right to manage."""


@servicebus.command(cls=CeleryCommand)
@click.argument("queues", nargs=-1, metavar="[QUEUE...]")
@click.option(
    "--lock",
    type=click.IntRange(5, 300),
    default=60,
    show_default=True,
    metavar="SECONDS",
    help="How long a worker has a message before it must renew that.",
)
@click.option(
    "--window",
    type=click.IntRange(20, 7 * 24 * 3600),
    default=600,
    show_default=True,
    metavar="SECONDS",
    help="For how long duplicates are detected.",
)
@click.option(
    "--max-deliveries",
    type=click.IntRange(1, 2000),
    default=100,
    show_default=True,
    help="After how many deliveries a message is a dead letter of the queue.",
)
@click.pass_context
@handle_preload_options
def create(
    ctx: click.Context, queues: tuple[str, ...], lock: int, window: int, max_deliveries: int
) -> None:
    """Create queues with duplicate detection; the app's own if none is named.

    A queue that exists is left as it is.
    """
    from celery_outbox.servicebus.queues import Making

    found = outbox_of_app(ctx)
    making = Making(lock, window, max_deliveries)
    with _namespace_of(found) as namespace:
        for queue in queues or _queues_of(found):
            made = namespace.create(queue, making)
            state = "created" if made else "exists, and is left as it is"
            click.echo(f"{namespace.name(queue)}: {state}")


@servicebus.command(cls=CeleryCommand)
@click.argument("queues", nargs=-1, metavar="[QUEUE...]")
@as_json
@click.pass_context
@handle_preload_options
def verify(ctx: click.Context, queues: tuple[str, ...], json_wanted: bool) -> None:
    """Say what is wrong with queues, the app's own if none is named, and what to do.

    Exits with 1 if a queue can't be used as it is.
    """
    from celery_outbox.doctor.servicebus import repeat_seconds

    found = outbox_of_app(ctx)
    doubts: list[Doubt] = []
    with _namespace_of(found) as namespace:
        for queue in queues or _queues_of(found):
            those = list(namespace.verify(queue, repeat_seconds(found)))
            doubts += those
            if not json_wanted:
                _print(namespace.name(queue), those)
    if json_wanted:
        print_json([asdict(doubt) for doubt in doubts])
    ctx.exit(int(any(doubt.level == "error" for doubt in doubts)))


def _print(queue: str, doubts: list[Doubt]) -> None:
    if not doubts:
        click.echo(f"{queue}: as it should be")
    for doubt in doubts:
        click.echo(f"{queue}: {doubt.level}: {printable(doubt.says)}")
        click.echo(f"    -> {printable(doubt.advice)}")


def _queues_of(found: Outbox) -> list[str]:
    return sorted(found.app.amqp.queues)


@contextmanager
def _namespace_of(found: Outbox) -> Iterator[Queues]:
    from celery_outbox.relay.publishers import is_servicebus

    with found.app.connection_for_write() as connection:
        if not is_servicebus(connection):
            raise click.ClickException("broker_url is none of Azure Service Bus")
        from azure.core.exceptions import AzureError

        from celery_outbox.servicebus.queues import Queues

        try:
            yield Queues(connection)
        except AzureError as exc:
            raise Unreachable(f"the namespace says: {type(exc).__name__}: {exc}") from exc
