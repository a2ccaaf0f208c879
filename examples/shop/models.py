"""The shop's tables. Nothing in them keeps an order from being charged twice, or if it isn't there."""

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """What the shop stores."""


class Order(Base):
    """What a customer bought, under a number that the customer's side chose."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    cents: Mapped[int]


class Charge(Base):
    """Money taken for an order."""

    __tablename__ = "charges"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(index=True)
    cents: Mapped[int]


class Receipt(Base):
    """A receipt sent, after the charge."""

    __tablename__ = "receipts"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(index=True)
