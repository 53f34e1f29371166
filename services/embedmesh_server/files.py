"""Files that may change while the process runs: certificates, keys of callers.

They are looked at every second, by what the file system says of them: that also sees the links by which Kubernetes
swaps the files of a Secret, and network file systems, where notifications see neither. A change is read when it has
been still for one look, so that whoever writes several files, or a long one, can finish. What cannot be used changes
nothing: what was read before stays, the log says why, and a metric says so until the file is put right.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from embedmesh_server.metrics import FileMetrics

__all__ = ["FileError", "Files", "Followed"]

_LOOK_SECONDS = 1.0

_log = logging.getLogger(__name__)

T = TypeVar("T")
_State = tuple[tuple[int, int, int] | None, ...]


class FileError(ValueError):
    """The content of a file cannot be used. The sentence names the file, and never shows what is in it."""


class Followed(Generic[T]):
    """What some files say.

    Attributes:
        value: As last read with success.
    """

    def __init__(self, name: str, paths: Sequence[Path], read: Callable[[], T], metrics: FileMetrics) -> None:
        self._name, self._paths, self._read = name, paths, read
        self._stale = metrics.stale.labels(name)
        self._reloads = {outcome: metrics.reloads.labels(name, outcome) for outcome in ("ok", "failed")}
        self._listeners: list[Callable[[T], None]] = []
        self._seen = self._done = self._state()
        self.value = read()

    def __repr__(self) -> str:
        return f"<Followed {self._name} {' '.join(map(str, self._paths))}>"

    def on_change(self, listener: Callable[[T], None]) -> None:
        """Have `listener` called with every new value."""
        self._listeners.append(listener)

    def look(self) -> None:
        """Read again what has changed, and has been still since the last look."""
        now = self._state()
        still, self._seen = now == self._seen, now
        if not still or now == self._done:
            return
        self._done = now
        try:
            self.value = self._read()
        except FileError as error:
            _log.error("%s; what was read before stays in use", error)
            self._stale.set(1)
            self._reloads["failed"].inc()
            return
        self._stale.set(0)
        self._reloads["ok"].inc()
        _log.info("read again", extra={"files": [str(path) for path in self._paths]})
        for listener in self._listeners:
            listener(self.value)

    def _state(self) -> _State:
        found: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                status = path.stat()
            except OSError:
                found.append(None)
            else:
                found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        return tuple(found)


class Files:
    """The files that a process follows."""

    def __init__(self, metrics: FileMetrics) -> None:
        self._metrics = metrics
        self._followed: list[Followed[Any]] = []

    def follow(self, name: str, paths: Sequence[Path], read: Callable[[], T]) -> Followed[T]:
        """Read files now, and again whenever they change while `watch` runs.

        Args:
            name: Of the metrics' label.
            paths: All that `read` reads.
            read: Gives the value; FileError where that cannot be.

        Raises:
            FileError: By `read`.
        """
        followed = Followed(name, paths, read, self._metrics)
        self._followed.append(followed)
        return followed

    async def watch(self) -> None:
        """Look at them, for ever."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            for followed in self._followed:
                try:
                    followed.look()
                except Exception:  # noqa: BLE001  (one file must not end the look after the others)
                    _log.exception("cannot follow %r", followed)
