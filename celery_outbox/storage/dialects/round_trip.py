"""RoundTrip: statements that go to PostgreSQL together, and are answered together.

psycopg sends BEGIN and COMMIT by themselves, and waits for the answer: a round trip more for each. Here
they go with the statement after or before them, in libpq's pipeline mode, of which psycopg publishes
what it takes. The statements are prepared, unless the app forbids it as it does for psycopg's own
(``prepare_threshold=None``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from hashlib import sha256
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from psycopg import Connection, Error, OperationalError, Pipeline, pq, waiting
from psycopg.abc import PQGen
from psycopg.adapt import PyFormat, Transformer
from psycopg.errors import DuplicatePreparedStatement, InvalidSqlStatementName, error_from_result
from psycopg.pq.abc import PGresult

from celery_outbox.errors import TransactionLost

__all__ = ["Command", "begin_with", "commits_plainly", "committing_with"]

#: What PostgreSQL says of a statement that somebody has deallocated, or prepared for another client
#: of a pooler.
_UNPREPARED = (InvalidSqlStatementName, DuplicatePreparedStatement)

_DIVISION_BY_ZERO = b"22012"
_GOOD = (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK)


class Command(NamedTuple):
    """A statement with the server's own parameters, ``$1``, which tells their types itself."""

    text: str
    values: Sequence[Any] = ()


_BEGIN, _COMMIT = Command("BEGIN"), Command("COMMIT")

#: Connection → the names of what is prepared there; None: nothing stays prepared.
_prepared: WeakKeyDictionary[Connection[Any], set[bytes] | None] = WeakKeyDictionary()


def begin_with(driver: Connection[Any], command: Command) -> int | None:
    """Begin a transaction with `command`, which returns no rows; return how many rows it changed.

    None: nothing is begun. It is not for here, or there was an error, which whoever asks in psycopg's
    own way is told again.
    """
    if not _begins_plainly(driver):
        return None
    try:
        results = _checked(driver, _execute(driver, (_BEGIN, command)))
    except _UNPREPARED:
        _prepared[driver] = None
    except Error:
        pass
    else:
        return results[-1].command_tuples or 0
    with suppress(Error):
        driver.rollback()
    return None


@contextmanager
def committing_with(driver: Connection[Any], command: Command) -> Iterator[None]:
    """Send `command` with the COMMIT for which the block asks `driver`.

    The command divides by the number of the rows that it has changed. If there is none, nothing is
    committed, and `TransactionLost` raised.
    """

    def commit() -> None:
        results = _execute(driver, (command, _COMMIT))
        # A COMMIT that is refused ends the transaction; the server has skipped ours.
        if driver.pgconn.transaction_status == pq.TransactionStatus.INERROR:
            driver.rollback()
        if results[-2].error_field(pq.DiagnosticField.SQLSTATE) == _DIVISION_BY_ZERO:
            raise TransactionLost
        try:
            _checked(driver, results)
        except _UNPREPARED as exc:
            # No fault of the task's. Its next delivery does without.
            _prepared[driver] = None
            raise OperationalError(f"a prepared statement is gone: {exc}") from exc

    # SQLAlchemy calls it after those who listen to its commit event, and may write still.
    vars(driver)["commit"] = commit
    try:
        yield
    finally:
        del vars(driver)["commit"]


def _begins_plainly(driver: Connection[Any]) -> bool:
    """Whether a transaction would begin now, by BEGIN and no other words."""
    return (
        driver.pgconn.transaction_status == pq.TransactionStatus.IDLE
        and driver.pgconn.pipeline_status == pq.PipelineStatus.OFF
        and not driver.autocommit
        and (driver.isolation_level, driver.read_only, driver.deferrable) == (None, None, None)
        and Pipeline.is_supported()
    )


def commits_plainly(driver: Connection[Any]) -> bool:
    """Whether what the transaction needs to be committed is COMMIT."""
    return (
        driver.pgconn.transaction_status == pq.TransactionStatus.INTRANS
        and driver.pgconn.pipeline_status == pq.PipelineStatus.OFF
        and Pipeline.is_supported()
    )


def _execute(driver: Connection[Any], commands: Sequence[Command]) -> list[PGresult]:
    """Send the commands; return the results, the commands' own the last. None follows an error."""
    with driver.lock:
        try:
            return driver.wait(_round_trip(driver, commands))
        finally:
            # Answers that nobody has read (a time limit struck) would be taken for others'.
            if driver.pgconn.pipeline_status != pq.PipelineStatus.OFF:
                driver.close()


def _checked(driver: Connection[Any], results: list[PGresult]) -> list[PGresult]:
    """Raise the error of the first result that is one."""
    for result in results:
        if result.status not in _GOOD:
            raise error_from_result(result, driver.info.encoding)
    return results


def _round_trip(driver: Connection[Any], commands: Sequence[Command]) -> PQGen[list[PGresult]]:
    """It is psycopg's to wait, in its own way, whenever this generator yields."""
    pgconn, encoding, as_text = driver.pgconn, driver.info.encoding, Transformer(driver)
    given = [
        as_text.dump_sequence(each.values, [PyFormat.TEXT] * len(each.values)) for each in commands
    ]
    prepared = None if driver.prepare_threshold is None else _prepared.setdefault(driver, set())
    # Of each result that is to come: the name of what is prepared by it.
    awaited: list[bytes | None] = []
    pgconn.enter_pipeline_mode()
    for command, values in zip(commands, given, strict=True):
        text = command.text.encode(encoding)
        if prepared is None or not values:
            pgconn.send_query_params(text, values)
        else:
            if (name := _name_of(text)) not in prepared:
                pgconn.send_prepare(name, text)
                awaited.append(name)
            pgconn.send_query_prepared(name, values)
        awaited.append(None)
    pgconn.pipeline_sync()
    while pgconn.flush():
        yield waiting.WAIT_W
    results: list[PGresult] = []
    yield waiting.WAIT_R
    pgconn.consume_input()
    while len(results) <= len(awaited):  # the last is of the sync
        # Each time it is asked psycopg lets other threads run: not more often than needed.
        while pgconn.is_busy():
            yield waiting.WAIT_R
            pgconn.consume_input()
        if (result := pgconn.get_result()) is None:
            raise OperationalError(pgconn.get_error_message())
        results.append(result)
        if len(results) <= len(awaited):
            pgconn.get_result()  # None: the next result is another command's
    pgconn.exit_pipeline_mode()
    for prepares, result in zip(awaited, results, strict=False):
        if prepares is not None and prepared is not None and result.status in _GOOD:
            prepared.add(prepares)
    return results[:-1]


@lru_cache
def _name_of(text: bytes) -> bytes:
    # The same for every client: a pooler may let another one have the session.
    return b"celery_outbox_" + sha256(text).hexdigest()[:16].encode()
