"""Examination: all checks, one after the other, whatever becomes of one of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from celery_outbox.doctor import (
    broker,
    clocks,
    content,
    database,
    leases,
    notifications,
    progress,
    retention,
    snapshots,
)
from celery_outbox.doctor.finding import Finding, Level, error, skipped
from celery_outbox.doctor.tasks import check_durable_tasks

if TYPE_CHECKING:
    from celery_outbox.plugin import Outbox

__all__ = ["CHECKS", "Check", "examine", "worst_of"]


@dataclass(frozen=True, slots=True)
class Check:
    """One check by name; it is not run when one of those that it needs has found an error."""

    name: str
    run: Callable[[Outbox], Iterable[Finding]]
    needs: tuple[str, ...] = ()


CHECKS: tuple[Check, ...] = (
    Check("database", database.check_database),
    Check("schema", database.check_schema, ("database",)),
    Check("writing", database.check_writing, ("database", "schema")),
    Check("notifications", notifications.check_notifications, ("database",)),
    Check("clocks", clocks.check_clocks, ("database",)),
    Check("snapshots", snapshots.check_snapshots, ("database", "schema")),
    Check("broker", broker.check_broker),
    Check("confirms", broker.check_confirms, ("broker",)),
    Check("queues", broker.check_queues, ("broker",)),
    Check("lease", leases.check_lease, ("database", "broker", "confirms")),
    Check("retention", retention.check_retention),
    Check("time-limits", retention.check_time_limits),
    Check("tasks", check_durable_tasks),
    Check("serializers", content.check_serializers),
    Check("content", content.check_content, ("database", "schema")),
    Check("stored-tasks", content.check_tasks, ("database", "schema")),
    Check("lag", progress.check_lag, ("database", "schema")),
    Check("leases", leases.check_leases, ("database", "schema")),
    Check("dead-letters", progress.check_dead_letters, ("database", "schema")),
    Check("kept", progress.check_kept, ("database", "schema")),
)


def examine(outbox: Outbox, names: Collection[str] | None = None) -> Iterator[Finding]:
    """Yield what the checks find, those of `names` or all; an error in a check is a finding."""
    failed: set[str] = set()
    for check in CHECKS:
        if names is not None and check.name not in _with_needs(names):
            continue
        for finding in _run(check, outbox, failed):
            if finding.level is Level.ERROR:
                failed.add(check.name)
            if names is None or check.name in names or finding.level is Level.ERROR:
                yield replace(finding, check=check.name)


def _run(check: Check, outbox: Outbox, failed: set[str]) -> Iterator[Finding]:
    if missing := [name for name in check.needs if name in failed]:
        yield skipped(f"not looked at, because of: {', '.join(missing)}")
        return
    try:
        yield from check.run(outbox)
    except Exception as exc:
        reason = getattr(exc, "orig", None) or exc
        yield error(
            f"could not be checked: {type(exc).__name__}: {reason}",
            "If this is not explained by another finding, it is a defect of the check.",
        )


def _with_needs(names: Collection[str]) -> set[str]:
    wanted = set(names)
    return wanted.union(*(check.needs for check in CHECKS if check.name in wanted))


def worst_of(findings: Iterable[Finding]) -> Level:
    """Return the worst level; ok if there is nothing."""
    order = (Level.OK, Level.SKIPPED, Level.WARNING, Level.ERROR)
    return max((finding.level for finding in findings), key=order.index, default=Level.OK)
