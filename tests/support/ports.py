"""Free TCP ports for servers that must be able to come back on the same one."""

import random
import socket

# Below the range that Linux takes outgoing ports from (32768 up): while a server is down, nobody
# else is given its port, and a client that keeps trying can't end up connected to itself.
_RANGE = range(20000, 32000)


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nobody listens."""
    for _ in range(200):
        port = random.choice(_RANGE)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port between {_RANGE.start} and {_RANGE.stop}")
