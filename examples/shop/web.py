"""The web process: ``python -m shop.web 8000``, then POST /orders/17?cents=1250."""

import sys
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qsl
from wsgiref.simple_server import make_server

from shop.app import Session, create_tables
from shop.models import Order
from shop.tasks import charge


class SoldOut(Exception):
    """There is nothing left to sell."""


def place_order(number: int, cents: int, *, in_stock: bool = True) -> None:
    """Store the order and have it charged, or, if it turns out to be sold out, neither."""
    with Session.begin() as session:
        session.add(Order(id=number, cents=cents))
        charge.delay(number, cents)
        if not in_stock:
            raise SoldOut(number)


def storefront(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """Answer 201 for an order placed and 409 for one that was rolled back (WSGI)."""
    number = int(environ["PATH_INFO"].rpartition("/")[2])
    query = dict(parse_qsl(environ["QUERY_STRING"]))
    try:
        place_order(number, int(query["cents"]), in_stock=query.get("in_stock", "1") == "1")
    except SoldOut:
        start_response("409 Conflict", [])
        return [b"sold out\n"]
    start_response("201 Created", [])
    return [b"thank you\n"]


if __name__ == "__main__":
    create_tables()
    with make_server("127.0.0.1", int(sys.argv[1]), storefront) as server:
        print("open", flush=True)
        server.serve_forever()
