"""Config: the ``outbox_*`` settings, read from ``app.conf`` once, validated, frozen."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from math import inf
from typing import Any, Literal

from celery_outbox.errors import ConfigurationError

__all__ = ["PREFIX", "Config"]

PREFIX = "outbox_"

NoTransactionPolicy = Literal["store", "publish", "refuse"]
BypassPolicy = Literal["warn", "refuse", "allow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Every setting of the outbox; docs/configuration.md describes each."""

    #: Where the tables are, when `Outbox` is given no session, engine or URL. Never printed.
    database_url: str | None = None
    #: ``"durable"``: `@durable_task` tasks; ``"all"``: every task; or patterns of task names besides.
    capture: str | tuple[str, ...] = "durable"
    #: What happens to a durable task that is sent with no transaction current.
    no_transaction: NoTransactionPolicy = "store"
    #: What happens to a message that goes around the outbox, and perhaps should not.
    bypass: BypassPolicy = "warn"
    #: Keep a message with an eta in the database until it is due; False: the worker holds it.
    hold_scheduled: bool = True
    #: Publish from a thread of the process that has sent, as soon as its transaction has committed.
    publish_after_commit: bool = False
    #: Queues whose messages workers take from the database, beside those of the broker.
    local_queues: tuple[str, ...] = ()
    #: How long a message of a local queue is left to a worker that is not heard of.
    local_lease_seconds: float = 30.0
    #: How often a message of a local queue is delivered in vain before it becomes a dead letter.
    local_max_attempts: int = 20
    #: How often celery beat drives the relay; 0 leaves the beat schedule alone.
    relay_tick_seconds: float = 1.0
    #: The queue of the relay's own task; None is the app's default queue.
    relay_queue: str | None = None
    #: Run a relay in a thread of each ``celery worker``.
    relay_in_worker: bool = False
    #: How many envelopes are claimed, published and settled together.
    batch_size: int = 500
    #: How long a claimed envelope is left to its relay before another one may take it.
    lease_seconds: float = 60.0
    #: How long the broker may take to confirm a batch.
    confirm_timeout_seconds: float = 15.0
    #: Use a transport of which it is not known what a publish that returned means.
    trust_broker: bool = False
    #: How often a message that the broker does not take is tried before it becomes a dead letter.
    max_attempts: int = 10
    #: The first pause before such a message is tried again; doubled each time, with full jitter.
    backoff_base_seconds: float = 1.0
    #: The longest such pause.
    backoff_cap_seconds: float = 300.0
    #: The longest that an idle relay waits before it looks again; where the database tells of commits,
    #: 25 times as long.
    poll_seconds: float = 0.2
    #: Let a commit to the outbox wake the relays, where the database can (PostgreSQL).
    notify: bool = True
    #: How long the inbox remembers what it handled; longer than the broker can redeliver.
    inbox_retention_seconds: float = 7 * 24 * 3600.0
    #: How long after a delivery the broker may deliver again; None: what is known of its kind.
    redelivery_window_seconds: float | None = None
    #: How long dead letters are kept; None: until somebody replays or discards them.
    dead_letter_retention_seconds: float | None = None
    #: How long a worker waits before it gives a message back whose first execution still runs, or
    #: whose database is away.
    busy_pause_seconds: float = 1.0
    #: Keep a published envelope until the worker's own transaction has handled it.
    keep_until_handled: bool = False
    #: With `keep_until_handled`: when a published envelope that was not handled is sent again.
    redeliver_after_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.no_transaction not in ("store", "publish", "refuse"):
            raise _wrong("no_transaction", self.no_transaction, '"store", "publish" or "refuse"')
        if self.bypass not in ("warn", "refuse", "allow"):
            raise _wrong("bypass", self.bypass, '"warn", "refuse" or "allow"')
        for name in ("batch_size", "max_attempts", "local_max_attempts"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise _wrong(name, value, "a whole number of at least 1")
        for name in _SECONDS:
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise _wrong(name, value, "a number of seconds")
            if not 0 <= value < inf:  # NaN is neither
                raise _wrong(name, value, "a number of seconds, 0 or more")
            if value == 0 and name not in _MAY_BE_ZERO:
                raise _wrong(name, value, "a number of seconds above 0")
        patterns = () if self.capture in ("durable", "all") else self.capture
        if not isinstance(patterns, tuple) or not all(isinstance(each, str) for each in patterns):
            raise _wrong(
                "capture", self.capture, '"durable", "all" or a list of task name patterns'
            )
        names = self.local_queues
        if not isinstance(names, tuple) or not all(
            isinstance(name, str) and name for name in names
        ):
            raise _wrong("local_queues", names, "a list of names of queues")
        if not isinstance(self.database_url, str | None):
            # Not shown: it may hold a password.
            raise ConfigurationError(f"{PREFIX}database_url is wrong: it takes a string")
        if not isinstance(self.relay_queue, str | None):
            raise _wrong("relay_queue", self.relay_queue, "the name of a queue")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "True or False")
        if self.keep_until_handled and not self.hold_scheduled:
            raise ConfigurationError(
                "outbox_keep_until_handled=True needs outbox_hold_scheduled=True: a message that a "
                "worker holds until its eta is not handled, and would be sent again and again"
            )
        if self.lease_seconds < 2 * self.confirm_timeout_seconds:
            raise ConfigurationError(
                f"outbox_lease_seconds={self.lease_seconds} must be at least twice "
                f"outbox_confirm_timeout_seconds={self.confirm_timeout_seconds}: a relay that waits "
                "for confirms would lose its lease, and another one would publish its batch again"
            )

    def captures(self, task: str, *, durable: bool) -> bool:
        """Return whether the outbox takes messages of this task."""
        if durable or self.capture == "all":
            return True
        return not isinstance(self.capture, str) and any(
            fnmatchcase(task, pattern) for pattern in self.capture
        )

    @classmethod
    def read(cls, settings: Mapping[str, Any], names: Iterable[str]) -> Config:
        """Read the settings from `settings`; `names` are all the names that the user has set.

        Raises `ConfigurationError` for an ``outbox_`` name that does not exist.
        """
        known = {f.name for f in fields(cls)}
        for name in names:
            lowered = name.lower().removeprefix("celery_")
            if lowered.startswith(PREFIX) and lowered.removeprefix(PREFIX) not in known:
                near = difflib.get_close_matches(lowered.removeprefix(PREFIX), known, n=1)
                hint = f"; did you mean {PREFIX}{near[0]}?" if near else ""
                raise ConfigurationError(f"unknown setting {name}{hint}")
        values = {name: settings.get(PREFIX + name) for name in known}
        given: dict[str, Any] = {k: value for k, value in values.items() if value is not None}
        for name in ("capture", "local_queues"):
            if isinstance(given.get(name), list | set | frozenset):
                given[name] = tuple(given[name])
        return cls(**given)


_SECONDS = tuple(f.name for f in fields(Config) if f.name.endswith("_seconds"))
_SWITCHES = tuple(f.name for f in fields(Config) if isinstance(f.default, bool))
_MAY_BE_NONE = ("redelivery_window_seconds", "dead_letter_retention_seconds")
_MAY_BE_ZERO = ("relay_tick_seconds", "backoff_base_seconds", "busy_pause_seconds")


def _wrong(name: str, value: object, wanted: str) -> ConfigurationError:
    return ConfigurationError(f"{PREFIX}{name}={value!r} is wrong: it takes {wanted}")
