"""The pytest plugin of celery_outbox: fixtures, which cost nothing where no test asks for them.

pytest loads it at every start: what the fixtures do is in `celery_outbox.testing`, which they import
when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sqlalchemy import MetaData

    from celery_outbox import Outbox, Tally
    from celery_outbox.testing import Faults, Run, Staged, Time
    from celery_outbox.testing.contract import Database

# Before they are imported.
pytest.register_assert_rewrite("celery_outbox.testing.contract")

_URL = "--outbox-database-url"
_INI = "celery_outbox_app"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("celery_outbox")
    group.addoption(
        _URL, metavar="URL", help="an empty database for celery_outbox.testing.contract"
    )
    parser.addini(_INI, "the Outbox that is tested, or its Celery app, like 'shop:outbox'")


@pytest.fixture(scope="session")
def outbox_under_test(pytestconfig: pytest.Config) -> Outbox:
    """The Outbox that is tested: override it, or set ``celery_outbox_app = shop:outbox``."""
    address = str(pytestconfig.getini(_INI) or "")
    if not address:
        pytest.fail(
            "celery_outbox does not know the Outbox under test. Either set in pytest's "
            f"configuration\n\n    {_INI} = shop:outbox\n\nor override the fixture in "
            'conftest.py\n\n    @pytest.fixture(scope="session")\n    def outbox_under_test():\n'
            "        from shop import outbox\n        return outbox",
            pytrace=False,
        )
    from celery_outbox import ConfigurationError
    from celery_outbox.testing import outbox_named

    try:
        return outbox_named(address)
    except ConfigurationError as exc:
        pytest.fail(f"{_INI}: {exc}", pytrace=False)


@pytest.fixture(scope="session")
def outbox_schema(outbox_under_test: Outbox) -> Iterator[Outbox]:
    """The Outbox, with tables that are made anew once a session, and dropped at its end."""
    from celery_outbox.testing import rebuild

    rebuild(outbox_under_test)
    yield outbox_under_test
    outbox_under_test.drop_schema()


@pytest.fixture
def outbox_clean(request: pytest.FixtureRequest) -> Iterator[Outbox]:
    """The Outbox, with empty tables and, if that is in memory, an empty broker.

    Nothing is published by itself, whatever ``outbox_publish_after_commit`` says.
    """
    from celery_outbox.testing import by_hand, empty

    outbox: Outbox
    if "outbox_in_memory" in request.fixturenames:
        outbox = request.getfixturevalue("outbox_in_memory")
    else:
        outbox = request.getfixturevalue("outbox_schema")
    with by_hand(outbox):
        if "outbox_in_memory" not in request.fixturenames:
            empty(outbox)
        yield outbox


@pytest.fixture
def staged(outbox_clean: Outbox) -> Staged:
    """Tells which messages a block stages; see `celery_outbox.testing.Staged`."""
    from celery_outbox.testing import Staged

    return Staged(outbox_clean)


@pytest.fixture
def relay_all(outbox_clean: Outbox) -> Callable[[], Tally]:
    """Move what is due to the broker."""
    return outbox_clean.relay_all


@pytest.fixture
def run_until_quiet(outbox_clean: Outbox) -> Callable[..., Run]:
    """Relay and execute, here, until nothing is left; see `celery_outbox.testing.run_until_quiet`."""
    from celery_outbox.testing import run_until_quiet

    return partial(run_until_quiet, outbox_clean)


@pytest.fixture
def outbox_time(outbox_clean: Outbox) -> Time:
    """Lets time pass for what is stored; see `celery_outbox.testing.Time`."""
    from celery_outbox.testing import Time

    return Time(outbox_clean)


@pytest.fixture
def outbox_faults(outbox_clean: Outbox) -> Faults:
    """What a broker or a kill may do; see `celery_outbox.testing.Faults`."""
    from celery_outbox.testing import Faults

    return Faults(outbox_clean)


@pytest.fixture(scope="session")
def outbox_metadata() -> MetaData | None:
    """The app's own tables, for `outbox_in_memory` to create: override it."""
    return None


@pytest.fixture
def outbox_in_memory(
    outbox_under_test: Outbox, outbox_metadata: MetaData | None
) -> Iterator[Outbox]:
    """The Outbox, its database and its broker in memory, for this test."""
    from celery_outbox.testing import in_memory

    with in_memory(outbox_under_test, outbox_metadata) as outbox:
        yield outbox


@pytest.fixture
def outbox_contract_database(pytestconfig: pytest.Config) -> Iterator[Database]:
    """The database of `celery_outbox.testing.contract`: override it, or say --outbox-database-url."""
    url = pytestconfig.getoption(_URL)
    if not url:
        pytest.fail(
            f"the contract needs an empty database: say {_URL} URL, or override the fixture "
            "outbox_contract_database",
            pytrace=False,
        )
    from celery_outbox.errors import ConfigurationError
    from celery_outbox.testing.contract import Database

    try:
        with Database.at(url).emptied() as database:
            yield database
    except ConfigurationError as exc:
        pytest.fail(str(exc), pytrace=False)
