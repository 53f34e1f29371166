"""Keeps the models of a node in step with their folders: loads what comes, lets go of what is gone.

Folders are looked at every second by what the file system says of their files, as `embedmesh_server.files` does it and
for the same reasons, and at once when asked to. A change counts when it has been still for one look, so that whoever
copies a folder file by file can finish; a model that cannot be loaded is tried again when its files change, or when
somebody asks. Loads go one after the other, and before anything leaves: what is served stays until its successor
serves. What leaves is first taken out of the catalog, then its calls end, then its memory is given back.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from embedmesh_encoder.encoder import Encoder
from embedmesh_encoder.model import MANIFEST, ModelError, ModelSpec
from embedmesh_encoder.service import Models
from embedmesh_server.metrics import EncoderMetrics, FileMetrics

__all__ = ["Keeper"]

_log = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 1.0
# Callers that left may leave a batch behind them, which must end before its model can be freed.
_LAST_BATCH_SECONDS: Final = 3600.0

# Of every file: path, inode, size, time of change.
_State = tuple[tuple[str, int, int, int], ...]


@dataclass(slots=True, eq=False)
class _Folder:
    """What is known of the folder of a model.

    Attributes:
        path: Where it is.
        place: Of a folder that was named by itself: its place among them.
        seen: What the last look saw; None when it saw no model.
        tried: What was loaded last, with success or without.
        spec: What is offered from it.
        written: When the manifest of `spec` was written.
        failed: Whether what was tried last could not be loaded.
    """

    path: Path
    place: int | None
    seen: _State | None = None
    tried: _State | None = None
    spec: ModelSpec | None = None
    written: int = 0
    failed: bool = False


class Keeper:
    """Offers the models that lie in folders.

    Of several revisions of one name the newest is the last of those that were named by themselves; of those that lie
    in folders of models, which are newer than all of these, the one whose manifest was written last.

    Args:
        models: What is offered; nobody else changes it.
        folders: Folders of models, named by themselves.
        roots: Folders in which every folder that holds a manifest is a model; names that begin with a dot are left out.
        read: Reads a manifest, in a thread; gives None for what is to be passed over, raises ModelError.
        load: Loads a model and warms it up; raises ModelError.
        metrics: Of the models.
        files: Of files that change.
        on_change: Called when other models are offered or loaded.

    Attributes:
        loading: Whether a model is being loaded; it stays so when that is cancelled, which ends no thread.
    """

    def __init__(
        self,
        models: Models,
        *,
        folders: Sequence[Path] = (),
        roots: Sequence[Path] = (),
        read: Callable[[Path], ModelSpec | None],
        load: Callable[[ModelSpec], Awaitable[Encoder]],
        metrics: EncoderMetrics,
        files: FileMetrics,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._models = models
        self._named = tuple(folders)
        self._roots = tuple(roots)
        self._read, self._load = read, load
        self._metrics = metrics
        self._stale = files.stale.labels("models")
        self._reloads = {outcome: files.reloads.labels("models", outcome) for outcome in ("ok", "failed")}
        self._on_change = on_change
        self._folders: dict[Path, _Folder] = {}
        self._unreadable = ""
        # What ends the line of each name in `model_ready`.
        self._shown: dict[str, Callable[[], None]] = {}
        self._leaving: dict[Encoder, asyncio.Task[None]] = {}
        self._asked = asyncio.Event()
        self.loading = False

    def __repr__(self) -> str:
        return f"<Keeper folders={len(self._folders)} leaving={len(self._leaving)} {self._models!r}>"

    def ask(self) -> None:
        """Have `run` look at once, take what it sees for whole, and try again what failed."""
        self._asked.set()

    async def run(self) -> None:
        """Look at the folders, for ever."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._asked.wait()
            asked = self._asked.is_set()
            self._asked.clear()
            try:
                await self.look(asked=asked)
            except Exception:  # noqa: BLE001  (the next look may go well)
                _log.exception("cannot keep the models in step with their folders")

    async def look(self, *, asked: bool = False) -> None:
        """Load what is new or changed, then let go of what is gone.

        Args:
            asked: See `ask`.
        """
        try:
            states = await asyncio.to_thread(lambda: dict(self._states()))
        except OSError as error:
            # A volume that is away for a moment must not take the models along.
            if str(error) != self._unreadable:
                self._unreadable = str(error)
                _log.error("cannot look at the folders of models: %s; what is loaded stays", error)
                self._stale.set(1)
            return
        self._unreadable = ""
        due, gone = self._changes(states, asked=asked)
        for folder in sorted(due, key=_rank):
            await self._take(folder)
        for folder in gone:
            del self._folders[folder.path]
        if gone:
            self._offer()
        self._stale.set(any(folder.failed for folder in self._folders.values()))

    def _changes(self, states: Mapping[Path, _State], *, asked: bool) -> tuple[list[_Folder], list[_Folder]]:
        """Note what is seen; gives the folders to load, and those that hold no model any more."""
        for path in states:
            self._folders.setdefault(path, _Folder(path, self._named.index(path) if path in self._named else None))
        due, gone = [], []
        for folder in self._folders.values():
            now = states.get(folder.path)
            still, folder.seen = asked or now == folder.seen, now
            if still and now is None:
                gone.append(folder)
            elif still and (now != folder.tried or (asked and folder.failed)):
                due.append(folder)
        return due, gone

    async def aclose(self) -> Sequence[Encoder]:
        """Wait for nothing more; gives the encoders that were leaving, for the caller to close."""
        leaving = dict(self._leaving)
        for task in leaving.values():
            task.cancel()
        await asyncio.gather(*leaving.values(), return_exceptions=True)
        return tuple(leaving)

    def _states(self) -> Iterator[tuple[Path, _State]]:
        """Find the models.

        Raises:
            OSError: A folder of models is away, or the file system does not answer.
        """
        inside = (path for root in self._roots for path in sorted(root.iterdir()) if not path.name.startswith("."))
        for path in (*self._named, *inside):
            try:
                (path / MANIFEST).stat()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except PermissionError:
                yield path, ()  # of this one alone; reading it will say so
            else:
                yield path, _state(path)

    async def _take(self, folder: _Folder) -> None:
        """Load what lies in a folder now."""
        folder.tried, before = folder.seen, folder.spec
        try:
            spec = await asyncio.to_thread(self._read, folder.path)
            if spec is not None and not self._serves(spec):
                if before is None or self._models.encoder(before) is None:
                    self._set(folder, spec)  # listed, and not ready
                started = time.perf_counter()
                self.loading = True
                encoder = await self._load(spec)
                if replaced := self._models.add(encoder):
                    self._let_go(replaced)
                seconds = round(time.perf_counter() - started, 3)
                _log.info("model ready", extra={"model": spec.name, "revision": spec.revision, "seconds": seconds})
            self._set(folder, spec)
        except ModelError as error:
            _log.error("%s%s", error, _instead(before), exc_info=error.__cause__)
            self._count(folder, failed=True)
        except Exception:  # noqa: BLE001  (one broken model does not take the others along)
            _log.exception("cannot load the model in %s%s", folder.path, _instead(before))
            self._count(folder, failed=True)
        else:
            self._count(folder, failed=False)
        self.loading = False

    def _count(self, folder: _Folder, *, failed: bool) -> None:
        folder.failed = failed
        self._reloads["failed" if failed else "ok"].inc()

    def _serves(self, spec: ModelSpec) -> bool:
        """Whether this very model is served, perhaps from a folder that was renamed."""
        encoder = self._models.encoder(spec)
        return encoder is not None and encoder.spec.model_copy(update={"folder": spec.folder}) == spec

    def _set(self, folder: _Folder, spec: ModelSpec | None) -> None:
        folder.spec = spec
        folder.written = next((changed for file, _, _, changed in folder.tried or () if file == MANIFEST), 0)
        self._offer()

    def _offer(self) -> None:
        """Offer what the folders hold; what nobody can ask for any more may go."""
        specs = [folder.spec for folder in sorted(self._folders.values(), key=_rank) if folder.spec]
        for encoder in self._models.offer(specs):
            self._let_go(encoder)
        names = {spec.name for spec in specs}
        for name in names - self._shown.keys():
            # So that one that cannot be loaded is shown, too.
            self._shown[name] = self._metrics.show(self._metrics.model_ready, (name,), lambda: False, any)
        for name in self._shown.keys() - names:
            self._shown.pop(name)()
        self._on_change()

    def _let_go(self, encoder: Encoder) -> None:
        task = self._leaving[encoder] = asyncio.create_task(self._free(encoder))
        task.add_done_callback(partial(self._forget, encoder))

    def _forget(self, encoder: Encoder, _: asyncio.Task[None]) -> None:
        del self._leaving[encoder]
        # When this frame and the task's hold it no more.
        asyncio.get_running_loop().call_soon(_collect)

    async def _free(self, encoder: Encoder) -> None:
        await encoder.drain()
        await encoder.close(_LAST_BATCH_SECONDS)
        _log.info("model let go", extra={"model": encoder.spec.name, "revision": encoder.spec.revision})


def _collect() -> None:
    """Give back what is held in cycles, also by what the node has frozen (`Node.set_ready`)."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    gc.collect()
    if frozen:
        gc.freeze()


def _rank(folder: _Folder) -> tuple[int, int, str, int, Path]:
    """Order in which models are named, see `Keeper`; of folders of models by name, so that no newcomer is first."""
    if folder.place is not None:
        return (0, folder.place, "", 0, folder.path)
    return (1, 0, folder.spec.name if folder.spec else "", folder.written, folder.path)


def _instead(before: ModelSpec | None) -> str:
    return f"; revision {before.revision} of {before.name} stays" if before else ""


def _state(folder: Path) -> _State:
    found = []
    for path, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            place = Path(path, file)
            with suppress(FileNotFoundError, PermissionError):  # gone since; or for `load` to complain about
                status = place.stat()
                found.append((str(place.relative_to(folder)), status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)
