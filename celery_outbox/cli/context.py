"""What every command needs first: the app's Outbox, and errors told as sentences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from celery_outbox.plugin import Outbox
    from celery_outbox.storage.administration import Administration

__all__ = ["Unreachable", "administration_of", "errors_as_sentences", "outbox_of_app"]


class Unreachable(click.ClickException):
    """The database can't be asked: nothing is known, which is not a no."""

    exit_code = 3


def outbox_of_app(ctx: click.Context) -> Outbox:
    """Return the Outbox of the app that ``-A`` names."""
    from celery_outbox.plugin import outbox_of

    app = ctx.obj.app
    with errors_as_sentences():
        app.loader.import_default_modules()
        found = outbox_of(app)
        _ = found.config
        return found


def administration_of(found: Outbox) -> Administration:
    """Return the administration of the outbox's tables, once they are known to be as it needs them."""
    from celery_outbox.storage.administration import Administration
    from celery_outbox.storage.schema import compare

    with errors_as_sentences():
        compare(found.engine, found.tables)
        return Administration(found.engine, found.tables)


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Tell an error that has a reason as a sentence, with the exit code of its kind."""
    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.exc import TimeoutError as PoolTimeout

    from celery_outbox.errors import OutboxError

    try:
        yield
    except OutboxError as exc:
        raise click.ClickException(str(exc)) from exc
    except DBAPIError as exc:
        # Its own words, not SQLAlchemy's, which repeat the statement with its parameters.
        raise Unreachable(f"the database says: {exc.orig}") from exc
    except PoolTimeout as exc:
        raise Unreachable(f"no connection to the database is free: {exc}") from exc
