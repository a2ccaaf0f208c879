"""What is true of the dialects and the tables without a database, and of the contract itself."""

import importlib
import pkgutil

import pytest
from sqlalchemy import MetaData

from celery_outbox.errors import ConfigurationError
from celery_outbox.storage import schema
from celery_outbox.storage.dialects import DIALECTS, dialect_for
from celery_outbox.storage.tables import Tables
from celery_outbox.testing import contract
from celery_outbox.testing.contract.schema import NAMES
from tests.contract.conftest import DATABASES


def test_every_dialect_is_under_contract() -> None:
    # SQL Server's is `test_mssql`, where no server is named.
    assert set(DATABASES) | {"mssql"} == set(DIALECTS)


def test_an_unknown_database_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"'oracle'.*postgresql, sqlite"):
        dialect_for("oracle")


def test_a_script_for_an_unknown_dialect_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"'mysq'.*postgresql, sqlite"):
        schema.script(Tables(), "mysq")


def test_an_empty_metadata_is_taken_too() -> None:
    own = MetaData()
    Tables(own)
    assert set(own.tables) >= NAMES


def test_no_name_of_the_contract_hides_another() -> None:
    """Neither test nor fixture: all of them are imported into one module."""
    for found in pkgutil.iter_modules(contract.__path__, f"{contract.__name__}."):
        module = importlib.import_module(found.name)
        for name, value in vars(module).items():
            is_fixture = type(value) is type(contract.store)
            if is_fixture or name.startswith("test_"):
                assert getattr(contract, name) is value, f"{found.name}.{name}"
