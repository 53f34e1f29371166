"""Vectors of captions and scores between vectors, with the text model that the towers are aligned to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_cli.starter.minilm import ensure_starter
from embedmesh_encoder.backend import create_backend
from embedmesh_encoder.model import load_spec
from embedmesh_encoder.text import TextItem, TextPreparer
from starter.material import BUILD

__all__ = ["ranks", "recalls", "text_vectors"]

_BUDGET: Final = 256


def text_vectors(texts: Sequence[str]) -> NDArray[np.float32]:
    """Embed texts with all-MiniLM-L6-v2 as it is served: float32 [n, 384], of length 1. Kept in the build folder."""
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    file = BUILD / "vectors" / f"{digest}.npy"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, np.concatenate([*_embed(texts)]))
    vectors: NDArray[np.float32] = np.load(file)
    return vectors


@cache
def _model() -> tuple[Any, Any]:
    spec = load_spec(ensure_starter(print))
    return TextPreparer(spec), create_backend(spec)


def _embed(texts: Iterable[str]) -> Iterable[NDArray[np.float32]]:
    preparer, backend = _model()
    batch: list[Any] = []
    for prepared in [*(preparer.prepare(TextItem(text), pb.TRUNCATION_END) for text in texts), None]:
        if batch and (prepared is None or sum(each.units for each in batch) + prepared.units > _BUDGET):
            rows = preparer.split(backend.run(preparer.collate(batch)), batch)
            yield rows / np.linalg.norm(rows, axis=1, keepdims=True)
            batch = []
        if prepared is not None:
            batch.append(prepared)


def ranks(
    queries: NDArray[np.float32], gallery: NDArray[np.float32], right: NDArray[np.bool_] | NDArray[np.int64]
) -> NDArray[np.int64]:
    """Give the rank (0 is best) of the best right answer to each query, by cosine of vectors of length 1.

    Args:
        queries: float32 [n, d].
        gallery: float32 [m, d].
        right: int64 [n], the index of the right answer, or bool [n, m]. Ties count against the right answer.
    """
    scores = queries @ gallery.T
    if right.dtype != np.bool_:
        marks = np.zeros(scores.shape, np.bool_)
        marks[np.arange(len(queries)), right] = True
        right = marks
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    better: NDArray[np.int64] = ((scores >= best) & ~right).sum(axis=1)
    return better


def recalls(those: NDArray[np.int64]) -> dict[str, float]:
    """Give recall at 1, 5 and 10, in percent."""
    return {f"R@{k}": round(100 * float((those < k).mean()), 1) for k in (1, 5, 10)}
