"""Kombu's filesystem broker, but a message appears whole or not at all.

Kombu's own creates the file and then fills it: a worker that looks in between finds an empty
message, and stops ("Unrecoverable error: JSONDecodeError").
"""

import time
import uuid
from pathlib import Path
from typing import Any

from kombu.transport import filesystem
from kombu.utils.json import dumps


class Channel(filesystem.Channel):
    """Writes under another name, and renames."""

    def _put(self, queue: str, payload: Any, **_: Any) -> None:
        name = f"{time.monotonic_ns():020}_{uuid.uuid4()}.{queue}.msg"
        unfinished = Path(self.data_folder_out, f"{name}.unfinished")
        unfinished.write_text(dumps(payload))
        unfinished.rename(unfinished.with_name(name))


class Transport(filesystem.Transport):
    """For the setting ``broker_transport``."""

    Channel = Channel
