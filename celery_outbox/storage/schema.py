"""The schema: create, drop, script and verify the tables."""

from __future__ import annotations

from sqlalchemy import Engine, create_mock_engine, insert, inspect, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import SchemaItem

from celery_outbox.errors import ConfigurationError, SchemaError
from celery_outbox.storage.dialects import DIALECTS, dialect_for
from celery_outbox.storage.tables import VERSION, Tables

__all__ = ["VERSION", "compare", "create", "drop", "script", "verify"]

_CREATE = "run `celery -A <your app> outbox schema create`"


def create(engine: Engine, tables: Tables) -> None:
    """Create what is missing, in one transaction. Safe to repeat.

    Raises `SchemaError` if tables are there that belong to another version.
    """
    dialect = dialect_for(engine.dialect.name)
    dialect.check(engine)
    dialect.prepare(engine)
    with engine.begin() as connection:
        tables.metadata.create_all(connection, tables=tables.all())
        # Empty where a migration has made the table.
        if connection.execute(select(tables.version.c.version)).scalar() is None:
            connection.execute(insert(tables.version).values(version=VERSION))
    compare(engine, tables)


def drop(engine: Engine, tables: Tables) -> None:
    """Drop the tables, with everything in them."""
    with engine.begin() as connection:
        tables.metadata.drop_all(connection, tables=tables.all())


def script(tables: Tables, dialect: str) -> str:
    """Return the SQL that creates the tables, for a dialect by name, without a connection."""
    if dialect not in DIALECTS:
        raise ConfigurationError(f"dialect {dialect!r} is unknown: {', '.join(sorted(DIALECTS))}")
    statements: list[str] = []

    def write(item: SchemaItem, *_: object, **__: object) -> None:
        compiled = item.compile(  # type: ignore[attr-defined]
            dialect=engine.dialect, compile_kwargs={"literal_binds": True}
        )
        statements.append(str(compiled).strip())

    engine = create_mock_engine(f"{dialect}://", write)
    tables.metadata.create_all(engine, tables=tables.all(), checkfirst=False)
    return ";\n\n".join(statements) + ";\n"


def verify(engine: Engine, tables: Tables) -> None:
    """Raise `SchemaError` unless all tables and columns are there, in the right version.

    Raises SQLAlchemy's `DBAPIError` when the database can't be asked.
    """
    dialect_for(engine.dialect.name).check(engine)
    compare(engine, tables)


def compare(engine: Engine, tables: Tables) -> None:
    """Raise `SchemaError` unless the tables are as this release needs them. Only reads."""
    inspector = inspect(engine)
    database = engine.url.render_as_string(hide_password=True)
    for table in tables.all():
        if not inspector.has_table(table.name, schema=table.schema):
            raise SchemaError(f"table {table.fullname!r} is missing in {database}: {_CREATE}")
        found = {column["name"] for column in inspector.get_columns(table.name, table.schema)}
        if absent := [column.name for column in table.columns if column.name not in found]:
            raise SchemaError(
                f"table {table.fullname!r} in {database} has no column {absent[0]!r}: it belongs "
                "to something else, or to another version; give Outbox(…, prefix=…) or migrate it"
            )
    try:
        with engine.connect() as connection:
            version = connection.execute(select(tables.version.c.version)).scalar()
    except DBAPIError as exc:
        if exc.connection_invalidated:
            raise
        raise SchemaError(f"the schema version in {database} can't be read: {exc.orig}") from exc
    if version is None:
        raise SchemaError(f"{tables.version.fullname!r} in {database} is empty: {_CREATE}")
    if version != VERSION:
        raise SchemaError(
            f"the tables in {database} are of version {version}, this release needs {VERSION}: "
            + (_CREATE if version < VERSION else "upgrade celery_outbox here")
        )
