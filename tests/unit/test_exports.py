"""What the package's modules say of themselves is true."""

import importlib
import pkgutil
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import celery_outbox
from celery_outbox import errors

MODULES = [
    "celery_outbox",
    *(found.name for found in pkgutil.walk_packages(celery_outbox.__path__, "celery_outbox.")),
]


def module_of(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize("name", MODULES)
def test_all_names_what_is_there(name: str) -> None:
    module = module_of(name)
    exported = getattr(module, "__all__", [])
    assert len(set(exported)) == len(exported)
    for each in exported:
        assert hasattr(module, each), each


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is(name: str) -> None:
    assert (module_of(name).__doc__ or "").strip()


@pytest.mark.parametrize("name", celery_outbox.__all__)
def test_every_public_name_says_what_it_is(name: str) -> None:
    assert (getattr(celery_outbox, name).__doc__ or "").strip()


def test_every_error_is_public() -> None:
    assert set(errors.__all__) <= set(celery_outbox.__all__)


def drawn_tree() -> dict[str, str | None]:
    """The tree in the docstring of errors, as child → parent."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"^((?:│   |    |├── |└── )*)(\w+)(?: .*)?$", line):
            lead, name = found.groups()
            # Indented once as a literal block.
            depth = len(lead) // 4 - 1
            if depth < 0:
                continue
            path[depth:] = [name]
            parents[name] = path[depth - 1] if depth else None
    return parents


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    real: dict[str, str | None] = {"OutboxError": None}
    for name in errors.__all__:
        kind = getattr(errors, name)
        if kind is not errors.OutboxError:
            (parent,) = (base for base in kind.__bases__ if issubclass(base, errors.OutboxError))
            real[name] = parent.__name__
    assert drawn_tree() == real


@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_without_a_message_says_its_docstring(name: str) -> None:
    kind = getattr(errors, name)
    assert str(kind()) == kind.__doc__.strip()
    assert str(kind("my own")) == "my own"


HEAVY = {"celery", "kombu", "sqlalchemy", "redis", "psycopg", "prometheus_client", "pytest"}


def loaded_by(code: str) -> set[str]:
    """What a new process has loaded of the package, and of what is heavy, after some code."""
    look = "import sys; print('loaded:', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{look}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    names = done.stdout.rpartition("loaded:")[2].split()
    return {name for name in names if name in HEAVY or name.partition(".")[0] == "celery_outbox"}


def test_the_package_loads_nothing_by_itself() -> None:
    assert loaded_by("import celery_outbox; dir(celery_outbox)") == {"celery_outbox"}


def test_an_error_loads_no_more_than_the_errors() -> None:
    loaded = loaded_by("from celery_outbox import OutboxError")
    assert loaded - {"kombu"} == {"celery_outbox", "celery_outbox.errors"}


def test_the_command_line_stays_light() -> None:
    """`celery` imports it at each start, of whatever command."""
    loaded = loaded_by("import celery_outbox.cli")
    assert loaded & HEAVY == {"celery", "kombu"}
    outside = {name for name in loaded if not name.startswith("celery_outbox.cli")}
    assert outside == {"celery", "kombu", "celery_outbox"}


def test_the_start_of_pytest_stays_light(tmp_path: Path) -> None:
    """It loads the plugin in every project, and before it measures coverage."""
    start = ["-p", "no:cacheprovider", "-p", "celery_outbox.pytest_plugin", "--fixtures"]
    loaded = loaded_by(
        "import os, pytest; os.environ['PYTEST_DISABLE_PLUGIN_AUTOLOAD'] = '1'\n"
        f"os.chdir({str(tmp_path)!r}); pytest.main({start!r})"
    )
    assert loaded == {"pytest", "celery_outbox", "celery_outbox.pytest_plugin"}


def test_tests_alone_load_pytest() -> None:
    for_tests = ("celery_outbox.pytest_plugin", "celery_outbox.testing.contract")
    modules = [name for name in MODULES if not name.startswith(for_tests)]
    assert "celery_outbox.testing" in modules
    assert "pytest" not in loaded_by(f"import {', '.join(modules)}")


def test_the_entry_points_are_there() -> None:
    found = {
        (point.group, point.value)
        for point in metadata.distribution("celery-outbox").entry_points
        if point.load()
    }
    assert found == {
        ("celery.commands", "celery_outbox.cli:outbox"),
        ("celery.beat_schedulers", "celery_outbox.beat:DurableScheduler"),
        ("pytest11", "celery_outbox.pytest_plugin"),
    }


def test_a_name_that_does_not_exist_is_told_as_ever() -> None:
    with pytest.raises(AttributeError, match="'celery_outbox' has no attribute 'nothing'"):
        celery_outbox.nothing  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from celery_outbox import nothing  # noqa: F401


def test_all_that_is_public_can_be_seen() -> None:
    assert set(celery_outbox.__all__) <= set(dir(celery_outbox))
