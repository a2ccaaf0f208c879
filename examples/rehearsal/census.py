"""Census: the effects that are in the database, held against the orders that are."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from shop.models import Charge, Order, Receipt
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

__all__ = ["Census", "Effects"]


@dataclass(frozen=True)
class Effects:
    """One kind of effect; each committed order should have exactly one."""

    found: int
    #: Orders without the effect.
    lost: list[int]
    #: Orders that have it but do not exist.
    ghosts: list[int]
    #: Effects beyond the first one of an order.
    duplicates: int

    @classmethod
    def compare(cls, orders: set[int], found: Iterable[int]) -> "Effects":
        """Hold the order numbers of the effects found against the orders."""
        times = Counter(found)
        return cls(
            found=times.total(),
            lost=sorted(orders - times.keys()),
            ghosts=sorted(times.keys() - orders),
            duplicates=times.total() - len(times),
        )

    def as_dict(self) -> dict[str, object]:
        """Return the figures, and the first order numbers to look for in the logs."""
        return {
            "found": self.found,
            "lost": len(self.lost),
            "ghosts": len(self.ghosts),
            "duplicates": self.duplicates,
            "lost_orders": self.lost[:20],
            "ghost_orders": self.ghosts[:20],
        }


@dataclass(frozen=True)
class Census:
    """What the shop's tables say."""

    committed: int
    charges: Effects
    receipts: Effects

    @classmethod
    def take(cls, engine: Engine) -> "Census":
        """Read the tables in one transaction."""
        with Session(engine) as session:
            orders = set(session.scalars(select(Order.id)))
            charges = Effects.compare(orders, session.scalars(select(Charge.order_id)))
            receipts = Effects.compare(orders, session.scalars(select(Receipt.order_id)))
        return cls(len(orders), charges, receipts)

    @property
    def effects(self) -> tuple[Effects, Effects]:
        """Both kinds."""
        return self.charges, self.receipts

    @property
    def lost(self) -> int:
        """How many effects are missing."""
        return sum(len(effects.lost) for effects in self.effects)

    @property
    def ghosts(self) -> int:
        """How many orders that do not exist have effects, counted for each kind."""
        return sum(len(effects.ghosts) for effects in self.effects)

    @property
    def duplicates(self) -> int:
        """How many effects are one too many."""
        return sum(effects.duplicates for effects in self.effects)
