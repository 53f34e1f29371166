"""From what a repository holds to model folders, whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from huggingface_hub import metadata_load
from rich.console import Console

from embedmesh_cli.console import USAGE, UserError
from embedmesh_cli.home import models_home
from embedmesh_cli.local import LocalModel
from embedmesh_cli.pull.recipe import Pipeline, Wishes, find_towers
from embedmesh_cli.pull.repository import Hub, Repository
from embedmesh_encoder.modalities import MODALITIES
from embedmesh_encoder.model import ModelError, ModelSpec, load_spec, write_manifest

__all__ = ["make_models"]

_UNKNOWN: Final = "unknown"
_LARGE: Final = 1 << 20


def make_models(
    repository: Repository,
    wishes: Wishes,
    *,
    name: str,
    output: Path | None,
    replace: bool,
    console: Console,
    weights: Sequence[str] = (),
    suffix: str = "",
    tables: Mapping[str, Any] | None = None,
    check: Callable[[ModelSpec], None] | None = None,
    pipeline: Pipeline | None = None,
) -> list[ModelSpec]:
    """Make a model folder of each tower that a repository holds, and see that it embeds.

    Args:
        repository: Where the files are.
        wishes: What its caller says of it.
        name: Name to serve it under; of several towers, their family.
        output: Folder to make, with the modality added where there are several; in the folder of models unless given.
        replace: Whether to take the place of a model that is there.
        console: Told what is done.
        weights: Files that tell the space, where it is not those that the models read.
        suffix: What more than these tells name and space, and the folder unless it is given.
        tables: More of the manifests.
        pipeline: How its one text model works, where that is known.
        check: Sees to each model before its folder appears; what it raises ends it all.

    Raises:
        UserError: There is nothing that can be served exactly, it cannot be had, or its place is taken.
        ModelError: It does not embed.
        OSError: It cannot be written.
    """
    console.print(f"Reading {repository.source}", markup=False)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", name):
        raise UserError(
            f'"{name}" cannot be the name of a model (letters, digits and . _ - /): give one with --name.', USAGE
        )
    towers = find_towers(repository, wishes, pipeline)
    files = sorted({file for tower in towers for file in tower.files})
    identity = {
        "family": f"{name}{suffix}",
        "space": f"{name}-{_fingerprint(repository.fetch(weights or files), weights or files)}{suffix}",
        "license": _license(repository),
        "source": repository.source,
        "backend": "onnxruntime",
    }
    target = output or models_home() / f"{name.replace('/', '--')}{suffix}"
    places: list[tuple[ModelSpec, Path]] = []
    with ExitStack() as stack:
        for tower in towers:
            which = f"-{tower.modality}" if len(towers) > 1 else ""
            place = target.with_name(f"{target.name}{which}")
            console.print(f"Taking {tower.graph.file} ({tower.modality}, {tower.graph.precision})", markup=False)
            for note in tower.notes:
                console.print(f"  {note}", markup=False)
            place.parent.mkdir(parents=True, exist_ok=True)
            # Beside the target, so that the rename at the end stays on one disk.
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent))
            made = Path(temporary) / place.name
            _copy(repository, tower.files, made)
            manifest = {"name": f"{name}{suffix}{which}", **identity, **tower.manifest, **(tables or {})}
            spec = write_manifest(made, manifest, tower.files)
            _prove(spec)
            if check:
                check(spec)
            places.append((spec, place))
        # Only now, so that of several towers all come or none.
        for spec, place in places:
            _vacate(place, spec, replace=replace)
        for spec, place in places:
            if not place.exists():
                spec.folder.chmod(0o755)
                spec.folder.rename(place)
            console.print(f"{spec.name}@{spec.revision} is in {place}", markup=False)
    return [load_spec(place) for _, place in places]


def _fingerprint(folder: Path, files: Sequence[str]) -> str:
    """Tell spaces of different weights apart; another model card, or another prompt, changes nothing."""
    digest = hashlib.sha256()
    for file in files:
        if not file.endswith(".json"):
            with (folder / file).open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:8]


def _license(repository: Repository) -> str:
    """Read the licence out of the model card."""
    if "README.md" not in repository.files:
        return _UNKNOWN
    try:
        card = metadata_load(repository.fetch(["README.md"]) / "README.md") or {}
    except Exception:  # noqa: BLE001  (a card is written for people, and may hold anything)
        return _UNKNOWN
    license_ = card.get("license")
    return license_ if isinstance(license_, str) else _UNKNOWN


def _copy(repository: Repository, files: Sequence[str], folder: Path) -> None:
    """Put files into a model's folder; large ones of the Hub's cache, which nobody edits, are not stored twice."""
    lie = repository.fetch(files)
    for file in files:
        source, place = (lie / file).resolve(), folder / file
        place.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(repository, Hub) and source.stat().st_size >= _LARGE:
            with suppress(OSError):  # another disk, or one that cannot
                os.link(source, place)
                continue
        shutil.copyfile(source, place)


def _prove(spec: ModelSpec) -> None:
    """See that the model loads and embeds; raises ModelError."""
    modality = MODALITIES[spec.modality]
    model = LocalModel(spec)
    try:
        batch = next(model.batches(modality.warm(spec, modality.defaults(spec))[:1]))
        vectors = model.vectors(batch)
    except (UserError, ModelError):
        raise
    except Exception as error:  # noqa: BLE001  (a graph may fail in any way)
        raise ModelError(f'model "{spec.name}" is loaded but cannot embed: {error}') from None
    finally:
        model.close()
    if vectors.dense is not None and vectors.dense.shape != (1, spec.dimensions):
        raise ModelError(
            f'model "{spec.name}" gives {vectors.dense.shape[-1]} numbers, {spec.dimensions} were expected'
        )
    if not vectors.finite().all():
        raise ModelError(f'model "{spec.name}" gives numbers that are not finite')


def _vacate(place: Path, spec: ModelSpec, *, replace: bool) -> None:
    """See that a new model can go to its place; what it takes the place of goes with the temporary folder."""
    if not place.exists():
        return
    try:
        old: ModelSpec | None = load_spec(place)
    except ModelError:
        old = None
    if old and (old.name, old.revision, old.source) == (spec.name, spec.revision, spec.source):
        return
    if not replace:
        what = f"{old.name}@{old.revision} from {old.source}" if old else "something else"
        raise UserError(f"{place} holds {what}: --replace takes its place, --output DIR keeps both.", USAGE)
    place.rename(spec.folder.with_name(f"{spec.folder.name}.old"))
