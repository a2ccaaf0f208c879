"""An emulator in this process, which the SDK reaches without TLS, and the admin client with it."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from azure.servicebus import ServiceBusClient

from tests.journeys.making import Making
from tests.support.record import used
from tests.support.servicebus import Emulator, Trust


@pytest.fixture(autouse=True)
def quiet_sdk() -> None:
    """Its loggers tell every state of every link."""
    logging.getLogger("azure").setLevel(logging.CRITICAL)


@pytest.fixture
def emulator(tmp_path: Path) -> Iterator[Emulator]:
    """An empty namespace."""
    with Emulator(folder=tmp_path) as emulator:
        used("azureservicebus://")
        Trust.add(emulator.certificate)
        yield emulator


@pytest.fixture
def client(emulator: Emulator) -> Iterator[ServiceBusClient]:
    """The SDK, which tries everything once."""
    string = emulator.connection_string
    with ServiceBusClient.from_connection_string(string, retry_total=0) as client:
        yield client


@pytest.fixture
def sites(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Making]:
    """Make sites that last for the test."""
    with Making(request, tmp_path_factory) as making:
        yield making
