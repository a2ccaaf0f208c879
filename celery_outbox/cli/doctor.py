"""``outbox doctor``: what must hold for messages to get through, proved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from celery.bin.base import CeleryCommand, handle_preload_options

from celery_outbox.cli.context import outbox_of_app
from celery_outbox.cli.output import as_json, print_json, printable

if TYPE_CHECKING:
    from celery_outbox.doctor.finding import Finding

__all__ = ["doctor"]


def _known(_ctx: click.Context, _option: click.Parameter, names: Any) -> tuple[str, ...]:
    if not names:
        return ()
    from celery_outbox.doctor.examination import CHECKS

    known = [check.name for check in CHECKS]
    for name in names:
        if name not in known:
            raise click.BadParameter(f"there is no check {name!r}: {', '.join(known)}")
    return tuple(names)


@click.command(cls=CeleryCommand)
@click.option("--check", "names", multiple=True, callback=_known, help="Only this one; repeatable.")
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings too.")
@click.option("--quiet", "-q", is_flag=True, help="Say nothing of what is as it should be.")
@as_json
@click.pass_context
@handle_preload_options
def doctor(
    ctx: click.Context, names: tuple[str, ...], strict: bool, quiet: bool, json_wanted: bool
) -> None:
    """Prove that messages get through: database, broker, settings, tables and what is in them.

    Writes to the database and rolls back; publishes to a queue that does not exist. Each finding says
    what to do. Exits with 1 if one is an error, and with 3 if the database can't be asked.
    """
    from celery_outbox.doctor.examination import examine, worst_of
    from celery_outbox.doctor.finding import Level

    found = outbox_of_app(ctx)
    findings = []
    for finding in examine(found, names or None):
        findings.append(finding)
        if not json_wanted and not (quiet and finding.level is Level.OK):
            _print(finding)
    worst = worst_of(findings)
    if json_wanted:
        print_json({"level": worst.value, "findings": [_plain(each) for each in findings]})
    elif not quiet or worst is not Level.OK:
        click.echo(_summary(findings))
    if any(each.check == "database" and each.level is Level.ERROR for each in findings):
        ctx.exit(3)
    ctx.exit(int(worst is Level.ERROR or (strict and worst is not Level.OK)))


def _print(finding: Finding) -> None:
    colors = {"ok": "green", "skipped": None, "warning": "yellow", "error": "red"}
    level = click.style(f"{finding.level.value:<8}", fg=colors[finding.level.value])
    click.echo(f"{level} {finding.check}: {printable(finding.says)}")
    if finding.advice:
        click.echo(f"         -> {printable(finding.advice)}")


def _plain(finding: Finding) -> dict[str, str]:
    return {
        "check": finding.check,
        "level": finding.level.value,
        "says": finding.says,
        "advice": finding.advice,
    }


def _summary(findings: list[Finding]) -> str:
    def count(level: str) -> int:
        return sum(finding.level.value == level for finding in findings)

    skipped = f", {count('skipped')} not looked at" if count("skipped") else ""
    return f"{count('error')} error(s), {count('warning')} warning(s), {count('ok')} ok{skipped}"
