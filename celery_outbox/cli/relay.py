"""``outbox relay``: the relay as a program."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from celery.bin.base import CeleryCommand, handle_preload_options

from celery_outbox.cli.context import errors_as_sentences, outbox_of_app

if TYPE_CHECKING:
    from celery_outbox.relay.loop import Tally

__all__ = ["relay"]


@click.command(cls=CeleryCommand)
@click.option("--once", is_flag=True, help="Move one batch, print what became of it, and end.")
@click.option("--loglevel", "-l", default="INFO", show_default=True, help="What is logged.")
@click.pass_context
@handle_preload_options
def relay(ctx: click.Context, once: bool, loglevel: str) -> None:
    """Publish what is due, until TERM or INT says stop; the batch in hand is ended first."""
    import logging

    from celery_outbox.checks import check
    from celery_outbox.relay.process import run_until_told

    found = outbox_of_app(ctx)
    ctx.obj.app.log.setup(loglevel=loglevel.upper())
    logging.getLogger("celery_outbox").setLevel(loglevel.upper())
    with errors_as_sentences():
        check(found.app, found)
        if once:
            click.echo(_sentence(found.relay_once()))
        else:
            run_until_told(found.relay())


def _sentence(tally: Tally) -> str:
    return (
        f"claimed {tally.claimed}, confirmed {tally.confirmed}, retried {tally.retried}, "
        f"dead {tally.dead}, released {tally.released}"
    )
