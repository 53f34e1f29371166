"""`embedmesh models`: what is on this machine, and what a mesh serves."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from embedmesh.client import Client
from embedmesh.errors import EmbedMeshError
from embedmesh_cli.console import explain
from embedmesh_cli.quantize import quantize
from embedmesh_cli.starter import TOWERS, StarterError, cache_folder, starter_tower
from embedmesh_encoder.model import ModelError, find_models

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.command("quantize")(quantize)


@dataclass(frozen=True)
class _Row:
    """A model, wherever it is."""

    name: str
    revision: str
    space: str
    modality: str
    dimensions: int
    state: str
    where: str


@app.callback()
def _root() -> None:
    """Models on this machine and in a mesh."""


@app.command("list")
def list_models(
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="List what the mesh or encoder at this host:port serves, instead of this machine's folder.",
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of models, instead of the cache folder and the starter models."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List models: name, revision, space, width, state.

    The revision changes with everything that changes a vector. Vectors may be compared if and only if
    their space is equal.
    """
    folders = [folder] if folder else [cache_folder() / "models", *_towers()]
    rows = _served(address) if address else _local(folders)
    if as_json:
        for row in rows:
            sys.stdout.write(json.dumps(asdict(row)) + "\n")
        return
    if not rows:
        where = f"at {address}" if address else f"in {folders[0]}"
        sys.stdout.write(f"No models {where}. `embedmesh up` makes the starter text model on first use.\n")
        return
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("name", "revision", "space", "modality", "dims", "state", "where"):
        table.add_column(column, overflow="fold", no_wrap=column != "state")
    for row in rows:
        table.add_row(row.name, row.revision, row.space, row.modality, str(row.dimensions), row.state, row.where)
    console = Console()
    if not console.is_terminal:
        # For `grep` and `cut`: never wrap.
        console = Console(width=1000)
    console.print(table)


def _towers() -> list[Path]:
    """The starter models that came with this package, where they are at hand."""
    found = []
    for modality in TOWERS:
        with suppress(StarterError):
            found.append(starter_tower(modality))
    return found


def _local(folders: list[Path]) -> list[_Row]:
    rows = []
    for path, spec in find_models(folders).items():
        if isinstance(spec, ModelError):
            rows.append(_Row(path.name, "", "", "", 0, f"unusable: {spec}", str(path)))
        else:
            rows.append(
                _Row(spec.name, spec.revision, spec.space, spec.modality, spec.dimensions, "on disk", str(path))
            )
    return rows


def _served(address: str) -> list[_Row]:
    try:
        with Client(address) as client:
            infos = client.list_models()
    except EmbedMeshError as error:
        raise explain(error, address) from None
    return [
        _Row(
            info.name,
            info.revision,
            info.space,
            info.modality,
            info.dimensions,
            ("ready" if info.ready else "not ready") + (", default" if info.is_default else ""),
            address,
        )
        for info in infos
    ]
