"""Loaded by the workers (``--include``): tells, through files, what can't be seen from outside.

Only the rehearsal needs it; the shop knows nothing of it.
"""

import os
from pathlib import Path
from typing import Any

from celery.signals import task_postrun, task_prerun, worker_process_init

from celery_outbox import events

__all__ = ["ABSORBED", "FOLDER", "RELAYING"]

#: The environment variable that names the folder.
FOLDER = "REHEARSAL_FOLDER"
#: ``relaying-PID`` is there while the pool process PID runs the relay.
RELAYING = "relaying-"
#: One byte for each delivery that the inbox recognised as a duplicate.
ABSORBED = "absorbed"

_RELAY = "celery_outbox.relay"
_folder = Path(os.environ.get(FOLDER, "."))


def _sign() -> Path:
    return _folder / f"{RELAYING}{os.getpid()}"


@worker_process_init.connect
def _begin(**_: Any) -> None:
    _sign().unlink(missing_ok=True)  # of a process that was killed and had the same id


@task_prerun.connect
def _enter(task: Any = None, **_: Any) -> None:
    if task.name == _RELAY:
        _sign().touch()


@task_postrun.connect
def _leave(task: Any = None, **_: Any) -> None:
    if task.name == _RELAY:
        _sign().unlink(missing_ok=True)


def _note(event: str, details: dict[str, Any]) -> None:
    if event == events.DUPLICATE:
        with (_folder / ABSORBED).open("ab") as file:
            file.write(b".")


events.subscribe(_note)
