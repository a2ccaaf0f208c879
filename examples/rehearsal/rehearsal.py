"""Rehearsal: the course of events, from the first order until all is quiet, and the count after."""

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

from shop.settings import Settings
from sqlalchemy import Engine, create_engine

from rehearsal.backlog import Backlog, Books
from rehearsal.cast import Cast
from rehearsal.census import Census
from rehearsal.customer import Answer, Customer
from rehearsal.outcome import Outcome
from rehearsal.plan import Plan
from rehearsal.strikes import Victim, victims_of
from rehearsal.witness import ABSORBED
from tests.support.ports import free_port
from tests.support.waiting import WaitTimeout, wait_until

__all__ = ["Rehearsal", "Stuck"]

#: No order is placed while more messages than this wait: the kills shall meet a steady flow.
BACKLOG_LIMIT = 150
#: How many orders are placed in one go; one only while a kill is due, for it needs orders then.
IN_ONE_GO = 10
#: So many messages wait for somebody who is busy: the best moment for a kill.
BUSY = 5
#: How far the orders may run ahead of a kill that is due, as a part of all orders, ...
RUNS_AHEAD = 0.1
#: ... and after how long one more is placed all the same.
TRICKLE_SECONDS = 0.3
#: How long a strike waits until a relay has messages in hand.
AMBUSH_SECONDS = 0.5
#: Nothing has moved for so long: something is lost for good, or hangs.
PATIENCE_SECONDS = 60.0
#: How often work may turn up again after all was quiet.
ROUNDS = 5
#: How long a process may take to end when it is asked to.
STOP_SECONDS = 30.0


class Stuck(Exception):
    """Nothing moves any more, and there is still work to do."""


class Rehearsal:
    """One run of the shop in `folder`, which holds its logs (and its data, without servers)."""

    def __init__(
        self,
        settings: Settings,
        cast: Cast,
        plan: Plan,
        folder: Path,
        watch: Callable[["Rehearsal"], None] = lambda rehearsal: None,
        *,
        clear: bool = False,
    ) -> None:
        """Prepare it; `watch` is called all the time, `clear` drops tables and queue at the end."""
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = settings
        self.plan = plan
        self.folder = folder
        self.placed = 0
        self.backlog = Backlog(0, 0, 0)
        self._watch = watch
        self._clear = clear
        self._answers: Counter[Answer] = Counter()
        self._customer = Customer(free_port())
        self._fleet = cast.fleet(settings, folder, self._customer.port)
        self._victims = [v for member in self._fleet for v in victims_of(plan, member, folder)]
        self._opened = False
        self._last_order = 0.0
        self._order_seconds = 0.005
        self._seen = (0, 0, 0)
        self._changed = time.monotonic()

    @property
    def kills(self) -> dict[str, int]:
        """How often each victim was killed so far."""
        return {victim.name: victim.struck for victim in self._victims}

    @property
    def all_kills(self) -> int:
        """How many kills are planned."""
        return sum(len(victim.moments) for victim in self._victims)

    # The course of events

    def run(self) -> Outcome:
        """Run it all; whatever happens, no process is left."""
        start = time.monotonic()
        trouble = None
        with self._books() as (books, engine):
            self._open(books, engine)
            try:
                self._sell(books)
                self._come_to_rest(books)
            except (Stuck, WaitTimeout) as error:
                trouble = str(error)
            return Outcome(
                orders=self.placed,
                answers=self._answers,
                kills=self.kills,
                crashes={member.name: member.crashes for member in self._fleet},
                absorbed=self._absorbed(),
                census=Census.take(engine),
                left=books.backlog(),
                seconds=time.monotonic() - start,
                trouble=trouble,
            )

    @contextmanager
    def _books(self) -> Iterator[tuple[Books, Engine]]:
        engine = create_engine(self.settings.database_url)
        books = Books(self.settings, engine)
        try:
            yield books, engine
        finally:
            self._fleet.close()
            if self._clear and self._opened:
                books.clear(engine)
            books.close()
            engine.dispose()

    def _open(self, books: Books, engine: Engine) -> None:
        """Start the web process, which creates the tables, and then the others."""
        books.declare_queue()
        self._fleet.web.start()
        wait_until(self._fleet.web.at_work_for, 60, "the web process")
        if Census.take(engine).committed:
            sys.exit("error: the database already holds orders: name an empty one")
        self._opened = True
        self._fleet.start_back_office()

    def _sell(self, books: Books) -> None:
        """Place the orders and strike the blows, at the pace at which both can be done."""
        web = next((v for v in self._victims if v.member is self._fleet.web), None)
        for purchase in self.plan.purchases():
            while not self._may_place():
                self._look_after(books)
            blow = self._blow_during_order(web)
            self._last_order = time.monotonic()
            self._answers[self._customer.order(purchase, blow)] += 1
            if blow is None:
                self._order_seconds = time.monotonic() - self._last_order
            self.placed += 1
            if self._overdue() or self.placed % IN_ONE_GO == 0:
                self._look_after(books)
        self._note("the last order")
        while any(victim.next_moment is not None for victim in self._victims):
            self._look_after(books)

    def _come_to_rest(self, books: Books) -> None:
        """Wait until all is handled, end the processes in good order, and look again.

        What a worker had fetched counts nowhere until it has ended and given it back.
        """
        for _ in range(ROUNDS):
            self._changed = time.monotonic()
            while self._look_after(books).total:
                pass
            self._note("nothing waits")
            for relay in self._fleet.relays:
                relay.stop(STOP_SECONDS)
            wait_until(lambda: not books.backlog().queue, STOP_SECONDS, "the last messages' end")
            for worker in self._fleet.workers:
                worker.stop(STOP_SECONDS)
            self.backlog = books.backlog()
            self._note("workers and relays have ended")
            if not self.backlog.total:
                return
            self._fleet.start_back_office()
        raise Stuck(f"messages come back again and again: {self.backlog}")

    def _look_after(self, books: Books) -> Backlog:
        """Start what has ended, kill whoever is due, and see whether anything has moved."""
        for member in self._fleet:
            if member.tend():
                self._note(f"{member.name} had ended by itself")
        self.backlog = books.backlog()
        for victim in self._victims:
            if self._strike(victim, books):
                self._note(f"killed {victim.name}")
        # Not the queue, if there is an outbox: beat's ticks come and go in it.
        waiting = self.backlog.outbox if self.settings.outbox else self.backlog.queue
        if self._seen != (seen := (self.placed, sum(self.kills.values()), waiting)):
            self._seen, self._changed = seen, time.monotonic()
        elif time.monotonic() > self._changed + PATIENCE_SECONDS:
            raise Stuck(f"nothing has moved for {PATIENCE_SECONDS:.0f} s: {self.backlog}")
        self._watch(self)
        time.sleep(0.02)
        return self.backlog

    def _strike(self, victim: Victim, books: Books) -> bool:
        """Strike if it is time; return whether it hit. The web process is struck in `_sell`."""
        if victim.member is self._fleet.web:
            return False
        if victim.member in self._fleet.workers:
            return victim.strike_if_due(self.placed, busy=self.backlog.queue >= BUSY)
        return victim.strike_if_due(
            self.placed,
            busy=self.backlog.outbox >= BUSY,
            lie_in_wait=partial(books.await_relay, AMBUSH_SECONDS),
        )

    def _may_place(self) -> bool:
        in_time = self._overdue() <= RUNS_AHEAD * self.plan.orders
        if not in_time and time.monotonic() < self._last_order + TRICKLE_SECONDS:
            return False
        return self.backlog.total < BACKLOG_LIMIT and self._fleet.web.at_work_for() > 0

    def _overdue(self) -> float:
        """Return how many orders were placed since the oldest kill was due; 0 if none is."""
        moments = [victim.next_moment or math.inf for victim in self._victims]
        return max(0.0, self.placed - min(moments, default=math.inf))

    def _blow_during_order(self, web: Victim | None) -> Callable[[], None] | None:
        """Return what kills the web process before it answers the next order, if it is time."""
        if web is None or web.next_moment is None or self.placed < web.next_moment:
            return None
        delay = web.random.uniform(0, self._order_seconds)

        def blow() -> None:
            time.sleep(delay)
            web.strike_now()
            self._note("killed web")

        return blow

    def _note(self, what: str) -> None:
        """Write into the folder what happened when, to be read beside the logs."""
        now = datetime.now().strftime("%H:%M:%S.%f")[:-3]  # noqa: DTZ005 (as the logs have it)
        with (self.folder / "events.log").open("a") as log:
            log.write(f"{now} after {self.placed} orders: {what}; {self.backlog}\n")

    def _absorbed(self) -> int:
        file = self.folder / ABSORBED
        return file.stat().st_size if file.exists() else 0
