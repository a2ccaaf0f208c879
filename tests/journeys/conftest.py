"""Sites: made for a module or for a test, on whichever broker and database."""

from collections.abc import Iterator

import pytest

from tests.journeys.making import Making


@pytest.fixture(scope="module")
def module_sites(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Making]:
    """Make sites that last for the module."""
    with Making(request, tmp_path_factory) as making:
        yield making


@pytest.fixture
def sites(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Making]:
    """Make sites that last for the test."""
    with Making(request, tmp_path_factory) as making:
        yield making
