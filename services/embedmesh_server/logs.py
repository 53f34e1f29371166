"""Log lines: one JSON object a line for machines, or plain lines for people."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Literal

__all__ = ["configure", "stamp"]

# What logging itself puts on a record; anything else came through `extra=`.
_BUILT_IN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure(level: str, style: Literal["json", "text"], role: str) -> None:
    """Send the log of the process to stderr; replaces earlier handlers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(role) if style == "json" else _Text(role))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def stamp(extra: Callable[[], Mapping[str, str]]) -> None:
    """Add to every line from now on what `extra` gives, asked where the line is logged."""

    def add(record: logging.LogRecord) -> bool:
        vars(record).update(extra())
        return True

    for handler in logging.getLogger().handlers:
        handler.addFilter(add)


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _BUILT_IN}


class _Json(logging.Formatter):
    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "role": self._role,
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Text(logging.Formatter):
    def __init__(self, role: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)-7s {role} %(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        extra = " ".join(f"{key}={value}" for key, value in _extra(record).items())
        return f"{line} {extra}" if extra and not record.exc_info else line
