"""Whether an old transaction keeps PostgreSQL from clearing up behind the outbox."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sqlalchemy import bindparam, text

from celery_outbox.doctor.finding import Finding, fine, warning

if TYPE_CHECKING:
    from celery_outbox.plugin import Outbox

__all__ = ["check_snapshots"]

#: How long a transaction may hold its snapshot before it is worth a word, in seconds.
OLD_SECONDS = 300.0

#: `backend_xmin` is what vacuum must spare for a session; who is not its user, nor in
#: pg_read_all_stats, sees NULL there.
_SESSIONS = text(
    "SELECT 'session ' || pid || ' (' || coalesce(nullif(application_name, ''), usename, '?') || ', '"
    " || coalesce(state, '?') || ')' AS who,"
    " extract(epoch FROM clock_timestamp() - xact_start)::float AS seconds"
    " FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    " AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL) AND xact_start IS NOT NULL"
    " AND backend_type = 'client backend'"
)
_PREPARED = text(
    "SELECT 'prepared transaction ' || gid AS who,"
    " extract(epoch FROM clock_timestamp() - prepared)::float AS seconds"
    " FROM pg_prepared_xacts WHERE database = current_database()"
)
_VACUUM = text(
    "SELECT setting FROM pg_settings WHERE name = 'autovacuum' AND setting = 'off'"
    " UNION ALL SELECT 'off' FROM pg_class WHERE oid = to_regclass(:name)"
    " AND 'autovacuum_enabled=false' = ANY(reloptions)"
).bindparams(bindparam("name"))


def check_snapshots(outbox: Outbox, old_seconds: float = OLD_SECONDS) -> Iterator[Finding]:
    """No transaction is so old that the rows which relays delete pile up behind it.

    A claim then reads past every row that was ever published since that transaction began.
    """
    if outbox.engine.dialect.name != "postgresql":
        yield fine("no old transaction keeps deleted rows in this kind of database")
        return
    with outbox.engine.connect() as connection:
        rows = [*connection.execute(_SESSIONS), *connection.execute(_PREPARED)]
        name = outbox.tables.outbox.fullname
        is_off = connection.execute(_VACUUM, {"name": name}).first() is not None
    old = sorted((row for row in rows if row.seconds >= old_seconds), key=lambda row: -row.seconds)
    for row in old:
        yield warning(
            f"{row.who} is in a transaction for {row.seconds:.0f} s: rows deleted since then stay in "
            "the tables, and slow every claim down",
            "End it, or let it commit more often (for a prepared transaction: COMMIT PREPARED or "
            "ROLLBACK PREPARED). idle_in_transaction_session_timeout ends forgotten ones.",
        )
    if is_off:
        yield warning(
            "autovacuum is off: the space of published messages is never used again",
            "Turn it on, for the server and for the outbox's tables.",
        )
    if not old and not is_off:
        yield fine(f"no transaction is older than {old_seconds:g} s, and autovacuum is on")
