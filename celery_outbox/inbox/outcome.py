"""Outcome: how an execution ended, as the inbox keeps it for duplicates."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from dataclasses import dataclass
from typing import Any

from celery.result import result_from_tuple

__all__ = ["Outcome"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A result or an error in the form that the result backend would store.

    `encoded` is None where nobody will ask for it. Reading it back obeys the backend's
    ``accept_content``, like any result.
    """

    encoded: str | bytes | None = None
    children: list[Any] | None = None
    traceback: str | None = None

    @classmethod
    def of_result(cls, backend: Any, result: Any, request: Any, *, wanted: bool) -> Outcome:
        """Encode a result; raises kombu's ``EncodeError`` if it can't be."""
        if not wanted:
            return cls()
        # As the backend does, a result that stands for other tasks becomes their ids.
        encoded = backend.encode(backend.prepare_value(result))
        return cls(encoded, backend.current_task_children(request))

    @classmethod
    def of_error(cls, backend: Any, error: BaseException, traceback: object) -> Outcome:
        """Encode an exception as the result backend does."""
        return cls(
            backend.encode(backend.prepare_exception(error)),
            traceback=None if traceback is None else str(traceback),
        )

    def result(self, backend: Any) -> Any:
        """Decode a result."""
        return None if self.encoded is None else backend.decode(self.encoded)

    def error(self, backend: Any) -> BaseException:
        """Decode an exception."""
        error: BaseException | None = None
        if self.encoded is not None:
            error = backend.exception_to_python(backend.decode(self.encoded))
        return error or RuntimeError("the task failed before")

    def results_of_children(self, app: Any) -> list[Any]:
        """Decode the results of the tasks that the execution has sent."""
        return [result_from_tuple(child, app) for child in self.children or ()]

    def dump(self) -> str | None:
        """Return the outcome as text, or None if there is nothing to keep."""
        if self.encoded is None:
            return None
        binary = isinstance(self.encoded, bytes)
        text = b64encode(self.encoded).decode() if isinstance(self.encoded, bytes) else self.encoded
        return json.dumps(
            {
                "encoded": text,
                "binary": binary,
                "children": self.children,
                "traceback": self.traceback,
            }
        )

    @classmethod
    def load(cls, text: str | None) -> Outcome:
        """Read back what `dump` wrote."""
        if text is None:
            return cls()
        data = json.loads(text)
        encoded = b64decode(data["encoded"]) if data["binary"] else data["encoded"]
        return cls(encoded, data["children"], data["traceback"])
