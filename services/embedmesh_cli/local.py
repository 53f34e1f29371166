"""A model run in this process, as a node would run it, and what to try it with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from embedmesh.errors import EmbedMeshError
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh.vectors import l2_norms, normalized
from embedmesh_cli.console import USAGE, UserError
from embedmesh_encoder.backend import create_backend
from embedmesh_encoder.model import ModelSpec
from embedmesh_encoder.preparation import Prepared

__all__ = ["DEFINITIONS", "LocalModel", "read_samples"]

DEFINITIONS: Final = Path(__file__).parent / "demo" / "wordnet.tsv"


class LocalModel:
    """A model with the preparer and the batches of a node that was told nothing else."""

    def __init__(self, spec: ModelSpec) -> None:
        """Load it; raises ModelError, and UserError for one that makes no dense vectors."""
        from embedmesh_encoder.modalities import MODALITIES, default_preparer  # noqa: PLC0415  (slow to import)

        if not spec.dimensions:
            raise UserError(f"{spec.name} makes no dense vectors, and only these can be looked at yet.", USAGE)
        self._preparer = default_preparer(spec)
        self._output = spec.graph.output
        self._units = MODALITIES[spec.modality].defaults(spec).batch_cost
        self._normalized = spec.normalized
        self._backend = create_backend(spec)

    def batches(self, items: Sequence[Any]) -> Iterator[list[Prepared]]:
        """Prepare items and put them into batches, in order; raises UserError for one that cannot be embedded."""
        batch: list[Prepared] = []
        for number, item in enumerate(items, start=1):
            try:
                prepared = self._preparer.prepare(item, pb.TRUNCATION_END)
            except EmbedMeshError as error:
                raise UserError(f"sample {number} cannot be embedded: {error.message}.", USAGE) from None
            alike = not batch or batch[0].group == prepared.group
            if batch and (not alike or sum(each.units for each in batch) + prepared.units > self._units):
                yield batch
                batch = []
            batch.append(prepared)
        yield batch

    def embed(self, batch: Sequence[Prepared], *, unit: bool = True) -> NDArray[np.float32]:
        """Give the vectors of one batch: float32 [n, dimensions]; without `unit` normalised only if the model's are."""
        with np.errstate(all="ignore"):  # what is not finite is found later
            rows = self._preparer.split(self._backend.run(self._preparer.collate(batch), [self._output]), batch)
            vectors: NDArray[np.float32] = normalized(rows, l2_norms(rows))
        return vectors if unit or self._normalized else rows

    def close(self) -> None:
        """Free what the backend holds."""
        self._backend.close()


def read_samples(spec: ModelSpec, path: Path | None) -> list[Any]:
    """Read what to embed: a file with a text a line, or a folder of files; texts have definitions built in."""
    from embedmesh_encoder.modalities import MODALITIES  # noqa: PLC0415  (slow to import)

    make = MODALITIES[spec.modality].item
    if spec.modality == "text":
        if path is None:
            lines = [
                line.split("\t")[1] for line in DEFINITIONS.read_text(encoding="utf-8").splitlines() if "\t" in line
            ]
        else:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [make(line) for line in lines if line.strip()]
    elif path is None:
        raise UserError(f"{spec.name} is for {spec.modality}: name a folder of files with --samples.", USAGE)
    else:
        found = [make(file.read_bytes()) for file in sorted(path.iterdir()) if file.is_file()]
    if not found:
        raise UserError(f"{path} holds nothing to measure with.", USAGE)
    return found
