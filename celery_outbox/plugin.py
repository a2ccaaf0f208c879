"""Outbox: what users create. The only place that wires the parts together."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary, WeakSet

from celery import Task
from celery.signals import beat_init, worker_process_shutdown
from sqlalchemy import Connection, Engine, MetaData
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_outbox import events
from celery_outbox.checks import WorkerChecks
from celery_outbox.config import Config
from celery_outbox.envelope import Envelope
from celery_outbox.errors import (
    ConfigurationError,
    NoTransaction,
    OutboxError,
)
from celery_outbox.hosting import WorkerRelay
from celery_outbox.inbox.installation import install, installed_in
from celery_outbox.inbox.joining import join_sessions_of
from celery_outbox.inbox.parking import Parking
from celery_outbox.inbox.task import DurableTask
from celery_outbox.inbox.transaction import new_application
from celery_outbox.local.queues import LocalQueues
from celery_outbox.outbox.bypass import Bypasses
from celery_outbox.outbox.capture import Capture
from celery_outbox.outbox.current import Current
from celery_outbox.outbox.ordering import key_of_call
from celery_outbox.outbox.producers import Stage
from celery_outbox.outbox.scope import (
    ConnectionScope,
    NamedSession,
    Scope,
    named_scope,
    naming,
)
from celery_outbox.outbox.tracking import watch_engine, watch_every_engine, watch_sessions
from celery_outbox.relay.after_commit import FastPath
from celery_outbox.relay.loop import Relay, Tally
from celery_outbox.relay.publishers import publisher_for
from celery_outbox.storage import schema
from celery_outbox.storage.asynchronous import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
)
from celery_outbox.storage.engine import (
    engine_from_url,
    engine_of,
    has_twin,
    is_same_database,
    twin_of,
    working_engine_of,
)
from celery_outbox.storage.store import FreshestFirst, Store
from celery_outbox.storage.tables import Tables

if TYPE_CHECKING:
    from celery import Celery
    from celery.canvas import Signature
    from celery.result import AsyncResult

__all__ = ["RELAY_TASK", "Outbox", "outbox_of"]

logger = logging.getLogger("celery_outbox")

#: The relay as a task, which celery beat drives. Its own message never goes through the outbox.
RELAY_TASK = "celery_outbox.relay"
BEAT_ENTRY = "celery-outbox-relay"
_SHORTEST_EXPIRY = 5.0

Target: TypeAlias = (
    "sessionmaker[Any] | scoped_session[Any] | async_sessionmaker[Any] | Engine | AsyncEngine | str"
)
Named: TypeAlias = "Session | scoped_session[Any] | AsyncSession | Connection | AsyncConnection"


class Outbox:
    """The outbox of a Celery app, in a database of the app's.

    `target` says which database: a sessionmaker or scoped_session (the best choice: its sessions join
    the transaction of a durable task by themselves), an async_sessionmaker, an engine, or a URL;
    without it the setting ``outbox_database_url`` does. `metadata` is the app's own, so that Alembic
    sees the tables; `schema` and `prefix` say where and how they are named.

    Settings are read with the first use, not here, so that the app may be configured later. One app
    has one Outbox.
    """

    def __init__(
        self,
        app: Celery,
        target: Target | None = None,
        *,
        metadata: MetaData | None = None,
        schema: str | None = None,
        prefix: str = "",
    ) -> None:
        if installed_in(app) is not None:
            raise ConfigurationError(f"the app {app.main!r} has an Outbox already")
        self.app = app
        self.tables = Tables(metadata, schema=schema, prefix=prefix)
        self._target = _checked(target)
        self._ours: WeakKeyDictionary[Engine, bool] = WeakKeyDictionary()
        self._current = Current(self.tables.outbox, self._is_our_engine)
        self._relay: tuple[int, Relay] | None = None
        self._relaying = Lock()
        self._local = LocalQueues(
            app,
            lambda: self.config,
            lambda: self._make_store(twin_of(self.engine)),
        )
        self._install()

    def _install(self) -> None:
        install(self.app, self)
        _outboxes.add(self)
        watch_sessions()
        engine = working_engine_of(self._target, self.tables.outbox)
        if engine is not None:
            watch_engine(engine)
        else:
            # A transaction that begins before the engine is known would be overlooked.
            watch_every_engine()
        if isinstance(self._target, sessionmaker | scoped_session):
            join_sessions_of(self._target)
        self._bypasses = Bypasses(lambda: self.config.bypass, self._has_inbox)
        Capture(
            self.app,
            self._choose,
            self._has_inbox,
            new_application,
            self._ordering_key,
            self._current.exists,
            self._bypasses,
            self._stage_of_local,
        ).install()
        self._local.install()
        self._add_relay_task()
        if self.app.configured:
            self._add_beat_entry(self.app)
        else:
            self.app.on_after_configure.connect(self._add_beat_entry)
        beat_init.connect(self._check_beat)
        self.app.steps["worker"].update((WorkerChecks, WorkerRelay))
        self.app.steps["consumer"].add(Parking)

    def _add_relay_task(self) -> None:
        # Stock, whatever class the app's tasks have.
        @self.app.task(
            name=RELAY_TASK, base=Task, ignore_result=True, acks_late=False, shared=False
        )
        def relay() -> None:
            self.tick()

    def _add_beat_entry(self, sender: Celery, **_: Any) -> None:
        if entry := self._beat_entry():
            # A new dict: the default one belongs to all apps of the process.
            sender.conf.beat_schedule = {BEAT_ENTRY: entry, **sender.conf.beat_schedule}

    def _beat_entry(self) -> dict[str, Any] | None:
        seconds = self.config.relay_tick_seconds
        if not seconds or self._local.routing.has_everything:
            return None
        # Ticks that no worker takes must not pile up; a polling transport takes a second or so.
        options: dict[str, Any] = {"expires": max(seconds, _SHORTEST_EXPIRY)}
        if self.config.relay_queue:
            options["queue"] = self.config.relay_queue
        return {"task": RELAY_TASK, "schedule": seconds, "options": options}

    def _check_beat(self, sender: Any, **_: Any) -> None:
        """Beat does not start with what could leave messages behind."""
        if sender.app is not self.app:
            return
        try:
            entry = self._beat_entry()
        except OutboxError as exc:
            # An Exception would be logged by the signal, and beat would go on.
            raise SystemExit(f"beat: {exc}") from exc
        # Who assigns to app.conf.beat_schedule late has replaced our entry.
        if entry and BEAT_ENTRY not in sender.scheduler.schedule:
            sender.scheduler.update_from_dict({BEAT_ENTRY: entry})

    # What it is made of

    @cached_property
    def config(self) -> Config:
        """The settings, read from ``app.conf`` at the first use. Raises `ConfigurationError`."""
        return Config.read(self.app.conf, list(self.app.conf))

    @cached_property
    def engine(self) -> Engine:
        """A synchronous engine of the outbox's database."""
        engine = engine_of(self._target, self.tables.outbox)
        if engine is None:
            url = self._target if isinstance(self._target, str) else self.config.database_url
            if url is None:
                raise ConfigurationError(
                    "the outbox has no database: give Outbox(app, Session), or set "
                    "outbox_database_url"
                )
            engine = engine_from_url(url)
        watch_engine(engine)
        return engine

    @cached_property
    def store(self) -> Store:
        """The tables of the outbox, transition by transition."""
        store = self._make_store(self.engine)
        store.on_stage = self._takes
        return store

    def _make_store(self, engine: Engine) -> Store:
        return Store(engine, self.tables, notifies=self.config.notify)

    @cached_property
    def fast_path(self) -> FastPath:
        """What publishes after the commit, with ``outbox_publish_after_commit``."""
        path = FastPath(lambda: FreshestFirst(twin_of(self.engine), self.tables), self._make_relay)
        if not has_twin(self.engine):
            path.stop()
        return path

    def make_session(self, connection: Connection) -> Session:
        """Return a session of the app's kind whose commits stay inside `connection`'s transaction."""
        target = self._target
        if isinstance(target, scoped_session):
            target = target.session_factory
        make: Callable[..., Session] = target if isinstance(target, sessionmaker) else Session
        return make(bind=connection, join_transaction_mode="create_savepoint", twophase=False)

    # Sending

    @contextmanager
    def using(self, target: Named) -> Iterator[None]:
        """Let what is sent in this block go with the transaction of this session or connection.

        Every task's message, durable or not. A session without a transaction begins one with the
        first message; a connection must have begun.
        """
        with naming(self._scope_of(target)):
            yield

    def send(self, signature: Signature, *, into: Named) -> AsyncResult:
        """Send a task, or a canvas, with the transaction of this session or connection."""
        with self.using(into):
            return signature.apply_async()

    def _scope_of(self, target: Named) -> Scope:
        if isinstance(target, scoped_session):
            target = target()
        if isinstance(target, AsyncSession):
            target = target.sync_session
        if isinstance(target, AsyncConnection):
            target = _sync_connection(target)
        if isinstance(target, Session):
            return NamedSession(target)
        if not isinstance(target, Connection):
            raise ConfigurationError(
                f"a message can go into a session or a connection, not into {target!r}"
            )
        if not target.in_transaction():
            raise NoTransaction("the connection has no transaction: begin() one, then send")
        watch_engine(target.engine)
        return ConnectionScope.of(target) or ConnectionScope(target)

    def _choose(self, task: str) -> Stage | None:
        """Say where a task's message is staged; None: Celery publishes it."""
        if task == RELAY_TASK:
            return None
        named = named_scope()
        if named is None and not self.config.captures(task, durable=self._is_durable(task)):
            if self._current.exists():
                self._bypasses.report(
                    task,
                    "is not captured, and is published whatever becomes of the transaction around it",
                )
            return None
        scope = named or self._current.scope(task)
        if scope is not None:
            return partial(self._stage_in, scope)
        match self.config.no_transaction:
            case "publish":
                return None
            case "refuse":
                raise NoTransaction(
                    f"{task} was sent with no transaction current, and outbox_no_transaction is "
                    '"refuse": send it inside one, or name it with outbox.using(session)'
                )
            case _:
                return self._stage_alone

    def _stage_of_local(self, options: Mapping[str, Any]) -> Stage | None:
        """Say where a message is staged that would be published, by what its sender was given."""
        return self._stage_alone if self._local.takes(options) else None

    def _stage_in(self, scope: Scope, envelope: Envelope) -> None:
        for row in self._local.rows_of(envelope):
            scope.stage(self.store, row)

    def _stage_alone(self, envelope: Envelope) -> None:
        for row in self._local.rows_of(envelope):
            self.store.stage_alone(row)
        events.emit(events.STAGED, count=1)

    def _takes(self, connection: Connection, count: int) -> bool:
        """Say whether this process publishes what is staged, when it is committed."""
        return self.config.publish_after_commit and self.fast_path.takes(connection, count)

    def _is_our_engine(self, engine: Engine) -> bool:
        try:
            return self._ours[engine]
        except KeyError:
            ours = self._ours[engine] = is_same_database(engine, self.engine)
            if ours:
                watch_engine(engine)
            return ours

    def _is_durable(self, task: str) -> bool:
        return isinstance(self._task(task), DurableTask)

    def _has_inbox(self, task: str) -> bool:
        found = self._task(task)
        return isinstance(found, DurableTask) and found.inbox

    def _ordering_key(
        self, task: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> str | None:
        return key_of_call(self._task(task), args, kwargs)

    def _task(self, name: str) -> Any:
        # Finalized, or a task of every app that is sent by name first would be taken for unknown.
        app = self.app
        return (app.tasks if app.finalized or app.autofinalize else app._tasks).get(name)

    # Relaying

    def relay(self) -> Relay:
        """Return this process's relay, with a connection of its own to the broker."""
        if self._relay is None or self._relay[0] != os.getpid():
            self._relay = (os.getpid(), self._make_relay(self.store))
        return self._relay[1]

    def hosted_relay(self) -> Relay:
        """Return a relay that shares no connection and no pool with the rest of the process."""
        return self._make_relay(self._make_store(twin_of(self.engine)))

    def _make_relay(self, store: Store) -> Relay:
        publisher = publisher_for(
            self._connect,
            self.config.confirm_timeout_seconds,
            trust_broker=self.config.trust_broker,
        )
        return Relay(store, publisher, self.config)

    def check_broker(self) -> None:
        """Raise `ConfigurationError` for a broker to which nothing can be published safely."""
        self.relay()

    def relay_once(self) -> Tally:
        """Move one batch of what is due to the broker, now and here; see `Relay.once`."""
        with self._relaying:
            return self.relay().once()

    def relay_all(self) -> Tally:
        """Move what is due to the broker until nothing is left or the broker is away."""
        with self._relaying:
            return self.relay().drain()

    def _connect(self) -> Any:
        # Without heartbeats, which nobody would answer while the relay waits; a dead peer is found
        # out by the confirm timeout.
        own = self.app.connection_for_write(heartbeat=0)
        options = dict(own.transport_options)
        options.pop("confirm_publish", None)
        if own.transport.driver_name == "py-amqp":
            seconds = self.config.confirm_timeout_seconds
            options |= {"read_timeout": seconds, "write_timeout": seconds}
        own.transport_options = options
        return own

    def tick(self) -> None:
        """One beat of the relay: move what is due, for at most the time of a tick.

        Returns at once if this process is relaying already. Neither the broker's absence nor the
        database's is an error here: the next tick tries again.
        """
        if not self._relaying.acquire(blocking=False):
            return
        try:
            relay = self.relay()
            relay.drain(self.config.relay_tick_seconds or 1.0)
            relay.keep_house()
        except SQLAlchemyError as exc:
            logger.error("the database is away: %s", exc)
        finally:
            self._relaying.release()

    # Schema

    def create_schema(self) -> None:
        """Create the tables that are missing. Safe to repeat."""
        schema.create(self.engine, self.tables)

    def drop_schema(self) -> None:
        """Drop the tables, with every message in them."""
        schema.drop(self.engine, self.tables)

    def verify_schema(self) -> None:
        """Raise `SchemaError` unless the tables are there, in the version that this release needs."""
        schema.verify(self.engine, self.tables)

    def schema_script(self, dialect: str | None = None) -> str:
        """Return the SQL that creates the tables, for a dialect by name or for the database's own."""
        return schema.script(self.tables, dialect or self.engine.dialect.name)


_outboxes: WeakSet[Outbox] = WeakSet()


def outbox_of(app: Celery) -> Outbox:
    """Return the app's Outbox; raise `ConfigurationError` if it has none."""
    outbox = installed_in(app)
    if not isinstance(outbox, Outbox):
        raise ConfigurationError(
            f"the app {app.main!r} has no Outbox: add `outbox = Outbox(app, Session)` where it is made"
        )
    return outbox


def _checked(target: Target | None) -> Target | None:
    kinds = (sessionmaker, scoped_session, async_sessionmaker, Engine, AsyncEngine, str)
    if target is not None and not isinstance(target, kinds):
        raise ConfigurationError(
            f"Outbox(app, {type(target).__name__}): it takes a sessionmaker, scoped_session, "
            "async_sessionmaker, engine or database URL"
        )
    return target


def _sync_connection(connection: AsyncConnection) -> Connection:
    if connection.sync_connection is None:
        raise NoTransaction(
            "the connection is not started: await it, begin() a transaction, then send"
        )
    return connection.sync_connection


def _forget_connections() -> None:
    """In a forked child: the parent's connections are the parent's."""
    for outbox in _outboxes:
        outbox._relaying = Lock()
        if fast_path := outbox.__dict__.get("fast_path"):
            fast_path.forget()
        engine = outbox.__dict__.get("engine")
        if engine is not None:
            engine.dispose(close=False)


def _end_fast_paths(**_: Any) -> None:
    """The process ends: what it has committed is published, if that does not take long."""
    for outbox in _outboxes:
        if fast_path := outbox.__dict__.get("fast_path"):
            fast_path.stop()


os.register_at_fork(after_in_child=_forget_connections)
atexit.register(_end_fast_paths)
# A pool's process ends without what Python does at an exit.
worker_process_shutdown.connect(_end_fast_paths)
