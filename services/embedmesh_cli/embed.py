"""`embedmesh embed`: texts in, vectors out."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Protocol

import numpy as np
import typer
from numpy.lib import format as npy
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from embedmesh.client import Client
from embedmesh.errors import EmbedMeshError
from embedmesh.results import EmbedResult
from embedmesh_cli.console import FAILED, USAGE, UserError, explain

__all__ = ["EXAMPLES", "embed"]

EXAMPLES = """\b
Examples:
  embedmesh embed "a cat" "a dog"
  embedmesh embed --file texts.txt --output vectors.npy
  sort -u texts.txt | embedmesh embed --dtype int8 > vectors.jsonl
"""

# A longer line is no text for a model, and it must not fill the memory.
_LONGEST_LINE_BYTES = 16 * 1024 * 1024
_DEFAULT_ADDRESS = "localhost:50050"


@dataclass(frozen=True, slots=True)
class _Entry:
    """One input as it was read: a text, or why it is none."""

    text: str
    error: str = ""


class _Writer(Protocol):
    """Where results go, in the order of the inputs."""

    def write(self, index: int, entry: _Entry, result: EmbedResult | None) -> None: ...
    def finish(self) -> None: ...


def embed(
    *,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT...", help="Texts to embed.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="One text a line; a name that ends in .jsonl holds JSON objects; - is standard input."
        ),
    ] = None,
    field: Annotated[str, typer.Option(metavar="NAME", help="The field of the text in JSON lines.")] = "text",
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write here instead of to standard output. A name that ends in .npy gets a matrix with one row for "
            "each input, NaN (or 0) where it failed; any other gets JSON lines.",
        ),
    ] = None,
    with_text: Annotated[bool, typer.Option("--with-text", help="Repeat the text in each JSON line.")] = False,
    address: Annotated[
        str, typer.Option(metavar="HOST:PORT", envvar="EMBEDMESH_ADDRESS", help="Where the mesh answers.")
    ] = _DEFAULT_ADDRESS,
    tls: Annotated[bool, typer.Option("--tls", help="Speak TLS, trusting the system's authorities.")] = False,
    token: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", envvar="EMBEDMESH_TOKEN", show_envvar=True, help="Bearer token to send."),
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Model or family, name@revision to pin it; empty: the default.")
    ] = "",
    dimensions: Annotated[
        int, typer.Option(min=0, metavar="N", help="Width, where the model offers smaller ones; 0: full.")
    ] = 0,
    dtype: Annotated[
        Literal["float32", "float16", "int8", "binary"], typer.Option(help="Type of the elements.")
    ] = "float32",
    role: Annotated[
        Literal["query", "document"] | None, typer.Option(help="Puts the model's prompt for this role before the text.")
    ] = None,
    instruction: Annotated[
        str, typer.Option(metavar="TEXT", help="Puts this before the text, in place of the role's prompt.")
    ] = "",
    truncation: Annotated[
        Literal["end", "start", "refuse"], typer.Option(help="What is cut from a text that is too long.")
    ] = "end",
    cache: Annotated[
        Literal["read_write", "refresh", "bypass"],
        typer.Option(help="Use the cache, renew what it holds, or leave it alone."),
    ] = "read_write",
    priority: Annotated[
        Literal["interactive", "bulk"] | None,
        typer.Option(help="Who goes first under load. Default: interactive for arguments, bulk for files."),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=0.001, metavar="SECONDS", help="Time limit; for files none unless given."),
    ] = None,
) -> None:
    """Embed texts: arguments, the lines of a file, or standard input.

    Prints a JSON line for each text: index, vector (or error), units, truncated, cached. Files may be of any
    length. Ends with 0 when all is done, 1 when texts failed (standard error names them), 2 for a mistake in
    the options, 3 when no mesh answers.
    """
    if texts and file:
        raise UserError("give texts or --file, not both.", USAGE)
    with ExitStack() as stack:
        entries, total = (map(_Entry, texts), len(texts)) if texts else _open(stack, file, field)
        writer = _writer(stack, output, with_text=with_text)
        options: dict[str, Any] = {
            "model": model,
            "dimensions": dimensions,
            "dtype": dtype,
            "role": role,
            "instruction": instruction,
            "truncation": truncation,
            "cache": cache,
        }
        if priority:
            options["priority"] = priority
        if timeout:
            options["timeout"] = timeout
        try:
            # Asked first, and not for long: a missing mesh is told at once, a restart under way is waited out.
            with Client(address, tls=tls, token=token, retries=1) as probe:
                probe.list_models(timeout=10)
            client = stack.enter_context(Client(address, tls=tls, token=token))
            run = _Run(client, writer, options, whole=bool(texts))
            status = run(entries, total)
            writer.finish()
        except EmbedMeshError as error:
            raise explain(error, address) from None
        except ValueError as error:
            raise UserError(f"{error}.", USAGE) from None
    if status:
        raise typer.Exit(status)


class _Run:
    """Moves entries through the mesh into the writer, keeping their order, with bounded memory."""

    def __init__(self, client: Client, writer: _Writer, options: dict[str, Any], *, whole: bool) -> None:
        self._client = client
        self._writer = writer
        self._options = options
        self._whole = whole
        # Read but not yet answered; the client reads ahead no further than its window.
        self._waiting: deque[_Entry] = deque()
        self._console = Console(stderr=True)
        self._done = self._failed = self._truncated = self._cached = 0

    def __call__(self, entries: Iterable[_Entry], total: int | None) -> int:
        """Run to the end; gives the exit status."""
        started = time.monotonic()
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        visible = self._console.is_terminal and not (self._whole and total is not None and total < 100)
        with Progress(*columns, console=self._console, disable=not visible, transient=True) as progress:
            task = progress.add_task("", total=total)
            for result in self._results(self._readable(entries)):
                self._flush_unreadable()
                self._put(self._waiting.popleft(), result)
                progress.update(task, completed=self._done)
            self._flush_unreadable()
        if self._truncated:
            self._say(f"{self._truncated} of {self._done} texts were longer than the model reads and were cut.")
        if visible:
            self._say(f"{self._done} texts in {time.monotonic() - started:.1f} s, {self._cached} from the cache.")
        if self._failed:
            self._say(f"{self._failed} of {self._done} texts failed.")
        return FAILED if self._failed else 0

    def _results(self, texts: Iterator[str]) -> Iterable[EmbedResult]:
        if self._whole:
            return self._client.embed(list(texts), **self._options).results
        return self._client.embed_stream(texts, **self._options)

    def _readable(self, entries: Iterable[_Entry]) -> Iterator[str]:
        """Give the texts that can be sent; remember all entries, in order."""
        for entry in entries:
            self._waiting.append(entry)
            if not entry.error:
                yield entry.text

    def _flush_unreadable(self) -> None:
        """Write the entries that were never sent and whose turn it is."""
        while self._waiting and self._waiting[0].error:
            self._put(self._waiting.popleft(), None)

    def _put(self, entry: _Entry, result: EmbedResult | None) -> None:
        index = self._done
        self._done += 1
        if result is None or result.error is not None:
            self._failed += 1
            self._say(f"text {index}: {_reason(entry, result)}")
        else:
            self._truncated += result.truncated
            self._cached += result.cached
        self._writer.write(index, entry, result)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _reason(entry: _Entry, result: EmbedResult | None) -> str:
    if result is None or result.error is None:
        return entry.error
    return f"{result.error.message} [{result.error.reason or result.error.code.name}]"


def _open(stack: ExitStack, file: Path | None, field: str) -> tuple[Iterator[_Entry], int | None]:
    """Open what is to be read; also the number of lines where a progress bar will want it."""
    if file is None or str(file) == "-":
        if file is None and sys.stdin.isatty():
            raise UserError('give texts, --file, or pipe lines in: embedmesh embed "hello world".', USAGE)
        return _lines(sys.stdin.buffer), None
    try:
        stream = stack.enter_context(file.open("rb"))
        total = None
        if sys.stderr.isatty() and file.is_file():
            total = sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))
            stream.seek(0)
    except OSError as error:
        raise UserError(f"--file {file}: {error.strerror}.", USAGE) from None
    if file.suffix in {".jsonl", ".ndjson"}:
        return _json_lines(_lines(stream), field), total
    return _lines(stream), total


def _lines(stream: BinaryIO) -> Iterator[_Entry]:
    """One entry a line; a line that is not UTF-8, or endless, is an error of its own."""
    first = True
    while line := stream.readline(_LONGEST_LINE_BYTES):
        if not line.endswith(b"\n") and len(line) == _LONGEST_LINE_BYTES:
            while (rest := stream.readline(_LONGEST_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield _Entry("", f"the line is longer than {_LONGEST_LINE_BYTES} bytes")
        else:
            try:
                text = line.decode("utf-8-sig" if first else "utf-8")
                yield _Entry(text.removesuffix("\n").removesuffix("\r"))
            except UnicodeDecodeError as error:
                yield _Entry("", f"the line is not UTF-8 (byte {error.start} is 0x{line[error.start]:02x})")
        first = False


def _json_lines(lines: Iterable[_Entry], field: str) -> Iterator[_Entry]:
    for entry in lines:
        if entry.error:
            yield entry
        elif entry.text.strip():
            try:
                value = json.loads(entry.text)
            except ValueError as error:
                yield _Entry("", f"the line is not JSON: {error}")
                continue
            text = value.get(field) if isinstance(value, dict) else None
            if isinstance(text, str):
                yield _Entry(text)
            else:
                yield _Entry("", f"the line is no JSON object with a text in {field!r} (--field names another)")


def _writer(stack: ExitStack, output: Path | None, *, with_text: bool) -> _Writer:
    if output is None:
        return _JsonLines(sys.stdout.buffer, with_text=with_text)
    try:
        stream = stack.enter_context(_replacing(output))
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}.", USAGE) from None
    return _Npy(stream) if output.suffix == ".npy" else _JsonLines(stream, with_text=with_text)


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

    def __init__(self, stream: BinaryIO, *, with_text: bool) -> None:
        self._stream = stream
        self._with_text = with_text

    def write(self, index: int, entry: _Entry, result: EmbedResult | None) -> None:
        line: dict[str, Any] = {"index": index}
        if self._with_text:
            line["text"] = entry.text
        if result is None or result.error is not None:
            code = "INVALID_ARGUMENT" if result is None or result.error is None else result.error.code.name
            reason = "UNREADABLE" if result is None or result.error is None else result.error.reason
            line["error"] = {"code": code, "reason": reason, "message": _reason(entry, result)}
        else:
            line["vector"] = _numbers(result.vector)
            if result.scale != 1:
                line["scale"] = result.scale
            line["model"] = result.model.name if result.model else ""
            line |= {"units": result.input_units, "truncated": result.truncated, "cached": result.cached}
            if result.truncated:
                line["original_units"] = result.original_units
        self._stream.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")

    def finish(self) -> None:
        self._stream.flush()


def _numbers(vector: NDArray[Any]) -> list[float]:
    """Give the shortest decimals that read back as the same element."""
    if vector.dtype.kind != "f":
        return [int(x) for x in vector]
    digits = 9 if vector.dtype == np.float32 else 5
    return [float(f"{x:.{digits}g}") for x in vector.tolist()]


class _Npy:
    """A matrix [n, d] written row by row; the header, which holds n, is put right at the end."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._rows = 0
        self._blank: NDArray[Any] | None = None

    def write(self, _index: int, _entry: _Entry, result: EmbedResult | None) -> None:
        good = result is not None and result.error is None
        if self._blank is None and result is not None and good:
            vector = result.vector
            self._blank = np.full(vector.shape, np.nan if vector.dtype.kind == "f" else 0, vector.dtype)
            self._header()
            for _ in range(self._rows):
                self._stream.write(self._blank.tobytes())
        self._rows += 1
        if self._blank is not None:
            self._stream.write((result.vector if result is not None and good else self._blank).tobytes())

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
