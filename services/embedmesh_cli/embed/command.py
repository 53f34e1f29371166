"""The command itself: options, the run through the mesh, what is said about it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from embedmesh.client import Client
from embedmesh.errors import EmbedMeshError
from embedmesh.inputs import Input
from embedmesh.results import EmbedResult, ModelInfo
from embedmesh_cli.connection import credentials
from embedmesh_cli.console import FAILED, USAGE, UserError, explain, read_kinds
from embedmesh_cli.embed.entries import Entry, Source, open_texts
from embedmesh_cli.embed.media import is_media_file, open_media
from embedmesh_cli.embed.output import Failure, Writer, open_writer

__all__ = ["EXAMPLES", "embed"]

EXAMPLES = """\b
Examples:
  embedmesh embed "a cat" "a dog"
  embedmesh embed --file texts.txt --output vectors.npy
  sort -u texts.txt | embedmesh embed --dtype int8 > vectors.jsonl
  embedmesh embed --media photos/ talk.mp3 --output vectors.npy

A mesh with TLS or keys, for this and other commands: EMBEDMESH_TLS_CA names a PEM file of whom to trust,
EMBEDMESH_TLS_CERT and EMBEDMESH_TLS_KEY those to show where it asks for certificates, EMBEDMESH_TOKEN_FILE a file with
the key (or EMBEDMESH_TOKEN holds it).
"""

_DEFAULT_ADDRESS = "localhost:50050"


def embed(
    *,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT...", help="Texts to embed; with --media files and folders.")
    ] = None,
    media: Annotated[
        bool,
        typer.Option(
            "--media",
            help="The arguments are pictures and sounds (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF; WAV, FLAC, OGG, MP3, "
            "AIFF; told apart by content), or folders of them, which are read with all that is below them.",
        ),
    ] = False,
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
            "each input, NaN (or 0) where it failed, and for --media FILE.jsonl beside it, which names the rows; any "
            "other gets JSON lines.",
        ),
    ] = None,
    with_text: Annotated[bool, typer.Option("--with-text", help="Repeat the text in each JSON line.")] = False,
    address: Annotated[
        str, typer.Option(metavar="HOST:PORT", envvar="EMBEDMESH_ADDRESS", help="Where the mesh answers.")
    ] = _DEFAULT_ADDRESS,
    tls: Annotated[
        bool,
        typer.Option(
            "--tls", help="Speak TLS, trusting the roots that come with gRPC, or those of EMBEDMESH_TLS_CA (see below)."
        ),
    ] = False,
    token: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="Key to send, which others can see among the processes: prefer a variable."),
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
    kinds: Annotated[
        str,
        typer.Option(
            metavar="KIND[,...]",
            help="Kinds of vector, of one run of the model: dense, sparse, multi_vector. In JSON lines they are "
            "vector, sparse (indices and values) and multi_vector (a list of rows).",
        ),
    ] = "dense",
    role: Annotated[
        Literal["query", "document"] | None, typer.Option(help="Puts the model's prompt for this role before the text.")
    ] = None,
    instruction: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Puts this before the text, in place of the role's prompt. Given several times: the average over all.",
        ),
    ] = None,
    truncation: Annotated[
        Literal["end", "start", "refuse", "chunk"],
        typer.Option(help="What is cut from a text that is too long; chunk: the average over its parts."),
    ] = "end",
    chunk_units: Annotated[
        int, typer.Option(min=0, metavar="N", help="Most tokens of a chunk; 0: as many as the model reads.")
    ] = 0,
    chunk_overlap: Annotated[
        int, typer.Option(min=0, metavar="N", help="Tokens that a chunk has in common with the one before.")
    ] = 0,
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
    """Embed texts (arguments, the lines of a file, or standard input), or pictures and sounds.

    Prints a JSON line for each input: index, vector (or error), units, truncated, cached, and file for pictures
    and sounds. Files and folders may be of any length: memory stays bounded. Ends with 0 when all is done, 1 when
    inputs failed (standard error names them), 2 for a mistake in the options, 3 when no mesh answers.
    """
    if file and (texts or media):
        raise UserError(f"give {'--media' if media else 'texts'} or --file, not both.", USAGE)
    if media and (role or instruction or with_text):
        raise UserError("--role, --instruction and --with-text are for texts; --media takes none of them.", USAGE)
    wanted = read_kinds(kinds)
    options: dict[str, Any] = {
        "model": model,
        "kinds": wanted,
        "dimensions": dimensions,
        "dtype": dtype,
        "role": role,
        **_instructions(instruction or []),
        "truncation": truncation,
        "chunk_units": chunk_units,
        "chunk_overlap": chunk_overlap,
        "cache": cache,
    }
    if priority:
        options["priority"] = priority
    if timeout:
        options["timeout"] = timeout
    given = credentials(tls=tls, token=token)
    with ExitStack() as stack:
        source = open_media(texts or ()) if media else open_texts(stack, texts or (), file, field)
        run = _Run(source, open_writer(stack, output, with_text=with_text, media=media, kinds=wanted))
        try:
            # Asked first, and not for long: a missing mesh is told at once, a restart under way is waited out.
            with Client(address, retries=1, **given) as probe:
                models = probe.list_models(timeout=10)
            client = stack.enter_context(Client(address, **given))
            status = run(client, models, options)
        except EmbedMeshError as error:
            raise explain(error, address) from None
        except ValueError as error:
            raise UserError(f"{error}.", USAGE) from None
    if not media and (missed := next(filter(is_media_file, texts or ()), "")):
        typer.echo(f"{missed!r} was embedded as a text; --media embeds what is in the file.", err=True)
    if status:
        raise typer.Exit(status)


def _instructions(given: list[str]) -> dict[str, Any]:
    return {"instructions": given} if len(given) > 1 else {"instruction": "".join(given)}


class _Run:
    """Moves entries through the mesh into the writer, keeping their order, with bounded memory."""

    def __init__(self, source: Source, writer: Writer) -> None:
        self._source = source
        self._writer = writer
        # Read but not yet answered; the client reads ahead no further than its window.
        self._waiting: deque[Entry] = deque()
        self._console = Console(stderr=True)
        self._spaces: set[str] = set()
        self._done = self._failed = self._truncated = self._cached = 0

    def __call__(self, client: Client, models: Sequence[ModelInfo], options: dict[str, Any]) -> int:
        """Run to the end; gives the exit status."""
        started = time.monotonic()
        source = self._source
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        visible = self._console.is_terminal and not source.quick
        with Progress(*columns, console=self._console, disable=not visible, transient=True) as progress:
            task = progress.add_task("", total=source.count() if visible else None)
            for result in source.ask(client, self._readable(source.entries(models)), options):
                self._flush_unreadable()
                self._put(self._waiting.popleft(), result)
                progress.update(task, completed=self._done)
            self._flush_unreadable()
        self._writer.finish()
        what = f"{self._done} {source.noun}s"
        if self._truncated:
            self._say(f"{self._truncated} of {what} were longer than the model reads and were cut.")
        if len(self._spaces) > 1:
            self._say(
                f"The vectors lie in {len(self._spaces)} spaces ({', '.join(sorted(self._spaces))}): "
                "compare only those of one."
            )
        if visible:
            self._say(f"{what} in {time.monotonic() - started:.1f} s, {self._cached} from the cache.")
        if remark := source.remark():
            self._say(remark)
        if self._failed:
            self._say(f"{self._failed} of {what} failed.")
        return FAILED if self._failed else 0

    def _readable(self, entries: Iterable[Entry]) -> Iterator[Input]:
        """Give what can be sent; remember all entries, in order."""
        for entry in entries:
            self._waiting.append(entry)
            if not entry.error:
                yield entry.input

    def _flush_unreadable(self) -> None:
        """Write the entries that were never sent and whose turn it is."""
        while self._waiting and self._waiting[0].error:
            entry = self._waiting.popleft()
            self._put(entry, Failure("INVALID_ARGUMENT", entry.reason, entry.error))

    def _put(self, entry: Entry, result: EmbedResult | Failure) -> None:
        index = self._done
        self._done += 1
        if isinstance(result, EmbedResult) and result.error is not None:
            result = Failure(result.error.code.name, result.error.reason, result.error.message)
        result = self._writer.write(index, entry, result) or result
        if isinstance(result, Failure):
            self._failed += 1
            self._say(f"{entry.file or f'text {index}'}: {result}")
        else:
            self._truncated += result.truncated
            self._cached += result.cached
            if result.model:
                self._spaces.add(result.model.space)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
