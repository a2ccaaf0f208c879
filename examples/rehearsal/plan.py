"""Plan: which orders are placed, which of them are rolled back, and who is killed when."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random

__all__ = ["Plan", "Purchase"]

#: The share of the orders that the web process rolls back after it has sent their task.
SOLD_OUT = 0.2
#: The kills are spread over this part of the run, so that they meet work in flight.
FIRST, LAST = 0.03, 0.96


@dataclass(frozen=True)
class Purchase:
    """One order as the customer sends it; out of stock, it is rolled back."""

    number: int
    cents: int
    in_stock: bool


@dataclass(frozen=True)
class Plan:
    """The same for the same seed."""

    seed: int
    orders: int
    #: How often each victim is killed, by its name.
    kills: Mapping[str, int]

    def purchases(self) -> Iterator[Purchase]:
        """Yield the orders, numbered from 1."""
        random = Random(self.seed)
        for number in range(1, self.orders + 1):
            yield Purchase(number, random.randrange(100, 100_000), random.random() >= SOLD_OUT)

    def moments(self, victim: str) -> list[float]:
        """Return after how many orders `victim` is killed: one random moment in each equal part."""
        random = Random(f"{self.seed}/{victim}")
        kills = self.kills[victim]
        width = (LAST - FIRST) / max(kills, 1)
        return [self.orders * (FIRST + width * (part + random.random())) for part in range(kills)]
