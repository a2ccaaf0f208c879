"""The parts of a Markdown page that can be checked."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(DOCS.rglob("*.md")),
]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^]]*\]\(([^)]+)\)")
_ROW = re.compile(r"^\|(.+)\|$", re.MULTILINE)


@dataclass(frozen=True)
class Listing:
    """A fenced block of code, and where it stands."""

    page: Path
    line: int
    language: str
    code: str

    @property
    def place(self) -> str:
        """Where to look when it fails."""
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    """Return the page's path in the clone."""
    return str(page.relative_to(ROOT))


def listings(page: Path, language: str) -> list[Listing]:
    """Return the page's listings in a language."""
    text = page.read_text()
    return [
        Listing(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in _FENCE.finditer(text)
        if match[1] == language
    ]


def links(page: Path) -> Iterator[str]:
    """Return where the page's links lead."""
    for match in _LINK.finditer(_FENCE.sub("", page.read_text())):
        yield match[1]


def anchors(page: Path) -> set[str]:
    """Return what GitHub makes of the page's headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows(page: Path) -> Iterator[list[str]]:
    """Return the rows of the page's tables, cell by cell."""
    for match in _ROW.finditer(page.read_text()):
        yield [cell.strip() for cell in match[1].split("|")]
