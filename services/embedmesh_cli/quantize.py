"""`embedmesh models quantize`: a smaller, faster variant of a model, and what it costs in likeness.

The variant is a model of its own: another name, family and revision, and another space unless its vectors are
as good as equal. Nothing takes it in place of the original unless somebody names it.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
import tomllib
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import typer
from rich.console import Console

from embedmesh_cli.console import FAILED, USAGE, UserError, explained, plain_console
from embedmesh_cli.local import LocalModel, read_samples
from embedmesh_encoder.model import MANIFEST, ModelSpec, load_spec, verify_files, write_manifest

__all__ = ["quantize"]

# What full precision promises: with it, vectors of both models may be compared as one space.
_EQUAL: Final = 0.9999
_LARGEST: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Likeness:
    """How alike the vectors of two models are, over samples each embedded in company and alone.

    Attributes:
        samples: How many.
        cosine_min: Least cosine between the two models' vectors of a sample.
        cosine_p1: First percentile.
        cosine_mean: Mean.
        company_min: Least cosine between the variant's own two vectors of a sample: int8 scales its
            arithmetic to the largest value of a batch, so company shows.
        time: CPU time of the variant over that of the original.
    """

    samples: int
    cosine_min: float
    cosine_p1: float
    cosine_mean: float
    company_min: float
    time: float


def quantize(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the model, in float32.")],
    *,
    precision: Annotated[
        Literal["int8", "float16"],
        typer.Option(
            metavar="int8|float16",
            help="int8: weights of the matrix products in 7 bits, about twice as fast on a CPU. float16: half the "
            "size, for GPUs; a CPU computes it in float32.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to make; beside the model, as FOLDER-int8, unless given.")
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="What to measure with: a file with a text a line, or a folder of pictures or sounds. Take what you "
            "will embed. Texts have 1,000 definitions built in.",
        ),
    ] = None,
    min_cosine: Annotated[
        float, typer.Option(metavar="X", min=0, max=1, help="Least cosine to the original that any sample may have.")
    ] = 0.95,
    force: Annotated[
        bool, typer.Option("--force", help="Keep the variant even if it is less alike than that.")
    ] = False,
) -> None:
    """Make a variant of a model in a lower precision, and measure how alike its vectors are."""
    console = plain_console()
    target = output or folder.with_name(f"{folder.resolve().name}-{precision}")
    if target.exists():
        raise UserError(f"{target} exists: remove it, or name another folder with --output.", USAGE)
    with explained(target):
        spec = load_spec(folder)
        if (spec.backend, spec.precision) != ("onnxruntime", "float32"):
            raise UserError(
                f"{spec.name} is made for {spec.backend} in {spec.precision}: quantize the original.", USAGE
            )
        verify_files(spec)
        items = read_samples(spec, samples)
        # Beside the target, so that the rename at the end stays on one disk.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
            made = Path(temporary) / target.name
            console.print(f"Converting {spec.name} to {precision}", markup=False)
            _convert(spec, precision, made)
            console.print(f"Comparing with the original on {len(items)} samples", markup=False)
            likeness = _measure(spec, load_spec(made), items)
            # Again, with what was found.
            variant = _describe(spec, precision, made, likeness)
            _report(console, spec, variant, likeness)
            if likeness.cosine_min < min_cosine and not force:
                raise UserError(
                    f"the least cosine {likeness.cosine_min:.6f} is below {min_cosine}: the variant is not kept "
                    "(--force keeps it, --min-cosine sets the limit).",
                    FAILED,
                )
            made.chmod(0o755)
            made.rename(target)
    console.print(f"Serve it by its name: embedmesh up --{spec.modality}-model {target}", markup=False)


def _report(console: Console, spec: ModelSpec, variant: ModelSpec, likeness: Likeness) -> None:
    before, after = (each.path(each.graph.file).stat().st_size / 1e6 for each in (spec, variant))
    console.print(
        f"{variant.name}@{variant.revision}: {after:.1f} MB instead of {before:.1f}, "
        f"{likeness.time:.2f} of the CPU time\n"
        f"cosine to {spec.name}@{spec.revision}: "
        f"min {likeness.cosine_min:.6f}, p1 {likeness.cosine_p1:.6f}, mean {likeness.cosine_mean:.6f}\n"
        f"cosine of the same sample in company and alone: min {likeness.company_min:.6f}\n"
        + (
            "Its vectors may be compared with the original's."
            if variant.space == spec.space
            else f"Its space is {variant.space}: do not mix its vectors with the original's in one index."
        ),
        markup=False,
    )


def _convert(spec: ModelSpec, precision: str, folder: Path) -> None:
    """Write the variant's folder, with a manifest that does not know its likeness yet."""
    import onnx  # noqa: PLC0415  (slow to import)

    graph = onnx.load(spec.path(spec.graph.file), load_external_data=False)
    weights = {entry.value for one in graph.graph.initializer for entry in one.external_data if entry.key == "location"}
    graph = onnx.load(spec.path(spec.graph.file))
    warnings_before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises a step that changes nothing for graphs like these
    try:
        converted = _to_int8(graph, spec) if precision == "int8" else _to_float16(graph)
    finally:
        logging.disable(warnings_before)
    if converted.ByteSize() > _LARGEST:
        raise UserError(f"{spec.name} would still be larger than the 2 GiB that one ONNX file can hold.")
    for file in spec.files:
        if file not in weights:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            if file == spec.graph.file:
                (folder / file).write_bytes(converted.SerializeToString(deterministic=True))
            else:
                shutil.copyfile(spec.path(file), folder / file)
    _write(spec, precision, folder, sorted(set(spec.files) - weights), space=spec.space, tables={})


def _to_int8(graph: Any, spec: ModelSpec) -> Any:
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "graph.onnx"
        quantize_dynamic(
            graph,
            file,
            # Tables of embeddings are read, not multiplied: in int8 they would cost likeness and save no time.
            op_types_to_quantize=["MatMul", "Gemm", "Attention"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            # Seven bits: with eight, sums overflow on CPUs without VNNI, silently and only there.
            reduce_range=True,
            extra_options={"MatMulConstBOnly": True},
        )
        import onnx  # noqa: PLC0415

        converted = onnx.load(file)
    if not any(node.op_type == "MatMulInteger" for node in converted.graph.node):
        raise UserError(f"{spec.name} has no products with weights that int8 would make faster.")
    return converted


def _to_float16(graph: Any) -> Any:
    from onnxruntime.transformers.float16 import convert_float_to_float16  # noqa: PLC0415

    with warnings.catch_warnings():
        # Of numbers that float16 does not have, as in the masks of attention; what it costs is measured.
        warnings.simplefilter("ignore")
        return convert_float_to_float16(graph, keep_io_types=True)


def _describe(spec: ModelSpec, precision: str, folder: Path, likeness: Likeness) -> ModelSpec:
    """Write the manifest and a README with what was measured."""
    made = load_spec(folder)
    space = spec.space if likeness.cosine_min >= _EQUAL else f"{spec.space}-{precision}"
    found = {name: round(value, 6) for name, value in asdict(likeness).items() if name != "time"}
    of = f"{spec.name}@{spec.revision}"
    variant = _write(spec, precision, folder, sorted(made.files), space=space, tables={"variant": {"of": of, **found}})
    (folder / "README.md").write_text(
        f"# {variant.name}\n\nMade by `embedmesh models quantize --precision {precision}` from {of}\n"
        f"({spec.source}, {spec.license}).\n\n"
        f"Cosine to the original's vectors on {likeness.samples} samples, each in company and alone, "
        f"by onnxruntime on a CPU: min {likeness.cosine_min:.6f}, p1 {likeness.cosine_p1:.6f}, "
        f"mean {likeness.cosine_mean:.6f}. "
        f"Cosine of the same sample in company and alone: min {likeness.company_min:.6f}.\n\n"
        f"Vectors of the space `{variant.space}`"
        + (", the original's.\n" if space == spec.space else "; not to be compared with the original's.\n"),
        encoding="utf-8",
    )
    return variant


def _write(
    spec: ModelSpec, precision: str, folder: Path, files: Sequence[str], *, space: str, tables: dict[str, Any]
) -> ModelSpec:
    manifest = tomllib.loads(spec.path(MANIFEST).read_text(encoding="utf-8"))
    name = f"{spec.name}-{precision}"
    changes = {"name": name, "family": name, "space": space, "precision": precision, **tables}
    kept = {key: value for key, value in manifest.items() if key not in ("format", "files")}
    return write_manifest(folder, kept | changes, files)


def _measure(spec: ModelSpec, variant: ModelSpec, items: Sequence[Any]) -> Likeness:
    """Embed the samples with both models, in batches that take turns."""
    both = LocalModel(spec), LocalModel(variant)
    cosines: list[float] = []
    company: list[float] = []
    seconds = [0.0, 0.0]
    for batch in both[0].batches(items):
        vectors = []
        for which, model in enumerate(both):
            started = time.process_time()
            vectors.append(model.embed(batch))
            seconds[which] += time.process_time() - started
        reference, together = vectors
        alone = np.concatenate([both[1].embed([each]) for each in batch])
        for ours in (together, alone):
            cosines += (ours * reference).sum(axis=1).tolist()
        company += (together * alone).sum(axis=1).tolist()
    for model in both:
        model.close()
    if not np.isfinite(cosines).all():
        raise UserError(f"some vectors of {variant.name} are not finite: this model cannot do without float32.")
    return Likeness(
        samples=len(company),
        cosine_min=min(cosines),
        cosine_p1=float(np.quantile(cosines, 0.01)),
        cosine_mean=float(np.mean(cosines)),
        company_min=min(company),
        time=seconds[1] / seconds[0],
    )
