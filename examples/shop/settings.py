"""Where the shop keeps its rows and its messages: two URLs, and a folder if they name no server."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Read from the environment; without any, the shop needs no server, only the folder."""

    folder: Path
    database_url: str
    broker_url: str
    outbox: bool = True  # False: the same tasks as plain Celery tasks, for comparison

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> "Settings":
        """Take SHOP_DATA, SHOP_DATABASE_URL, SHOP_BROKER_URL and SHOP_OUTBOX."""
        folder = Path(environ.get("SHOP_DATA", "shop-data")).absolute()
        return cls(
            folder,
            environ.get("SHOP_DATABASE_URL", f"sqlite:///{folder}/shop.sqlite"),
            environ.get("SHOP_BROKER_URL", "filesystem://localhost/"),
            environ.get("SHOP_OUTBOX", "1") != "0",
        )

    def celery(self) -> dict[str, Any]:
        """Return the Celery settings that fit the broker."""
        settings: dict[str, Any] = {
            "broker_url": self.broker_url,
            "broker_connection_retry_on_startup": True,
            "task_default_queue": "shop",
            "task_ignore_result": True,
            "outbox_lease_seconds": 6,  # how long a killed relay's batch waits for another relay
            "outbox_confirm_timeout_seconds": 3,
        }
        if self.broker_url.startswith("amqp"):
            return settings | {"broker_transport_options": {"confirm_publish": True}}
        # Any other broker forgets what a killed worker had fetched: the outbox sends it again.
        settings |= {"outbox_keep_until_handled": True, "outbox_redeliver_after_seconds": 5}
        return settings | (self._files() if self.broker_url.startswith("filesystem") else {})

    def _files(self) -> dict[str, Any]:
        names = ("data_folder_in", "data_folder_out", "processed_folder", "control_folder")
        paths = [self.folder / name for name in ("messages", "messages", "fetched", "exchanges")]
        for path in paths:
            path.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"polling_interval": 0.02, "store_processed": True}
        options |= zip(names, map(str, paths), strict=True)
        return {"broker_transport": "shop.folder:Transport", "broker_transport_options": options}
