"""What runs a model's graph: arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from embedmesh_encoder.backend.choice import Choice, Machine, choose, look
from embedmesh_encoder.backend.options import BackendOptions, TritonOptions, best_lanes
from embedmesh_encoder.model import ModelSpec

__all__ = [
    "Backend",
    "BackendOptions",
    "Choice",
    "Machine",
    "TritonOptions",
    "best_lanes",
    "choose",
    "create_backend",
    "look",
]


class Backend(Protocol):
    """Runs one loaded graph.

    Attributes:
        name: What runs it, for metrics; one of `embedmesh_encoder.model.BackendName`.
        precision: Precision of its arithmetic, for metrics; one of `embedmesh_encoder.model.Precision`.
    """

    name: str
    precision: str

    @property
    def run_beside(self) -> Callable[..., dict[str, NDArray[Any]]] | None:
        """As `run`, on one lane's part of the threads, for while other lanes run too; None where it is the same."""

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
        """Run the graph. Blocking, releases the GIL, may be called from several threads at once.

        Args:
            feeds: The graph's inputs.
            outputs: Which of `ModelSpec.outputs` are wanted; all of them unless given.

        Raises:
            Exception: Whatever the library raises; its text is for the log, never for callers.
        """

    def close(self) -> None:
        """Give memory and threads back. `run` must not be called again."""


def create_backend(spec: ModelSpec, options: BackendOptions | None = None) -> Backend:
    """Load a model's graph with the backend that `spec` names. Takes seconds; call it in a thread.

    Raises:
        ModelError: The graph cannot be loaded, or is not what the manifest says.
    """
    options = options or BackendOptions()
    # Each library is imported only where it is used: none may need another to be installed.
    if spec.backend == "fake":
        from embedmesh_encoder.backend.fake import FakeBackend  # noqa: PLC0415

        return FakeBackend(spec)
    if spec.backend == "openvino":
        from embedmesh_encoder.backend.openvino import OpenVinoBackend  # noqa: PLC0415

        return OpenVinoBackend(
            spec,
            intra_op_threads=options.intra_op_threads,
            lanes=options.lanes,
            cache_folder=options.cache_folder,
        )
    if spec.backend == "triton":
        from embedmesh_encoder.backend.triton import TritonBackend  # noqa: PLC0415

        return TritonBackend(spec, options.triton, batch_items=options.batch_items)
    from embedmesh_encoder.backend.onnxruntime import OnnxRuntimeBackend  # noqa: PLC0415

    return OnnxRuntimeBackend(
        spec,
        intra_op_threads=options.intra_op_threads,
        lanes=options.lanes,
        cache_folder=options.cache_folder,
        cuda_graphs=options.cuda_graphs,
    )
