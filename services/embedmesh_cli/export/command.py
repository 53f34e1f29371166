"""The command `embedmesh models export`."""

from __future__ import annotations

import importlib.util
from dataclasses import replace as replaced
from enum import StrEnum
from typing import Annotated

import typer

from embedmesh_cli.console import USAGE, UserError, explained, plain_console
from embedmesh_cli.layers import Layers
from embedmesh_cli.pull.command import say_how_to_serve
from embedmesh_cli.pull.options import (
    CacheDir,
    Endpoint,
    Kinds,
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

__all__ = ["export"]


class _Layout(StrEnum):
    auto = "auto"
    packed = "packed"
    padded = "padded"


def export(
    source: Source,
    *,
    output: Output = None,
    name: Name = None,
    layout: Annotated[
        _Layout,
        typer.Option(
            help="How a text model reads a batch: texts end to end in rows (packed; only families for which that is "
            "exact), or one text a row. The former where it can, unless given."
        ),
    ] = _Layout.auto,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="Keep only the first N layers of a text model, as those trained for it allow (AdaptiveLayerLoss, 2D "
            "Matryoshka). Several numbers make several models; each is named after its depth, NAME-lN.",
        ),
    ] = None,
    average_layers: Annotated[
        str | None,
        typer.Option(
            metavar="I,...",
            help="Pool the mean of these hidden states, not the last: 0 is the embeddings, I what layer I gives. The "
            "model is named NAME-hI-...",
        ),
    ] = None,
    pooling: PoolingWays = None,
    kinds: Kinds = None,
    normalize: Normalize = None,
    max_units: MaxUnits = None,
    image_template: Annotated[
        str | None,
        typer.Option(
            metavar="TEMPLATE",
            help="Of a model that reads pictures with texts: its prompt, with the token of a picture and {text} in it.",
        ),
    ] = None,
    text_template: Annotated[
        str | None,
        typer.Option(metavar="TEMPLATE", help="Likewise, for texts without a picture: with {text} alone."),
    ] = None,
    library_code: Annotated[
        bool,
        typer.Option(
            "--library-code",
            help="Of a repository that brings code of its own, take the implementation of transformers instead.",
        ),
    ] = False,
    endpoint: Endpoint = None,
    cache_dir: CacheDir = None,
    offline: Offline = False,
    replace: Replace = False,
) -> None:
    """Make a model of a repository that holds weights but no ONNX graph, on the Hugging Face Hub or in a folder.

    Needs the extra `export` (torch, transformers). Only safetensors are read; pickles and code of repositories are
    neither fetched nor loaded. The graph's vectors are held against torch's before anything is kept.
    """
    if missing := [module for module in ("torch", "transformers") if not importlib.util.find_spec(module)]:
        raise UserError(f"export needs {' and '.join(missing)}: pip install 'embedmesh[export]'.", USAGE)
    averaged = _numbers("--average-layers", average_layers, least=0)
    depths = _numbers("--layers", layers, least=1) or (0,)
    # Slow to import, and only this command needs them.
    from embedmesh_cli.export.make import export_models  # noqa: PLC0415
    from embedmesh_cli.pull.recipe import Templates  # noqa: PLC0415
    from embedmesh_cli.pull.repository import open_repository  # noqa: PLC0415

    console = plain_console()
    repository = open_repository(source, endpoint=endpoint, cache=cache_dir, offline=offline)
    if (image_template is None) is not (text_template is None):
        raise UserError("--image-template and --text-template belong together.", USAGE)
    templates = Templates(image_template, text_template) if image_template and text_template else None
    wishes = replaced(
        read_wishes(pooling=pooling, normalize=normalize, max_units=max_units, kinds=kinds), templates=templates
    )
    specs = []
    for kept in depths:
        choice = Layers(kept, averaged)
        with explained(source):
            specs += export_models(
                repository,
                wishes,
                layers=choice,
                layout=layout.value,
                library_code=library_code,
                name=name or repository.name,
                output=output.with_name(f"{output.name}{choice.suffix}") if output and len(depths) > 1 else output,
                replace_old=replace,
                console=console,
            )
    say_how_to_serve(specs, console)


def _numbers(option: str, given: str | None, *, least: int) -> tuple[int, ...]:
    """Read numbers of layers, each once, ascending."""
    words = [word.strip() for word in given.split(",")] if given is not None else []
    if not all(word.isascii() and word.isdecimal() and int(word) >= least for word in words):
        raise UserError(f'{option} "{given}" is no list of whole numbers from {least} on, such as 3,6.', USAGE)
    return tuple(sorted({int(word) for word in words}))
