"""Installation: what a durable task needs of its app's Outbox, and which app has which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from celery_outbox.errors import NotInstalled

if TYPE_CHECKING:
    from celery import Celery
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    from celery_outbox.config import Config
    from celery_outbox.storage.store import Store

__all__ = ["Installation", "install", "installation_of", "installed_in"]


class Installation(Protocol):
    """The app's outbox, as tasks see it."""

    @property
    def config(self) -> Config:
        """The settings."""

    @property
    def store(self) -> Store:
        """The tables."""

    def check_broker(self) -> None:
        """Raise `ConfigurationError` for a broker to which nothing can be published safely."""

    def make_session(self, connection: Connection) -> Session:
        """Return a session of the app's kind whose commits stay inside `connection`'s transaction."""


#: On the app itself: a registry beside it would keep both alive for ever.
_ATTRIBUTE = "_celery_outbox"


def install(app: Celery, installation: Installation) -> None:
    """Make `installation` the app's."""
    setattr(app, _ATTRIBUTE, installation)


def installed_in(app: Celery) -> Installation | None:
    """Return the app's installation, if it has one."""
    installation: Installation | None = getattr(app, _ATTRIBUTE, None)
    return installation


def installation_of(app: Celery, task: str) -> Installation:
    """Return the app's installation; raise `NotInstalled`, naming the task, if it has none."""
    installation = installed_in(app)
    if installation is None:
        raise NotInstalled(
            f"task {task} is durable, but its app {app.main!r} has no Outbox: add "
            "`outbox = Outbox(app, Session)` where the app is made"
        )
    return installation
