"""``celery -A <app> outbox doctor``: what it says, and its exit codes."""

import json

import pytest

from tests.unit.conftest import MakeShop
from tests.unit.shop import Shop
from tests.unit.test_cli import run
from tests.unit.test_cli_storage import answer, fill

#: Those for which the shop's own broker is broker enough.
ONLY = ["--check", "database", "--check", "schema", "--check", "dead-letters"]


def test_all_is_well(shop: Shop) -> None:
    """P18."""
    result = run(shop.app, "doctor", *ONLY)
    assert result.exit_code == 0, result.output
    assert "0 error(s), 0 warning(s), 3 ok" in result.output
    assert run(shop.app, "doctor", "--quiet", "--strict", *ONLY).output == ""


def test_a_warning_is_an_exit_code_on_request(shop: Shop) -> None:
    fill(shop)
    result = run(shop.app, "doctor", "--quiet", *ONLY)
    assert result.exit_code == 0
    assert "warning  dead-letters: 1 dead letter(s)" in result.output
    assert "-> See `outbox dead-letters list`" in result.output
    assert run(shop.app, "doctor", "--strict", *ONLY).exit_code == 1


def test_an_error_is_an_exit_code(shop: Shop) -> None:
    shop.outbox.drop_schema()
    result = run(shop.app, "doctor", "--json", *ONLY)
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert said["level"] == "error"
    assert [(each["check"], each["level"]) for each in said["findings"]] == [
        ("database", "ok"),
        ("schema", "error"),
        ("dead-letters", "skipped"),
    ]
    assert said["findings"][1]["advice"]


def test_a_database_that_is_away_is_an_exit_code_of_its_own(make_shop: MakeShop) -> None:
    shop = make_shop("postgresql+psycopg://nobody@127.0.0.1:9/none", tables=False)
    assert run(shop.app, "doctor", *ONLY).exit_code == 3


def test_a_check_that_does_not_exist(sqlite_shop: Shop) -> None:
    result = run(sqlite_shop.app, "doctor", "--check", "weather")
    assert result.exit_code == 2
    assert "there is no check 'weather'" in result.output
    assert "clocks" in result.output


def test_json_names_the_worst_level(sqlite_shop: Shop) -> None:
    assert answer(sqlite_shop, "doctor", *ONLY)["level"] == "ok"


@pytest.mark.parametrize("words", [["doctor", "--help"]])
def test_help(sqlite_shop: Shop, words: list[str]) -> None:
    assert "what to do" in run(sqlite_shop.app, *words).output
