"""What runs a model's graph: arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from embedmesh_encoder.model import ModelError, ModelSpec

__all__ = ["Backend", "BackendOptions", "create_backend"]


class Backend(Protocol):
    """Runs one loaded graph.

    Attributes:
        name: What runs it, for metrics: "onnxruntime" or "fake".
        precision: Precision of its arithmetic, for metrics: "float32".
    """

    name: str
    precision: str

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph. Blocking, releases the GIL, may be called from several threads at once.

        Raises:
            Exception: Whatever the library raises; its text is for the log, never for callers.
        """

    def close(self) -> None:
        """Give memory and threads back. `run` must not be called again."""


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """How to run a graph, as far as it changes no vector.

    Attributes:
        name: "auto" takes the manifest's backend. Another name must agree with the manifest,
            because the backend is part of the model's revision.
        intra_op_threads: Threads one `run` may use; 0 takes one for each core this process may use.
    """

    name: Literal["auto", "onnxruntime", "fake"] = "auto"
    intra_op_threads: int = 0


def create_backend(spec: ModelSpec, options: BackendOptions | None = None) -> Backend:
    """Load a model's graph. Takes seconds; call it in a thread.

    Raises:
        ModelError: The graph cannot be loaded, or is not what the manifest says.
    """
    options = options or BackendOptions()
    if options.name not in ("auto", spec.backend):
        raise ModelError(
            f'model "{spec.name}" was made for backend "{spec.backend}" and cannot run on "{options.name}": '
            'set the backend to "auto"'
        )
    # Each library is imported only where it is used: the fake must not need onnxruntime, nor the reverse.
    if spec.backend == "fake":
        from embedmesh_encoder.backend.fake import FakeBackend  # noqa: PLC0415

        return FakeBackend(spec)
    from embedmesh_encoder.backend.onnxruntime import OnnxRuntimeBackend  # noqa: PLC0415

    return OnnxRuntimeBackend(spec, intra_op_threads=options.intra_op_threads)
