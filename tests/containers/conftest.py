"""pytest-celery's fixtures, given the shop; on containers where an engine answers.

``OUTBOX_TEST_NODES=containers`` or ``=processes`` says what to use; by default the engine is asked.
The end of the run's report names what was used.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import celery
import docker  # type: ignore[import-untyped]
import psycopg
import pytest
from celery import Celery, _state
from pytest_celery import CeleryTestContainer, CeleryTestSetup  # type: ignore[import-untyped]
from pytest_docker_tools import build, container, fxtr  # type: ignore[import-untyped]
from pytest_docker_tools.wrappers import container as wrapper  # type: ignore[import-untyped]
from sqlalchemy import create_engine

import celery_outbox
from celery_outbox.storage import schema
from celery_outbox.storage.tables import Tables
from tests.containers import shop as shop_module
from tests.containers.local_engine import LocalEngine
from tests.containers.shop import Base, Shop

_nodes = pytest.StashKey[str]()


def _engine_client() -> Any:
    """Return a client of the container engine; raise DockerException if none answers."""
    client = docker.from_env()
    client.ping()
    return client


@pytest.fixture(scope="session")
def docker_client(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """The container engine, or its stand-in: the only thing that differs between the two."""
    choice = os.environ.get("OUTBOX_TEST_NODES", "auto")
    if choice not in ("auto", "containers", "processes"):
        raise pytest.UsageError(f"OUTBOX_TEST_NODES={choice}: not auto, containers or processes")
    why = "OUTBOX_TEST_NODES=processes"
    if choice != "processes":
        try:
            client = _engine_client()
        except docker.errors.DockerException as error:
            if choice == "containers":
                raise
            why = f"no container engine answers ({error})"
        else:
            request.config.stash[_nodes] = "containers of the engine that answers"
            yield client
            client.close()
            return
    request.config.stash[_nodes] = f"local processes: {why}"
    engine = LocalEngine(tmp_path_factory.mktemp("engine"))
    with pytest.MonkeyPatch.context() as patch:
        # The ports are this machine's, even if it is a container itself.
        patch.setattr(wrapper, "tests_inside_container", lambda: False)
        yield engine
    engine.close()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say where the nodes ran."""
    if nodes := config.stash.get(_nodes, None):
        terminalreporter.write_line(f"tests/containers ran on {nodes}")


@pytest.fixture(autouse=True)
def current_app_as_it_was() -> Iterator[None]:
    """pytest-celery makes its app the current one, and leaves it."""
    current, default = _state._tls.current_app, _state.default_app
    yield
    _state._tls.current_app, _state.default_app = current, default


class DatabaseContainer(CeleryTestContainer):
    """PostgreSQL, for the test and for the worker."""

    def ready(self) -> bool:
        """Whether it answers: its port is open while it still starts."""
        if not super().ready():
            return False
        try:
            psycopg.connect(self.host_url.replace("+psycopg", ""), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    @property
    def url(self) -> str:
        """Where the worker finds it."""
        return f"postgresql+psycopg://postgres@{self.attrs['Config']['Hostname']}/postgres"

    @property
    def host_url(self) -> str:
        """Where the test finds it."""
        host, port = self.get_addr("5432/tcp")
        return f"postgresql+psycopg://postgres@{host}:{port}/postgres"


database_container = container(
    image="postgres:16",
    ports={"5432/tcp": None},
    environment={"POSTGRES_HOST_AUTH_METHOD": "trust"},
    network="{default_pytest_celery_network.name}",
    wrapper_class=DatabaseContainer,
    timeout=60,
)

celery_base_worker_image = build(
    path=str(Path(__file__).parent),
    tag="celery-outbox/tests/worker",
    buildargs={"CELERY_VERSION": fxtr("default_worker_celery_version")},
)


@pytest.fixture(scope="session")
def default_worker_celery_version() -> str:
    """The version that is installed here."""
    return str(celery.__version__)


@pytest.fixture
def database(database_container: DatabaseContainer) -> DatabaseContainer:
    """A database with all tables, before any worker looks for them."""
    engine = create_engine(database_container.host_url)
    Base.metadata.create_all(engine)
    schema.create(engine, Tables())
    engine.dispose()
    return database_container


@pytest.fixture
def default_worker_app(default_worker_app: Celery) -> Celery:
    """The settings, for the test's app and the worker's."""
    default_worker_app.conf.update(
        outbox_relay_in_worker=True,
        outbox_poll_seconds=0.05,
        # How long a killed worker's batch waits for the next relay.
        outbox_confirm_timeout_seconds=1,
        outbox_lease_seconds=2,
        outbox_busy_pause_seconds=0.2,
        # Redis gives back what a killed worker had fetched after an hour; the outbox sends it again.
        outbox_keep_until_handled=True,
        outbox_redeliver_after_seconds=2,
    )
    return default_worker_app


@pytest.fixture
def default_worker_app_module() -> ModuleType:
    """The worker's app has an outbox. Only its source is of use here, so it is not run."""
    spec = find_spec("tests.containers.app")
    assert spec is not None
    return module_from_spec(spec)


@pytest.fixture
def default_worker_tasks(default_worker_tasks: set[ModuleType]) -> set[ModuleType]:
    """The shop's module is in the volume."""
    return {*default_worker_tasks, shop_module}


@pytest.fixture
def default_worker_initial_content(
    default_worker_initial_content: dict[str, Any],
) -> dict[str, Any]:
    """The volume holds this celery_outbox, so that the image needs none."""
    package = Path(celery_outbox.__file__).parent
    return default_worker_initial_content | {
        path.relative_to(package.parent).as_posix(): path.read_bytes()
        for path in package.rglob("*.py")
    }


@pytest.fixture
def default_worker_env(
    default_worker_env: dict[str, str], database: DatabaseContainer
) -> dict[str, str]:
    """Where the worker finds the database."""
    return default_worker_env | {"SHOP_DATABASE_URL": database.url}


@pytest.fixture
def default_worker_command(default_worker_container_cls: Any) -> list[str]:
    """Two processes, and no wait for other workers."""
    command: list[str] = default_worker_container_cls.command(
        "--concurrency=2", "--without-gossip", "--without-mingle"
    )
    return command


@pytest.fixture
def shop(celery_setup: CeleryTestSetup, database: DatabaseContainer) -> Iterator[Shop]:
    """The shop on the test's side."""
    shop = Shop(celery_setup.app, database.host_url)
    yield shop
    shop.engine.dispose()
    celery_setup.app.close()
