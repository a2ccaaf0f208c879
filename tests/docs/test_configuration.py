"""The reference of settings is complete and true."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from celery_outbox import pytest_plugin
from celery_outbox.config import PREFIX, Config
from celery_outbox.outbox.ordering import OPTION
from celery_outbox.relay.loop import Tally
from celery_outbox.storage.tables import Tables
from tests.docs.markdown import DOCS, PAGES, name_of, rows

REFERENCE = DOCS / "configuration.md"

_DEFAULTS = {
    cells[0].strip("`"): ast.literal_eval(cells[1].strip("`"))
    for cells in rows(REFERENCE)
    if cells[0].startswith(f"`{PREFIX}")
}
#: What begins like a setting and is none.
_TABLES = {table.name for table in Tables().all()}
_FIELDS = {
    f"{PREFIX}{name}"
    for name in (
        *("event", "count", "task", "task_id", "error", "destination", "table", "key", "state"),
        *(field.name for field in fields(Tally)),
    )
}
_FIXTURES = {name for name in vars(pytest_plugin) if name.startswith(PREFIX)}


def test_every_setting_is_described_with_its_default() -> None:
    assert {PREFIX + field.name: field.default for field in fields(Config)} == _DEFAULTS


def test_a_default_is_written_as_python_shows_it() -> None:
    """1.0 for seconds, 500 for a number of messages: what kind of number it is can be seen."""
    for field in fields(Config):
        assert type(_DEFAULTS[PREFIX + field.name]) is type(field.default), field.name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_names_no_setting_that_does_not_exist(page: Path) -> None:
    named = set(re.findall(rf"\b{PREFIX}[a-z_]+\b", page.read_text()))
    assert named - _TABLES - _FIXTURES - _FIELDS - {OPTION} <= set(_DEFAULTS)


def test_the_reference_says_what_the_package_does_with_a_setting_that_does_not_exist() -> None:
    with pytest.raises(Exception, match="did you mean outbox_batch_size"):
        Config.read({}, ["outbox_bach_size"])
