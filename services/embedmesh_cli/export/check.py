"""Whether an exported graph, run as a node runs it, gives what torch gives of the same inputs, one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from embedmesh.v1 import text_pb2
from embedmesh_cli.console import UserError
from embedmesh_cli.likeness import LEAST_COSINE, MOST_APART, Vectors, join
from embedmesh_cli.likeness import compare as compare_vectors
from embedmesh_cli.local import LocalModel, demo_files, demo_texts
from embedmesh_encoder.image import ImageItem
from embedmesh_encoder.modalities import MODALITIES
from embedmesh_encoder.model import ModelSpec
from embedmesh_encoder.preparation import Prepared
from embedmesh_encoder.text import TextItem

__all__ = ["Comparison", "Reference", "compare"]

# Of one prepared input: its vectors by torch; dense ones and rows need not be normalised.
Reference = Callable[[ModelSpec, Prepared], Vectors]

_MOST_FILES: Final = 6


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found of one kind of vector.

    Attributes:
        kind: Of vector.
        samples: How many inputs.
        units: Of the shortest and of the longest.
        cosine: The worst.
        company: Largest difference of an element, alone and in company.
    """

    kind: str
    samples: int
    units: tuple[int, int]
    cosine: float
    company: float


def compare(spec: ModelSpec, reference: Reference) -> list[Comparison]:
    """Compare a model with its reference.

    Raises:
        UserError: They differ, or a vector depends on its company.
        ModelError: The model cannot be loaded.
    """
    model = LocalModel(spec)
    try:
        batches = list(model.batches(_samples(spec)))
        together = join([model.vectors(batch) for batch in batches])
        inputs = [prepared for batch in batches for prepared in batch]
        alone = join([model.vectors([prepared]) for prepared in inputs])
    finally:
        model.close()
    theirs = join([reference(spec, prepared) for prepared in inputs])
    units = [each.units for each in inputs]
    found = []
    for likeness, single, company in zip(
        compare_vectors(together, theirs), compare_vectors(alone, theirs), compare_vectors(alone, together), strict=True
    ):
        kind, cosines = likeness.kind, [float(each.cosines.min()) for each in (likeness, single)]
        what = f"other {kind.replace('_', '-')} vectors than torch" if kind != "dense" else "other vectors than torch"
        if likeness.problem:
            raise UserError(f"the exported graph gives {what} ({likeness.problem}): nothing was kept.")
        # So that numbers which are not finite fail, too.
        if not min(cosines) >= LEAST_COSINE or not max(cosines) >= LEAST_COSINE:
            raise UserError(
                f"the exported graph gives {what} (worst cosine {min(cosines):.6f}, at least {LEAST_COSINE} is "
                "wanted): nothing was kept."
            )
        if not company.apart <= MOST_APART[kind]:
            raise UserError(
                f"the exported graph gives vectors that depend on what else is in their batch (by {company.apart:.1e})"
                ": nothing was kept."
            )
        found.append(Comparison(kind, len(inputs), (min(units), max(units)), min(cosines), company.apart))
    return found


def _samples(spec: ModelSpec) -> Sequence[Any]:
    if spec.modality == "text":
        roles = (text_pb2.TEXT_ROLE_UNSPECIFIED, text_pb2.TEXT_ROLE_QUERY)
        return [TextItem(text, role) for text, role in zip(_texts(), itertools.cycle(roles), strict=False)]
    files = demo_files(spec.modality)[:_MOST_FILES]
    if spec.text:
        return [ImageItem(content, text) for content, text in zip(files, ["", *_texts()], strict=False)]
    return [MODALITIES[spec.modality].item(content) for content in files]


def _texts() -> list[str]:
    """Give texts from a letter to some five hundred tokens, short and long ones in turn."""
    lines = demo_texts()
    lengths = (1, 40, 1, 3, 1, 15, 1, 7, 2)
    return [
        "a",
        *(" ".join(lines[40 * at : 40 * at + length]) for at, length in enumerate(lengths)),
        "東京は首都です。",
    ]
