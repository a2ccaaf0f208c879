"""A private MariaDB server: see `tests.support.servers`.

with MariaDB() as server:
    engine = create_engine(server.create_database())
"""

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

from tests.support.processes import Process, ProcessEnded
from tests.support.servers import Server, program, unprivileged_user, version_of

__all__ = ["MariaDB"]

#: Debian keeps the server out of an ordinary user's PATH.
_PLACES = [Path("/usr/sbin"), Path("/usr/local/sbin")]


class MariaDB(Server):
    """A MariaDB server without a binary log; root comes in from 127.0.0.1 without a password.

    Without ``fsync`` (the default: tests kill processes, never the machine's power) it answers
    faster, and still keeps every commit through `kill`.
    """

    name = "mariadb"

    def __init__(self, *, fsync: bool = False, settings: dict[str, str] | None = None) -> None:
        """Choose durability, and further ``settings`` as options of mariadbd."""
        super().__init__()
        self._server = self._find()
        self._install = program("mariadb-install-db")
        self._databases = itertools.count(1)
        # Nothing of the machine's own server is shared: no user, file or socket.
        self._user = unprivileged_user("mysql") if os.geteuid() == 0 else None
        self.settings = {
            "datadir": str(self.folder / "data"),
            # Two servers' temporary tables may get the same name.
            "tmpdir": str(self.folder),
            "bind-address": self.host,
            "port": str(self.port),
            "socket": str(self.folder / "socket"),
            "pid-file": str(self.folder / "pid"),
            "skip-name-resolve": "ON",
            "max-connections": "200",
            "innodb-buffer-pool-size": "64M",
            "innodb-log-file-size": "48M",
            "innodb-use-native-aio": "OFF",
            # 2: written at each commit, so that a kill loses nothing; synced by the system.
            "innodb-flush-log-at-trx-commit": "1" if fsync else "2",
            "innodb-flush-method": "fsync" if fsync else "nosync",
            **(settings or {}),
        }

    @staticmethod
    def _find() -> Path:
        return program("mariadbd", _PLACES)

    @classmethod
    def version(cls) -> str:
        """The version that is installed."""
        return version_of(cls._find())

    @property
    def url(self) -> str:
        """The SQLAlchemy URL of the server's own database."""
        return self._url("mysql")

    def _url(self, database: str) -> str:
        return f"mariadb+pymysql://root@{self.host}:{self.port}/{database}?charset=utf8mb4"

    def create_database(self) -> str:
        """Create an empty database; return its SQLAlchemy URL."""
        name = f"test_{next(self._databases)}"
        self.execute(f"CREATE DATABASE {name}")
        return self._url(name)

    def empty(self, url: str) -> None:
        """Drop all that is in a database, ending its connections."""
        name = _name(url)
        self.end_connections(name)
        tables = self.execute(
            f"SELECT table_name FROM information_schema.tables WHERE table_schema = '{name}'"
        )
        if tables:
            every = ", ".join(f"{name}.`{table}`" for (table,) in tables)
            self.execute(f"SET STATEMENT foreign_key_checks = 0 FOR DROP TABLE {every}")

    def drop_database(self, url: str) -> None:
        """Drop a database that `create_database` made, ending its connections."""
        name = _name(url)
        self.end_connections(name)
        self.execute(f"DROP DATABASE IF EXISTS {name}")

    def end_connections(self, database: str) -> None:
        """Let the server end every connection to a database."""
        found = self.execute(
            f"SELECT id FROM information_schema.processlist WHERE db = '{database}'"
        )
        for (number,) in found:
            self.execute(f"KILL SOFT CONNECTION {int(number)}", ignoring=(1094,))  # it is gone

    def execute(self, statement: str, ignoring: tuple[int, ...] = ()) -> list[tuple[Any, ...]]:
        """Run a statement on a connection of its own; return the rows."""
        import pymysql  # here, so that tests without MariaDB need no driver

        connection = pymysql.connect(**self._address, autocommit=True)
        with connection, connection.cursor() as cursor:
            try:
                cursor.execute(statement)
            except pymysql.MySQLError as error:
                if error.args[0] not in ignoring:
                    raise
                return []
            return list(cursor.fetchall())

    @property
    def _address(self) -> dict[str, Any]:
        return {"host": self.host, "port": self.port, "user": "root", "connect_timeout": 5}

    def _launch(self) -> Process:
        if not (self.folder / "data").exists():
            if self._user is not None:
                shutil.chown(self.folder, self._user)
            self._initialize(self.folder / "data")
        options = [f"--{key}={value}" for key, value in self.settings.items()]
        return self._spawn([self._server, "--no-defaults", *options], user=self._user)

    def _initialize(self, data: Path) -> None:
        command: list[str | Path] = [self._install, "--no-defaults", f"--datadir={data}"]
        command += [f"--tmpdir={self.folder}"]
        command += ["--auth-root-authentication-method=normal", "--skip-test-db"]
        command += ["--skip-name-resolve", "--innodb-flush-method=nosync"]
        command += ["--innodb-log-file-size=48M", "--innodb-use-native-aio=OFF"]
        with Process(command, cwd=self.folder, user=self._user, name="mariadb-install-db") as made:
            if made.wait(60) != 0:
                raise ProcessEnded(made.describe())

    def _is_ready(self) -> bool:
        import pymysql

        try:
            pymysql.connect(**self._address).close()
        except pymysql.MySQLError:
            return False
        return True


def _name(url: str) -> str:
    return url.rpartition("/")[2].partition("?")[0]
