"""Whether an exported graph, run as a node runs it, gives what torch gives of the same inputs, one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from embedmesh_cli.console import UserError
from embedmesh_cli.local import LocalModel, demo_files, demo_texts
from embedmesh_encoder.image import ImageItem
from embedmesh_encoder.modalities import MODALITIES
from embedmesh_encoder.model import ModelSpec
from embedmesh_encoder.preparation import Prepared

__all__ = ["LEAST_COSINE", "MOST_COMPANY", "Reference", "compare"]

Float32 = NDArray[np.float32]
# Of one prepared input: its vector by torch, float32 [1, d], not normalised.
Reference = Callable[[ModelSpec, Prepared], Float32]

LEAST_COSINE: Final = 0.9999
# Of an element of a normalised vector, alone and in company.
MOST_COMPANY: Final = 1e-5
_MOST_FILES: Final = 6


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found.

    Attributes:
        samples: How many inputs.
        units: Of the shortest and of the longest.
        cosine: The worst.
        company: Largest difference of an element, alone and in company.
    """

    samples: int
    units: tuple[int, int]
    cosine: float
    company: float


def compare(spec: ModelSpec, reference: Reference) -> Comparison:
    """Compare a model with its reference.

    Raises:
        UserError: They differ, or a vector depends on its company.
        ModelError: The model cannot be loaded.
    """
    model = LocalModel(spec)
    try:
        batches = list(model.batches(_samples(spec)))
        together = np.concatenate([model.embed(batch) for batch in batches])
        inputs = [prepared for batch in batches for prepared in batch]
        alone = np.concatenate([model.embed([prepared]) for prepared in inputs])
    finally:
        model.close()
    theirs = np.concatenate([reference(spec, prepared) for prepared in inputs]).astype(np.float64)
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    cosines = [float(np.einsum("nd,nd->n", ours, theirs).min()) for ours in (together, alone)]
    found = Comparison(
        len(inputs),
        (min(each.units for each in inputs), max(each.units for each in inputs)),
        min(cosines),
        float(np.abs(together - alone).max()),
    )
    # So that numbers which are not finite fail, too.
    if not min(cosines) >= LEAST_COSINE or not max(cosines) >= LEAST_COSINE:
        raise UserError(
            f"the exported graph gives other vectors than torch (worst cosine {found.cosine:.6f}, at least "
            f"{LEAST_COSINE} is wanted): nothing was kept."
        )
    if not found.company <= MOST_COMPANY:
        raise UserError(
            f"the exported graph gives vectors that depend on what else is in their batch (by {found.company:.1e}): "
            "nothing was kept."
        )
    return found


def _samples(spec: ModelSpec) -> Sequence[Any]:
    make = MODALITIES[spec.modality].item
    if spec.modality == "text":
        return [make(text) for text in _texts()]
    files = demo_files(spec.modality)[:_MOST_FILES]
    if spec.text:
        return [ImageItem(content, text) for content, text in zip(files, ["", *_texts()], strict=False)]
    return [make(content) for content in files]


def _texts() -> list[str]:
    """Give texts from a letter to some five hundred tokens, short and long ones in turn."""
    lines = demo_texts()
    lengths = (1, 40, 1, 3, 1, 15, 1, 7, 2)
    return [
        "a",
        *(" ".join(lines[40 * at : 40 * at + length]) for at, length in enumerate(lengths)),
        "東京は首都です。",
    ]
