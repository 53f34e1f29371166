"""What `embedmesh models pull` and `embedmesh models export` ask for alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, cast, get_args

import typer

from embedmesh_cli.console import USAGE, UserError, read_kinds
from embedmesh_encoder.pooling import Pooling

if TYPE_CHECKING:
    from embedmesh_cli.pull.recipe import Wishes

__all__ = [
    "CacheDir",
    "Endpoint",
    "Kinds",
    "MaxUnits",
    "Name",
    "Normalize",
    "Offline",
    "Output",
    "PoolingWays",
    "Replace",
    "Source",
    "read_wishes",
]


_SPLADE: Final = "splade"


def _ways(wanted: list[str] | None) -> list[str] | None:
    known = (*get_args(Pooling), _SPLADE)
    if unknown := [way for way in wanted or () if way not in known]:
        raise UserError(f"--pooling {unknown[0]} is none of {', '.join(known)}.", USAGE)
    if wanted and _SPLADE in wanted and len(wanted) > 1:
        raise UserError("--pooling splade gives a sparse vector, which is joined with no other.", USAGE)
    return wanted


def read_wishes(
    *,
    file: str | None = None,
    pooling: Sequence[str] | None,
    normalize: bool | None,
    max_units: int | None,
    kinds: str | None = None,
) -> Wishes:
    """Put options together."""
    from embedmesh_cli.pull.recipe import Wishes  # noqa: PLC0415  (slow to import, and only few commands need it)

    splade = pooling is not None and _SPLADE in pooling
    ways = () if splade else tuple(cast("Sequence[Pooling]", pooling or ()))
    return Wishes(file, ways, normalize, max_units, splade, read_kinds(kinds) if kinds else ())


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
        "weightedmean or last; repeat to join several. Or splade, for a sparse vector of a masked-language model.",
        callback=_ways,
    ),
]
Kinds = Annotated[
    str | None,
    typer.Option(
        metavar="KIND[,...]",
        help="Kinds of vector to make of one forward pass: dense, sparse, multi_vector; those that the repository has "
        "heads for unless given. multi_vector without a head is the last hidden state of each token.",
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
