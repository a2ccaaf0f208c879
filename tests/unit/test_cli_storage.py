"""``celery -A app outbox storage …`` and ``status``: what they do to the tables, and what they say."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from celery_outbox.cli import outbox as command
from celery_outbox.storage.dialects import DIALECTS
from celery_outbox.storage.store import Settlement
from tests.unit.conftest import MakeShop
from tests.unit.shop import Shop
from tests.unit.test_cli import bare_shop, run, table_names

__all__ = ["bare_shop"]

EVERY = {"outgoing": 1, "scheduled": 1, "in_flight": 1, "published": 1, "dead": 1, "incoming": 1}
#: As commands count them, who know local queues too.
COUNTED = {**EVERY, "due": 0, "taken": 0}


def answer(shop: Shop, *words: str) -> Any:
    """What a command that ends well says with --json."""
    result = run(shop.app, *words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def fill(shop: Shop) -> dict[str, str]:
    """One message in each state; return the task ids by state."""
    store, found = shop.outbox.store, {}
    for state in ("dead", "published", "in_flight"):
        found[state] = str(shop.notify.delay(state).id)
        batch = store.claim(1, 60)
        number = batch.rows[0].id
        if state == "dead":
            store.settle(batch, Settlement(dead={number: "NOT_FOUND - no exchange 'mail'"}))
        elif state == "published":
            store.settle(batch, Settlement(kept={number: 3600}))
    found["scheduled"] = str(shop.notify.apply_async(("scheduled",), countdown=3600).id)
    found["outgoing"] = str(shop.notify.delay("outgoing").id)
    with store.engine.begin() as connection:
        store.receive(connection, "handled:0:0:", "shop.notify", "handled")
    return found


def audit_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The audit lines, parsed."""
    return [
        json.loads(record.getMessage())
        for record in caplog.records
        if record.name == "celery_outbox.audit"
    ]


# counts


def test_counts(shop: Shop) -> None:
    """P17."""
    fill(shop)
    assert answer(shop, "storage", "counts") == COUNTED
    said = run(shop.app, "storage", "counts").output
    for words in ("persisted incoming", "in flight", "published (kept)", "dead letters"):
        assert words in said


def test_counts_by_task_and_by_destination(shop: Shop) -> None:
    fill(shop)
    assert answer(shop, "storage", "counts", "--by", "task") == {"shop.notify": COUNTED}
    by_destination = {name: count for name, count in COUNTED.items() if name != "incoming"}
    assert answer(shop, "storage", "counts", "--by", "destination") == {"celery": by_destination}
    assert "shop.notify" in run(shop.app, "storage", "counts", "--by", "task").output


# rebuild, script


def test_rebuild_drops_everything_and_creates_it_again(shop: Shop) -> None:
    """P18."""
    fill(shop)
    said = answer(shop, "storage", "rebuild", "--yes")
    assert said["rows"] == 6
    assert answer(shop, "storage", "counts") == dict.fromkeys(COUNTED, 0)
    shop.outbox.verify_schema()


def test_rebuild_creates_what_was_not_there(bare_shop: Shop) -> None:
    assert answer(bare_shop, "storage", "rebuild", "--yes")["rows"] == 0
    bare_shop.outbox.verify_schema()


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
def test_script_for_every_dialect_needs_no_connection(
    make_shop: MakeShop, tmp_path: Path, dialect: str
) -> None:
    shop = make_shop("postgresql+psycopg://nobody@127.0.0.1:9/none", tables=False)
    file = tmp_path / "outbox.sql"
    words = ["storage", "script", "--dialect", dialect]
    result = run(shop.app, *words, "--file", str(file))
    assert result.exit_code == 0, result.output
    script = file.read_text()
    for table in (
        "outbox",
        "inbox",
        "outbox_dead_letter",
        "outbox_beat",
        "outbox_relay",
        "outbox_schema",
    ):
        assert f"CREATE TABLE {table} " in script
    assert run(shop.app, *words).output == script


def test_script_into_a_file_that_can_not_be_written(sqlite_shop: Shop, tmp_path: Path) -> None:
    result = run(sqlite_shop.app, "storage", "script", "--file", str(tmp_path / "no" / "such"))
    assert result.exit_code == 1
    assert "can't be written" in result.output


# clear


@pytest.mark.parametrize("what", ["incoming", "outgoing", "scheduled", "published", "dead"])
def test_clear_deletes_what_it_is_told_and_says_how_much(shop: Shop, what: str) -> None:
    """P18."""
    fill(shop)
    said = answer(shop, "storage", "clear", what, "--yes")
    assert said["deleted"] == {what: 1}
    assert shop.outbox.store.counts() == {**EVERY, what: 0}


def test_clear_several(shop: Shop) -> None:
    fill(shop)
    said = run(shop.app, "storage", "clear", "outgoing", "dead", "--yes").output
    assert "deleted: 1 outgoing, 1 dead letters" in said
    assert "left alone: 1 in flight" in said
    assert shop.outbox.store.counts() == {**EVERY, "outgoing": 0, "dead": 0}


def test_clear_tries_without_changing(shop: Shop) -> None:
    fill(shop)
    said = answer(shop, "storage", "clear", "outgoing", "incoming", "--dry-run")
    assert said["deleted"] == {"outgoing": 1, "incoming": 1}
    assert shop.outbox.store.counts() == EVERY


@pytest.mark.parametrize("words", [[], ["everything"], ["in_flight"]])
def test_clear_takes_states_only(sqlite_shop: Shop, words: list[str]) -> None:
    fill(sqlite_shop)
    assert run(sqlite_shop.app, "storage", "clear", *words, "--yes").exit_code == 2
    assert sqlite_shop.outbox.store.counts() == EVERY


@pytest.mark.parametrize(
    "words",
    [
        ["storage", "clear", "outgoing"],
        ["storage", "rebuild"],
        ["storage", "release", "--older-than", "0"],
        ["storage", "prune", "--older-than", "0"],
        ["dead-letters", "discard", "--all"],
        ["cancel", "5"],
        ["scheduled", "cancel", "4"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("typed", ["n\n", ""])
def test_what_destroys_asks_first(sqlite_shop: Shop, words: list[str], typed: str) -> None:
    """P18: neither a no nor silence destroys."""
    fill(sqlite_shop)
    result = CliRunner().invoke(command, words, obj=context(sqlite_shop), input=typed)
    assert result.exit_code == 1
    assert "Aborted!" in result.output
    assert sqlite_shop.outbox.store.counts() == EVERY


def context(shop: Shop) -> Any:
    from celery.bin.base import CLIContext

    return CLIContext(app=shop.app, no_color=True, workdir=None, quiet=False)


def test_a_yes_on_the_terminal_is_one(sqlite_shop: Shop) -> None:
    fill(sqlite_shop)
    words = ["storage", "clear", "outgoing"]
    result = CliRunner().invoke(command, words, obj=context(sqlite_shop), input="y\n")
    assert result.exit_code == 0
    assert sqlite_shop.outbox.store.counts() == {**EVERY, "outgoing": 0}


# release, prune


def test_release_without_options_gives_back_what_is_over(shop: Shop) -> None:
    """P18."""
    fill(shop)
    assert answer(shop, "storage", "release") == {"dry_run": False, "rows": 0}
    outbox = shop.outbox.tables.outbox
    with shop.outbox.engine.begin() as connection:
        over = sa.update(outbox).where(outbox.c.lease_token.is_not(None))
        connection.execute(over.values(available_at=shop.outbox.store.dialect.after(-5)))
    assert answer(shop, "storage", "release", "--dry-run")["rows"] == 1
    assert answer(shop, "storage", "release") == {"dry_run": False, "rows": 1}
    assert answer(shop, "storage", "release") == {"dry_run": False, "rows": 0}
    assert shop.outbox.store.counts() == {**EVERY, "in_flight": 0, "outgoing": 2}


def test_release_of_a_live_lease_by_its_token(shop: Shop) -> None:
    """P18."""
    fill(shop)
    (listed,) = answer(shop, "list", "--state", "in_flight")["messages"]
    token = listed["lease_token"]
    assert answer(shop, "storage", "release", "--token", "another", "--yes")["rows"] == 0
    assert shop.outbox.store.counts() == EVERY
    dry = run(shop.app, "storage", "release", "--token", token, "--dry-run")
    assert token in dry.output
    assert answer(shop, "storage", "release", "--token", token, "--yes")["rows"] == 1
    assert shop.outbox.store.counts() == {**EVERY, "in_flight": 0, "outgoing": 2}


def test_release_by_the_age_of_the_claim(shop: Shop) -> None:
    """P18. The lease of the app is 60 seconds."""
    fill(shop)
    assert answer(shop, "storage", "release", "--older-than", "30", "--yes")["rows"] == 0
    outbox = shop.outbox.tables.outbox
    with shop.outbox.engine.begin() as connection:
        claimed_40_seconds_ago = sa.update(outbox).where(outbox.c.lease_token.is_not(None))
        values = {"available_at": shop.outbox.store.dialect.after(20)}
        connection.execute(claimed_40_seconds_ago.values(**values))
    assert answer(shop, "storage", "release", "--older-than", "50", "--yes")["rows"] == 0
    assert answer(shop, "storage", "release", "--older-than", "30", "--yes")["rows"] == 1


def test_release_takes_one_of_its_options(sqlite_shop: Shop) -> None:
    words = ["storage", "release", "--token", "t", "--older-than", "1"]
    assert run(sqlite_shop.app, *words).exit_code == 2


def test_prune_deletes_what_is_older_than_the_retention(shop: Shop) -> None:
    """P12."""
    fill(shop)
    assert answer(shop, "storage", "prune") == {"rows": 0}
    inbox = shop.outbox.tables.inbox
    with shop.outbox.engine.begin() as connection:
        week_old = {"handled_at": shop.outbox.store.dialect.after(-7 * 86400 - 60)}
        connection.execute(sa.update(inbox).values(**week_old))
    assert answer(shop, "storage", "prune", "--older-than", str(8 * 86400)) == {"rows": 0}
    assert answer(shop, "storage", "prune") == {"rows": 1}
    assert shop.outbox.store.counts() == {**EVERY, "incoming": 0}


# status


def test_status(shop: Shop) -> None:
    """P17."""
    fill(shop)
    outbox = shop.outbox.tables.outbox
    with shop.outbox.engine.begin() as connection:
        waits = sa.update(outbox).where(outbox.c.task_id.is_not(None), outbox.c.due_at.is_(None))
        waits = waits.where(outbox.c.lease_token.is_(None), outbox.c.published_at.is_(None))
        late = shop.outbox.store.dialect.after(-90)
        assert connection.execute(waits.values(available_at=late)).rowcount == 1
    said = answer(shop, "status")
    assert 90 <= said.pop("lag_seconds") < 300
    assert said.pop("errors") == [
        {"error": "NOT_FOUND - no exchange 'mail'", "messages": 1, "dead": 1}
    ]
    assert (said.pop("relays"), said.pop("relays_alive")) == ([], 0)
    assert said.pop("published_per_second") == 0
    assert said.pop("handled_per_second") == pytest.approx(1 / 60, abs=0.001)
    assert said.pop("local_queues") == {}
    assert said == COUNTED
    assert run(shop.app, "status", "--max-lag", "600").exit_code == 0
    result = run(shop.app, "status", "--max-lag", "60")
    assert result.exit_code == 1
    assert "no exchange 'mail'" in result.output
    assert run(shop.app, "status", "--max-lag", "60", "--json").exit_code == 1


def test_what_is_not_due_does_not_lag(shop: Shop) -> None:
    shop.notify.apply_async(("later",), countdown=3600)
    assert answer(shop, "status")["lag_seconds"] == 0
    assert run(shop.app, "status", "--max-lag", "0").exit_code == 0


def test_status_looks_again(sqlite_shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is interrupted."""

    def meanwhile(_seconds: float) -> None:
        if sqlite_shop.stored() == ["1", "2"]:
            raise KeyboardInterrupt
        sqlite_shop.notify.delay("2")

    monkeypatch.setattr(time, "sleep", meanwhile)
    sqlite_shop.notify.delay("1")
    words = ["status", "--watch", "1", "--json"]
    result = CliRunner().invoke(command, words, obj=context(sqlite_shop))
    seen = [json.loads(line)["outgoing"] for line in result.stdout.splitlines() if line]
    assert seen == [1, 2]


# What all have in common

ALL = [
    ["storage", "counts"],
    ["storage", "counts", "--by", "task"],
    ["storage", "clear", "outgoing", "--yes"],
    ["storage", "release"],
    ["storage", "prune"],
    ["status"],
    ["list"],
    ["show", "1"],
    ["cancel", "1", "--yes"],
    ["republish"],
    ["dead-letters", "list"],
    ["dead-letters", "show", "1"],
    ["dead-letters", "replay", "--all"],
    ["dead-letters", "discard", "--all", "--yes"],
    ["scheduled", "list"],
    ["scheduled", "cancel", "1", "--yes"],
    ["scheduled", "reschedule", "1", "--in", "5"],
    ["scheduled", "run-now", "1"],
]


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_missing_tables_are_told(sqlite_url: str, make_shop: MakeShop, words: list[str]) -> None:
    shop = make_shop(sqlite_url, tables=False)
    result = run(shop.app, *words)
    assert result.exit_code == 1
    assert "'outbox' is missing" in result.output
    assert not table_names(shop)


@pytest.mark.parametrize("words", [*ALL, ["storage", "rebuild", "--yes"]], ids=" ".join)
def test_a_database_that_is_away_is_told_without_its_password(
    make_shop: MakeShop, words: list[str]
) -> None:
    """An exit code of its own: that nothing is known is not a no."""
    shop = make_shop("postgresql+psycopg://nobody:s3cret@127.0.0.1:9/none", tables=False)
    result = run(shop.app, *words)
    assert result.exit_code == 3
    assert result.output.startswith("Error: the database says:")
    assert "s3cret" not in result.output


def test_rebuild_asks_without_the_password(make_shop: MakeShop, postgresql_url: str) -> None:
    url = sa.make_url(postgresql_url).set(password="s3cret")
    shop = make_shop(url.render_as_string(hide_password=False))
    words = ["storage", "rebuild"]
    result = CliRunner().invoke(command, words, obj=context(shop), input="n\n")
    assert "Drop 7 tables with 0 rows in postgresql" in result.output
    assert "s3cret" not in result.output


def test_every_change_is_audited(sqlite_shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """P18."""
    fill(sqlite_shop)
    caplog.set_level(logging.INFO, "celery_outbox.audit")
    for words in (
        ["storage", "counts"],
        ["storage", "clear", "outgoing", "--dry-run"],
        ["dead-letters", "list"],
        ["dead-letters", "replay", "--all", "--dry-run"],
    ):
        run(sqlite_shop.app, *words)
    assert audit_of(caplog) == []
    run(sqlite_shop.app, "dead-letters", "replay", "--task", "shop.*", "--error", "not_found")
    run(sqlite_shop.app, "storage", "clear", "outgoing", "--yes")
    first, second = audit_of(caplog)
    assert first["user"]
    assert first["command"] == "dead-letters replay"
    assert first["filter"] == {"task": "shop.*", "error": "not_found"}
    assert (first["rows"], first["completed"]) == (1, True)
    assert (second["command"], second["filter"]) == ("storage clear", {"what": "outgoing"})
    assert second["rows"] == 2


def test_what_an_error_ends_is_audited_as_far_as_it_came(
    sqlite_shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    fill(sqlite_shop)
    caplog.set_level(logging.INFO, "celery_outbox.audit")
    with sqlite_shop.outbox.engine.begin() as connection:
        refuse = "CREATE TRIGGER no BEFORE DELETE ON outbox BEGIN SELECT RAISE(ABORT, 'no'); END"
        connection.exec_driver_sql(refuse)
    result = run(sqlite_shop.app, "storage", "clear", "dead", "outgoing", "--yes")
    assert result.exit_code == 3
    done, failed = audit_of(caplog)
    assert (done["filter"], done["rows"], done["completed"]) == ({"what": "dead"}, 1, True)
    assert (failed["filter"], failed["rows"], failed["completed"]) == (
        {"what": "outgoing"},
        0,
        False,
    )
