"""The openvino backend: float32, or bfloat16 where the CPU has instructions for it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from embedmesh_encoder.backend.options import fits_twice
from embedmesh_encoder.backend.signature import Port, check_signature
from embedmesh_encoder.backend.unloadable import unloadable
from embedmesh_encoder.model import ModelError, ModelSpec

# The library reports its own import to an analytics service, unless the package that does so is missing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # (None forbids the import)

import openvino as ov  # noqa: E402  (after the line above)
from openvino.frontend import FrontEndManager  # noqa: E402

__all__ = ["OpenVinoBackend"]

_TYPES: Final = {"float32": ov.Type.f32, "bfloat16": ov.Type.bf16}
_DTYPES: Final = {"i64": "int64", "i32": "int32", "f32": "float32", "f16": "float16", "boolean": "bool"}
# Compiled kernels that are kept, one for each operation and shape; the library's own limit is 5,000.
_KERNELS: Final = 200


class OpenVinoBackend:
    """Implements `Backend` with compiled models.

    For several lanes a small model is compiled twice: for runs alone and, with a lane's part of the threads, for runs
    beside others; see services/README.md, "alone with all cores, together with one each". A new shape costs the
    compilation of its kernels: see `row_multiple` of the text preparer.
    """

    name = "openvino"

    def __init__(
        self, spec: ModelSpec, *, intra_op_threads: int = 0, lanes: int = 1, cache_folder: Path | None = None
    ) -> None:
        """Load the graph, check it against the manifest, compile it.

        Args:
            spec: The model.
            intra_op_threads: Threads of one run; 0 takes one for each core this process may use.
            lanes: Runs at the same time.
            cache_folder: Where compiled models are kept between starts; none by default.

        Raises:
            ModelError: The file cannot be loaded, is not what the manifest says, or this CPU does not
                compute in the precision asked for.
        """
        self.precision: str = spec.precision
        path = spec.path(spec.graph.file)
        core = ov.Core()
        if spec.precision == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ModelError(f'model "{spec.name}" cannot run in bfloat16: this CPU has no instructions for it')
        config: dict[str, Any] = {
            # Without this the library takes bfloat16 by itself where it can. Graphs that are stored in a
            # lower precision are computed in float32 wherever they do not say otherwise.
            "INFERENCE_PRECISION_HINT": _TYPES.get(spec.precision, ov.Type.f32),
            "CPU_RUNTIME_CACHE_CAPACITY": _KERNELS,
        }
        if cache_folder:
            config["CACHE_DIR"] = str(cache_folder)
        try:
            # Core.read_model would try the readers of half a dozen other formats on a file that is no graph.
            reader = FrontEndManager().load_by_framework("onnx")
            model = reader.convert(reader.load(str(path)))
            _check(model, spec)
            cores = len(os.sched_getaffinity(0))
            threads = intra_op_threads or cores

            def compiled(streams: int, each: int, *, bound: bool) -> _Compiled:
                own = {
                    "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
                    "NUM_STREAMS": streams,
                    "INFERENCE_NUM_THREADS": min(streams * each, cores),
                    "ENABLE_CPU_PINNING": bound,
                }
                return _Compiled(core.compile_model(model, "CPU", config | own), spec.outputs.values())

            # For runs alone, and for those beside others; where there is one, it is for both.
            self._compiled: list[_Compiled] = []
            if lanes == 1 or (threads > 1 and fits_twice(spec)):
                # See README.md, "a run alone has a thread on each core".
                self._compiled.append(compiled(1, threads, bound=threads == cores))
            if lanes > 1:
                # A bound thread would stand still while the event loop or a neighbour has its core.
                self._compiled.append(compiled(lanes, max(1, threads // lanes), bound=False))
        except ModelError:
            raise
        except Exception as error:  # noqa: BLE001  (its exceptions have no public base)
            raise unloadable(path, f"openvino {ov.__version__.partition('-')[0]}", error) from None

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
        """Run the graph; feeds and outputs as `embedmesh_encoder.model` describes the layouts."""
        return self._compiled[0].run(feeds, outputs)

    @property
    def run_beside(self) -> Callable[..., dict[str, NDArray[Any]]] | None:
        """See `Backend`."""
        return self._compiled[1].run if len(self._compiled) > 1 else None

    def close(self) -> None:
        """Free the models' memory and threads."""
        self._compiled.clear()


class _Compiled:
    """A compiled model, with a request of its own for each concurrent run."""

    def __init__(self, model: Any, outputs: Iterable[str]) -> None:
        self._model = model
        self._outputs = list(dict.fromkeys(outputs))
        self._idle: list[Any] = []
        self._lock = threading.Lock()

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
        with self._lock:
            request = self._idle.pop() if self._idle else self._model.create_infer_request()
        # Inputs are read where they lie; outputs are copies, because the next run overwrites them.
        results = request.infer(dict(feeds), share_inputs=True, share_outputs=False)
        # A request that raised is not used again.
        with self._lock:
            self._idle.append(request)
        return {name: results[name] for name in outputs or self._outputs}


def _check(model: Any, spec: ModelSpec) -> None:
    """Compare the graph with the manifest."""

    def ports(ends: Any, named: tuple[str, ...]) -> dict[str, Port]:
        found = {}
        for end in ends:
            # One end may have several names.
            name = next((name for name in named if name in end.get_names()), end.get_any_name())
            shape = end.get_partial_shape()
            sizes = [] if shape.rank.is_dynamic else [one.get_length() if one.is_static else "?" for one in shape]
            kind = end.get_element_type().get_type_name()
            found[name] = Port(_DTYPES.get(kind, kind), sizes)
        return found

    inputs, outputs = ports(model.inputs, spec.graph.inputs), ports(model.outputs, tuple(spec.outputs.values()))
    check_signature(spec, str(spec.path(spec.graph.file)), inputs, outputs)
