"""The listings of docs/commands: the commands run, and say what the pages say.

Each listing begins with the same shop (`filled`). Where a page can't know what is said, such as times
and tokens, it says something of the same form.
"""

import re
import shlex
from pathlib import Path

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from celery_outbox.cli import outbox as command
from celery_outbox.doctor.examination import CHECKS
from celery_outbox.storage.relays import Relays
from celery_outbox.storage.store import Settlement
from tests.docs.markdown import DOCS, Listing, listings, name_of
from tests.unit.conftest import MakeShop
from tests.unit.shop import Shop
from tests.unit.test_cli_storage import context

LISTINGS = [
    listing
    for page in sorted((DOCS / "commands").glob("*.md"))
    for listing in listings(page, "console")
]
_PROMPT = "$ celery -A shop outbox "
_VARYING = [
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[.,\d]*(\+00:00|Z)?", "<time>"),
    (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "<id>"),
    (r"\b\d+ s\b", "<span>"),
    (r'("(?:lag|silent)_seconds": )[\d.]+', r"\1<span>"),
    (r"gen\d+@[\w.-]+", "<origin>"),
    (r'"user": "\w+"', "<user>"),
    (r" +", " "),
]


def filled(shop: Shop) -> None:
    """The messages of the pages: one in each state, called by letters; f6 and g7 in a local queue."""
    store, tables = shop.outbox.store, shop.outbox.tables
    for number, task_id in enumerate(["a1", "b2", "c3"], start=1):
        shop.notify.apply_async((number,), task_id=task_id, queue="mail" if number == 1 else None)
        batch = store.claim(1, 60)
        match task_id:
            case "a1":
                error = "unroutable, the broker returned it: NO_ROUTE"
                store.settle(batch, Settlement(dead={batch.rows[0].id: error}))
            case "b2":
                store.settle(batch, Settlement(kept={batch.rows[0].id: 50.5}))
    shop.notify.apply_async((4,), task_id="d4", countdown=7200)
    shop.notify.apply_async((5,), task_id="e5")
    for number, task_id in enumerate(["f6", "g7"], start=6):
        shop.notify.apply_async((number,), task_id=task_id, queue="emails")
    taken = store.local.take(
        ["emails"], 1, token="4711@web:5f1c9a7e02", lease_seconds=30, max_attempts=3
    )
    assert [each.id for each in taken] == [1]
    with store.engine.begin() as connection:
        late = store.dialect.after(-240)
        for table in (tables.outbox, tables.local, tables.dead_letter):
            connection.execute(sa.update(table).values(created_at=late))
        connection.execute(sa.update(tables.dead_letter).values(died_at=store.dialect.after(-120)))
        for table, task_id in ((tables.outbox, "e5"), (tables.local, "g7")):
            waits = sa.update(table).where(table.c.task_id == task_id)
            connection.execute(waits.values(available_at=late))
        store.receive(connection, "z0:0:0:", "shop.notify", "z0")
        store.record(connection, "z0:0:0:", "SUCCESS", None, forget=False)
    error = "the broker is away: ConnectionRefusedError: [Errno 111] Connection refused"
    values = {"dead": 1, "lost": 0, "per_second": 412.5, "last_error": error}
    relays = Relays(shop.outbox.engine, tables)
    relays.seen("3f", has_failed=True, host="web", pid=20088, confirmed=104218, **values)


def normal(text: str) -> list[str]:
    for pattern, replacement in _VARYING:
        text = re.sub(pattern, replacement, text)
    return [line.rstrip() for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("listing", LISTINGS, ids=lambda each: each.place)
def test_the_commands_of_a_listing_say_what_the_page_says(
    listing: Listing,
    make_shop: MakeShop,
    sqlite_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shop = make_shop(sqlite_url, outbox_local_queues=["emails"])
    filled(shop)
    monkeypatch.chdir(tmp_path)
    first, *blocks = listing.code.split(_PROMPT)
    assert not first
    for block in blocks:
        line, _, expected = block.partition("\n")
        result = CliRunner().invoke(
            command, shlex.split(line), obj=context(shop), catch_exceptions=False
        )
        # The audit lines come to the terminal too; docs/commands/README.md has one.
        said = [each for each in normal(result.output) if "celery_outbox.audit" not in each]
        assert said == normal(expected), f"{listing.place}: {line}\n{result.output}"


def test_there_are_pages_for_all_groups() -> None:
    pages = "".join(page.read_text() for page in (DOCS / "commands").glob("*.md"))
    for name, found in command.commands.items():
        for each in [name, *(f"{name} {verb}" for verb in getattr(found, "commands", ()))]:
            assert f"outbox {each}" in pages, f"no page tells of {each}"


def test_pages_are_named_after_what_they_tell_of() -> None:
    assert {name_of(each.page) for each in LISTINGS} >= {
        f"docs/commands/{page}.md"
        for page in (
            *("storage", "messages", "dead-letters", "scheduled", "status", "doctor"),
            *("relay", "schema"),
        )
    }


def test_the_page_of_the_doctor_tells_of_each_check() -> None:
    page = (DOCS / "commands" / "doctor.md").read_text()
    assert re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE) == [each.name for each in CHECKS]
