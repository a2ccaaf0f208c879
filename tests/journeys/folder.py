"""The filesystem broker, with marks for the messages that a worker has and has not acknowledged.

The broker itself forgets a message when a worker takes it, so that a test which looks at its folder
believes that all is over while the last message is being handled.
"""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from kombu.transport import virtual

__all__ = ["Transport", "unacknowledged"]

_SUFFIX = ".unacknowledged"

#: The example's, which writes whole files. The examples are programs, and no package for mypy.
_whole_files: Any = import_module("examples.shop.folder")


def unacknowledged(folder: Path) -> int:
    """Return how many messages workers have that still live."""
    pids = [int(path.name.partition("~")[0]) for path in folder.glob(f"*{_SUFFIX}")]
    return sum(Path(f"/proc/{pid}").exists() for pid in pids)


class QoS(virtual.QoS):
    """Removes a message's mark once it is acknowledged, or back in its queue."""

    def append(self, message: Any, delivery_tag: str) -> None:
        super().append(message, delivery_tag)
        self.channel.mark(delivery_tag).touch()
        self.channel.mark("taking").unlink(missing_ok=True)

    def ack(self, delivery_tag: str) -> None:
        super().ack(delivery_tag)
        self.channel.mark(delivery_tag).unlink(missing_ok=True)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        super().reject(delivery_tag, requeue)
        self.channel.mark(delivery_tag).unlink(missing_ok=True)


class Channel(_whole_files.Channel):
    """Marks a message before its file is gone."""

    QoS = QoS

    def mark(self, name: str) -> Path:
        return Path(self.data_folder_in, f"{os.getpid()}~{name}{_SUFFIX}")

    def _get(self, queue: str) -> Any:
        # Remote control is not acknowledged.
        paths = Path(self.data_folder_in).iterdir()
        is_there = any(path.name.partition(".")[2] == f"{queue}.msg" for path in paths)
        if is_there and "pidbox" not in queue:
            self.mark("taking").touch()
        try:
            return super()._get(queue)
        except BaseException:
            self.mark("taking").unlink(missing_ok=True)
            raise


class Transport(_whole_files.Transport):
    """For the setting ``broker_transport``."""

    Channel = Channel
