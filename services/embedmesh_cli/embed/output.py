"""Where vectors go: JSON lines, or a matrix of numpy with one row an input."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from embedmesh.results import EmbedResult, SparseVector
from embedmesh_cli.console import USAGE, UserError
from embedmesh_cli.embed.entries import Entry

__all__ = ["Failure", "Writer", "open_writer"]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an input has no vector."""

    code: str
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.message} [{self.reason or self.code}]"


class Writer(Protocol):
    """Takes outcomes in the order of the inputs."""

    def write(self, index: int, entry: Entry, outcome: EmbedResult | Failure) -> Failure | None:
        """Write one outcome, a failure or a result without error; gives why its vector has no place here."""

    def finish(self) -> None:
        """Write what is known only at the end."""


def open_writer(
    stack: ExitStack, output: Path | None, *, with_text: bool, media: bool, kinds: Sequence[str] = ("dense",)
) -> Writer:
    """Give the writer that the name of `output` asks for.

    Raises:
        UserError: The file cannot be written, or has no place for a kind of vector.
    """
    if output is None:
        return _JsonLines(sys.stdout.buffer, with_text=with_text, kinds=kinds)
    if output.suffix == ".npy" and list(kinds) != ["dense"]:
        raise UserError(
            f"--output {output} holds dense vectors only: write --kinds {','.join(kinds)} to JSON lines.", USAGE
        )
    try:
        stream = stack.enter_context(_replacing(output))
        if output.suffix != ".npy":
            return _JsonLines(stream, with_text=with_text, kinds=kinds)
        if not media:
            return _Npy(stream)
        # The rows of a file of texts are its lines; only this tells which row is which picture.
        names = stack.enter_context(_replacing(output.with_name(f"{output.name}.jsonl")))
        return _Npy(stream, _JsonLines(names, with_vector=False))
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}.", USAGE) from None


class _replacing:  # noqa: N801  (used as a context manager)
    """A file that appears under its name only when all went well."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.{os.getpid()}")

    def __enter__(self) -> BinaryIO:
        self._stream = self._partial.open("wb")
        return self._stream

    def __exit__(self, kind: object, *_: object) -> None:
        self._stream.close()
        if kind is None:
            self._partial.replace(self._path)
        else:
            with suppress(OSError):
                self._partial.unlink()


class _JsonLines:
    """One JSON object a line."""

    def __init__(
        self,
        stream: BinaryIO,
        *,
        with_text: bool = False,
        with_vector: bool = True,
        kinds: Sequence[str] = ("dense",),
    ) -> None:
        self._stream = stream
        self._kinds = kinds
        self._with_text = with_text
        self._with_vector = with_vector

    def write(self, index: int, entry: Entry, outcome: EmbedResult | Failure) -> None:
        line: dict[str, Any] = {"index": index}
        if self._with_text:
            line["text"] = entry.input
        if entry.file:
            line["file"] = entry.file
        if isinstance(outcome, Failure):
            line["error"] = {"code": outcome.code, "reason": outcome.reason, "message": outcome.message}
        else:
            if self._with_vector:
                line |= {key: read(outcome) for key, read in (_FIELDS[kind] for kind in self._kinds)}
            if outcome.scale != 1:
                line["scale"] = outcome.scale
            line["model"] = outcome.model.name if outcome.model else ""
            line |= {"units": outcome.input_units, "truncated": outcome.truncated, "cached": outcome.cached}
            if outcome.truncated:
                line["original_units"] = outcome.original_units
        self._stream.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")

    def finish(self) -> None:
        self._stream.flush()


def _sparse(vector: SparseVector) -> dict[str, list[float]]:
    return {"indices": vector.indices.tolist(), "values": _numbers(vector.values)}


def _numbers(vector: NDArray[Any]) -> list[float]:
    """Give the shortest decimals that read back as the same element."""
    if vector.dtype.kind != "f":
        return [int(x) for x in vector]
    digits = 9 if vector.dtype == np.float32 else 5
    return [float(f"{x:.{digits}g}") for x in vector.tolist()]


# The key of a line, and what it holds, by kind.
_FIELDS: Final[Mapping[str, tuple[str, Callable[[EmbedResult], Any]]]] = {
    "dense": ("vector", lambda result: _numbers(result.vector)),
    "sparse": ("sparse", lambda result: _sparse(result.sparse)),
    "multi_vector": ("multi_vector", lambda result: [_numbers(row) for row in result.multi_vector]),
}


class _Npy:
    """A matrix [n, d] written row by row; the header, which holds n, is put right at the end.

    Args:
        stream: Where to.
        names: Told about every row, where the rows have names.
    """

    def __init__(self, stream: BinaryIO, names: _JsonLines | None = None) -> None:
        self._stream = stream
        self._names = names
        self._rows = 0
        self._blank: NDArray[Any] | None = None

    def write(self, index: int, entry: Entry, outcome: EmbedResult | Failure) -> Failure | None:
        row = None if isinstance(outcome, Failure) else outcome.vector
        if self._blank is None and row is not None:
            self._blank = np.full(row.shape, np.nan if row.dtype.kind == "f" else 0, row.dtype)
            self._header()
            for _ in range(self._rows):
                self._stream.write(self._blank.tobytes())
        misfit = None
        if self._blank is not None:
            if row is not None and row.shape != self._blank.shape:
                misfit = Failure(
                    "INVALID_ARGUMENT",
                    "OTHER_WIDTH",
                    f"its vector has {row.size} numbers, the matrix has {self._blank.size} columns; write JSON lines "
                    "(--output NAME.jsonl), or pictures and sounds each for themselves",
                )
            self._stream.write((self._blank if row is None or misfit else row).tobytes())
        self._rows += 1
        if self._names:
            self._names.write(index, entry, misfit or outcome)
        return misfit

    def finish(self) -> None:
        if self._blank is None:
            self._blank = np.empty(0, np.float32)  # no input gave a vector: the width is unknown
        self._stream.seek(0)
        self._header()

    def _header(self) -> None:
        assert self._blank is not None  # noqa: S101  (for the type checker)
        shape = (self._rows, self._blank.shape[0])
        # numpy pads the first axis so that the header keeps its length when rows are added.
        header = {"descr": npy.dtype_to_descr(self._blank.dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(self._stream, header)
