"""A model run in this process, as a node would run it, and what to try it with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from embedmesh.errors import EmbedMeshError
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh.vectors import l2_norms, normalized
from embedmesh_cli.console import USAGE, UserError
from embedmesh_cli.likeness import Vectors
from embedmesh_encoder.backend import BackendOptions, create_backend
from embedmesh_encoder.model import ModelSpec
from embedmesh_encoder.preparation import KindsPreparer, Prepared

__all__ = ["LocalModel", "contents", "demo_files", "demo_texts", "read_samples"]

_DEMO: Final = Path(__file__).parent / "demo"


class LocalModel:
    """A model with the preparer and the batches of a node that was told nothing else.

    Attributes:
        preparer: Makes its inputs.
        backend: Runs its graph.
    """

    def __init__(self, spec: ModelSpec, *, lanes: int = 1) -> None:
        """Load it, to be run by so many threads at the same time; raises ModelError."""
        from embedmesh_encoder.modalities import MODALITIES, default_preparer  # noqa: PLC0415  (slow to import)

        self.preparer = default_preparer(spec)
        self._spec = spec
        self._units = MODALITIES[spec.modality].defaults(spec).batch_cost
        self.backend = create_backend(spec, BackendOptions(lanes=lanes))
        self._run = self.backend.run_beside or self.backend.run

    def batches(self, items: Sequence[Any]) -> Iterator[list[Prepared]]:
        """Prepare items and put them into batches, in order; raises UserError for one that cannot be embedded."""
        batch: list[Prepared] = []
        for number, item in enumerate(items, start=1):
            try:
                prepared = self.preparer.prepare(item, pb.TRUNCATION_END)
            except EmbedMeshError as error:
                raise UserError(f"sample {number} cannot be embedded: {error.message}.", USAGE) from None
            alike = not batch or batch[0].group == prepared.group
            if batch and (not alike or sum(each.units for each in batch) + prepared.units > self._units):
                yield batch
                batch = []
            batch.append(replace(prepared, kinds=frozenset(self._spec.kinds)))
        yield batch

    def embed(self, batch: Sequence[Prepared], *, unit: bool = True) -> NDArray[np.float32]:
        """Give the dense vectors of one batch: float32 [n, d]; without `unit` normalised only if the model's are.

        Raises:
            UserError: It makes none.
        """
        if not self._spec.dimensions:
            raise UserError(f"{self._spec.name} makes no dense vectors, and only these can be measured.", USAGE)
        outputs = self._run(self.preparer.collate(batch), [self._spec.graph.output])
        return self._dense(outputs, batch, unit=unit)

    def vectors(self, batch: Sequence[Prepared]) -> Vectors:
        """Give the vectors of one batch, of every kind that the model makes."""
        names = list(dict.fromkeys(self._spec.outputs.values()))
        outputs = self._run(self.preparer.collate(batch), names)
        dense = self._dense(outputs, batch) if self._spec.dimensions else None
        if not isinstance(self.preparer, KindsPreparer):
            return Vectors(dense)
        with np.errstate(all="ignore"):
            others = self.preparer.split_others(outputs, batch)
        return Vectors(
            dense,
            [each.sparse for each in others if each.sparse] if self._spec.sparse else None,
            [each.multi_vector for each in others if each.multi_vector is not None]
            if self._spec.multi_vector
            else None,
        )

    def _dense(
        self, outputs: Mapping[str, NDArray[Any]], batch: Sequence[Prepared], *, unit: bool = False
    ) -> NDArray[np.float32]:
        with np.errstate(all="ignore"):  # what is not finite is found later
            rows = self.preparer.split(outputs, batch)
            return normalized(rows, l2_norms(rows)) if unit or self._spec.normalized else rows

    def close(self) -> None:
        """Free what the backend holds."""
        self.backend.close()


def demo_texts() -> list[str]:
    """Give the definitions that the demo embeds."""
    return [line.partition("\t")[2] for line in (_DEMO / "wordnet.tsv").read_text(encoding="utf-8").splitlines()]


def demo_files(modality: str) -> list[bytes]:
    """Give the pictures or the spoken words that the demo embeds."""
    return contents(_DEMO / {"image": "pictures", "audio": "speech"}[modality])


def contents(folder: Path) -> list[bytes]:
    """Read the files of a folder, in the order of their names."""
    return [file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()]


def read_samples(spec: ModelSpec, path: Path | None) -> list[Any]:
    """Read what to embed: a file with a text a line, or a folder of files; texts have definitions built in."""
    from embedmesh_encoder.modalities import MODALITIES  # noqa: PLC0415  (slow to import)

    make = MODALITIES[spec.modality].item
    if spec.modality == "text":
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path else demo_texts()
        found = [make(line) for line in lines if line.strip()]
    elif path is None:
        raise UserError(f"{spec.name} is for {spec.modality}: name a folder of files with --samples.", USAGE)
    else:
        found = [make(content) for content in contents(path)]
    if not found:
        raise UserError(f"{path} holds nothing to embed.", USAGE)
    return found
