"""Cast: which processes of the shop take part, and how each is launched."""

import os
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shop.settings import Settings

from rehearsal.fleet import Fleet, Member
from rehearsal.witness import FOLDER
from tests.support.processes import Process, celery_beat, celery_worker, outbox_relay

__all__ = ["Cast"]

EXAMPLES = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Cast:
    """How many processes of each kind are at work, beside the one web process."""

    workers: int = 1
    relays: int = 0
    beat: bool = False

    def fleet(self, settings: Settings, folder: Path, port: int) -> Fleet:
        """Return the processes, none of them started; they work in `folder` and log there."""
        env = {
            "SHOP_DATA": str(settings.folder),
            "SHOP_DATABASE_URL": settings.database_url,
            "SHOP_BROKER_URL": settings.broker_url,
            "SHOP_OUTBOX": str(int(settings.outbox)),
            "PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)]),
            FOLDER: str(folder),
        }
        relays = [_relay(f"relay{n + 1}", folder, env) for n in range(self.relays)]
        return Fleet(
            web=_web(port, folder, env),
            workers=[
                _worker(f"worker{n + 1}", folder, env, watched=settings.outbox)
                for n in range(self.workers)
            ],
            relays=[*relays, _beat(folder, env)] if self.beat else relays,
        )


def _web(port: int, folder: Path, env: dict[str, str]) -> Member:
    command = [sys.executable, "-m", "shop.web", str(port)]
    launch = partial(Process, command, cwd=folder, env=env, log=folder / "web.log")
    return Member("web", launch, re.compile(rb"^open$", re.MULTILINE))


def _worker(name: str, folder: Path, env: dict[str, str], *, watched: bool) -> Member:
    launch = partial(
        celery_worker,
        "shop.app",
        folder,
        env,
        f"--hostname={name}@shop",
        *(["--include=rehearsal.witness"] if watched else []),
        log=folder / f"{name}.log",
        ready_timeout=None,
    )
    return Member(name, launch, re.compile(rb" ready\.$", re.MULTILINE))


def _beat(folder: Path, env: dict[str, str]) -> Member:
    log = folder / "beat.log"
    launch = partial(celery_beat, "shop.app", folder, env, log=log, ready_timeout=None)
    return Member("beat", launch, re.compile(rb"beat: Starting\.\.\."))


def _relay(name: str, folder: Path, env: dict[str, str]) -> Member:
    launch = partial(outbox_relay, "shop.app", folder, env, log=folder / f"{name}.log")
    return Member(name, launch, re.compile(rb"relay: ready"))
