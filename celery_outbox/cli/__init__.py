"""``celery -A <app> outbox …``

Imported at every start of any ``celery`` command: what is heavy is imported where it is used.

Exit codes, for scripts: 0 done; 1 no (nothing found, not as asked, refused, not confirmed); 2 the words
are wrong; 3 the database can't be asked.
"""

from __future__ import annotations

import click
from celery.bin.base import handle_preload_options

from celery_outbox.cli import (
    dead_letters,
    doctor,
    messages,
    relay,
    scheduled,
    schema,
    servicebus,
    status,
    storage,
)

__all__ = ["outbox"]


@click.group()
@click.pass_context
@handle_preload_options
def outbox(ctx: click.Context) -> None:
    """Durable messages: relay them, look at them, and administer their tables."""


for _command in (
    relay.relay,
    status.status,
    doctor.doctor,
    messages.list_messages,
    messages.show,
    messages.cancel,
    messages.republish,
    dead_letters.dead_letters,
    scheduled.scheduled,
    schema.schema,
    servicebus.servicebus,
    storage.storage,
):
    outbox.add_command(_command)
