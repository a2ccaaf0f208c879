"""What happens after an order was placed. A `Session` in a durable task joins its transaction."""

from shop.app import Session, task
from shop.models import Charge, Receipt


@task
def charge(order_id: int, cents: int) -> None:
    """Take the money, then have the receipt sent."""
    with Session.begin() as session:
        session.add(Charge(order_id=order_id, cents=cents))
        send_receipt.delay(order_id)


@task
def send_receipt(order_id: int) -> None:
    """Send the receipt: here, a row."""
    with Session.begin() as session:
        session.add(Receipt(order_id=order_id))
