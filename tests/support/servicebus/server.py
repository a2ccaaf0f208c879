"""ServiceBus: an emulator in a process of its own, as tests and benchmarks of processes need it."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import socket
import ssl
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from http.client import HTTPSConnection
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from tests.support.guardian import guardian
from tests.support.processes import Process
from tests.support.servicebus.controls import PATH
from tests.support.servicebus.emulator import kombu_url
from tests.support.servicebus.faults import Fault
from tests.support.servicebus.trust import Trust

__all__ = ["ServiceBus"]

#: The port on which the SDK looks for AMQP over TLS; it can't be told another.
_PORT = 5671
_ROOT = Path(__file__).parents[3]


class ServiceBus:
    """A namespace on a loopback address of its own, whose certificate this process trusts."""

    #: Whether it misbehaves when it is told to.
    injects = True

    def __init__(self) -> None:
        self.host = _free_address()
        self._folder = Path(tempfile.mkdtemp(prefix="outbox-servicebus-"))
        guardian.watch_folder(self._folder)
        self._process = self._start()
        self._process.wait_for_log("^ready")
        self._certificate = self._folder / "emulator.pem"
        Trust.add(self._certificate)

    def _start(self) -> Process:
        words = ("--host", self.host, "--port", str(_PORT), "--folder", str(self._folder))
        command = [sys.executable, "-m", "tests.support.servicebus", *words]
        environment = {"PYTHONPATH": str(_ROOT)}
        return Process(command, cwd=_ROOT, env=environment, name="servicebus")

    @property
    def url(self) -> str:
        """Its address for kombu."""
        return kombu_url(self.host, _PORT)

    def create_queue(self, name: str, **options: Any) -> None:
        """Create a queue; see `tests.support.servicebus.queues.Options`."""
        self._order("queue", {"name": name, **options})

    def counts(self, name: str) -> Counter[str]:
        """Return how many messages a queue has, and what it has done so far."""
        return Counter(self.state()["queues"].get(name, {}))

    def left(self) -> int:
        """Return how many messages are in all queues, those in the hands of workers included."""
        return sum(counts.get("active", 0) for counts in self.state()["queues"].values())

    def plan(self, faults: Iterable[Fault]) -> None:
        """Plan misbehaviour."""
        self._order("faults", {"faults": [asdict(fault) for fault in faults]})

    def behave(self) -> None:
        """Forget the faults that are still to come."""
        self._order("no-faults", {})

    def delay_acknowledgements(self, seconds: float) -> None:
        """Let each acknowledgement of a send take so long."""
        self._order("ack-seconds", {"seconds": seconds})

    def end_connections(self, condition: str | None = "amqp:connection:forced") -> None:
        """Close all connections; without a condition: cut them."""
        self._order("close-connections", {"condition": condition})

    def add_key(self, policy: str, key: str, *rights: str) -> str:
        """Add a policy with a key; return the namespace's address with it, for kombu."""
        self._order("key", {"policy": policy, "key": key, "rights": rights})
        return self.url_of(f"{policy}:{key}")

    def accept_tokens(self) -> None:
        """Take tokens of an identity from now on, whatever they say."""
        self._order("accept-tokens", {})

    def url_of(self, credential: str) -> str:
        """Return its address for kombu with another credential."""
        return f"azureservicebus://{credential}@{self._endpoint}"

    @property
    def _endpoint(self) -> str:
        return self.url.rpartition("@")[2]

    def state(self) -> dict[str, Any]:
        """Return queues, faults that have hit, and what was done."""
        return self._order("state", {})

    def _order(self, what: str, order: dict[str, Any]) -> dict[str, Any]:
        context = ssl.create_default_context(cafile=str(self._certificate))
        connection = HTTPSConnection(self.host, _PORT, context=context, timeout=10)
        try:
            connection.request("POST", PATH + what, json.dumps(order))
            answer = connection.getresponse()
            said = answer.read()
            assert answer.status == 200, said
            state: dict[str, Any] = json.loads(said)
            return state
        finally:
            connection.close()

    def pause(self) -> None:
        """Let it stand still: it takes connections, and never answers."""
        self._process.pause()

    def resume(self) -> None:
        """Let it go on."""
        self._process.resume()

    def close(self) -> None:
        """End it, with all that is in it."""
        self._process.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        guardian.release_folder(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


_numbers = itertools.count(os.getpid() * 61)


def _free_address() -> str:
    """Return a loopback address on whose port nobody listens."""
    for number in itertools.islice(_numbers, 100):
        second, third = 1 + number // 250 % 250, 1 + number % 250
        host = f"127.{second}.{third}.{random.randrange(1, 255)}"
        with socket.socket() as attempt:
            try:
                attempt.bind((host, _PORT))
            except OSError:
                continue
            return host
    raise OSError("no free loopback address")
