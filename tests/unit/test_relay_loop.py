"""The relay's loop, with a publisher that does what no broker should."""

import threading
from collections.abc import Sequence

import pytest

from celery_outbox.envelope import Envelope
from celery_outbox.relay.loop import Relay
from celery_outbox.relay.outcome import Confirmed, Outcome
from celery_outbox.relay.publishers import Publisher
from celery_outbox.relay.publishers.base import Meanwhile, nothing
from tests.unit.conftest import MakeShop


class Surprising(Publisher):
    """Raises once what nobody has foreseen, and confirms from then on."""

    def __init__(self, stop: threading.Event) -> None:
        super().__init__(lambda: None, 1.0)
        self._stop = stop
        self._calls = 0

    def open(self) -> None: ...

    def publish(
        self, batch: Sequence[tuple[int, Envelope]], meanwhile: Meanwhile = nothing
    ) -> dict[int, Outcome]:
        self._calls += 1
        if self._calls == 1:
            raise ZeroDivisionError
        self._stop.set()
        return {number: Confirmed() for number, _ in batch}


def test_an_error_that_nobody_has_foreseen_does_not_end_the_relay(
    make_shop: MakeShop, sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """P7."""
    shop = make_shop(sqlite_url, outbox_lease_seconds=0.2, outbox_confirm_timeout_seconds=0.1)
    shop.notify.delay("m")
    stop = threading.Event()
    Relay(shop.outbox.store, Surprising(stop), shop.outbox.config).run(stop)
    assert shop.stored() == []
    assert "ZeroDivisionError" in caplog.text
