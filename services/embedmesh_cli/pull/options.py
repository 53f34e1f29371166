"""What `embedmesh models pull` and `embedmesh models export` ask for alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from embedmesh_cli.console import USAGE, UserError
from embedmesh_encoder.pooling import Pooling

__all__ = [
    "CacheDir",
    "Endpoint",
    "MaxUnits",
    "Name",
    "Normalize",
    "Offline",
    "Output",
    "PoolingWays",
    "Replace",
    "Source",
]


def _ways(wanted: list[str] | None) -> list[str] | None:
    if unknown := [way for way in wanted or () if way not in get_args(Pooling)]:
        raise UserError(f"--pooling {unknown[0]} is none of {', '.join(get_args(Pooling))}.", USAGE)
    return wanted


Source = Annotated[
    str,
    typer.Argument(
        metavar="MODEL[@REVISION]|FOLDER",
        help="Id of a model on the Hugging Face Hub, such as sentence-transformers/all-MiniLM-L6-v2, with a "
        "branch, tag or commit after @ if not the default; or a folder with such a repository.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder to make, in place of one in the folder of models. A repository of several towers makes "
        "DIR-text, DIR-image, DIR-audio.",
    ),
]
Name = Annotated[
    str | None, typer.Option(metavar="NAME", help="Name to serve it under; the id or the folder's unless given.")
]
PoolingWays = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WAY",
        help="For repositories that do not say how tokens become one vector: mean, cls, max, mean_sqrt_len, "
        "weightedmean or last; repeat to join several.",
        callback=_ways,
    ),
]
Normalize = Annotated[
    bool | None,
    typer.Option("--normalize/--no-normalize", help="Likewise: whether its vectors are normalised."),
]
MaxUnits = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Likewise: the longest input, or less than it could read.")
]
Endpoint = Annotated[str | None, typer.Option(metavar="URL", help="Address of the Hub; HF_ENDPOINT unless given.")]
CacheDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Cache of downloads; HF_HUB_CACHE or huggingface_hub's own unless given."),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Take what is in the cache and ask nobody, as HF_HUB_OFFLINE=1 does.")
]
Replace = Annotated[bool, typer.Option("--replace", help="Take the place of a model that was made there before.")]
