"""The wire of a driver's connection to the database: cut where the client has it."""

import os
import socket
from typing import Any

__all__ = ["cut", "use"]


def cut(connection: Any) -> None:
    """Cut the wire of a connection of psycopg or PyMySQL."""
    number = (
        connection.pgconn.socket if hasattr(connection, "pgconn") else connection._sock.fileno()
    )
    with socket.socket(fileno=os.dup(number)) as wire:
        wire.shutdown(socket.SHUT_RDWR)


def use(connection: Any) -> None:
    """Ask something: what the driver says of a connection that is gone is raised here."""
    ask = connection.execute if hasattr(connection, "pgconn") else connection.query
    ask("SELECT 1")
