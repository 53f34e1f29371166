"""The command `embedmesh models pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast, get_args

import typer
from rich.console import Console

from embedmesh_cli.console import USAGE, UserError, command_name
from embedmesh_encoder.model import ModelError
from embedmesh_encoder.pooling import Pooling

__all__ = ["pull"]


def _ways(wanted: list[str] | None) -> list[str] | None:
    if unknown := [way for way in wanted or () if way not in get_args(Pooling)]:
        raise UserError(f"--pooling {unknown[0]} is none of {', '.join(get_args(Pooling))}.", USAGE)
    return wanted


def pull(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL[@REVISION]|FOLDER",
            help="Id of a model on the Hugging Face Hub, such as sentence-transformers/all-MiniLM-L6-v2, with a "
            "branch, tag or commit after @ if not the default; or a folder with such a repository.",
        ),
    ],
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder to make, in place of one in the folder of models. A repository of several towers makes "
            "DIR-text, DIR-image, DIR-audio.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name to serve it under; the id or the folder's unless given.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="ONNX file of the repository to take, in place of the full-precision one."),
    ] = None,
    pooling: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WAY",
            help="For repositories that do not say how tokens become one vector: mean, cls, max, mean_sqrt_len, "
            "weightedmean or last; repeat to join several.",
            callback=_ways,
        ),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="Likewise: whether its vectors are normalised."),
    ] = None,
    max_units: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Likewise: the longest input, or less than it could read.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Address of the Hub; HF_ENDPOINT unless given.")
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Cache of downloads; HF_HUB_CACHE or huggingface_hub's own unless given."),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Take what is in the cache and ask nobody, as HF_HUB_OFFLINE=1 does.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the place of a model that was pulled there before.")
    ] = False,
) -> None:
    """Make a model of a repository on the Hugging Face Hub, or of a folder, ready to be served.

    Needs a ready ONNX graph. Pickles and code of repositories are neither fetched nor loaded. Private and gated
    repositories: `hf auth login`, or HF_TOKEN.
    """
    # Slow to import, and only this command of them all needs them.
    from embedmesh_cli.pull.make import make_models  # noqa: PLC0415
    from embedmesh_cli.pull.recipe import Wishes  # noqa: PLC0415
    from embedmesh_cli.pull.repository import Folder, Hub  # noqa: PLC0415

    console = Console(width=None if Console().is_terminal else 1000, highlight=False)
    path, (hub_id, _, revision) = Path(source).expanduser(), source.partition("@")
    if path.is_dir():
        repository: Folder | Hub = Folder(path)
    elif source.startswith((".", "/", "~")):
        raise UserError(f"there is no folder {source}.", USAGE)
    else:
        repository = Hub(hub_id, revision or None, endpoint=endpoint, cache=cache_dir, offline=offline)
    wishes = Wishes(file, tuple(cast("list[Pooling]", pooling or [])), normalize, max_units)
    try:
        specs = make_models(
            repository, wishes, name=name or repository.name, output=output, replace=replace, console=console
        )
    except ModelError as error:
        raise UserError(f"{str(error).strip().rstrip('.')}.") from None  # onnxruntime ends its lines
    except OSError as error:
        raise UserError(f"{error.filename or source}: {error.strerror or error}.") from None
    options = " ".join(f"--{spec.modality}-model {spec.folder}" for spec in specs)
    console.print(f"Serve it: {command_name()} up {options}", markup=False)
