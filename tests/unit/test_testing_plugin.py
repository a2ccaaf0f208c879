"""The pytest plugin, as a user's own tests see it: each runs in a pytest of its own."""

import os
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from sqlalchemy import create_engine, inspect, text

from tests.docs.markdown import ROOT
from tests.support.processes import Process

_SHOP = """
from celery import Celery
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker
from celery_outbox import Outbox, durable_task

class Base(DeclarativeBase): pass

class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str] = mapped_column(default="placed")

app = Celery("shop", broker="memory://", backend="cache+memory://")
engine = create_engine(URL)
Session = sessionmaker(engine)
outbox = Outbox(app, Session)

@durable_task(bind=True, app=app, name="shop.charge")
def charge(self, order_id):
    self.session.get(Order, order_id).state = "charged"
    receipt.delay(order_id)

@durable_task(app=app, name="shop.receipt")
def receipt(order_id): ...

def place_order(order_id):
    with Session.begin() as session:
        session.add(Order(id=order_id))
        charge.delay(order_id)
"""

_CONFTEST = """
import pytest
from shop import Base, engine

@pytest.fixture(scope="session", autouse=True)
def tables():
    Base.metadata.create_all(engine)
    yield
    Base.metadata.drop_all(engine)
    engine.dispose()
"""


class Project:
    """A user's project: a shop, and what its tests are run with."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        self.write("shop.py", _SHOP.replace("URL", repr(url)))

    def write(self, name: str, code: str) -> None:
        (self._folder / name).write_text(dedent(code))

    def configure(self, setting: str) -> None:
        """Let the shop have a setting."""
        shop = (self._folder / "shop.py").read_text()
        self.write("shop.py", shop.replace("outbox = ", f"app.conf.{setting}\noutbox = "))

    def run(
        self, *arguments: str, plugins: tuple[str, ...] = ("celery_outbox.pytest_plugin",)
    ) -> str:
        """Run its tests; return what pytest says, with the exit code as the last line."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        for plugin in plugins:
            command += ["-p", plugin]
        env = {
            "PYTHONPATH": f"{self._folder}{os.pathsep}{ROOT}",
            # Also where the package's entry point is not installed, or is.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        with Process([*command, *arguments, "."], cwd=self._folder, env=env) as process:
            code = process.wait(60)
            return f"{process.log}\nexit code {code}"


@pytest.fixture
def project(tmp_path: Path, database_url: str) -> Project:
    """A project on each database."""
    return Project(tmp_path, database_url)


@pytest.fixture
def small(tmp_path: Path, sqlite_url: str) -> Project:
    """A project on SQLite."""
    return Project(tmp_path, sqlite_url)


def _ini(project: Project, address: str) -> None:
    project.write("pytest.ini", f"[pytest]\ncelery_outbox_app = {address}\n")


def test_all_fixtures_in_a_project_of_their_own(project: Project) -> None:
    _ini(project, "shop:outbox")
    project.write("conftest.py", _CONFTEST)
    project.write(
        "test_shop.py",
        """
        from celery_outbox.testing import expected
        from shop import Order, Session, app, outbox, place_order

        def test_staged(staged):
            with staged.exactly("shop.charge", args=(1,)):
                place_order(1)
            assert outbox.store.counts()["outgoing"] == 1

        def test_the_tables_are_empty_again(outbox_clean):
            assert outbox_clean is outbox
            assert not any(outbox.store.counts().values())

        def test_relay(relay_all):
            place_order(2)
            assert relay_all().confirmed == 1

        def test_nothing_is_left_in_the_broker(run_until_quiet):
            assert run_until_quiet().tasks == []

        def test_until_quiet(run_until_quiet):
            place_order(3)
            assert run_until_quiet().tasks == ["shop.charge", "shop.receipt"]
            with Session() as session:
                assert session.get(Order, 3).state == "charged"

        def test_time(outbox_time, relay_all):
            with Session.begin():
                app.tasks["shop.receipt"].apply_async((1,), countdown=3600)
            assert not relay_all().claimed
            outbox_time.travel(hours=2)
            assert relay_all().confirmed == 1

        def test_faults(outbox_faults, relay_all):
            place_order(4)
            with outbox_faults.refuse():
                assert relay_all().postponed == 1
        """,
    )
    assert "7 passed" in project.run()


def test_an_app_that_publishes_by_itself_does_not_in_tests(project: Project) -> None:
    _ini(project, "shop:outbox")
    project.configure("outbox_publish_after_commit = True")
    project.write("conftest.py", _CONFTEST)
    project.write(
        "test_shop.py",
        """
        from shop import outbox, place_order

        def test_staged(staged):
            assert outbox.config.publish_after_commit
            for number in range(20):
                with staged.exactly("shop.charge", args=(number,)):
                    place_order(number)
            assert outbox.store.counts()["outgoing"] == 20

        def test_relay(relay_all):
            place_order(22)
            assert relay_all().confirmed == 1
        """,
    )
    assert "2 passed" in project.run()


def test_in_memory_no_database_is_touched(tmp_path: Path) -> None:
    project = Project(tmp_path, "postgresql+psycopg://nobody@localhost:1/nothing")
    project.write(
        "conftest.py",
        """
        import pytest
        from shop import Base, outbox

        @pytest.fixture(scope="session")
        def outbox_under_test():
            return outbox

        @pytest.fixture(scope="session")
        def outbox_metadata():
            return Base.metadata
        """,
    )
    project.write(
        "test_shop.py",
        """
        import pytest
        from shop import Order, Session, charge, outbox, place_order
        pytestmark = pytest.mark.usefixtures("outbox_in_memory")

        @pytest.mark.parametrize("number", [1, 2])
        def test_there_and_back(number, staged, run_until_quiet):
            with staged.exactly(charge, args=(7,)):
                place_order(7)
            assert run_until_quiet().tasks == ["shop.charge", "shop.receipt"]
            with Session() as session:
                assert session.get(Order, 7).state == "charged"
        """,
    )
    assert "2 passed" in project.run()


def test_without_an_outbox_it_says_what_to_do(small: Project) -> None:
    small.write("test_shop.py", "def test_it(staged): ...")
    said = small.run()
    assert "celery_outbox_app = shop:outbox" in said
    assert "def outbox_under_test():" in said
    assert "1 error" in said


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("shop", "'shop' names no Outbox"),
        ("shap:outbox", "there is no module 'shap'"),
        ("shop:outbax", "there is no 'outbax' in shop"),
        ("shop:engine", "is no Outbox"),
    ],
)
def test_a_wrong_address_is_told(small: Project, address: str, complaint: str) -> None:
    _ini(small, address)
    small.write("test_shop.py", "def test_it(staged): ...")
    assert complaint in small.run()


def test_the_celery_app_is_an_address_too(small: Project) -> None:
    _ini(small, "shop:app")
    small.write("conftest.py", _CONFTEST)
    small.write("test_shop.py", "def test_it(relay_all): assert not relay_all().claimed")
    assert "1 passed" in small.run()


def test_the_plugin_loads_nothing_where_no_test_asks(small: Project) -> None:
    small.write(
        "test_other.py",
        """
        import sys

        def test_it():
            assert not {"celery_outbox.testing", "celery", "sqlalchemy"} & set(sys.modules)
        """,
    )
    assert "1 passed" in small.run()


def test_beside_pytest_celery(small: Project) -> None:
    _ini(small, "shop:outbox")
    small.write("conftest.py", _CONFTEST)
    small.write(
        "test_shop.py",
        """
        from shop import place_order

        def test_it(staged, celery_config, celery_worker_parameters):
            with staged.exactly("shop.charge"):
                place_order(1)
        """,
    )
    plugins = ("pytest_celery", "celery.contrib.pytest", "celery_outbox.pytest_plugin")
    said = small.run(plugins=plugins)
    assert "1 passed" in said, said


_CONTRACT = ("--pyargs", "celery_outbox.testing.contract", "-k", "stage_alone_commits")


def test_the_contract_needs_to_know_its_database(small: Project) -> None:
    said = small.run(*_CONTRACT)
    assert "say --outbox-database-url URL, or override" in said


def test_the_contract_leaves_a_database_alone_that_has_tables(
    small: Project, sqlite_url: str
) -> None:
    engine = create_engine(sqlite_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE customers (id integer)"))
    said = small.run(*_CONTRACT, "--outbox-database-url", sqlite_url)
    assert f"wants an empty database, for it drops all tables; {sqlite_url} has customers" in said
    assert inspect(engine).get_table_names() == ["customers"]
    engine.dispose()


def test_the_contract_leaves_nothing_behind(project: Project, database_url: str) -> None:
    said = project.run(*_CONTRACT, "--outbox-database-url", database_url)
    assert "1 passed" in said, said
    engine = create_engine(database_url)
    assert inspect(engine).get_table_names() == []
    engine.dispose()


def test_a_failure_of_the_contract_is_explained(small: Project, sqlite_url: str) -> None:
    """Its assertions are rewritten, as those of the user's own tests."""
    small.write(
        "test_contract.py",
        """
        from celery_outbox.testing.contract import *
        from celery_outbox.testing.contract import outgoing

        class Forgetful:
            def stage_alone(self, row): ...
            def claim(self, limit, lease_seconds):
                return outgoing.Batch("token", None, [])

        def test_forgetful():
            test_stage_alone_commits(Forgetful())
        """,
    )
    said = small.run("-k", "forgetful")
    assert "assert [] == ['m']" in said, said
