"""The types of the columns, as each database has them."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from sqlalchemy import (
    BigInteger,
    DateTime,
    Dialect,
    Integer,
    LargeBinary,
    String,
    Text,
    TypeDecorator,
)
from sqlalchemy.dialects import mssql, mysql
from sqlalchemy.types import TypeEngine

__all__ = ["Body", "Id", "LongText", "UTCDateTime", "name_of_length"]

_MYSQL = ("mysql", "mariadb")
_VARBINARY: Any = mssql.VARBINARY
_DATETIME2: Any = mssql.DATETIME2
#: SQL Server compares without regard to case unless it is told otherwise; and keys are the user's.
_BINARY = "Latin1_General_100_BIN2"

Id = BigInteger().with_variant(Integer, "sqlite")

#: MySQL's BLOB and TEXT hold 64 kB.
Body = (
    LargeBinary().with_variant(mysql.LONGBLOB(), *_MYSQL).with_variant(_VARBINARY("max"), "mssql")
)
LongText = (
    Text()
    .with_variant(mysql.LONGTEXT(), *_MYSQL)
    .with_variant(mssql.NVARCHAR(None, collation=_BINARY), "mssql")
)


def name_of_length(length: int) -> String:
    """Return the type of a name of any letters: two that differ in case are two."""
    return String(length).with_variant(mssql.NVARCHAR(length, collation=_BINARY), "mssql")


class UTCDateTime(TypeDecorator[datetime]):
    """A time zone aware time, stored as UTC where the database knows no zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Keep microseconds, which MySQL and SQL Server round unless they are told otherwise."""
        if dialect.name in _MYSQL:
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        if dialect.name == "mssql":
            return dialect.type_descriptor(_DATETIME2(6))
        return dialect.type_descriptor(DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Turn `value` into UTC."""
        if value is None:
            return None
        value = value.astimezone(timezone.utc)
        return value if dialect.name == "postgresql" else value.replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Give `value` its zone back."""
        if value is None or value.tzinfo is not None:
            return value
        return value.replace(tzinfo=timezone.utc)
