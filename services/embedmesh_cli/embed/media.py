"""Pictures and sounds to be embedded: found among files and folders, told apart, read one at a time.

What a file is, its content says; its name only where the content does not: a damaged photo.jpg is a picture that
fails, not a file that nobody mentions. Whether it can be decoded is for the encoder to find out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal

from embedmesh.client import Client
from embedmesh.errors import InputTooLarge
from embedmesh.inputs import Audio, Image, Input
from embedmesh.results import EmbedResult, ModelInfo
from embedmesh_cli.console import USAGE, UserError
from embedmesh_cli.embed.entries import Entry, Source

__all__ = ["is_media_file", "open_media"]

_Kind = Literal["image", "audio"]

# Names of formats that are read, and of those for which the encoder's "no known format" is better than silence.
_KINDS: Final[Mapping[str, _Kind]] = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"), "image"),
    **dict.fromkeys((".avif", ".heic", ".heif", ".jxl", ".jp2"), "image"),
    **dict.fromkeys((".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc"), "audio"),
    **dict.fromkeys((".m4a", ".aac", ".wma"), "audio"),
}
_HEAD_BYTES: Final = 32
_IMAGE_HEADS: Final = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a"),
    *(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),  # TIFF, small and big, of either byte order
)
# Sizes of the header that follows BMP's first one: "BM" alone may begin a text.
_BMP_HEADERS: Final = frozenset({12, 40, 52, 56, 64, 108, 124})
# What the client sends at most, where the mesh names no limit.
_MOST_BYTES: Final = 64 * 2**20


def open_media(paths: Sequence[str]) -> Source:
    """Give the pictures and sounds among files and folders.

    Folders are read with all that is below them, in order of names, without hidden files. Links are followed, but no
    folder is read twice. Other files are skipped in a folder, and errors where they are named themselves.

    Raises:
        UserError: There are no paths, or there is none of that name.
    """
    if not paths:
        raise UserError("--media needs files or folders: embedmesh embed --media photos/ talk.mp3.", USAGE)
    for path in paths:
        try:
            Path(path).lstat()  # a link that leads nowhere, among those a shell found, is one bad file
        except (OSError, ValueError) as error:
            raise UserError(f"--media {path}: {_why(error)}.", USAGE) from None
    return _Media([Path(path) for path in paths])


def is_media_file(text: str) -> bool:
    """Whether a text is the name of a picture or a sound here: its writer may have meant the file."""
    with suppress(OSError, ValueError):  # too long for a name, or a zero in it
        return Path(text).suffix.lower() in _KINDS and Path(text).is_file()
    return False


class _Media(Source):
    noun = "file"

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._skipped = 0

    def entries(self, models: Sequence[ModelInfo]) -> Iterator[Entry]:
        limits = [(model.modality, model.limits.get(f"{model.modality}_bytes", 0)) for model in models]
        for found in self._found():
            if isinstance(found, Entry):
                yield found
            else:
                # One model may take more than another: the encoder has the last word.
                limit = max((limit for modality, limit in limits if modality == found[1]), default=0)
                yield _read(*found, limit or _MOST_BYTES)

    def count(self) -> int:
        return sum(1 for _ in self._found())

    def ask(self, client: Client, inputs: Iterator[Input], options: dict[str, Any]) -> Iterable[EmbedResult]:
        # Small chunks, few at once: files are large, and the bar moves every few of them.
        return client.embed_stream(inputs, chunk_inputs=16, window=4, **options)

    def remark(self) -> str:
        if not self._skipped:
            return ""
        files = "1 other file was" if self._skipped == 1 else f"{self._skipped} other files were"
        return f"{files} skipped: neither pictures nor sounds."

    def _found(self) -> Iterator[tuple[Path, _Kind] | Entry]:
        """Give each file with its kind, or the entry that says what is wrong with it."""
        self._skipped = 0
        for named in self._paths:
            for path, problem in _files(named):
                if problem:
                    yield _failed(path, problem)
                    continue
                try:
                    kind = _kind(path)
                except OSError as error:
                    yield _failed(path, _why(error))
                    continue
                if kind:
                    yield path, kind
                elif path == named:
                    yield _failed(path, "neither its content nor its name is that of a picture or a sound")
                else:
                    self._skipped += 1


def _read(path: Path, kind: _Kind, limit: int) -> Entry:
    """Read a file, unless it is over the limit."""
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            content = stream.read() if size <= limit else b""
    except OSError as error:
        return _failed(path, _why(error))
    if size > limit:
        over = InputTooLarge.over(f"the {kind} file", size, limit, "bytes")
        return _failed(path, over.message, over.reason)
    return Entry(Image(content) if kind == "image" else Audio(content), str(path))


def _files(named: Path) -> Iterator[tuple[Path, str]]:
    """Give a file, or those of a folder, each with why it cannot be read: "" where it may be."""
    seen: set[tuple[int, int]] = set()
    levels: list[Iterator[Path]] = [iter((named,))]  # no recursion: folders may lie deeper than Python's stack
    while levels:
        path = next(levels[-1], None)
        if path is None:
            levels.pop()
            continue
        try:
            status = path.stat()
            if stat.S_ISDIR(status.st_mode):
                if (identity := (status.st_dev, status.st_ino)) not in seen:
                    seen.add(identity)
                    names = sorted(child.name for child in path.iterdir() if not child.name.startswith("."))
                    levels.append(map(path.joinpath, names))
                continue
        except OSError as error:
            yield path, _why(error)
            continue
        if stat.S_ISREG(status.st_mode):
            yield path, ""
        elif path == named:  # reading a pipe or a device may never end
            yield path, "neither a file nor a folder"


def _kind(path: Path) -> _Kind | None:
    """Tell a picture from a sound, and both from all else."""
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    if _is_image(head):
        return "image"
    if _is_audio(head):
        return "audio"
    return _KINDS.get(path.suffix.lower())


def _is_image(head: bytes) -> bool:
    return (
        head.startswith(_IMAGE_HEADS)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and head[8:12] in {b"avif", b"avis"})
        or (head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS)
    )


def _is_audio(head: bytes) -> bool:
    return (
        head.startswith((b"fLaC", b"OggS", b"ID3"))
        or (head[:4] in {b"RIFF", b"RF64"} and head[8:12] == b"WAVE")
        or (head[:4] == b"FORM" and head[8:12] in {b"AIFF", b"AIFC"})
        or (head[:1] == b"\xff" and head[1:2] != b"" and head[1] & 0xE6 == 0xE2)  # a frame of MPEG layer III
    )


def _failed(path: Path, error: str, reason: str = "UNREADABLE") -> Entry:
    return Entry("", str(path), error, reason)


def _why(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
