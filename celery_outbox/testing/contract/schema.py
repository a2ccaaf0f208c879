"""The schema: create, verify, drop, script, and the tables in the app's own MetaData."""

import pytest
from sqlalchemy import Column, Engine, Integer, MetaData, String, Table, inspect, update

from celery_outbox.errors import SchemaError
from celery_outbox.storage import schema
from celery_outbox.storage.store import Store
from celery_outbox.storage.tables import Tables
from celery_outbox.testing.contract.database import Database
from celery_outbox.testing.contract.outgoing import claim, ids, stage

NAMES = {"outbox", "inbox", "outbox_dead_letter", "outbox_beat", "outbox_relay", "outbox_schema"}


def run_script(engine: Engine, script: str) -> None:
    with engine.begin() as connection:
        for statement in script.split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)


def use(engine: Engine, tables: Tables) -> None:
    """Use the tables once."""
    store = Store(engine, tables)
    stage(store, "m")
    assert ids(claim(store)) == ["m"]
    assert store.counts()["in_flight"] == 1


def test_create_then_verify(engine: Engine) -> None:
    tables = Tables()
    schema.create(engine, tables)
    schema.verify(engine, tables)
    assert set(inspect(engine).get_table_names()) >= NAMES


def test_create_may_be_repeated_and_keeps_what_is_there(store: Store) -> None:
    stage(store, "m")
    schema.create(store.engine, store.tables)
    schema.verify(store.engine, store.tables)
    assert ids(claim(store)) == ["m"]


def test_create_adds_what_is_missing(store: Store) -> None:
    stage(store, "m")
    store.tables.inbox.drop(store.engine)
    with pytest.raises(SchemaError, match="'inbox' is missing"):
        schema.verify(store.engine, store.tables)
    schema.create(store.engine, store.tables)
    schema.verify(store.engine, store.tables)
    assert ids(claim(store)) == ["m"]


def test_drop_leaves_nothing(engine: Engine) -> None:
    tables = Tables()
    schema.create(engine, tables)
    schema.drop(engine, tables)
    assert not NAMES & set(inspect(engine).get_table_names())
    schema.drop(engine, tables)


def test_the_script_makes_what_verify_accepts(engine: Engine, database: Database) -> None:
    """P18."""
    tables = Tables()
    run_script(engine, schema.script(tables, database.name))
    schema.verify(engine, tables)
    use(engine, tables)


def test_the_script_makes_what_create_makes(
    engine: Engine, database: Database, request: pytest.FixtureRequest
) -> None:
    def description() -> object:
        inspector = inspect(engine)
        return {
            name: (
                [(c["name"], str(c["type"]), c["nullable"]) for c in inspector.get_columns(name)],
                inspector.get_pk_constraint(name)["constrained_columns"],
                sorted((i["name"], i["column_names"]) for i in inspector.get_indexes(name)),
            )
            for name in NAMES
        }

    tables = Tables()
    schema.create(engine, tables)
    created = description()
    schema.drop(engine, tables)
    run_script(engine, schema.script(tables, database.name))
    assert description() == created


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_missing_table_is_named_with_what_to_do(engine: Engine, name: str) -> None:
    tables = Tables()
    schema.create(engine, tables)
    tables.metadata.tables[name].drop(engine)
    with pytest.raises(SchemaError, match=rf"'{name}' is missing.*outbox schema create"):
        schema.verify(engine, tables)


def test_a_foreign_table_of_the_same_name_is_told_apart(engine: Engine) -> None:
    foreign = MetaData()
    Table("inbox", foreign, Column("id", Integer, primary_key=True), Column("subject", String(9)))
    foreign.create_all(engine)
    tables = Tables()
    for action in (schema.create, schema.verify):
        with pytest.raises(SchemaError, match=r"'inbox'.*no column 'key'.*prefix"):
            action(engine, tables)


def test_an_older_version_is_told_to_create(store: Store) -> None:
    """P19."""
    with store.engine.begin() as connection:
        connection.execute(update(store.tables.version).values(version=schema.VERSION - 1))
    with pytest.raises(SchemaError, match=r"version 0, this release needs 1: .*schema create"):
        schema.verify(store.engine, store.tables)


def test_a_newer_version_is_told_to_upgrade(store: Store) -> None:
    """P19."""
    with store.engine.begin() as connection:
        connection.execute(update(store.tables.version).values(version=schema.VERSION + 1))
    with pytest.raises(SchemaError, match=r"version 2, this release needs 1: upgrade"):
        schema.verify(store.engine, store.tables)


def test_tables_without_a_version_are_told_to_create(store: Store) -> None:
    with store.engine.begin() as connection:
        connection.execute(store.tables.version.delete())
    with pytest.raises(SchemaError, match=r"'outbox_schema'.*is empty.*schema create"):
        schema.verify(store.engine, store.tables)


def test_a_prefix_keeps_two_outboxes_apart(engine: Engine) -> None:
    one, two = Tables(prefix="one_"), Tables(prefix="two_")
    for tables in (one, two):
        schema.create(engine, tables)
        schema.verify(engine, tables)
    stage(Store(engine, one), "1")
    assert Store(engine, two).counts()["outgoing"] == 0
    use(engine, two)
    schema.drop(engine, one)
    schema.verify(engine, two)


def test_a_schema_keeps_the_tables_in_it(engine: Engine, database: Database) -> None:
    if database.schema is None:
        pytest.skip("it has no schemas")
    with engine.begin() as connection:
        for statement in database.prepare_schema:
            connection.exec_driver_sql(statement)
    tables = Tables(schema=database.schema, prefix="x_")
    with pytest.raises(SchemaError, match=rf"'{database.schema}.x_outbox' is missing"):
        schema.verify(engine, tables)
    schema.create(engine, tables)
    schema.verify(engine, tables)
    assert inspect(engine).get_table_names() == []
    use(engine, tables)
    schema.drop(engine, tables)
    run_script(engine, schema.script(tables, database.name))
    schema.verify(engine, tables)


def test_the_apps_own_metadata_makes_the_tables(engine: Engine) -> None:
    """As Alembic sees them; the version comes with its table."""
    own = MetaData()
    Table("customer", own, Column("id", Integer, primary_key=True))
    tables = Tables(own)
    assert {"customer", *NAMES} <= set(own.tables)
    own.create_all(engine)
    schema.verify(engine, tables)
    own.create_all(engine)
    use(engine, tables)


def test_create_and_drop_leave_the_apps_own_tables_alone(engine: Engine) -> None:
    own = MetaData()
    customer = Table("customer", own, Column("id", Integer, primary_key=True))
    tables = Tables(own)
    schema.create(engine, tables)
    assert not inspect(engine).has_table("customer")
    customer.create(engine)
    schema.drop(engine, tables)
    assert inspect(engine).has_table("customer")
