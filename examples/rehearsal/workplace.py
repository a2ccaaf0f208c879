"""Workplace: the folder of a command, and an orderly end whoever asks for it."""

import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tests.support.guardian import guardian

__all__ = ["Workplace", "workplace"]


class Workplace:
    """Where the logs and the data are; removed at the end unless `kept`."""

    def __init__(self, folder: Path, *, kept: bool) -> None:
        self.folder = folder
        self.kept = kept

    def keep(self) -> None:
        """Leave the folder for the reader."""
        if not self.kept:
            guardian.release_folder(self.folder)
            self.kept = True


@contextmanager
def workplace(keep: Path | None) -> Iterator[Workplace]:
    """Provide a folder: `keep`, or a temporary one that is removed unless something went wrong."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    if keep is None:
        place = Workplace(Path(tempfile.mkdtemp(prefix="celery-outbox-shop-")), kept=False)
        guardian.watch_folder(place.folder)
    else:
        keep.mkdir(parents=True, exist_ok=True)
        if any(keep.iterdir()):
            sys.exit(f"error: --keep {keep}: the folder is not empty")
        place = Workplace(keep.resolve(), kept=True)
    try:
        yield place
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception:
        place.keep()
        print(f"the logs are in {place.folder}", file=sys.stderr)
        raise
    finally:
        if not place.kept:
            shutil.rmtree(place.folder, ignore_errors=True)
            guardian.release_folder(place.folder)


def _leave(number: int, frame: FrameType | None) -> None:
    """End as on Ctrl-C: everything on the way out is still cleared up."""
    sys.exit(128 + number)
