"""What the package's modules say of themselves is true."""

import importlib
import pkgutil
import re
import subprocess
import sys
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


def test_the_command_line_stays_light() -> None:
    """`celery` imports it at each start, of whatever command."""
    code = (
        "import sys, celery_outbox.cli; "
        "print([name for name in ('redis', 'psycopg', 'boto3') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
