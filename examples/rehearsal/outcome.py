"""Outcome: what happened in a rehearsal, and what was left."""

from collections.abc import Mapping
from dataclasses import dataclass

from rehearsal.backlog import Backlog
from rehearsal.census import Census
from rehearsal.customer import Answer

__all__ = ["Outcome"]


@dataclass(frozen=True)
class Outcome:
    """The figures of one run."""

    orders: int
    answers: Mapping[Answer, int]
    kills: Mapping[str, int]
    crashes: Mapping[str, int]
    absorbed: int
    census: Census
    left: Backlog
    seconds: float
    #: Why it did not come to rest, if it did not.
    trouble: str | None = None

    @property
    def sound(self) -> bool:
        """Whether every committed order, and no other, has each effect once, and all is done."""
        return (
            self.trouble is None
            and self.census.committed > 0
            and not self.answers.get(Answer.ERROR, 0)
            and not (self.census.lost or self.census.ghosts or self.census.duplicates)
            and self.left == Backlog(0, 0, 0)
        )

    def as_dict(self) -> dict[str, object]:
        """Return the figures, for JSON."""
        return {
            "sound": self.sound,
            "trouble": self.trouble,
            "orders": self.orders,
            "committed": self.census.committed,
            "answers": {answer.value: self.answers.get(answer, 0) for answer in Answer},
            "kills": dict(self.kills),
            "crashes": dict(self.crashes),
            "lost": self.census.lost,
            "ghosts": self.census.ghosts,
            "duplicates": self.census.duplicates,
            "duplicate_deliveries_absorbed": self.absorbed,
            "left": vars(self.left),
            "charges": self.census.charges.as_dict(),
            "receipts": self.census.receipts.as_dict(),
            "seconds": round(self.seconds, 1),
        }
