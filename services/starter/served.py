"""A starter tower as an encoder runs it: the product's decoding, pre-processing and backend, without the server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_encoder.audio import AudioItem
from embedmesh_encoder.backend import create_backend
from embedmesh_encoder.modalities import MODALITIES, default_preparer
from embedmesh_encoder.model import ModelSpec, load_spec
from starter.sounds import RATE

__all__ = ["Tower"]

Float32 = NDArray[np.float32]


class Tower:
    """The model in a folder."""

    def __init__(self, folder: Path) -> None:
        self.spec: ModelSpec = load_spec(folder)
        self._preparer = default_preparer(self.spec)
        self._backend = create_backend(self.spec)

    def __call__(self, files: Sequence[bytes | Float32]) -> Float32:
        """Embed files, or sounds at `RATE`: float32 [n, 384], of length 1."""
        rows = np.empty((len(files), self.spec.dimensions), np.float32)
        for start in range(0, len(files), 32):
            batch = [self._preparer.prepare(self._item(each), pb.TRUNCATION_END) for each in files[start : start + 32]]
            rows[start : start + 32] = self._preparer.split(self._backend.run(self._preparer.collate(batch)), batch)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return rows

    def _item(self, file: bytes | Float32) -> Any:
        if isinstance(file, bytes):
            return MODALITIES[self.spec.modality].item(file)
        return AudioItem(samples=file, rate=RATE)
