"""By hand: the test says when messages are published, whatever the app is configured to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from celery_outbox.plugin import Outbox

__all__ = ["by_hand"]


@contextmanager
def by_hand(outbox: Outbox) -> Iterator[None]:
    """For a block, let ``outbox_publish_after_commit`` be off: the test says when to publish."""
    outbox.fast_path.stop()
    try:
        yield
    finally:
        outbox.fast_path.resume()
