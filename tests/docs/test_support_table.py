"""The README's table says what a test run was run on."""

import json
import sys
from pathlib import Path

import pytest

from tests.support.processes import Process
from tests.support.record import LIBRARIES, SYSTEMS, system_of
from tests.support.support_table import BEGIN, END, README, claims, not_passed, written

EMULATOR = system_of("azureservicebus://k:s@localhost")
VERSIONS = dict.fromkeys(["Python", *LIBRARIES], "1.2")
POSTGRESQL = {"PostgreSQL": {"contract": 5, "faults": 2}}
RECORD = {
    "passed": {**POSTGRESQL, EMULATOR: {"servicebus": 1}},
    "versions": {"PostgreSQL": "15.1", **VERSIONS},
}
PAGE = f"before\n{BEGIN}\n| old |\n{END}\nafter"


def test_what_is_written_is_what_has_passed() -> None:
    page = written(PAGE, RECORD)
    assert claims(page) == {
        ("PostgreSQL", "contract"),
        ("PostgreSQL", "faults"),
        (EMULATOR, "servicebus"),
    }
    assert "| PostgreSQL | 15.1 |  | 5 |  | 2 |  |" in page
    assert page.startswith("before\n")
    assert page.endswith(f"{END}\nafter")
    assert written(page, RECORD) == page
    assert list(not_passed(page, RECORD)) == []


def test_other_numbers_and_versions_are_no_fault() -> None:
    later = {
        "passed": {"PostgreSQL": {"contract": 6, "faults": 1}, EMULATOR: {"servicebus": 9}},
        "versions": {"PostgreSQL": "15.2", **VERSIONS},
    }
    assert list(not_passed(written(PAGE, RECORD), later)) == []


def test_what_a_run_did_not_pass_is_found() -> None:
    less = {"passed": {"PostgreSQL": {"contract": 5, "faults": 0}}, "versions": VERSIONS}
    assert list(not_passed(written(PAGE, RECORD), less)) == [
        f"README.md: no test of tests/servicebus has passed on {EMULATOR}",
        "README.md: no test of tests/faults has passed on PostgreSQL",
    ]


def test_the_real_one_shows_what_its_stand_in_would() -> None:
    real = {"passed": {**POSTGRESQL, "Azure Service Bus": {"servicebus": 1}}}
    assert list(not_passed(written(PAGE, RECORD), real)) == []


def test_the_readme_names_what_is_known() -> None:
    """And what a reader looks for is there."""
    systems = {system for system, _ in claims(README.read_text())}
    assert systems <= set(SYSTEMS)
    assert systems >= {EMULATOR, "PostgreSQL", "local queues", "kombu's memory"}


@pytest.mark.parametrize(
    ("url", "system"),
    [
        ("postgresql+psycopg://u@h:1/d", "PostgreSQL"),
        ("sqla+postgresql+psycopg://u@h/d", "kombu's SQLAlchemy"),
        ("outbox://", "local queues"),
        ("azureservicebus://real", "Azure Service Bus"),
        ("azureservicebus://other", EMULATOR),
    ],
)
def test_a_system_is_known_by_its_url(
    monkeypatch: pytest.MonkeyPatch, url: str, system: str
) -> None:
    monkeypatch.setenv("CELERY_OUTBOX_SERVICEBUS_URL", "azureservicebus://real")
    assert system_of(url) == system


CONFTEST = """
from pathlib import Path
from tests.support.record import Recorder

def pytest_configure(config):
    config.pluginmanager.register(Recorder(Path("record.json"), Path(__file__).parent))
"""
SUITE = """
import pytest
from tests.support.record import used

@pytest.fixture(scope="module", params=["postgresql://", "sqlite://"])
def place(request):
    used(request.param)

def test_passes(place):
    used("amqp://")

def test_shares_it(place): ...

def test_fails(place):
    used("redis://")
    assert False

def test_needs_nothing(): ...
"""


def test_a_run_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "contract").mkdir()
    (tmp_path / "contract" / "test_it.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "contract"]
    environment = {"PYTHONPATH": str(README.parent)}
    with Process(command, cwd=tmp_path, env=environment) as run:
        assert run.wait() == 1, run.log
        assert "2 failed, 5 passed" in run.log
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["passed"] == {
        "PostgreSQL": {"contract": 2},
        "SQLite": {"contract": 2},
        "RabbitMQ": {"contract": 2},
    }
    assert record["versions"].keys() >= {"PostgreSQL", "SQLite", "RabbitMQ", "Python", "celery"}
    assert "Redis" not in record["versions"]
