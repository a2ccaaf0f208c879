"""``celery -A app outbox …`` as a process of its own: exit codes, streams, and what it imports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

APP = """
from celery import Celery
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from celery_outbox import Outbox, durable_task

app = Celery("shop", broker="memory://")
outbox = Outbox(app, sessionmaker(create_engine({url!r})))


@durable_task(app=app, name="shop.notify")
def notify(): ...
"""


class Shop:
    """A folder with an app, and commands that run there."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        (folder / "shop.py").write_text(APP.format(url=url))

    def run(self, *words: str, typed: str = "") -> "subprocess.CompletedProcess[str]":
        """Run a command of the outbox, with something typed at its terminal."""
        return self._python("-m", "celery", "-A", "shop", "outbox", *words, typed=typed)

    def send(self, *more: str) -> None:
        """Send a message, and do more."""
        lines = ["import shop", "shop.notify.apply_async(task_id='a1')", *more]
        done = self._python("-c", "\n".join(lines))
        assert done.returncode == 0, done.stderr

    def _python(self, *words: str, typed: str = "") -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, *words],
            cwd=self._folder,
            input=typed,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def shop(tmp_path: Path, database_url: str) -> Shop:
    """A shop with its tables."""
    shop = Shop(tmp_path, database_url)
    done = shop.run("storage", "rebuild", "--yes")
    assert done.returncode == 0, done.stderr
    return shop


def counts(shop: Shop) -> dict[str, int]:
    done = shop.run("storage", "counts", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


def test_a_dead_letter_is_found_replayed_and_cancelled(shop: Shop) -> None:
    """P18."""
    shop.send(
        "from celery_outbox.storage.store import Settlement",
        "batch = shop.outbox.store.claim(1, 60)",
        "shop.outbox.store.settle(batch, Settlement(dead={batch.rows[0].id: 'queue is full'}))",
    )
    assert counts(shop)["dead"] == 1
    listed = json.loads(shop.run("dead-letters", "list", "--json").stdout)
    assert [message["task_id"] for message in listed["messages"]] == ["a1"]
    replayed = shop.run("dead-letters", "replay", "--error", "FULL", "--json")
    assert (replayed.returncode, json.loads(replayed.stdout)["rows"]) == (0, 1)
    (audit,) = [line for line in replayed.stderr.splitlines() if "celery_outbox.audit" in line]
    assert json.loads(audit.partition("celery_outbox.audit: ")[2])["rows"] == 1
    assert counts(shop) == {**dict.fromkeys(counts(shop), 0), "outgoing": 1}
    cancelled = shop.run("cancel", "a1", "--yes", "--json")
    assert (cancelled.returncode, json.loads(cancelled.stdout)["rows"]) == (0, 1)
    assert set(counts(shop).values()) == {0}


def test_the_lag_is_an_exit_code(shop: Shop) -> None:
    """P17."""
    assert shop.run("status", "--max-lag", "0").returncode == 0
    shop.send()
    late = shop.run("status", "--max-lag", "0", "--json")
    assert late.returncode == 1
    assert json.loads(late.stdout)["lag_seconds"] > 0
    assert shop.run("status", "--max-lag", "600").returncode == 0


@pytest.mark.parametrize(("typed", "left"), [("", 1), ("n\n", 1), ("y\n", 0)])
def test_a_question_is_asked_beside_the_json(shop: Shop, typed: str, left: int) -> None:
    """P18: silence is a no."""
    shop.send()
    done = shop.run("storage", "clear", "outgoing", "--json", typed=typed)
    assert done.returncode == left
    assert "Delete 1 outgoing?" in done.stderr
    assert counts(shop)["outgoing"] == left
    if not left:
        assert json.loads(done.stdout)["deleted"] == {"outgoing": 1}


def test_a_database_that_is_away_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    shop = Shop(tmp_path, "postgresql+psycopg://ann:s3cret@127.0.0.1:9/none")
    for words in (["status", "--max-lag", "5"], ["storage", "rebuild", "--yes"]):
        done = shop.run(*words)
        assert done.returncode == 3
        assert "the database says" in done.stderr
        assert "s3cret" not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
