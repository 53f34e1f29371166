"""From one vector a token to one vector a text, for graphs that do not pool themselves.

The five ways are those of sentence-transformers' `Pooling` module, over texts padded on the right.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Pooling", "pool"]

Pooling = Literal["mean", "cls", "max", "mean_sqrt_len", "last"]


def pool(how: Pooling, hidden: NDArray[np.float32], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
    """Pool the vectors of each text's tokens.

    Args:
        how: "mean" over tokens, "cls" (the first), "max" per element, "mean_sqrt_len" (sum over
            square root of length), "last" (the last token).
        hidden: float32 [n, longest, d]; what lies behind a text's end is ignored, NaN too.
        lengths: Tokens of each text, int64 [n], each at least 1 and at most `longest`.

    Returns:
        float32 [n, d], not normalised.
    """
    if how == "cls":
        return np.ascontiguousarray(hidden[:, 0])
    if how == "last":
        return np.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    real = np.arange(hidden.shape[1])[None, :, None] < lengths[:, None, None]
    if how == "max":
        maxima: NDArray[np.float32] = np.where(real, hidden, np.float32(-np.inf)).max(axis=1)
        return maxima
    sums: NDArray[np.float32] = np.where(real, hidden, np.float32(0)).sum(axis=1)
    divisor = (lengths if how == "mean" else np.sqrt(lengths)).astype(np.float32)
    means: NDArray[np.float32] = sums / divisor[:, None]
    return means
