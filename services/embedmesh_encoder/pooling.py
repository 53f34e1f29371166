"""From one vector a token to one vector a text, for graphs that do not pool themselves.

The ways of `pool` are those of sentence-transformers' `Pooling` module, over texts padded on the right. Sparse vectors
are pooled text by text, because what they are pooled from is as wide as a vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Pooling", "Sparse", "largest", "lexical", "nonzero", "pool", "splade"]

# Of a sparse vector: the indices, ascending, uint32 [k]; the values there, float32 [k], none of them zero.
Sparse = tuple[NDArray[np.uint32], NDArray[np.float32]]

Pooling = Literal["mean", "cls", "max", "mean_sqrt_len", "weightedmean", "last"]


def pool(
    how: Pooling | Sequence[Pooling],
    hidden: NDArray[np.float32],
    lengths: NDArray[np.int64],
    starts: NDArray[np.int64] | None = None,
) -> NDArray[np.float32]:
    """Pool the vectors of each text's tokens, in one way or in several, whose vectors are then joined.

    Args:
        how: "mean" over tokens, "cls" (the first), "max" per element, "mean_sqrt_len" (sum over
            square root of length), "weightedmean" (the first token counts once, the second twice, ...),
            "last" (the last token).
        hidden: float32 [n, longest, d]; what lies behind a text's end is ignored, NaN too.
        lengths: Tokens of each text, int64 [n], each at least 1 and at most `longest`.
        starts: The first token of each text that is pooled, int64 [n], each less than its length; the first of all
            unless given. Weights of "weightedmean" are counted from the text's first token all the same.

    Returns:
        float32 [n, d], or [n, d * ways], not normalised.
    """
    starts = np.zeros_like(lengths) if starts is None else starts
    if isinstance(how, str):
        return _pool(how, hidden, lengths, starts)
    return np.concatenate([_pool(each, hidden, lengths, starts) for each in how], axis=1)


def _pool(
    how: Pooling, hidden: NDArray[np.float32], lengths: NDArray[np.int64], starts: NDArray[np.int64]
) -> NDArray[np.float32]:
    if how == "cls":
        return np.take_along_axis(hidden, starts[:, None, None], axis=1)[:, 0]
    if how == "last":
        return np.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    places = np.arange(hidden.shape[1])[None, :, None]
    real = (places >= starts[:, None, None]) & (places < lengths[:, None, None])
    if how == "max":
        maxima: NDArray[np.float32] = np.where(real, hidden, np.float32(-np.inf)).max(axis=1)
        return maxima
    counted = np.where(real, hidden, np.float32(0))
    if how == "weightedmean":
        counted *= np.arange(1, hidden.shape[1] + 1, dtype=np.float32)[None, :, None]
    sums: NDArray[np.float32] = counted.sum(axis=1)
    count = lengths - starts
    weights = (lengths * (lengths + 1) - starts * (starts + 1)) / 2
    divisors = {"mean": count, "mean_sqrt_len": np.sqrt(count), "weightedmean": weights}
    divisor = divisors[how].astype(np.float32)
    means: NDArray[np.float32] = sums / divisor[:, None]
    return means


def splade(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Pool what a masked-language-model head gives for a text's tokens (Formal et al., SPLADE v2, 2021).

    Args:
        logits: float32 [tokens, vocabulary], at least one token.

    Returns:
        The largest log(1 + relu(logit)) over the tokens, float32 [vocabulary].
    """
    # The function never falls, so that of the largest is the largest.
    weights: NDArray[np.float32] = np.log1p(np.maximum(logits.max(axis=0), np.float32(0)))
    return weights


def lexical(weights: NDArray[np.float32], ids: NDArray[np.int64]) -> Sparse:
    """Turn a weight a token into one for each token id, as BGE-M3 does: the largest relu(weight) of equal ids.

    Args:
        weights: float32 [tokens].
        ids: Of the tokens, int64 [tokens].
    """
    unique, places = np.unique(ids, return_inverse=True)
    largest = np.zeros(len(unique), np.float32)
    np.maximum.at(largest, places, weights)
    return nonzero(unique, largest)


def largest(vectors: Sequence[Sparse]) -> Sparse:
    """Give the largest weight that each index has in any of the sparse vectors."""
    indices = np.concatenate([indices for indices, _ in vectors])
    values = np.concatenate([values for _, values in vectors])
    unique, places = np.unique(indices, return_inverse=True)
    found = np.full(len(unique), -np.inf, np.float32)
    np.maximum.at(found, places, values)
    return unique, found


def nonzero(indices: NDArray[np.int64], values: NDArray[np.float32]) -> Sparse:
    """Leave zeros out; what is not a number stays."""
    kept = values != 0
    return indices[kept].astype(np.uint32), values[kept]
