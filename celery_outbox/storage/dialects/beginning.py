"""BeginningCursor: a cursor of psycopg's whose first statement goes to the server with its BEGIN.

psycopg sends BEGIN by itself and waits for the answer: a round trip more in each transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from psycopg import Connection, OperationalError, Pipeline, RawCursor, pq, waiting
from psycopg.abc import PQGen
from psycopg.adapt import PyFormat, Transformer
from psycopg.errors import error_from_result
from psycopg.pq.abc import PGresult

__all__ = ["BeginningCursor"]


class BeginningCursor(RawCursor[Any]):
    """Where no transaction is open, its statement must return no rows."""

    _affected: int | None = None

    @property
    def rowcount(self) -> int:
        return super().rowcount if self._affected is None else self._affected

    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        driver = self.connection
        if not _begins_plainly(driver):
            return super().execute(query, params, **options)
        with driver.lock:
            try:
                self._affected = driver.wait(_begin_with(driver, query, params))
            finally:
                # Answers that nobody has read (a time limit struck) would be taken for others'.
                if driver.pgconn.pipeline_status != pq.PipelineStatus.OFF:
                    driver.close()
        return self


def _begins_plainly(driver: Connection[Any]) -> bool:
    """Whether a transaction would begin now, by BEGIN and no other words."""
    return (
        driver.pgconn.transaction_status == pq.TransactionStatus.IDLE
        and driver.pgconn.pipeline_status == pq.PipelineStatus.OFF
        and not driver.autocommit
        and (driver.isolation_level, driver.read_only, driver.deferrable) == (None, None, None)
        and Pipeline.is_supported()
    )


def _begin_with(driver: Connection[Any], text: str, values: Sequence[Any]) -> PQGen[int]:
    """Send BEGIN and a statement in libpq's pipeline mode; return how many rows it has changed.

    It is psycopg's to wait, in its own way, whenever this generator yields.
    """
    pgconn, encoding = driver.pgconn, driver.info.encoding
    as_text = Transformer(driver)
    given = as_text.dump_sequence(values, [PyFormat.AUTO] * len(values))
    pgconn.enter_pipeline_mode()
    pgconn.send_query_params(b"BEGIN", None)
    pgconn.send_query_params(text.encode(encoding), given, as_text.types, as_text.formats)
    pgconn.pipeline_sync()
    while pgconn.flush():
        yield waiting.WAIT_W
    results: list[PGresult] = []
    while len(results) < 3:  # of BEGIN, the statement and the sync
        while pgconn.is_busy():
            yield waiting.WAIT_R
            pgconn.consume_input()
        if (result := pgconn.get_result()) is not None:
            results.append(result)
        elif pgconn.status == pq.ConnStatus.BAD:
            raise OperationalError(pgconn.get_error_message())
    pgconn.exit_pipeline_mode()
    for result in results[:2]:
        if result.status != pq.ExecStatus.COMMAND_OK:
            raise error_from_result(result, encoding)
    return results[1].command_tuples or 0
