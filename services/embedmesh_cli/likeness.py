"""How alike two sets of vectors of the same inputs are, kind by kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from embedmesh_encoder.pooling import Sparse

__all__ = ["LEAST_COSINE", "MOST_APART", "Likeness", "Vectors", "compare", "join"]

Float32 = NDArray[np.float32]
_One = TypeVar("_One")

LEAST_COSINE: Final = 0.9999
# Of an element, alone and in company: of normalised dense vectors and rows, and of the weights of sparse ones.
MOST_APART: Final[Mapping[str, float]] = {"dense": 1e-5, "sparse": 1e-4, "multi_vector": 1e-5}


@dataclass(frozen=True, slots=True)
class Vectors:
    """Vectors of some inputs; None for a kind that is not made.

    Attributes:
        dense: float32 [n, d].
        sparse: Of each input.
        multi_vector: Of each input, float32 [rows, d].
    """

    dense: Float32 | None = None
    sparse: Sequence[Sparse] | None = None
    multi_vector: Sequence[Float32] | None = None

    def finite(self) -> NDArray[np.bool_]:
        """Tell of each input whether all its numbers are finite."""
        found: list[Sequence[Float32]] = []
        if self.dense is not None:
            found.append(list(self.dense))
        if self.sparse is not None:
            found.append([values for _, values in self.sparse])
        if self.multi_vector is not None:
            found.append(self.multi_vector)
        return np.array([all(np.isfinite(each).all() for each in one) for one in zip(*found, strict=True)])


@dataclass(frozen=True, slots=True)
class Likeness:
    """How alike vectors of one kind are; without numbers where their shapes differ, which is a problem of its own.

    Attributes:
        kind: Of vector.
        cosines: Of each input; of a multi-vector the least of its rows.
        norms: Largest difference of the lengths of vectors or rows, in parts of the other's.
        apart: Largest difference of an element: of normalised dense vectors and rows, of a sparse vector's weights.
        problem: Why they cannot be compared.
    """

    kind: str
    cosines: NDArray[np.float64] = field(default_factory=lambda: np.ones(1))
    norms: float = 0.0
    apart: float = 0.0
    problem: str = ""


def join(parts: Sequence[Vectors]) -> Vectors:
    """Put vectors of several batches one after the other."""
    first = parts[0]
    return Vectors(
        None if first.dense is None else np.concatenate([part.dense for part in parts if part.dense is not None]),
        None if first.sparse is None else [one for part in parts for one in part.sparse or ()],
        None if first.multi_vector is None else [one for part in parts for one in part.multi_vector or ()],
    )


def compare(ours: Vectors, theirs: Vectors) -> Iterator[Likeness]:
    """Compare all kinds that the second has, which the first must have, too."""
    if theirs.dense is not None and ours.dense is not None:
        yield _dense(ours.dense, theirs.dense)
    if theirs.sparse is not None and ours.sparse is not None:
        yield _each("sparse", ours.sparse, theirs.sparse, _sparse)
    if theirs.multi_vector is not None and ours.multi_vector is not None:
        yield _each("multi_vector", ours.multi_vector, theirs.multi_vector, _rows)


# Of vectors: cosines, differences of lengths, and differences of elements; or why there are none.
_Found = tuple[NDArray[np.float64], float, float] | str


def _dense(ours: Float32, theirs: Float32) -> Likeness:
    found = _rows(ours, theirs)
    if isinstance(found, str):
        return Likeness("dense", problem=f"vectors have {ours.shape[1]} numbers, the reference's {theirs.shape[1]}")
    return Likeness("dense", *found)


def _each(kind: str, ours: Sequence[_One], theirs: Sequence[_One], look: Callable[[_One, _One], _Found]) -> Likeness:
    cosines, norms, apart = [], 0.0, 0.0
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        found = look(one, other)
        if isinstance(found, str):
            return Likeness(kind, problem=f"sample {number} has {found}")
        cosines.append(float(found[0].min(initial=1.0)))
        norms, apart = max(norms, found[1]), max(apart, found[2])
    return Likeness(kind, np.array(cosines), norms, apart)


def _rows(ours: Float32, theirs: Float32) -> _Found:
    if ours.shape != theirs.shape:
        return f"{ours.shape[0]} rows of {ours.shape[1]}, the reference {theirs.shape[0]} of {theirs.shape[1]}"
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    norms = np.linalg.norm(a, axis=1, keepdims=True), np.linalg.norm(b, axis=1, keepdims=True)
    a, b = a / norms[0], b / norms[1]
    apart = np.abs(a - b).max(initial=0)
    return np.einsum("nd,nd->n", a, b), float(np.abs(norms[0] / norms[1] - 1).max(initial=0)), float(apart)


def _sparse(ours: Sparse, theirs: Sparse) -> _Found:
    # An index that only one of them has counts with all of its weight.
    indices = np.union1d(ours[0], theirs[0])
    a, b = np.zeros((2, len(indices)))
    a[np.searchsorted(indices, ours[0])] = ours[1]
    b[np.searchsorted(indices, theirs[0])] = theirs[1]
    apart = float(np.abs(a - b).max(initial=0))
    lengths = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if not all(lengths):
        return np.array([float(lengths[0] == lengths[1])]), 0.0, apart
    return np.array([a @ b / (lengths[0] * lengths[1])]), abs(lengths[0] / lengths[1] - 1), apart
