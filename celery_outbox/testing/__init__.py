"""For tests of apps that use an outbox. The pytest plugin makes fixtures of what is here.

Nothing here imports pytest, except for `contract`, which is a suite of tests: what fails raises
`AssertionError`.
"""

from celery_outbox.testing.app import outbox_named
from celery_outbox.testing.faults import Faults, Killed
from celery_outbox.testing.hand import by_hand
from celery_outbox.testing.memory import in_memory
from celery_outbox.testing.message import Expected, Message, expected
from celery_outbox.testing.quiet import NotQuiet, Run, run_until_quiet
from celery_outbox.testing.staged import Messages, Staged
from celery_outbox.testing.tables import empty, rebuild
from celery_outbox.testing.time import Time

__all__ = [
    "Expected",
    "Faults",
    "Killed",
    "Message",
    "Messages",
    "NotQuiet",
    "Run",
    "Staged",
    "Time",
    "by_hand",
    "empty",
    "expected",
    "in_memory",
    "outbox_named",
    "rebuild",
    "run_until_quiet",
]
