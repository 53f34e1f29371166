"""Late interaction: MaxSim of multi-vectors, and MUVERA, with which a plain vector index approximates it.

MaxSim, or Chamfer similarity, sums over the rows of a query the largest inner product with a row of the document:

    MaxSim(Q, P) = sum over q in Q of max over p in P of <q, p>

A fixed-dimensional encoding (Dhulipala et al., "MUVERA: Multi-Vector Retrieval via Fixed Dimensional Encodings", 2024)
is one vector a query and one a document whose inner product estimates it. For each of R repetitions:

    SimHash     k normal vectors g cut space into 2^k cells: cell(x) has bit i set where <g_i, x> > 0
    query       in each cell the sum of the rows of Q that lie there
    document    in each cell the mean of the rows of P that lie there; an empty cell takes the row of P whose own cell
                has the fewest other bits, the first of several
    projection  each cell's vector x becomes S x / sqrt(d'), where S is a d' x d matrix of random signs

The cells of all repetitions lie end to end, each side divided by sqrt(R), so that the inner product is the mean of the
R estimates. A final projection, if any, is a count sketch: each number is added, with a random sign, to a random one of
the numbers that are kept; inner products stay the same in expectation.

Without projections an estimate is never above MaxSim, since a mean is never above the maximum. For rows of norm 1 it is
below by more than an epsilon a row of the query with a probability that falls exponentially in k * epsilon
(theorem 2.1 there); a projection to d' numbers adds noise of mean 0 and of a variance that falls with 1 / d'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Muvera", "max_sim"]

Float32 = NDArray[np.float32]

_MOST_BITS: Final = 16


def max_sim(query: NDArray[Any], documents: Iterable[NDArray[Any]]) -> Float32:
    """Give the MaxSim of a query with each document, float32 [documents]; 0 for one without rows.

    Args:
        query: Its multi-vector, [n, d].
        documents: Theirs, [m, d] each.

    Raises:
        ValueError: Something is no matrix of finite numbers, or the widths differ.
    """
    rows = _matrix(query, None)

    def score(document: NDArray[Any]) -> float:
        others = _matrix(document, rows.shape[1])
        return float((rows @ others.T).max(axis=1).sum()) if len(others) else 0.0

    return np.array([score(document) for document in documents], np.float32)


@dataclass(frozen=True, slots=True)
class Muvera:
    """Makes fixed-dimensional encodings. Equal settings give equal encodings, whatever the version of numpy.

    Attributes:
        dimensions: Width of the multi-vectors' rows.
        simhash_bits: k: 2^k cells; more are closer to MaxSim, and as many times wider.
        repetitions: R.
        projected: d', numbers of a cell after projection; 0 keeps all.
        final: Numbers of an encoding after the final projection; 0 keeps all.
        seed: Another seed, other encodings. Encodings may be compared only when all settings are equal.
    """

    dimensions: int
    simhash_bits: int = 5
    repetitions: int = 20
    projected: int = 0
    final: int = 0
    seed: int = 0
    _draws: tuple[Float32, Float32, tuple[NDArray[np.int64], Float32]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Draw what is random.

        Raises:
            ValueError: A setting that cannot work.
        """
        for name, least, most in (
            ("dimensions", 1, math.inf),
            ("simhash_bits", 0, _MOST_BITS),
            ("repetitions", 1, math.inf),
            ("projected", 0, self.dimensions),
            ("final", 0, self._cells_width),
            ("seed", 0, 2**32 - 1),
        ):
            if not least <= (value := getattr(self, name)) <= most:
                raise ValueError(f"{name} is {value}; give {least}" + ("" if most == math.inf else f" to {most}"))
        # Of numpy's generators the only one whose numbers are promised never to change.
        draw = np.random.RandomState(self.seed)
        hyperplanes = draw.standard_normal((self.repetitions, self.dimensions, self.simhash_bits))
        signs = draw.randint(0, 2, (self.repetitions, self.dimensions, self.projected)) * 2 - 1
        places = draw.randint(0, max(self.final, 1), self._cells_width if self.final else 0)
        flips = draw.randint(0, 2, len(places)) * 2 - 1
        draws = (
            hyperplanes.astype(np.float32),
            signs.astype(np.float32) / np.float32(math.sqrt(max(self.projected, 1))),
            (places.astype(np.int64), flips.astype(np.float32)),
        )
        object.__setattr__(self, "_draws", draws)

    @property
    def width(self) -> int:
        """How many numbers an encoding has."""
        return self.final or self._cells_width

    def encode_query(self, rows: NDArray[Any]) -> Float32:
        """Encode a query's multi-vector [n, d]: float32 [width].

        Raises:
            ValueError: It is no matrix of finite numbers of width `dimensions`.
        """
        return self._encode(rows, lambda sums, _: sums)

    def encode_document(self, rows: NDArray[Any]) -> Float32:
        """Encode a document's multi-vector [n, d]: float32 [width]; raises as `encode_query` does."""
        return self._encode(rows, self._means)

    @property
    def _cells_width(self) -> int:
        return self.repetitions * (self.projected or self.dimensions) << self.simhash_bits

    def _encode(self, rows: NDArray[Any], finish: Callable[[Float32, _Cells], Float32]) -> Float32:
        matrix = _matrix(rows, self.dimensions)
        if not len(matrix):
            return np.zeros(self.width, np.float32)
        hyperplanes, signs, (places, flips) = self._draws
        weights = 1 << np.arange(self.simhash_bits)
        parts = []
        for r in range(self.repetitions):
            cells = ((matrix @ hyperplanes[r]) > 0) @ weights
            vectors = matrix @ signs[r] if self.projected else matrix
            sums = np.zeros((1 << self.simhash_bits, vectors.shape[1]), np.float32)
            np.add.at(sums, cells, vectors)
            parts.append(finish(sums, _Cells(cells, vectors)).ravel())
        whole = np.concatenate(parts) / np.float32(math.sqrt(self.repetitions))
        if self.final:
            return np.bincount(places, whole * flips, minlength=self.final).astype(np.float32)
        return whole

    def _means(self, sums: Float32, cells: _Cells) -> Float32:
        counts = np.bincount(cells.of_rows, minlength=len(sums))
        (empty,) = np.nonzero(counts == 0)
        # How many bits each empty cell has other than each row's.
        differing = _bits(self.simhash_bits)[empty[:, None] ^ cells.of_rows[None, :]]
        means: Float32 = sums / np.maximum(counts, 1).astype(np.float32)[:, None]
        means[empty] = cells.vectors[differing.argmin(axis=1)]
        return means


@dataclass(frozen=True, slots=True)
class _Cells:
    """The rows of a multi-vector in one repetition: the cell of each, and what each adds to it."""

    of_rows: NDArray[np.int64]
    vectors: Float32


def _bits(count: int) -> NDArray[np.uint8]:
    """Count the bits of every number of so many bits."""
    found = np.zeros(1, np.uint8)
    for _ in range(count):
        found = np.concatenate([found, found + np.uint8(1)])
    return found


def _matrix(rows: NDArray[Any], width: int | None) -> Float32:
    matrix = np.asarray(rows, np.float32)
    if matrix.ndim != 2 or (width is not None and matrix.shape[1] != width):
        wanted = "[n, d]" if width is None else f"[n, {width}]"
        raise ValueError(f"a multi-vector has the shape {list(matrix.shape)}, expected {wanted}")
    if not np.isfinite(matrix).all():
        raise ValueError("a multi-vector holds numbers that are not finite")
    return matrix
