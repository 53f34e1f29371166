"""The command `embedmesh models pull`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console

from embedmesh_cli.console import command_name, explained, plain_console
from embedmesh_cli.pull.options import (
    CacheDir,
    Endpoint,
    MaxUnits,
    Name,
    Normalize,
    Offline,
    Output,
    PoolingWays,
    Replace,
    Source,
    read_wishes,
)
from embedmesh_encoder.model import ModelSpec

__all__ = ["pull", "say_how_to_serve"]


def pull(
    source: Source,
    *,
    output: Output = None,
    name: Name = None,
    file: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="ONNX file of the repository to take, in place of the full-precision one."),
    ] = None,
    pooling: PoolingWays = None,
    normalize: Normalize = None,
    max_units: MaxUnits = None,
    endpoint: Endpoint = None,
    cache_dir: CacheDir = None,
    offline: Offline = False,
    replace: Replace = False,
) -> None:
    """Make a model of a repository on the Hugging Face Hub, or of a folder, ready to be served.

    Needs a ready ONNX graph (`embedmesh models export` makes one) or the table of a static embedding. Pickles and
    code of repositories are neither fetched nor loaded. Private and gated repositories: `hf auth login`, or HF_TOKEN.
    """
    # Slow to import, and only few commands need them.
    from embedmesh_cli.pull.make import make_models  # noqa: PLC0415
    from embedmesh_cli.pull.recipe import is_static, read_pipeline  # noqa: PLC0415
    from embedmesh_cli.pull.repository import Repository, WithGraphs, open_repository  # noqa: PLC0415
    from embedmesh_cli.pull.static import static_weights, write_static_graph  # noqa: PLC0415

    console = plain_console()
    repository: Repository = open_repository(source, endpoint=endpoint, cache=cache_dir, offline=offline)
    wishes = read_wishes(file=file, pooling=pooling, normalize=normalize, max_units=max_units)
    with explained(source), ExitStack() as stack:
        weights: list[str] = []
        if is_static(repository):
            pipeline = read_pipeline(repository, wishes)
            weights = [static_weights(repository, pipeline.prefix)]
            made = Path(stack.enter_context(TemporaryDirectory(prefix="embedmesh-")))
            write_static_graph(repository, pipeline.prefix, made / "onnx" / "model.onnx")
            repository = WithGraphs(repository, made)
        specs = make_models(
            repository,
            wishes,
            name=name or repository.name,
            output=output,
            replace=replace,
            console=console,
            weights=weights,
        )
    say_how_to_serve(specs, console)


def say_how_to_serve(specs: Sequence[ModelSpec], console: Console) -> None:
    """Print the next command."""
    options = " ".join(f"--{spec.modality}-model {spec.folder}" for spec in specs)
    console.print(f"Serve it: {command_name()} up {options}", markup=False)
