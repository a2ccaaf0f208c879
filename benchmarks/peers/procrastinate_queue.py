"""procrastinate: tasks as rows in PostgreSQL, which its own workers take. No broker, no Celery."""

from typing import Any

import procrastinate
import psycopg
from procrastinate.sync_psycopg_connector import SyncPsycopgConnector
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

QUEUE = "bench"
TASK = "benchmarks.task"


class Procrastinate:
    """The peer's app and tables, for messages that are deferred in a session's transaction."""

    def __init__(self, database_url: str) -> None:
        self.conninfo = conninfo(database_url)
        app = procrastinate.App(connector=SyncPsycopgConnector(conninfo=self.conninfo))
        app.open()
        app.schema_manager.apply_schema()
        self._app = app

        @app.task(name=TASK, queue=QUEUE)
        def task(number: int, text: str) -> None: ...

        self._task = task

    def defer(self, session: Session, number: int, text: str) -> Any:
        """Defer a task in the session's own transaction."""
        connection = session.connection().connection.driver_connection
        return self._task.configure(connection=connection).defer(number=number, text=text)

    def clear(self) -> None:
        """Empty the tables."""
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            connection.execute("TRUNCATE procrastinate_jobs CASCADE")

    def close(self) -> None:
        """Close its connections."""
        self._app.close()


def conninfo(database_url: str) -> str:
    """Return libpq's form of a SQLAlchemy URL."""
    url = make_url(database_url).set(drivername="postgresql")
    return url.render_as_string(hide_password=False)
