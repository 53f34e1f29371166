"""What a modality must offer between one input and the model's arrays."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_encoder.pooling import Sparse

__all__ = ["DENSE", "KindsPreparer", "Others", "Prepared", "Preparer", "SpansPreparer"]

# What a model without other kinds makes, and what is wanted unless a call says otherwise.
DENSE: Final = frozenset((pb.EMBEDDING_KIND_DENSE,))


@dataclass(frozen=True, slots=True)
class Prepared:
    """One input, ready to be put into a batch.

    Attributes:
        data: What `Preparer.collate` needs; for text the token ids, int64 [units].
        units: Units (tokens, patches, frames) the model will read, special tokens included.
        original_units: Units the whole input would have taken; equals `units` when nothing was
            cut. A lower bound for inputs many times longer than the model can read.
        truncated: Whether part of the input is not read.
        group: Only inputs of equal group can be collated, e.g. images of one shape. None where all can.
        prompt: Units at the beginning that pooling leaves out.
        expansion: Units at the end that the model's attention leaves out, though each has a row.
        rows: Which of the units have a row in the multi-vector, bool [units]; None where the model makes none.
        kinds: Kinds of vector wanted.
        spans: Parts of the units that get a dense vector of their own, int64 [spans, 2]; None where none is wanted.
        offsets: Where the spans lie in the input as the caller gave it, int64 [spans, 2].
        more: The other passes of the model that this input takes; each is in a batch like any other input, and the
            vectors of all become one. What stands above is of the first pass alone.
        weight: Of this pass's dense vector as pooled, in the mean over all; they sum up to 1.
    """

    data: Any
    units: int
    original_units: int
    truncated: bool
    group: Hashable = None
    prompt: int = 0
    expansion: int = 0
    rows: NDArray[np.bool_] | None = None
    kinds: frozenset[pb.EmbeddingKind.ValueType] = DENSE
    spans: NDArray[np.int64] | None = None
    offsets: NDArray[np.int64] | None = None
    more: tuple[Prepared, ...] = ()
    weight: float = 1.0

    @property
    def passes(self) -> tuple[Prepared, ...]:
        """All passes of this input."""
        return (self, *self.more)


@dataclass(frozen=True, slots=True)
class Others:
    """What one input gave besides its dense vector; None for kinds that are not wanted.

    Attributes:
        sparse: See `embedmesh_encoder.pooling.Sparse`.
        multi_vector: float32 [rows, d], normalised as the manifest says.
        spans: Vectors of the spans, float32 [spans, d], as the dense vector is, with the norms that they were pooled
            with, float32 [spans].
    """

    sparse: Sparse | None = None
    multi_vector: NDArray[np.float32] | None = None
    spans: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None


class Preparer(Protocol):
    """Turns inputs of one modality into a graph's feeds, and its outputs into vectors.

    Attributes:
        limits: Named limits on one input, as in `ModelInfo.limits`, e.g. `{"text_bytes": 1048576}`.
        padded: True when every input of a batch costs as much as its longest, so that a batch
            costs `longest * n` units; False when it costs the sum of its units.
    """

    limits: Mapping[str, int]
    padded: bool

    def is_quick(self, items: Sequence[Any]) -> bool:
        """Whether all of them are prepared in less time than it takes to hand them to a thread and back (0.4 ms)."""

    def prepare(self, item: Any, truncation: pb.Truncation.ValueType) -> Prepared:
        """Turn one input into what the model reads. Blocking and thread-safe.

        Raises:
            EmbedMeshError: This input alone cannot be embedded.
        """

    def collate(self, batch: Sequence[Prepared]) -> dict[str, NDArray[Any]]:
        """Lay a batch of one or more inputs of one group out as the graph's feeds."""

    def split(self, outputs: Mapping[str, NDArray[Any]], batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """Take the vectors out of the graph's outputs: float32 [n, d], as pooled, not normalised."""


@runtime_checkable
class SpansPreparer(Preparer, Protocol):
    """One for models that give parts of an input a vector."""

    def split_spans(self, outputs: Mapping[str, NDArray[Any]], place: int, prepared: Prepared) -> NDArray[np.float32]:
        """Take the vectors of the spans of one input of a batch: float32 [spans, d], as pooled, not normalised."""


@runtime_checkable
class KindsPreparer(Preparer, Protocol):
    """One for models that make more than dense vectors."""

    def split_others(self, outputs: Mapping[str, NDArray[Any]], batch: Sequence[Prepared]) -> list[Others]:
        """Take the other kinds that each input wants out of the graph's outputs; not checked for finite numbers."""
