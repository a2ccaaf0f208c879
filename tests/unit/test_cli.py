"""``celery -A <app> outbox …`` as far as one process tells."""

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result

from celery_outbox.cli import outbox as command
from tests.unit import wire
from tests.unit.conftest import MakeShop
from tests.unit.shop import Shop

Run = Callable[..., Result]


def run(app: Celery, *words: str) -> Result:
    """Run the command as `celery -A app outbox` does."""
    context = CLIContext(app=app, no_color=True, workdir=None, quiet=False)
    return CliRunner().invoke(command, list(words), obj=context, catch_exceptions=False)


def table_names(shop: Shop) -> set[str]:
    return set(sa.inspect(shop.outbox.engine).get_table_names())


@pytest.fixture
def bare_shop(make_shop: MakeShop, database_url: str) -> Shop:
    return make_shop(database_url, tables=False)


def test_the_command_is_one_of_celerys() -> None:
    from importlib.metadata import entry_points

    (found,) = entry_points(group="celery.commands", name="outbox")
    assert found.load() is command


@pytest.mark.parametrize("words", [["--help"], ["relay", "--help"], ["schema", "--help"]])
def test_help(sqlite_shop: Shop, words: list[str]) -> None:
    result = run(sqlite_shop.app, *words)
    assert result.exit_code == 0
    assert "Usage:" in result.output


# schema


def test_schema_create_makes_the_tables_and_names_them(bare_shop: Shop) -> None:
    """P18."""
    result = run(bare_shop.app, "schema", "create")
    assert result.exit_code == 0, result.output
    assert table_names(bare_shop) >= {
        "outbox",
        "inbox",
        "outbox_beat",
        "outbox_relay",
        "outbox_schema",
    }
    assert (
        "outbox, outbox_local, inbox, outbox_dead_letter, outbox_beat, outbox_relay, outbox_schema"
        in result.output
    )
    bare_shop.outbox.verify_schema()


def test_schema_create_may_be_repeated_and_keeps_messages(bare_shop: Shop) -> None:
    run(bare_shop.app, "schema", "create")
    bare_shop.notify.delay("m")
    assert run(bare_shop.app, "schema", "create").exit_code == 0
    assert bare_shop.stored() == ["m"]


def test_schema_verify_says_what_is_missing_and_then_nothing(bare_shop: Shop) -> None:
    result = run(bare_shop.app, "schema", "verify")
    assert result.exit_code == 1
    assert "'outbox' is missing" in result.output
    assert "schema create" in result.output
    run(bare_shop.app, "schema", "create")
    result = run(bare_shop.app, "schema", "verify")
    assert result.exit_code == 0
    assert "as this release needs them" in result.output


def test_schema_verify_tells_of_another_version(shop: Shop) -> None:
    with shop.outbox.engine.begin() as connection:
        connection.execute(sa.update(shop.outbox.tables.version).values(version=99))
    result = run(shop.app, "schema", "verify")
    assert result.exit_code == 1
    assert "version 99" in result.output


def test_schema_script_prints_sql_that_verify_accepts(bare_shop: Shop) -> None:
    result = run(bare_shop.app, "schema", "script")
    assert result.exit_code == 0
    assert not table_names(bare_shop) & {"outbox", "inbox"}
    with bare_shop.outbox.engine.begin() as connection:
        for statement in result.output.split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)
    assert run(bare_shop.app, "schema", "verify").exit_code == 0


def test_schema_script_for_another_dialect_needs_no_such_database(sqlite_shop: Shop) -> None:
    result = run(sqlite_shop.app, "schema", "script", "--dialect", "postgresql")
    assert result.exit_code == 0
    assert "BIGSERIAL" in result.output
    assert "TIMESTAMP WITH TIME ZONE" in result.output


def test_schema_script_for_an_unknown_dialect_names_the_known(sqlite_shop: Shop) -> None:
    result = run(sqlite_shop.app, "schema", "script", "--dialect", "mysq")
    assert result.exit_code == 1
    assert "postgresql, sqlite" in result.output


@pytest.mark.parametrize("verb", ["create", "verify"])
def test_a_database_that_is_away_is_told_in_a_sentence(make_shop: MakeShop, verb: str) -> None:
    url = "postgresql+psycopg://nobody@127.0.0.1:9/none"
    shop = make_shop(url, tables=False)
    result = run(shop.app, "schema", verb)
    assert result.exit_code == 3
    assert result.output.startswith("Error: the database says:")
    assert "Traceback" not in result.output


# relay


def test_relay_once_moves_a_batch_and_says_what_became_of_it(shop: Shop) -> None:
    for label in ("1", "2", "3"):
        shop.notify.delay(label)
    result = run(shop.app, "relay", "--once")
    assert result.exit_code == 0, result.output
    assert "claimed 3, confirmed 3, retried 0, dead 0, released 0" in result.output
    assert shop.stored() == []
    assert shop.published() == ["shop.notify"] * 3


def test_relay_once_moves_no_more_than_a_batch(make_shop: MakeShop, sqlite_url: str) -> None:
    shop = make_shop(sqlite_url, outbox_batch_size=2)
    for label in ("1", "2", "3"):
        shop.notify.delay(label)
    assert "confirmed 2" in run(shop.app, "relay", "--once").output
    assert shop.stored() == ["3"]


def test_relay_once_with_nothing_to_do(sqlite_shop: Shop) -> None:
    result = run(sqlite_shop.app, "relay", "--once")
    assert result.exit_code == 0
    assert "claimed 0" in result.output


def test_relay_once_leaves_what_is_not_due(sqlite_shop: Shop) -> None:
    """P11."""
    sqlite_shop.notify.apply_async(("later",), countdown=3600)
    assert "claimed 0" in run(sqlite_shop.app, "relay", "--once").output
    assert sqlite_shop.stored() == ["later"]


def test_relay_refuses_to_start_without_its_tables(bare_shop: Shop) -> None:
    result = run(bare_shop.app, "relay", "--once")
    assert result.exit_code == 1
    assert "'outbox' is missing" in result.output


def test_relay_once_tells_that_the_database_is_away(make_shop: MakeShop) -> None:
    """As every command does: 3 is no answer, and no traceback."""
    shop = make_shop("postgresql+psycopg://nobody:s3cret@127.0.0.1:9/none", tables=False)
    result = run(shop.app, "relay", "--once")
    assert result.exit_code == 3
    assert "Error: the database says:" in result.output
    assert "s3cret" not in result.output


@pytest.mark.parametrize(
    "words", [["relay", "--once"], ["schema", "create"], ["schema", "verify"], ["schema", "script"]]
)
def test_every_command_tells_of_an_app_without_an_outbox(words: list[str]) -> None:
    app = Celery("bare", broker=f"recording://{wire.new_name()}", set_as_current=False)
    result = run(app, *words)
    assert result.exit_code == 1
    assert "'bare' has no Outbox" in result.output


@pytest.mark.parametrize(
    "words", [["relay", "--once"], ["schema", "create"], ["schema", "verify"], ["schema", "script"]]
)
def test_every_command_tells_of_a_wrong_setting(
    make_shop: MakeShop, sqlite_url: str, words: list[str]
) -> None:
    shop: Any = make_shop(sqlite_url, tables=False, outbox_batch_sise=5)
    result = run(shop.app, *words)
    assert result.exit_code == 1
    assert "did you mean outbox_batch_size?" in result.output
