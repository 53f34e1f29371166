"""`embedmesh models whiten`: a model whose vectors are whitened on texts of its user's.

Whitening is that of Su et al. ("Whitening Sentence Representations for Better Semantics and Faster Retrieval", 2021):
of the vectors of many texts the mean m and the covariance U S U^T are taken, and a vector x becomes (x - m) U S^(-1/2),
of which the first numbers are the directions in which the texts differ most. It is one dense layer of the head, so that
the new model is served as any other. It is fitted before normalisation, as the paper does.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import save

from embedmesh_cli.console import USAGE, UserError, explained, plain_console
from embedmesh_cli.home import find_model
from embedmesh_cli.local import LocalModel, read_samples
from embedmesh_encoder.model import MANIFEST, ModelSpec, verify_files, write_manifest

__all__ = ["whiten"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_FILE: Final = "whitening.safetensors"
# Of the mean squared length of vectors: in directions of less variance, float32 holds little but rounding.
_LEAST_VARIANCE: Final = 1e-8
# Of a model's dimensions; texts that differ in fewer directions are too much alike.
_MOST_DIRECTIONS: Final = 0.9
_SMALLEST_WIDTH: Final = 32


def whiten(
    model: Annotated[str, typer.Argument(metavar="NAME|FOLDER", help="Name of a text model at hand, or its folder.")],
    *,
    file: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            help="Texts to fit it on, one a line: such as will be embedded, and many times as many as dimensions.",
        ),
    ],
    dimensions: Annotated[
        int | None,
        typer.Option(
            metavar="K", min=1, help="Keep the K dimensions of most variance; all that have any unless given."
        ),
    ] = None,
    normalize: Annotated[
        bool,
        typer.Option(
            "--normalize/--no-normalize", help="Whether the whitened vectors are normalised, as the paper's are."
        ),
    ] = True,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name to serve it under; the model's with -whitened unless given."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to make; beside the model, as FOLDER-whitened, unless given."),
    ] = None,
) -> None:
    """Make a model whose vectors are those of another, whitened: centred, and of equal variance in all directions.

    A model of its own, with a space of its own: what was embedded with the original must be embedded anew.
    """
    console = plain_console()
    spec = find_model(model)
    suffix = "-whitened" + (f"-{dimensions}" if dimensions else "")
    target = output or spec.folder.with_name(f"{spec.folder.resolve().name}{suffix}")
    if target.exists():
        raise UserError(f"{target} exists: remove it, or name another folder with --output.", USAGE)
    if spec.modality != "text" or not spec.dimensions:
        raise UserError(f"{spec.name} makes no dense vectors of texts, and only these can be whitened.", USAGE)
    if spec.whitening:
        raise UserError(f"{spec.name} is whitened already: whiten {spec.whitening.of}.", USAGE)
    width = dimensions or spec.dimensions
    if width > spec.dimensions:
        raise UserError(
            f"{spec.name} gives {spec.dimensions} numbers, of which --dimensions cannot keep {width}.", USAGE
        )
    with explained(file):
        verify_files(spec)
        texts = read_samples(spec, file)
        if len(texts) <= width:
            raise UserError(
                f"{file} holds {len(texts)} texts, and {width} dimensions need more than that, better many times as "
                "many: give more texts, or keep fewer dimensions with --dimensions.",
                USAGE,
            )
        weights = fit(_vectors(spec, texts, console), dimensions)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the rename at the end stays on one disk.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
            made = Path(temporary) / target.name
            whitened = _write(spec, weights, made, name or f"{spec.name}{suffix}", len(texts), normalize=normalize)
            made.chmod(0o755)
            made.rename(target)
    console.print(
        f"{whitened.name}@{whitened.revision} is in {target}: {whitened.dimensions} numbers of {spec.dimensions}\n"
        f"Its space is {whitened.space}: do not mix its vectors with the original's in one index.\n"
        f"Serve it by its name: embedmesh up --text-model {target}",
        markup=False,
    )


def fit(batches: Iterable[Float32], width: int | None) -> dict[str, Float32]:
    """Fit a whitening to vectors [n, d] in batches; gives the weights of a dense layer d -> `width`.

    Without a width all directions are kept in which the vectors differ: a few are always missing, since a layer norm
    takes one and models leave others as good as unused.

    Raises:
        UserError: They do not differ in so many directions.
    """
    count, mean, scatter = 0, np.zeros(0), np.zeros((0, 0))
    for batch in batches:
        vectors = batch.astype(np.float64)
        # Chan et al.: from mean and scatter of two parts to those of both, however far they are from 0.
        part = vectors.mean(axis=0)
        if not count:
            mean, scatter = np.zeros_like(part), np.zeros((len(part), len(part)))
        shift = part - mean
        both = count + len(vectors)
        scatter += (vectors - part).T @ (vectors - part) + np.outer(shift, shift) * (count * len(vectors) / both)
        mean += shift * (len(vectors) / both)
        count = both
    directions, variances, _ = np.linalg.svd(scatter / (count - 1))
    enough = int((variances > _LEAST_VARIANCE * (variances.sum() + mean @ mean)).sum())
    if width is None:
        width = max(enough, math.ceil(_MOST_DIRECTIONS * len(mean)))
    if enough < width:
        raise UserError(
            f"the vectors of these texts differ in {enough} directions, of which {width} cannot be made: give more and "
            f"other texts{f', or keep fewer dimensions with --dimensions {enough}' if enough else ''}."
        )
    kernel: Float64 = directions[:, :width] / np.sqrt(variances[:width])
    return {
        "linear.weight": np.ascontiguousarray(kernel.T, np.float32),
        "linear.bias": (-mean @ kernel).astype(np.float32),
    }


def _vectors(spec: ModelSpec, texts: list[Any], console: Console) -> Iterable[Float32]:
    """Give the vectors of texts as they come to the head's end, in batches of one text or more."""
    console.print(f"Embedding {len(texts)} texts with {spec.name}@{spec.revision}", markup=False)
    model = LocalModel(spec.model_copy(update={"normalized": False}))
    done = 0
    try:
        with console.status("Embedding") as status:
            for batch in model.batches(texts):
                vectors = model.embed(batch, unit=False)
                if not np.isfinite(vectors).all():
                    raise UserError(
                        f"{spec.name} gives numbers that are not finite for texts {done + 1} and following."
                    )
                yield vectors
                done += len(batch)
                status.update(f"Embedding: {math.floor(100 * done / len(texts))} %")
    finally:
        model.close()


def _write(
    spec: ModelSpec, weights: dict[str, Float32], folder: Path, name: str, count: int, *, normalize: bool
) -> ModelSpec:
    """Write the new model's folder: all that the original reads, and one layer more."""
    for file in spec.files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(spec.path(file), folder / file)
    content = save(weights)
    (folder / _FILE).write_bytes(content)
    manifest = tomllib.loads(spec.path(MANIFEST).read_text(encoding="utf-8"))
    width = len(weights["linear.bias"])
    layer = {"kind": "dense", "file": _FILE, "inputs": spec.dimensions, "outputs": width}
    changes = {
        "name": name,
        "family": name,
        "space": f"{spec.space}-whitened-{hashlib.sha256(content).hexdigest()[:8]}",
        "dimensions": width,
        # The first numbers are those of a whitening to fewer dimensions: the paper's way to shorter vectors.
        "truncatable_dimensions": [size for size in (2**n for n in range(16)) if _SMALLEST_WIDTH <= size < width],
        "normalized": normalize,
        "head": {"layers": [*manifest.get("head", {}).get("layers", []), layer]},
        "whitening": {"of": f"{spec.name}@{spec.revision}", "texts": count},
    }
    kept = {key: value for key, value in manifest.items() if key not in ("format", "files", "variant")}
    return write_manifest(folder, kept | changes, [*spec.files, _FILE])
