"""Each Python listing runs, on each database, against a broker in memory."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from celery import Celery
from sqlalchemy import Connection, Engine, create_engine, delete, text

from celery_outbox import Outbox, SchemaError, durable_task
from celery_outbox.storage.store import Settlement
from tests.docs.markdown import DOCS, PAGES, ROOT, Listing, listings, name_of
from tests.support.processes import Process

#: What listings say, and a test has not.
_BROKER = '"amqp://localhost"'
_DATABASE = '"postgresql+psycopg://localhost/shop"'
_FILE = re.compile(r"# (\w+\.py)(?:, continued)?\n")
#: In a listing that is run by itself: it wants a database without tables.
_CONTRACT = "celery_outbox.testing.contract"

_WITH_PYTHON = [page for page in PAGES if listings(page, "python")]


class Folder:
    """A folder with the files that the listings of a page make, and the tests to run there."""

    def __init__(self, path: Path, database_url: str) -> None:
        self.path = path
        self._database_url = database_url
        self._count = 0

    def write(self, listing: Listing) -> str:
        """Write a listing into the file that it names; return which."""
        named = _FILE.match(listing.code)
        assert named, listing.place
        self._append(named[1], listing.code)
        return named[1]

    def add(self, listing: Listing) -> None:
        """Write a listing: into the file that it names, or into one that is run."""
        code = listing.code
        if _FILE.match(code):
            name = self.write(listing)
            if name not in ("shop.py", "conftest.py"):
                self._run(name)
        elif "def test_" in code:
            self._append(f"test_{self._number()}.py", code)
        else:
            name = f"listing_{self._number()}.py"
            self._append(name, code)
            self._run(name)

    def run(self, place: str, *arguments: str) -> str:
        """Run pytest there; return its output, and raise with it unless all pass."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull]
        env = {"PYTHONPATH": f"{self.path}{os.pathsep}{ROOT}"}
        command += ["--rootdir=.", *arguments, "."]
        with Process(command, cwd=self.path, env=env) as process:
            assert process.wait(60) == 0, f"{place}\n{process.log}"
            return process.log

    def _append(self, name: str, code: str) -> None:
        code = code.replace(_BROKER, '"memory://"').replace(_DATABASE, f'"{self._database_url}"')
        with (self.path / name).open("a") as file:
            file.write(code + "\n\n")

    def _run(self, name: str) -> None:
        module = name.removesuffix(".py")
        test = f"""
            import runpy

            def test_{module}():
                runpy.run_path({name!r}, run_name={module!r})
        """
        (self.path / f"test_{self._number()}.py").write_text(dedent(test))

    def _number(self) -> str:
        # Tests run in the order of their files' names.
        self._count += 1
        return f"{self._count:03}"


def _listings_for(file: str, page: str) -> list[Listing]:
    return [
        listing
        for listing in listings(DOCS / page, "python")
        if listing.code.startswith(f"# {file}")
    ]


@pytest.mark.parametrize("page", _WITH_PYTHON, ids=name_of)
def test_the_python_listings_of_a_page_run(page: Path, tmp_path: Path, database_url: str) -> None:
    """Those without a file of their own use the shop of the quickstart."""
    folder = Folder(tmp_path, database_url)
    here = listings(page, "python")
    if not any(listing.code.startswith("# shop.py\n") for listing in here):
        here = [*_listings_for("shop.py", "quickstart.md"), *here]
    if page.name != "testing.md":
        here = [*_listings_for("conftest.py", "testing.md"), *here]
    for listing in here:
        if _CONTRACT not in listing.code:
            folder.add(listing)
    folder.run(name_of(page))


def test_the_contract_runs_as_its_listing_says(tmp_path: Path, database_url: str) -> None:
    """docs/testing.md, "The contract of a database": a part of it."""
    folder = Folder(tmp_path, database_url)
    (listing,) = (
        each for each in listings(DOCS / "testing.md", "python") if _CONTRACT in each.code
    )
    folder.write(listing)
    assert " passed" in folder.run(listing.place, "-k", "lease_ends or create_then_verify")


def test_the_contract_runs_as_its_command_says(tmp_path: Path, database_url: str) -> None:
    """docs/testing.md, "The contract of a database": a part of it."""
    (listing,) = (
        each for each in listings(DOCS / "testing.md", "console") if _CONTRACT in each.code
    )
    line = listing.code.strip().replace("postgresql+psycopg://localhost/empty", database_url)
    assert database_url in line
    command = [sys.executable, "-m", *line.split()[1:], "-k", "lease_ends or create_then_verify"]
    with Process([*command, "-q", "-p", "no:cacheprovider"], cwd=tmp_path) as process:
        assert process.wait(60) == 0, process.log
        assert " passed" in process.log


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine of an empty database."""
    engine = create_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def outbox(engine: Engine) -> Outbox:
    """An outbox with tables, and one dead letter."""
    app = Celery("docs", broker="memory://", set_as_current=False)
    outbox = Outbox(app, engine)
    outbox.create_schema()

    @durable_task(app=app, name="a_task")
    def task() -> None: ...

    task.delay()
    batch = outbox.store.claim(1, 60)
    outbox.store.settle(batch, Settlement(dead={batch.rows[0].id: "nobody wants it"}))
    assert outbox.store.counts()["dead"] == 1
    return outbox


def _sql(heading: str) -> str:
    page = (DOCS / "schema.md").read_text().partition(f"## {heading}\n")[2]
    return page.partition("```sql\n")[2].partition("```")[0]


def _execute(connection: Connection, script: str) -> None:
    for statement in filter(None, map(str.strip, script.split(";"))):
        connection.execute(text(statement))


def test_the_sql_for_dead_letters_has_one_published_after_all(outbox: Outbox) -> None:
    """docs/schema.md, "Dead letters"."""
    dead = outbox.tables.dead_letter
    with outbox.engine.begin() as connection:
        number = connection.execute(dead.select()).one().id
        _execute(connection, _sql("Dead letters").replace("17", str(number)))

    assert outbox.relay_all().confirmed == 1
    assert outbox.store.counts()["dead"] == 0


def test_the_sql_for_the_version_makes_migrated_tables_complete(engine: Engine) -> None:
    """docs/schema.md, "With Alembic"."""
    app = Celery("docs", broker="memory://", set_as_current=False)
    outbox = Outbox(app, engine)
    outbox.tables.metadata.create_all(outbox.engine)
    with outbox.engine.begin() as connection:
        # A migration makes the tables without telling SQLAlchemy's listeners.
        connection.execute(delete(outbox.tables.version))
    with pytest.raises(SchemaError):
        outbox.verify_schema()
    with outbox.engine.begin() as connection:
        _execute(connection, _sql("With Alembic"))

    outbox.verify_schema()


def test_the_sql_for_the_lag_is_right(outbox: Outbox) -> None:
    """docs/schema.md, "What waits"."""
    with outbox.engine.begin() as connection:
        assert connection.execute(text(_sql("What waits").strip(" ;\n"))).scalar() is None
        outbox.app.tasks["a_task"].delay()
    with outbox.engine.begin() as connection:
        assert connection.execute(text(_sql("What waits").strip(" ;\n"))).scalar() is not None
