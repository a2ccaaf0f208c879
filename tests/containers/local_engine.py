"""A container engine's client, as far as pytest-docker-tools asks it, with processes for containers.

pytest-celery reaches the engine through one fixture, ``docker_client``. Brokers, result backends
and databases are the servers of `tests.support.servers`; whatever else is run, is a worker.
"""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import psycopg

from tests.support.processes import Process
from tests.support.servers import PostgreSQL, RabbitMQ, Redis, Server


class Program(Protocol):
    """What runs in a container: a server or a process."""

    @property
    def alive(self) -> bool: ...
    @property
    def log(self) -> str: ...
    @property
    def pid(self) -> int: ...
    def kill(self) -> None: ...
    def close(self) -> None: ...


class LocalContainer:
    """One program, with the face of ``docker.models.containers.Container``."""

    def __init__(
        self,
        program: Program,
        *,
        start: Callable[[], object],
        stop: Callable[[float], object],
        remove: Callable[[bool], object],
        settings: Mapping[str, Any],
        identity: str,
        port: str | None = None,
        folder: Path,
        env: Mapping[str, str],
    ) -> None:
        """Take what starts, stops and removes the program; ``port`` is the one inside (5432/tcp)."""
        self.id = identity
        self.name = f"local-{identity[:8]}"
        self.labels: dict[str, str] = settings.get("labels") or {}
        self._program, self._folder, self._env = program, folder, env
        self._start, self._stop, self._remove = start, stop, remove
        self._port = port
        self._damaged = False
        bound: dict[str, list[dict[str, str]]] = {}
        hostname = identity[:12]
        if port is not None:
            assert isinstance(program, Server)
            bound = {port: [{"HostIp": program.host, "HostPort": str(program.port)}]}
            # With the port: the URLs that containers are given name none, and mean the default.
            hostname = f"{program.host}:{program.port}"
        environment: Mapping[str, str] = settings.get("environment") or {}
        self.attrs: dict[str, Any] = {
            "Config": {
                "Hostname": hostname,
                "Labels": self.labels,
                "Env": [f"{name}={value}" for name, value in environment.items()],
            },
            "NetworkSettings": {
                "Networks": {settings.get("network") or "local": {"IPAddress": "127.0.0.1"}},
                "Ports": bound,
            },
            "HostConfig": {"PortBindings": bound},
        }

    @property
    def status(self) -> str:
        return "running" if self._program.alive else "exited"

    def reload(self) -> None:
        """Nothing is remembered that could be old."""

    def logs(self) -> bytes:
        return self._program.log.encode()

    def kill(self, signal: str | int | None = None) -> None:
        """Send a signal to the program; SIGKILL, as with a container, to all of its processes."""
        number = _signal(signal)
        self._damaged = True
        if number == _signal(None):
            self._program.kill()
        else:
            os.kill(self._program.pid, number)

    def restart(self, timeout: float = 10) -> None:
        self._damaged = True
        if self._program.alive:
            self._stop(timeout)
        self._start()

    def exec_run(self, command: str | Sequence[str], **_: Any) -> tuple[int, bytes]:
        words = shlex.split(command) if isinstance(command, str) else list(command)
        if "/proc/net/tcp" in words:
            return 0, self._listening().encode()
        done = subprocess.run(
            _local_command(words),
            cwd=self._folder,
            env={**os.environ, **self._env},
            capture_output=True,
            check=False,
        )
        return done.returncode, done.stdout

    def _listening(self) -> str:
        """Answer as ``/proc/net/tcp`` does: the container's port, once the server's one is open."""
        if self._port is None:
            return ""
        assert isinstance(self._program, Server)
        with socket.socket() as sock:
            if sock.connect_ex((self._program.host, self._program.port)) != 0:
                return ""
        return f"0: 0100007F:{int(self._port.partition('/')[0]):04X} 00000000:0000 0A"

    def remove(self, force: bool = False) -> bool:
        self._remove(self._damaged)
        return True

    def wait(self, timeout: float | None = None) -> dict[str, int]:
        """It has ended: `remove` waits for that."""
        return {"StatusCode": 0}


@dataclass
class Named:
    """An image, a network or a volume."""

    id: str

    @property
    def name(self) -> str:
        return self.id

    def remove(self, *_: Any, **__: Any) -> None:
        """The engine's folder goes with the engine."""


@dataclass
class Seeder:
    """The throw-away container by which a volume gets its first files."""

    folder: Path

    def put_archive(self, path: str, archive: IO[bytes]) -> None:
        with tarfile.open(fileobj=archive) as files:
            files.extractall(self.folder, filter="data")

    def remove(self, **_: Any) -> None:
        """There is nothing but the volume."""


class LocalEngine:
    """``docker.DockerClient`` on this machine's own programs.

    RabbitMQ and PostgreSQL take seconds to start: one that was not killed or restarted is emptied,
    and serves as the next container.
    """

    def __init__(self, folder: Path) -> None:
        """Keep volumes and logs below ``folder``."""
        self.folder = folder
        self._idle: dict[type[Server], Server] = {}
        self.images = self.containers = self.networks = self.volumes = self

    def close(self) -> None:
        """End the servers that are kept."""
        while self._idle:
            self._idle.popitem()[1].close()

    def build(self, *, tag: str = "scratch", **_: Any) -> tuple[Named, list[str]]:
        """Build an image: its name is all that there is of it."""
        return Named(tag), []

    def pull(self, repository: str, **_: Any) -> Named:
        """Pull an image: the same."""
        return Named(repository)

    def create(self, name: str = "", **settings: Any) -> Named | Seeder:
        """Create a network, a volume, or the container that fills a volume."""
        if "image" in settings:
            return Seeder(self.folder / next(iter(settings["volumes"])))
        (self.folder / name).mkdir(exist_ok=True)
        return Named(name)

    def run(self, image: str, command: Any = None, **settings: Any) -> LocalContainer:
        """Run a container: a server if the image's name says which, else ``command``."""
        identity = uuid.uuid4().hex * 2
        for word, (kind, port) in _SERVERS.items():
            if word in image:
                return self._serve(kind, port, identity, settings)
        return self._work(shlex.split(command) if isinstance(command, str) else command, identity,
                          settings)  # fmt: skip

    def _serve(
        self, kind: type[Server], port: str, identity: str, settings: Mapping[str, Any]
    ) -> LocalContainer:
        server = self._idle.pop(kind, None) or kind()
        try:
            server.start()
        except BaseException:
            server.close()
            raise

        def remove(damaged: bool) -> None:
            if damaged or kind not in _EMPTY or kind in self._idle:
                server.close()
            else:
                _EMPTY[kind](server)
                self._idle[kind] = server

        return LocalContainer(
            server,
            start=server.start,
            stop=lambda timeout: server.stop(),
            remove=remove,
            settings=settings,
            identity=identity,
            port=port,
            folder=server.folder,
            env={},
        )

    def _work(
        self, command: Sequence[str], identity: str, settings: Mapping[str, Any]
    ) -> LocalContainer:
        places = {
            mount["bind"]: str(self.folder / source)
            for source, mount in (settings.get("volumes") or {}).items()
        }
        folder = Path(next(iter(places.values()), self.folder))
        inside = re.compile("|".join(rf"{re.escape(place)}(?=/|$)" for place in places) or r"(?!)")
        env = {
            name: inside.sub(lambda found: places[found[0]], str(value))
            for name, value in (settings.get("environment") or {}).items()
        }
        # Celery as root warns at length; the pickle it warns about is not in use here.
        env["C_FORCE_ROOT"] = "1"
        words = _local_command([word.replace("%h", identity[:12]) for word in command])
        process = Process(
            words, cwd=folder, env=env, name="worker", log=self.folder / f"{identity[:8]}.log"
        )

        def stop(timeout: float) -> None:
            try:
                process.terminate(timeout)
            except AssertionError:  # as an engine does with what won't end
                process.kill()

        return LocalContainer(
            process,
            start=process.restart,
            stop=stop,
            remove=lambda damaged: process.close(),
            settings=settings,
            identity=identity,
            folder=folder,
            env=env,
        )


def _local_command(words: Sequence[str]) -> list[str]:
    """Run this environment's Python and Celery, whatever PATH says."""
    if words[0] == "celery":
        return [sys.executable, "-m", *words]
    if words[0] == "python":
        return [sys.executable, *words[1:]]
    return [shutil.which(words[0]) or words[0], *words[1:]]


def _signal(name: str | int | None) -> signal.Signals:
    if isinstance(name, str):
        return signal.Signals[name]
    return signal.SIGKILL if name is None else signal.Signals(name)


def _empty_rabbitmq(server: Server) -> None:
    assert isinstance(server, RabbitMQ)
    server.eval(
        'rabbit_vhost:delete(<<"/">>, <<>>), rabbit_vhost:add(<<"/">>, <<>>), '
        'rabbit_auth_backend_internal:set_permissions(<<"guest">>, <<"/">>, <<".*">>, <<".*">>, '
        '<<".*">>, <<>>).'
    )


def _empty_postgresql(server: Server) -> None:
    with psycopg.connect(server.url.replace("+psycopg", "")) as connection:
        connection.execute("SET client_min_messages = error")
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")


#: By a word in the image's name: the server, and the port that it has in a container.
_SERVERS: dict[str, tuple[type[Server], str]] = {
    "redis": (Redis, "6379/tcp"),
    "rabbitmq": (RabbitMQ, "5672/tcp"),
    "postgres": (PostgreSQL, "5432/tcp"),
}

#: Servers that are worth keeping, and how they are emptied.
_EMPTY: dict[type[Server], Callable[[Server], None]] = {
    RabbitMQ: _empty_rabbitmq,
    PostgreSQL: _empty_postgresql,
}
