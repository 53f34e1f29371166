"""How to run a graph, as far as it changes no vector; what does is in the `ModelSpec`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from embedmesh_encoder.model import ModelSpec

__all__ = ["BackendOptions", "TritonOptions", "best_lanes", "fits_twice"]


@dataclass(frozen=True, slots=True)
class TritonOptions:
    """How to reach a Triton server.

    Attributes:
        url: Its gRPC address, host:port; `grpcs://` before it asks for TLS.
        timeout_seconds: How long it may take over a batch.
        shared_memory: Whether inputs go through memory shared with a server on the same machine.
    """

    url: str = "localhost:8001"
    timeout_seconds: float = 30.0
    shared_memory: bool = False


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """How to run a graph.

    Attributes:
        intra_op_threads: Threads one `run` may use; 0 takes one for each core this process may use.
        lanes: How many threads will call `run` at the same time.
        batch_items: Most inputs that a batch will have; 0 when that is not known.
        cache_folder: Where compiled models (openvino, tensorrt) are kept between starts; none by default.
        cuda_graphs: Whether "cuda" records the work of each shape once and replays it.
        triton: For the backend of that name.
    """

    intra_op_threads: int = 0
    lanes: int = 1
    batch_items: int = 0
    cache_folder: Path | None = None
    cuda_graphs: bool = False
    triton: TritonOptions = TritonOptions()


# Up to this size a backend may keep a second copy of a model's files, for runs beside others.
_TWICE_BYTES: Final = 256 * 2**20


def best_lanes(spec: ModelSpec) -> int:
    """Give how many batches should run at the same time here, by the figures in services/README.md."""
    if len(os.sched_getaffinity(0)) == 1:
        return 1
    if spec.backend == "onnxruntime":
        return 2 if fits_twice(spec) else 1
    return 2 if spec.backend == "openvino" else 1


def fits_twice(spec: ModelSpec) -> bool:
    """Whether a second copy of the model is worth its memory."""
    return spec.file_bytes <= _TWICE_BYTES
