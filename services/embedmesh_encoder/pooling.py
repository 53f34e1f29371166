"""From one vector a token to one vector a text, for graphs that do not pool themselves.

The ways are those of sentence-transformers' `Pooling` module, over texts padded on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Pooling", "pool"]

Pooling = Literal["mean", "cls", "max", "mean_sqrt_len", "weightedmean", "last"]


def pool(
    how: Pooling | Sequence[Pooling], hidden: NDArray[np.float32], lengths: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Pool the vectors of each text's tokens, in one way or in several, whose vectors are then joined.

    Args:
        how: "mean" over tokens, "cls" (the first), "max" per element, "mean_sqrt_len" (sum over
            square root of length), "weightedmean" (the first token counts once, the second twice, ...),
            "last" (the last token).
        hidden: float32 [n, longest, d]; what lies behind a text's end is ignored, NaN too.
        lengths: Tokens of each text, int64 [n], each at least 1 and at most `longest`.

    Returns:
        float32 [n, d], or [n, d * ways], not normalised.
    """
    if isinstance(how, str):
        return _pool(how, hidden, lengths)
    return np.concatenate([_pool(each, hidden, lengths) for each in how], axis=1)


def _pool(how: Pooling, hidden: NDArray[np.float32], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
    if how == "cls":
        return np.ascontiguousarray(hidden[:, 0])
    if how == "last":
        return np.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    real = np.arange(hidden.shape[1])[None, :, None] < lengths[:, None, None]
    if how == "max":
        maxima: NDArray[np.float32] = np.where(real, hidden, np.float32(-np.inf)).max(axis=1)
        return maxima
    counted = np.where(real, hidden, np.float32(0))
    if how == "weightedmean":
        counted *= np.arange(1, hidden.shape[1] + 1, dtype=np.float32)[None, :, None]
    sums: NDArray[np.float32] = counted.sum(axis=1)
    divisors = {"mean": lengths, "mean_sqrt_len": np.sqrt(lengths), "weightedmean": lengths * (lengths + 1) / 2}
    divisor = divisors[how].astype(np.float32)
    means: NDArray[np.float32] = sums / divisor[:, None]
    return means
