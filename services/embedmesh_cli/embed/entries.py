"""What is to be embedded, one entry at a time; here the texts: arguments, lines, JSON lines."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from embedmesh.client import Client
from embedmesh.inputs import Input
from embedmesh.results import EmbedResult, ModelInfo
from embedmesh_cli.console import USAGE, UserError

__all__ = ["Entry", "Source", "open_texts"]

# A longer line is no text for a model, and it must not fill the memory.
_LONGEST_LINE_BYTES: Final = 16 * 1024 * 1024
# Fewer arguments are embedded before a progress bar would be of use.
_MANY_ARGUMENTS: Final = 100


@dataclass(frozen=True, slots=True)
class Entry:
    """One input as it was read, or why it is none.

    Attributes:
        input: What is sent; "" where there is nothing to send.
        file: Where a picture or a sound was read from; "" for a text.
        error: Why there is nothing to send; "" when there is.
        reason: The same in a word.
    """

    input: Input
    file: str = ""
    error: str = ""
    reason: str = "UNREADABLE"


class Source(ABC):
    """Where entries come from, and how they are best sent.

    Attributes:
        noun: What one of them is called.
        quick: Whether it is done before a progress bar would be of use.
    """

    noun = "text"
    quick = False

    @abstractmethod
    def entries(self, models: Sequence[ModelInfo]) -> Iterable[Entry]:
        """Give them all; `models` are those of the mesh."""

    def count(self) -> int | None:
        """How many there will be, where that can be known; asked only when somebody watches."""
        return None

    def ask(self, client: Client, inputs: Iterator[Input], options: dict[str, Any]) -> Iterable[EmbedResult]:
        """Embed `inputs` in their order, reading them no further ahead than need be."""
        return client.embed_stream(inputs, **options)

    def remark(self) -> str:
        """Give what the user may have overlooked, "" for nothing; asked at the end."""
        return ""


def open_texts(stack: ExitStack, texts: Sequence[str], file: Path | None, field: str) -> Source:
    """Give the texts of the command line; without any the lines of a file, or of standard input.

    Args:
        stack: Closes the file.
        texts: The arguments.
        file: Its name; "-" or None is standard input. A name that ends in .jsonl or .ndjson holds JSON objects.
        field: The field of the text in these.

    Raises:
        UserError: There is nothing to read, or it cannot be read.
    """
    if texts:
        return _Arguments(texts)
    if file is None or str(file) == "-":
        if file is None and sys.stdin.isatty():
            raise UserError('give texts, --file, or pipe lines in: embedmesh embed "hello world".', USAGE)
        return _Lines(sys.stdin.buffer, countable=False)
    try:
        stream = stack.enter_context(file.open("rb"))
        countable = file.is_file()
    except IsADirectoryError:
        raise UserError(f"--file {file}: is a folder. Of pictures or sounds? --media {file}", USAGE) from None
    except OSError as error:
        raise UserError(f"--file {file}: {error.strerror}.", USAGE) from None
    return _Lines(stream, countable=countable, field=field if file.suffix in {".jsonl", ".ndjson"} else None)


class _Arguments(Source):
    """Texts of the command line."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self.quick = len(texts) < _MANY_ARGUMENTS

    def entries(self, models: Sequence[ModelInfo]) -> Iterable[Entry]:
        del models
        return map(Entry, self._texts)

    def count(self) -> int:
        return len(self._texts)

    def ask(self, client: Client, inputs: Iterator[Input], options: dict[str, Any]) -> Iterable[EmbedResult]:
        return client.embed(list(inputs), **options).results


class _Lines(Source):
    """A stream of texts, one a line, or one in `field` of a JSON object a line."""

    def __init__(self, stream: BinaryIO, *, countable: bool, field: str | None = None) -> None:
        self._stream = stream
        self._countable = countable
        self._field = field

    def entries(self, models: Sequence[ModelInfo]) -> Iterable[Entry]:
        del models
        lines = _lines(self._stream)
        return lines if self._field is None else _json_lines(lines, self._field)

    def count(self) -> int | None:
        if not self._countable:
            return None
        total = sum(block.count(b"\n") for block in iter(lambda: self._stream.read(1 << 20), b""))
        self._stream.seek(0)
        return total


def _lines(stream: BinaryIO) -> Iterator[Entry]:
    """One entry a line; a line that is not UTF-8, or endless, is an error of its own."""
    first = True
    while line := stream.readline(_LONGEST_LINE_BYTES):
        if not line.endswith(b"\n") and len(line) == _LONGEST_LINE_BYTES:
            while (rest := stream.readline(_LONGEST_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield Entry("", error=f"the line is longer than {_LONGEST_LINE_BYTES} bytes")
        else:
            try:
                text = line.decode("utf-8-sig" if first else "utf-8")
                yield Entry(text.removesuffix("\n").removesuffix("\r"))
            except UnicodeDecodeError as error:
                yield Entry("", error=f"the line is not UTF-8 (byte {error.start} is 0x{line[error.start]:02x})")
        first = False


def _json_lines(lines: Iterable[Entry], field: str) -> Iterator[Entry]:
    for entry in lines:
        line = entry.input
        if not isinstance(line, str) or entry.error:
            yield entry
        elif line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                yield Entry("", error=f"the line is not JSON: {error}")
                continue
            text = value.get(field) if isinstance(value, dict) else None
            if isinstance(text, str):
                yield Entry(text)
            else:
                yield Entry("", error=f"the line is no JSON object with a text in {field!r} (--field names another)")
