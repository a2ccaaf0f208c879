"""An engine for SQL Server without a server: it notes each statement, and finds one row every time."""

from datetime import datetime
from types import SimpleNamespace
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.pool import StaticPool

__all__ = ["Asked", "fake_engine"]

NOON = datetime(2026, 11, 24, 12)  # noqa: DTZ001 (as the driver gives it)
#: What a column holds, by its name, then by its type.
_BY_NAME: dict[str, Any] = {"message": "{}", "granted": 0, "version": 1, "found": False}
_BY_TYPE: dict[type, Any] = {int: 7, str: "x", bytes: b"x", datetime: NOON, float: 1.0}


class Asked(list[str]):
    """The statements, in their order, with the parameters' places as the driver gets them."""


def fake_engine(changes: int = 1) -> tuple[Engine, Asked]:
    """Return an engine of SQLAlchemy's mssql dialect with a driver that is none, and its statements.

    Each of them says that it has changed so many rows.
    """
    asked = Asked()
    engine = create_engine(
        "mssql+pyodbc://sa@nowhere/shop?driver=none",
        module=_Driver(asked, changes),
        poolclass=StaticPool,
    )
    dialect: Any = engine.dialect
    # What SQLAlchemy would ask a server for.
    dialect.initialize = lambda connection: None
    dialect.server_version_info = (15, 0, 2000)
    dialect.default_schema_name = "dbo"
    dialect._setup_version_attributes()
    event.listen(engine, "before_cursor_execute", _announce)
    return engine, asked


def _announce(_c: Any, cursor: Any, _s: str, _p: Any, context: Any, _many: bool) -> None:
    """Tell the cursor which columns are expected."""
    compiled = context.compiled
    columns = [] if compiled is None else (compiled._result_columns or [])
    cursor.expect([(column.keyname, column.type) for column in columns])


class _Driver(SimpleNamespace):
    """What SQLAlchemy needs of pyodbc's module."""

    paramstyle = "qmark"
    version = "5.0.0"
    apilevel = "2.0"

    class Error(Exception): ...

    class IntegrityError(Error): ...

    class OperationalError(Error): ...

    class ProgrammingError(Error): ...

    def __init__(self, asked: Asked, changes: int) -> None:
        super().__init__(Cursor=_Cursor)
        self._asked = asked
        self._changes = changes

    def __getattr__(self, name: str) -> str:
        if not name.isupper():
            raise AttributeError(name)
        return name  # the driver's numbers for types

    def connect(self, *_: Any, **__: Any) -> Any:
        nothing = lambda *_: None  # noqa: E731
        return SimpleNamespace(
            cursor=lambda: _Cursor(self._asked, self._changes),
            commit=nothing,
            rollback=nothing,
            close=nothing,
            add_output_converter=nothing,
            autocommit=False,
        )

    @staticmethod
    def Binary(value: bytes) -> bytes:
        return value


class _Cursor:
    """Finds one row of the columns that are expected."""

    fast_executemany = False

    def __init__(self, asked: Asked, changes: int) -> None:
        self._asked = asked
        self.rowcount = changes
        self._expected: list[tuple[str, Any]] = []
        self.description: list[tuple[Any, ...]] | None = None
        self._rows: list[tuple[Any, ...]] = []

    def expect(self, columns: list[tuple[str, Any]]) -> None:
        self._expected = columns

    def execute(self, statement: str, parameters: Any = ()) -> None:
        self._asked.append(statement)
        columns, self._expected = self._expected, []
        self.description = [(name, *[None] * 6) for name, _ in columns] or None
        self._rows = [tuple(_value(name, kind) for name, kind in columns)] if columns else []

    def executemany(self, statement: str, parameters: Any) -> None:
        self.execute(statement)

    def setinputsizes(self, _sizes: Any) -> None: ...

    def nextset(self) -> bool:
        return False

    def fetchone(self) -> tuple[Any, ...] | None:
        return self._rows.pop(0) if self._rows else None

    def fetchall(self) -> list[tuple[Any, ...]]:
        rows, self._rows = self._rows, []
        return rows

    def fetchmany(self, _size: int | None = None) -> list[tuple[Any, ...]]:
        return self.fetchall()

    def close(self) -> None: ...


def _value(name: str, kind: Any) -> Any:
    if name in _BY_NAME:
        return _BY_NAME[name]
    if name == "now" or name.endswith("_at"):
        return NOON
    try:
        return _BY_TYPE.get(kind.python_type)
    except NotImplementedError:
        return 7
