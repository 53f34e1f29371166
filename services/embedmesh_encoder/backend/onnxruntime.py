"""The onnxruntime backend: one inference session on the CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from embedmesh_encoder.model import MANIFEST, ModelError, ModelSpec

# Since 1.29 the library reports to its maker and writes a device id, from its import on, unless told not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

__all__ = ["OnnxRuntimeBackend"]

_ERROR_LEVEL = 3
# Axes of the output of a graph that pools; convolutional networks pool images to [n, d, 1, 1].
_RANKS = {"packed": (2,), "padded": (2,), "stacked": (2, 4)}
# Of inputs that are no token ids, positions or masks.
_INPUT_TYPES = {
    "pixel_values": "tensor(float)",
    "input_features": "tensor(float)",
    "input_values": "tensor(float)",
    "is_longer": "tensor(bool)",
}


class OnnxRuntimeBackend:
    """Implements `Backend` with one `InferenceSession`, which is thread-safe by itself."""

    name = "onnxruntime"
    precision = "float32"

    def __init__(self, spec: ModelSpec, *, intra_op_threads: int = 0) -> None:
        """Load the graph and check it against the manifest.

        Args:
            spec: The model.
            intra_op_threads: Threads of one run; 0 takes one for each core this process may use.

        Raises:
            ModelError: The file cannot be loaded, or is not what the manifest says.
        """
        path = spec.path(spec.graph.file)
        try:
            self._session: Any = ort.InferenceSession(
                path, _session_options(intra_op_threads), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # noqa: BLE001  (onnxruntime's exceptions have no public base)
            raise ModelError(f"cannot load {path} with onnxruntime {ort.__version__}: {error}") from None
        self._outputs = [spec.graph.output]
        _check_signature(self._session, spec)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph; feeds and output as `embedmesh_encoder.model` describes the layouts."""
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))

    def close(self) -> None:
        """Free the session's memory and threads."""
        self._session = None


def _session_options(intra_op_threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    # onnxruntime's own default counts the machine's cores, not those this process may use.
    options.intra_op_num_threads = intra_op_threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _ERROR_LEVEL
    # Idle workers that spin would take the core from the event loop.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Memory patterns are kept for every shape ever seen, and an arena never shrinks from the largest
    # batch ever seen; without both a loaded MiniLM keeps at 165 instead of 205 MiB, as fast.
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = False
    return options


def _check_signature(session: Any, spec: ModelSpec) -> None:
    """Compare the graph's inputs and output with the manifest."""
    problems = []
    inputs = {one.name: one for one in session.get_inputs()}
    for name in spec.graph.inputs:
        if name not in inputs:
            problems.append(f'it has no input "{name}" (its inputs: {", ".join(inputs)})')
        elif inputs[name].type != (wanted := _INPUT_TYPES.get(name, "tensor(int64)")):
            problems.append(f'input "{name}" is {inputs[name].type}, not {wanted}')
    extra = [name for name in inputs if name not in spec.graph.inputs]
    if extra:
        problems.append(f"it wants inputs that the manifest does not name: {', '.join(extra)}")
    outputs = {one.name: one for one in session.get_outputs()}
    output = outputs.get(spec.graph.output)
    if output is None:
        problems.append(f'it has no output "{spec.graph.output}" (its outputs: {", ".join(outputs)})')
    else:
        ranks = _RANKS[spec.graph.layout] if spec.graph.pooling == "graph" else (3,)
        if output.type != "tensor(float)":
            problems.append(f'output "{output.name}" is {output.type}, not tensor(float)')
        shape = f'output "{output.name}" has shape {output.shape}'
        # An exporter may leave shapes or single sizes out; what is there must be right.
        if output.shape and len(output.shape) not in ranks:
            problems.append(f'{shape}; {ranks[0]} axes were expected with pooling "{spec.graph.pooling}"')
        elif (
            output.shape
            and isinstance(width := output.shape[-1 if ranks[0] == 3 else 1], int)
            and width != spec.dimensions
        ):
            problems.append(f"{shape}; the manifest says dimensions = {spec.dimensions}")
    if problems:
        raise ModelError(f"{spec.path(spec.graph.file)} does not fit {MANIFEST}: {'; '.join(problems)}")
