"""DurableScheduler: for ``celery beat --scheduler outbox``.

An entry that is due records its run and stages its message in one transaction. So a beat that is
killed and started again neither skips a run nor doubles it, the broker may be away, and several beats
may run at once.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from celery.beat import ScheduleEntry, Scheduler, SchedulingError
from sqlalchemy.exc import SQLAlchemyError

from celery_outbox.errors import ConfigurationError
from celery_outbox.plugin import RELAY_TASK, outbox_of
from celery_outbox.storage.runs import Run, Runs
from celery_outbox.storage.tables import NAME_LENGTH

__all__ = ["DurableScheduler"]

logger = logging.getLogger("celery_outbox.beat")

#: How long it waits for a database that is away, in seconds.
_PAUSE = 1.0


class DurableScheduler(Scheduler):
    """Celery's scheduler of ``beat_schedule``, whose last runs are in the outbox's database.

    What was due while no beat ran is run once at the start, not once for each time missed. The
    relay's own entry is not recorded: it goes straight to the broker, as ever.
    """

    #: Nothing is published here but the relay's entry, which takes a connection of the app's pool.
    producer = None

    def __init__(self, app: Any, *args: Any, **kwargs: Any) -> None:
        self._outbox = outbox_of(app)
        self._runs = Runs(self._outbox.engine, self._outbox.tables.beat)
        self._is_read = False
        super().__init__(app, *args, **kwargs)

    def setup_schedule(self) -> None:
        """Read the schedule of the settings; the last runs are read with the first tick."""
        super().setup_schedule()
        for name in self.schedule:
            if len(name) > NAME_LENGTH:
                raise ConfigurationError(
                    f"beat_schedule: the name {name[:40]!r}… is longer than {NAME_LENGTH} characters"
                )

    def tick(self, *args: Any, **kwargs: Any) -> Any:
        """Run the entry that is due next, if there is one; return the seconds until the next."""
        if not self._is_read:
            try:
                self._read()
            except SQLAlchemyError as exc:
                logger.error("beat: the database is away: %s", exc)
                return _PAUSE
        return super().tick(*args, **kwargs)

    def apply_entry(self, entry: ScheduleEntry, producer: Any = None) -> None:
        """Record the run of an entry and stage its message, in one transaction."""
        if entry.task == RELAY_TASK:
            super().apply_entry(entry, producer)
            return
        try:
            sent = self._run(entry)
        except SchedulingError as exc:
            logger.error("beat: entry %s is passed over: %s", entry.name, exc, exc_info=exc)
            sent = self._pass_over(entry)
        except SQLAlchemyError as exc:
            logger.error("beat: entry %s waits, the database is away: %s", entry.name, exc)
            time.sleep(_PAUSE)
            sent = False
        if not sent:
            # Not run, or run by another beat: what the database says counts.
            self.schedule[entry.name] = entry
            self._is_read, self._heap = False, None
        else:
            logger.info("beat: entry %s (%s)", entry.name, entry.task)

    def _run(self, entry: ScheduleEntry) -> bool:
        with self._outbox.engine.begin() as connection:
            if not self._runs.advance(connection, self._next_run(entry)):
                return False
            with self._outbox.using(connection):
                self.apply_async(entry, advance=False)
        return True

    def _pass_over(self, entry: ScheduleEntry) -> bool:
        """Record the run of an entry that can't be sent: it would be due again at once, for ever."""
        try:
            with self._outbox.engine.begin() as connection:
                return self._runs.advance(connection, self._next_run(entry))
        except SQLAlchemyError as exc:
            logger.error("beat: entry %s waits, the database is away: %s", entry.name, exc)
            time.sleep(_PAUSE)
            return False

    def _next_run(self, entry: ScheduleEntry) -> Run:
        # tick() has put the entry as it will be after this run into the schedule.
        return _run_of(self.schedule[entry.name])

    def _read(self) -> None:
        """Take over what the database knows of the entries, and tell it of new ones."""
        entries = {name: e for name, e in self.schedule.items() if e.task != RELAY_TASK}
        self._runs.remember(_run_of(entry) for entry in entries.values())
        runs = self._runs.all()
        for name, entry in entries.items():
            entry.last_run_at = runs[name].last_run_at
            entry.total_run_count = runs[name].count
        self._is_read, self._heap = True, None


def _run_of(entry: ScheduleEntry) -> Run:
    return Run(entry.name, entry.last_run_at, entry.total_run_count)
