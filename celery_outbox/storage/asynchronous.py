"""SQLAlchemy's asyncio classes, where greenlet is installed; without it nobody can have made one."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING or find_spec("greenlet") is not None:
    from sqlalchemy.ext.asyncio import (
        AsyncConnection,
        AsyncEngine,
        AsyncSession,
        async_sessionmaker,
    )
else:

    class _Absent:
        """Nothing is an instance of it."""

    AsyncConnection = AsyncEngine = AsyncSession = async_sessionmaker = _Absent

__all__ = ["AsyncConnection", "AsyncEngine", "AsyncSession", "async_sessionmaker"]
