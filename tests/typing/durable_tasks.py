"""Declaring durable tasks."""

from typing import Any

from celery import Celery, Task
from sqlalchemy.orm import Session

from celery_outbox import DurableTask, current_session, durable_task

app = Celery("typed")


@durable_task
def bare(order_id: int) -> None:
    session: Session = current_session()
    session.flush()


@durable_task()
def called(order_id: int) -> None: ...


@durable_task(bind=True, autoretry_for=(ValueError,), retry_backoff=True, max_retries=3)
def bound(self: DurableTask, order_id: int) -> str:
    session: Session = self.session
    session.flush()
    self.retry(countdown=3)
    return str(self.request.id)


@durable_task(app=app, name="typed.named", queue="orders", inbox=False)
def named(*args: Any, **kwargs: Any) -> None: ...


@durable_task(session=False, ignore_result=True)
async def without_session() -> None: ...


class ContextTask(Task):
    """A base class of the app's own."""

    abstract = True


@durable_task(base=ContextTask)
def with_base() -> None: ...


@durable_task(bind=True, base=DurableTask)
def with_our_base(self: DurableTask) -> None: ...


bare.delay(7)
called.apply_async((7,), countdown=3)
bound.si(7).link(bare.s()).delay()
(bare.s(1) | called.s()).apply_async()

# What is wrong is told by mypy, too.
durable_task(inbox="no")  # type: ignore[call-overload]
durable_task(session=None)  # type: ignore[call-overload]
