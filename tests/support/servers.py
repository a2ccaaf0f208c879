"""Private PostgreSQL, RabbitMQ and Redis servers: own port, own folder, gone when the tests are.

    with PostgreSQL() as server:
        engine = create_engine(server.create_database())

Each can be killed, stopped, started again on the same port with the data that it kept, and paused.
Nothing outlives the Python process that started it, however that ends (see `guardian`).
"""

import itertools
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from typing_extensions import Self

from tests.support.guardian import guardian
from tests.support.ports import free_port
from tests.support.processes import Process, ProcessEnded
from tests.support.waiting import wait_until

INSTALL = "apt-get install -y postgresql mariadb-server redis-server rabbitmq-server"


class ServerMissing(RuntimeError):
    """A program that the tests need is not installed; the message says how to install it."""

    def __init__(self, program: str) -> None:
        """Name the missing program."""
        super().__init__(f"{program} is not installed; as root: {INSTALL}")


def program(name: str, places: Iterable[Path] = ()) -> Path:
    """Find a program in the given folders, then on PATH."""
    for place in places:
        if os.access(place / name, os.X_OK):
            return place / name
    found = shutil.which(name)
    if found is None:
        raise ServerMissing(name)
    return Path(found)


def version_of(program: Path, option: str = "--version") -> str:
    """Return the number in what a program says of its version."""
    said = subprocess.run([program, option], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\d+(\.\d+)+", said)
    assert found is not None, said
    return found[0]


class Server(ABC):
    """What the servers have in common: one process, one port, one folder.

    It is started by `start` or by ``with``; at the end of the block it is killed and its folder
    removed. `kill`, `stop` and `pause` leave the data, for `restart` and `resume`.
    """

    name: str
    host = "127.0.0.1"
    _start_timeout = 60.0

    def __init__(self) -> None:
        """Make the folder and choose the port; nothing runs yet."""
        self.port = free_port()
        # A short name: the path of PostgreSQL's socket in it must stay below 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix=f"outbox-{self.name}-")).resolve()
        guardian.watch_folder(self.folder)
        self._process: Process | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients find it."""

    @abstractmethod
    def _launch(self) -> Process:
        """Start the process (again), with the data that is there."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Whether it serves clients."""

    @property
    def log(self) -> str:
        """What the server wrote so far."""
        path = self.folder / "server.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def alive(self) -> bool:
        """Whether its process runs (also while paused)."""
        return self._process is not None and self._process.alive

    @property
    def pid(self) -> int:
        """The id of its main process."""
        return self._running.pid

    def start(self) -> Self:
        """Start it if it does not run; return when it serves clients."""
        if not self.alive:
            if self._process is not None:
                self._process.close()
            self._process = self._launch()
            self.wait_ready()
        return self

    def wait_ready(self) -> None:
        """Return when it serves clients."""

        def ready() -> bool:
            if not self.alive:
                raise ProcessEnded(f"{self.name} did not start: {self._running.describe()}")
            return self._is_ready()

        wait_until(ready, self._start_timeout, f"{self.name} on port {self.port}")

    def kill(self) -> None:
        """Kill it and all its processes (SIGKILL)."""
        self._running.kill()

    def stop(self) -> None:
        """Shut it down in good order; the data stays."""
        if self.alive:
            self._shut_down()

    def restart(self) -> None:
        """Start it again on the same port with its data, after `stop` if it still runs."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Stop all its processes where they are (SIGSTOP): connections hang."""
        self._running.pause()

    def resume(self) -> None:
        """Let its processes go on (SIGCONT)."""
        self._running.resume()

    def close(self) -> None:
        """Kill it and remove its folder."""
        if self._process is not None:
            self._process.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        guardian.release_folder(self.folder)

    def _shut_down(self) -> None:
        self._running.terminate(self._start_timeout)

    @property
    def _running(self) -> Process:
        if self._process is None:
            raise RuntimeError(f"{self.name} was never started")
        return self._process

    def _spawn(
        self, command: list[str | Path], env: dict[str, str] | None = None, user: str | None = None
    ) -> Process:
        log = self.folder / "server.log"
        return Process(command, cwd=self.folder, env=env, name=self.name, log=log, user=user)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class PostgreSQL(Server):
    """A PostgreSQL cluster with two-phase commits enabled; trusts everybody on 127.0.0.1.

    Without ``fsync`` (the default: tests kill processes, never the machine's power) it answers
    faster, and still keeps every commit through `kill`.
    """

    name = "postgresql"

    def __init__(self, *, fsync: bool = False, settings: dict[str, str] | None = None) -> None:
        """Choose durability, and further ``settings`` as in postgresql.conf."""
        super().__init__()
        self._bin = self._find()
        self._databases = itertools.count(1)
        # PostgreSQL refuses to run as root.
        self._user = unprivileged_user("postgres") if os.geteuid() == 0 else None
        self.settings = {
            "listen_addresses": self.host,
            "port": str(self.port),
            "unix_socket_directories": str(self.folder),
            "fsync": "on" if fsync else "off",
            "full_page_writes": "on" if fsync else "off",
            # Otherwise a commit may rest in shared memory, and be lost with the processes.
            "synchronous_commit": "on",
            "max_prepared_transactions": "20",
            "max_connections": "200",
            "shared_buffers": "64MB",
            "log_min_messages": "warning",
            **(settings or {}),
        }

    @staticmethod
    def _find() -> Path:
        """Return the folder of the newest installed version."""

        def version(path: Path) -> int:
            return int(path.parent.name) if path.parent.name.isdigit() else 0

        places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=version, reverse=True)
        return program("initdb", places).resolve().parent

    @classmethod
    def version(cls) -> str:
        """The version that is installed."""
        return version_of(cls._find() / "postgres")

    @property
    def url(self) -> str:
        """The SQLAlchemy URL of the database ``postgres``."""
        return self._url("postgres")

    def _url(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@{self.host}:{self.port}/{database}"

    def create_database(self) -> str:
        """Create an empty database; return its SQLAlchemy URL."""
        name = f"test_{next(self._databases)}"
        self._execute(f"CREATE DATABASE {name} TEMPLATE template0")
        return self._url(name)

    def drop_database(self, url: str) -> None:
        """Drop a database that `create_database` made, ending its connections."""
        self._execute(f"DROP DATABASE IF EXISTS {url.rpartition('/')[2]} WITH (FORCE)")

    def end_connections(self, database: str) -> None:
        """Let the server end every connection to a database."""
        self._execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"
        )

    def _execute(self, statement: str) -> None:
        import psycopg  # here, so that tests without PostgreSQL need no driver

        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute(statement.encode())

    @property
    def _dsn(self) -> str:
        return f"host={self.host} port={self.port} user=postgres dbname=postgres connect_timeout=5"

    def _launch(self) -> Process:
        data = self.folder / "data"
        if not data.exists():
            if self._user is not None:
                shutil.chown(self.folder, self._user)
            self._initialize(data)
        command: list[str | Path] = [self._bin / "postgres", "-D", data]
        for key, value in self.settings.items():
            command += ["-c", f"{key}={value}"]
        return self._spawn(command, user=self._user)

    def _initialize(self, data: Path) -> None:
        command: list[str | Path] = [self._bin / "initdb", "-D", data, "--no-sync", "--auth=trust"]
        command += ["--username=postgres", "--encoding=UTF8", "--locale=C"]
        with Process(command, cwd=self.folder, user=self._user, name="initdb") as initdb:
            if initdb.wait(60) != 0:
                raise ProcessEnded(initdb.describe())

    def _is_ready(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self._dsn).close()
        except psycopg.OperationalError:
            return False
        return True

    def _shut_down(self) -> None:
        self._running.signal(signal.SIGINT)  # "fast": rolls back and disconnects
        self._running.wait(self._start_timeout)


def unprivileged_user(name: str) -> str:
    """Return a user as whom a server may run, who has no rights to lose: `name`, or nobody."""
    for user in (name, "nobody"):
        try:
            return pwd.getpwnam(user).pw_name
        except KeyError:
            continue
    raise RuntimeError(f"a server can't run as root, and there is no user {name} or nobody")


class Redis(Server):
    """A Redis server; ``appendonly`` keeps what it acknowledged through `kill` and `restart`."""

    name = "redis"
    databases = 64

    def __init__(self, *, appendonly: bool = False) -> None:
        """Choose whether data survives a kill."""
        super().__init__()
        self.appendonly = appendonly
        self._program = program("redis-server")

    @classmethod
    def version(cls) -> str:
        """The version that is installed."""
        return version_of(program("redis-server"))

    @property
    def url(self) -> str:
        """The URL of database 0."""
        return self.database_url(0)

    def database_url(self, number: int) -> str:
        """Return the URL of one of its `databases`."""
        return f"redis://{self.host}:{self.port}/{number}"

    def flush(self, number: int) -> None:
        """Empty one database."""
        self._ask(f"SELECT {number}", "FLUSHDB")

    def _launch(self) -> Process:
        keep = "yes" if self.appendonly else "no"
        command: list[str | Path] = [self._program, "--bind", self.host, "--port", str(self.port)]
        command += ["--dir", self.folder, "--daemonize", "no", "--save", ""]
        # Otherwise what it has acknowledged may wait in its memory while an fsync is under way.
        command += ["--appendonly", keep, "--appendfsync", "always"]
        command += ["--databases", str(self.databases)]
        return self._spawn(command)

    def _is_ready(self) -> bool:
        try:
            return self._ask("PING") == ["+PONG"]
        except OSError:
            return False

    def _ask(self, *commands: str) -> list[str]:
        """Send inline commands; return one line of reply for each."""
        with socket.create_connection((self.host, self.port), timeout=10) as sock:
            sock.sendall("".join(f"{command}\r\n" for command in commands).encode())
            with sock.makefile("r", newline="\r\n") as replies:
                lines = [replies.readline().rstrip() for _ in commands]
        for line in lines:
            # -LOADING while it reads its file back: not ready, no error of ours.
            if line.startswith("-") and not line.startswith("-LOADING"):
                raise RuntimeError(f"Redis answered {line}")
        return lines


class RabbitMQ(Server):
    """A RabbitMQ node of its own name, ports, folder, cookie and epmd; no plugins.

    `restart` keeps users, vhosts, durable queues and persistent messages.
    """

    name = "rabbitmq"
    # Debian's wrapper on PATH changes the user and starts a session: not that one, if possible.
    _homes = (Path("/usr/lib/rabbitmq/bin"),)

    def __init__(self, *, config: dict[str, str] | None = None) -> None:
        """Take further ``config`` as in rabbitmq.conf."""
        super().__init__()
        self._server = program("rabbitmq-server", self._homes)
        self._ctl = program("rabbitmqctl", self._homes)
        self._epmd = program("epmd")
        self._erl_call = program("erl_call", sorted(Path("/usr/lib/erlang").glob("erts-*/bin")))
        self._vhosts = itertools.count(1)
        self._distribution_port = free_port()
        self._epmd_port = free_port()
        self._epmd_process: Process | None = None
        self.node = f"outbox{self.port}@localhost"
        self.config = {
            "listeners.tcp.default": f"{self.host}:{self.port}",
            "log.console": "false",
            "log.file.level": "info",
            "disk_free_limit.absolute": "50MB",
            **(config or {}),
        }
        self._cookie = secrets.token_hex(16)
        self._env = {
            "HOME": str(self.folder),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": self.host,
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_LOGS": str(self.folder / "log" / "rabbit.log"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "no-rabbitmq-env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_PID_FILE": str(self.folder / "rabbit.pid"),
            # Makes the script become the Erlang machine, instead of a shell that waits for it.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    @classmethod
    def version(cls) -> str:
        """The version that is installed."""
        return version_of(program("rabbitmqctl", cls._homes), "version")

    @property
    def url(self) -> str:
        """The AMQP URL of the default vhost ``/``."""
        return f"amqp://guest:guest@{self.host}:{self.port}//"

    def vhost_url(self, vhost: str) -> str:
        """Return the AMQP URL of a vhost."""
        return f"amqp://guest:guest@{self.host}:{self.port}/{quote(vhost, safe='')}"

    @property
    def log(self) -> str:
        """What the node wrote so far."""
        path = Path(self._env["RABBITMQ_LOGS"])
        return super().log + (path.read_text(errors="replace") if path.exists() else "")

    def create_vhost(self) -> str:
        """Create an empty vhost; return its AMQP URL."""
        vhost = f"test_{next(self._vhosts)}"
        name = _binary(vhost)
        anything = _binary(".*")
        self.eval(
            f"rabbit_vhost:add({name}, <<>>), rabbit_auth_backend_internal:set_permissions("
            f"{_binary('guest')}, {name}, {anything}, {anything}, {anything}, <<>>)."
        )
        return self.vhost_url(vhost)

    def delete_vhost(self, url: str) -> None:
        """Delete a vhost that `create_vhost` made, and all that is in it."""
        self.eval(f"rabbit_vhost:delete({_binary(url.rpartition('/')[2])}, <<>>).")

    def queue_depths(self, vhost: str = "/") -> dict[str, int]:
        """Return how many messages each queue holds: ready ones and unacknowledged ones.

        ``vhost`` is its name or its URL.
        """
        if "://" in vhost:
            vhost = vhost.split("/", 3)[3]
        answer = self.eval(
            'lists:flatten([io_lib:format("~s ~b,", [binary:encode_hex(element(4, Name)), Depth]) '
            "|| [{name, Name}, {messages, Depth}] <- "
            f"rabbit_amqqueue:info_all({_binary(vhost)}, [name, messages])])."
        )
        pairs = re.findall(r"([0-9A-F]+) ([0-9]+),", answer)
        return {bytes.fromhex(name).decode(): int(depth) for name, depth in pairs}

    def raise_memory_alarm(self) -> None:
        """Block every connection that publishes, as if memory had run out."""
        self.eval("rabbit_alarm:set_alarm({{resource_limit, memory, node()}, []}).")

    def clear_memory_alarm(self) -> None:
        """Let connections publish again."""
        self.eval("rabbit_alarm:clear_alarm({resource_limit, memory, node()}).")

    def eval(self, expressions: str) -> str:
        """Evaluate Erlang expressions, ended by a full stop, in the node; return the last value.

        It takes some milliseconds, where `rabbitmqctl` takes a second.
        """
        done = subprocess.run(
            [self._erl_call, "-c", self._cookie, "-sname", self.node, "-e"],
            input=f"{expressions}\n",
            env={**os.environ, **self._env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        answer = re.fullmatch(r"\{ok, ?(.*)\}\s*", done.stdout, re.DOTALL)
        if done.returncode != 0 or answer is None:
            raise RuntimeError(f"erl_call: {done.stdout}{done.stderr} (code {done.returncode})")
        return answer[1]

    def rabbitmqctl(self, *args: str) -> str:
        """Run ``rabbitmqctl`` on this node; return what it printed."""
        done = subprocess.run(
            [self._ctl, "--quiet", "--node", self.node, *args],
            env={**os.environ, **self._env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"rabbitmqctl {' '.join(args)}: {done.stdout}{done.stderr}")
        return done.stdout

    def close(self) -> None:
        """Kill the node and its epmd, and remove the folder."""
        if self._epmd_process is not None:
            self._epmd_process.close()
        super().close()

    def _launch(self) -> Process:
        self._write_files()
        # Erlang would start an epmd that stays behind; this one ends with the node's folder.
        if self._epmd_process is None:
            log = self.folder / "epmd.log"
            self._epmd_process = Process([self._epmd], env=self._env, name="epmd", log=log)
            wait_until(lambda: _answers(self.host, self._epmd_port), 10, "epmd")
        return self._spawn([self._server], env=self._env)

    def _write_files(self) -> None:
        (self.folder / "log").mkdir(exist_ok=True)
        lines = (f"{key} = {value}\n" for key, value in self.config.items())
        (self.folder / "rabbitmq.conf").write_text("".join(lines))
        (self.folder / "enabled_plugins").write_text("[].\n")
        cookie = self.folder / ".erlang.cookie"
        if not cookie.exists():
            cookie.touch(0o600)
            cookie.write_text(self._cookie)
            cookie.chmod(0o400)  # Erlang takes no other

    def _is_ready(self) -> bool:
        """Whether it opens an AMQP connection: the last thing that a node does on its start."""
        try:
            with socket.create_connection((self.host, self.port), timeout=10) as sock:
                sock.sendall(b"AMQP\x00\x00\x09\x01")
                return sock.recv(1) == b"\x01"  # the frame of Connection.Start
        except OSError:
            return False


def _answers(host: str, port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((host, port)) == 0


def _binary(text: str) -> str:
    """Write ``text`` as an Erlang binary."""
    return f"<<{','.join(str(byte) for byte in text.encode())}>>"


__all__ = ["PostgreSQL", "RabbitMQ", "Redis", "Server", "ServerMissing", "unprivileged_user"]
