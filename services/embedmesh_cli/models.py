"""`embedmesh models`: what is on this machine, and what a mesh serves."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from embedmesh.client import Client
from embedmesh.errors import EmbedMeshError
from embedmesh_cli.connection import credentials
from embedmesh_cli.console import USAGE, UserError, explain
from embedmesh_cli.export import export
from embedmesh_cli.home import find_model, model_folders, models_home
from embedmesh_cli.pull import pull
from embedmesh_cli.quantize import quantize
from embedmesh_cli.verify import verify
from embedmesh_cli.whiten import whiten
from embedmesh_encoder.model import ModelError, ModelSpec, find_models

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.command("pull")(pull)
app.command("export")(export)
app.command("verify")(verify)
app.command("quantize")(quantize)
app.command("whiten")(whiten)


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
    folders = [folder] if folder else model_folders()
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


@app.command("show")
def show_model(
    model: Annotated[str, typer.Argument(metavar="NAME|FOLDER", help="Name of a model at hand, or its folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="The manifest as one JSON object.")] = False,
) -> None:
    """Show what a model is, reads and gives."""
    spec = find_model(model)
    if as_json:
        table = spec.model_dump(mode="json", exclude={"files", "kinds"})
        table |= {"kinds": list(spec.kind_names), "files": dict(spec.files), "revision": spec.revision}
        sys.stdout.write(json.dumps(table) + "\n")
        return
    for title, text in _description(spec):
        sys.stdout.write(f"{title:12}{text}\n")


@app.command("remove")
def remove_model(
    model: Annotated[str, typer.Argument(metavar="NAME|FOLDER", help="Name of a pulled model, or its folder.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a model from the folder of models; what lies elsewhere is never touched."""
    home = models_home()
    spec = find_model(model)
    # Not resolved: a link in the folder of models is removed, not what it leads to.
    folder = next((each for each in find_models([home]) if each.samefile(spec.folder) and each != home), None)
    if folder is None:
        raise UserError(f"{spec.folder} is not in {home}: remove it yourself, if nobody serves it.", USAGE)
    if not yes:
        if not sys.stdin.isatty():
            raise UserError(f"say --yes to remove {folder} without being asked.", USAGE)
        typer.confirm(f"Remove {spec.name}@{spec.revision} in {folder}?", abort=True)
    try:
        if folder.is_symlink():
            folder.unlink()
        else:
            # Out of sight first, so that nobody finds half a model.
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=home) as temporary:
                folder.rename(Path(temporary) / folder.name)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}.") from None
    sys.stdout.write(f"Removed {folder}\n")


def _description(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """Give what people want to know of a model, line by line."""
    graph = spec.graph
    yield "name", spec.name
    yield "revision", spec.revision
    yield "space", f"{spec.space} (vectors may be compared only within it)"
    if spec.family != spec.name:
        yield "family", spec.family
    yield from zip(("gives", "", ""), _gives(spec), strict=False)
    yield from zip(("reads", "", "", "", ""), _reads(spec), strict=False)
    ways = graph.pooling if isinstance(graph.pooling, str) else " and ".join(graph.pooling)
    pooled = ("; pooled by the graph" if ways == "graph" else f"; pooled here: {ways}") if spec.dimensions else ""
    outputs = ", ".join(dict.fromkeys(spec.outputs.values()))
    yield "graph", f"{graph.file or 'none'} ({graph.layout}; {', '.join(graph.inputs)} -> {outputs}{pooled})"
    for layer in spec.head.layers if spec.head else ():
        kind = layer.kind.replace("_", " ") + (f", {layer.activation}" if layer.activation != "none" else "")
        file = f" ({layer.file})" if layer.file else ""
        yield "", f"then {kind}: {layer.inputs} -> {layer.outputs}{file}"
    if spec.layers:
        states = " and ".join(map(str, spec.layers.averaged))
        mean = f"; the mean of hidden states {states} is pooled" if states else ""
        yield "layers", f"{spec.layers.kept} of {spec.layers.of}{mean}"
    yield "runs", f"{spec.backend}, {spec.precision}, unless a node is told otherwise"
    if spec.whitening:
        yield "made from", f"{spec.whitening.of}, whitened on {spec.whitening.texts} texts"
    if spec.variant:
        yield "made from", f"{spec.variant.of} (least cosine of {spec.variant.samples}: {spec.variant.cosine_min})"
    yield "licence", spec.license
    yield "source", spec.source
    yield "files", f"{len(spec.files)}, {spec.file_bytes / 1e6:.1f} MB in {spec.folder}"
    for file, digest in spec.files.items():
        yield "", f"{digest[:12]}  {file}"


def _reads(spec: ModelSpec) -> Iterator[str]:
    """Say what it takes, and what stands around texts."""
    text = spec.text
    units = {"text": "tokens", "image": "patches", "audio": "frames"}[spec.modality]
    if spec.modality == "image" and text:
        yield f"image with text, up to {spec.max_input_units} tokens, {text.image_tokens} of them for the picture"
    else:
        yield f"{spec.modality}, up to {spec.max_input_units} {units}"
    if text and text.template:
        yield f"in the template {text.template!r}"
    for role, prompt in text.prompts.model_dump().items() if text else ():
        if prompt:
            yield f"before texts {'without a role' if role == 'default' else f'of role {role}'}: {prompt!r}"


def _gives(spec: ModelSpec) -> Iterator[str]:
    """Say what each kind of vector is."""
    if spec.dimensions:
        widths = ", ".join(map(str, spec.truncatable_dimensions))
        shorter = f"; may be cut to {widths}" if widths else ""
        yield f"{spec.dimensions} numbers{', normalised' if spec.normalized else ', not normalised'}{shorter}"
    if sparse := spec.sparse:
        made = {"max": "SPLADE", "tokens": "lexical weights of its tokens", "graph": "pooled by the graph"}
        yield f"sparse: {made[sparse.pooling]}, over a vocabulary of {sparse.dimensions}"
    if rows := spec.multi_vector:
        yield f"multi-vector: {rows.dimensions} numbers a token, {'' if rows.normalized else 'not '}normalised"


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
        with Client(address, **credentials()) as client:
            infos = client.list_models()
    except EmbedMeshError as error:
        raise explain(error, address) from None
    except ValueError as error:
        raise UserError(f"{error}.", USAGE) from None
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
