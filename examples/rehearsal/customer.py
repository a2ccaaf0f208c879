"""Customer: sends orders to the web process over HTTP, one at a time."""

import http.client
from collections.abc import Callable
from enum import Enum
from urllib.parse import urlencode

from rehearsal.plan import Purchase

__all__ = ["Answer", "Customer"]


class Answer(Enum):
    """What became of an order, as the customer sees it."""

    PLACED = "placed"
    ROLLED_BACK = "rolled back"
    NONE = "no answer"
    ERROR = "error"


_ANSWERS = {201: Answer.PLACED, 409: Answer.ROLLED_BACK}


class Customer:
    """Orders at the web process on a port of this machine."""

    def __init__(self, port: int) -> None:
        self.port = port

    def order(self, purchase: Purchase, meanwhile: Callable[[], None] | None = None) -> Answer:
        """Send the order; call `meanwhile` before the answer is awaited."""
        query = {"cents": purchase.cents, "in_stock": int(purchase.in_stock)}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", f"/orders/{purchase.number}?{urlencode(query)}")
            if meanwhile is not None:
                meanwhile()
            return _ANSWERS.get(connection.getresponse().status, Answer.ERROR)
        except (OSError, http.client.HTTPException):
            return Answer.NONE
        finally:
            connection.close()
