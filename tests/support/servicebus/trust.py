"""Trust: processes that take the emulators' certificates for good, as one would those of a company.

The admin client reads ``REQUESTS_CA_BUNDLE`` by itself. The AMQP side of the SDK takes its roots from
certifi, unless it is told otherwise, which kombu never does.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import certifi

__all__ = ["Trust", "trust_of_environment"]

_VARIABLE = "CELERY_OUTBOX_TEST_CERTIFICATES"


class Trust:
    """The certificates that this process and its children trust, in one file."""

    _file: Path | None = None

    @classmethod
    def add(cls, certificate: Path) -> None:
        """Trust one more, here and in processes that are started from now on."""
        if cls._file is None:
            folder = Path(tempfile.mkdtemp(prefix="outbox-trust-"))
            cls._file = folder / "certificates.pem"
            cls._file.write_bytes(Path(certifi.where()).read_bytes())
            os.environ[_VARIABLE] = str(cls._file)
            trust_of_environment()
        with cls._file.open("ab") as bundle:
            bundle.write(certificate.read_bytes())


def trust_of_environment() -> None:
    """Trust what the parent process trusts."""
    if file := os.environ.get(_VARIABLE):
        os.environ["REQUESTS_CA_BUNDLE"] = file
        certifi.where = lambda: file
