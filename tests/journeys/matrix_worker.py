"""A worker that starts again whenever it is killed, and at once: ``-m tests.journeys.matrix_worker``.

This process imports everything, once, and is no worker itself. It forks one, and the next one when
that is gone.
"""

import os
import sys
from importlib import import_module

from tests.journeys.worker import app


def main(*arguments: str) -> int:
    """Run worker after worker; return when one ends by itself."""
    app.loader.import_default_modules()
    app.finalize()
    for name in ("celery.apps.worker", "celery.bin.celery", "celery.concurrency.thread"):
        import_module(name)
    while True:
        child = os.fork()
        if not child:
            try:
                app.worker_main(["worker", *arguments])
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
