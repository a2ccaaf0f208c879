"""What the pages name exists: other pages, commands, scripts, functions."""

import importlib
import re
from pathlib import Path
from typing import Any

import click
import pytest

from celery_outbox.cli import outbox
from tests.docs.markdown import DOCS, PAGES, ROOT, anchors, links, name_of

every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{name_of(page)}: {link}"


@every_page
def test_commands_exist(page: Path) -> None:
    """``celery -A shop outbox schema create|verify --option``."""
    for line in re.findall(r"celery -A \S+ outbox ?([^`\n]*)", page.read_text()):
        _check_command(outbox, line.split())


def _check_command(command: Any, words: list[str]) -> None:
    if not words or words[0] in ("...", "…"):
        return
    if words[0].startswith("-"):
        options = {option for param in command.params for option in param.opts}
        assert words[0] in options, f"{command.name} has no {words[0]}"
        return
    if not isinstance(command, click.Group):
        arguments = [param for param in command.params if isinstance(param, click.Argument)]
        assert arguments, f"{command.name} has no {words[0]}"
        _check_command(command, words[1:])
        return
    for name in words[0].split("|"):
        assert name in command.commands, f"{command.name} has no {name}"
        _check_command(command.commands[name], words[1:])


@every_page
def test_scripts_exist(page: Path) -> None:
    for name in re.findall(r"\bscripts/([\w-]+)", page.read_text()):
        assert (ROOT / "scripts" / name).is_file(), f"{name_of(page)}: scripts/{name}"


@every_page
def test_names_of_the_package_exist(page: Path) -> None:
    """`celery_outbox.relay.loop.Relay.once`, as docs/journeys.md names what does each step."""
    for name in re.findall(r"`(celery_outbox(?:\.\w+)+)(?:\(.*?\))?`", page.read_text()):
        if name != "celery_outbox.relay":  # also the name of the relay's task
            _resolve(name)


def _resolve(name: str) -> None:
    words = name.split(".")
    for end in range(len(words), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(words[:end]))
        except ModuleNotFoundError:
            continue
        for word in words[end:]:
            # __trace__ is a property, which the class itself answers.
            found = getattr(found, word)
        return
    raise AssertionError(name)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 165


def test_the_readme_leads_to_every_page() -> None:
    found = {(ROOT / link.partition("#")[0]).resolve() for link in links(ROOT / "README.md")}
    assert set(DOCS.glob("*.md")) <= found


@pytest.mark.parametrize("page", sorted((DOCS / "decisions").iterdir()), ids=name_of)
def test_a_decision_says_why_and_until_when(page: Path) -> None:
    headings = re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE)
    assert headings == ["Context", "Decision", "Consequences", "Revisit when"]
