"""``python -m tests.support.servicebus --host 127.1.2.3 --port 5671 --folder DIR``: until TERM."""

import argparse
import signal
import threading
from pathlib import Path

from tests.support.servicebus.emulator import Emulator


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with Emulator(given.host, given.port, folder=given.folder) as emulator:
        print("ready", emulator.host, emulator.port, flush=True)
        stop.wait()


if __name__ == "__main__":
    main()
