"""The onnxruntime backend: one inference session, on the CPU or on an NVIDIA GPU (cuda, tensorrt)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from embedmesh_encoder.backend.signature import Port, check_signature
from embedmesh_encoder.backend.unloadable import unloadable
from embedmesh_encoder.model import BackendName, ModelError, ModelSpec

# Since 1.29 the library reports to its maker and writes a device id, from its import on, unless told not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

__all__ = ["OnnxRuntimeBackend"]

_ERROR_LEVEL: Final = 3
_PROVIDERS: Final[Mapping[BackendName, str]] = {
    "onnxruntime": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_DTYPES: Final = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}
# Sets of shapes whose inputs stay allocated on the device; others are allocated for their run.
_BINDINGS: Final = 64
# Option of a run: under which number its work on the device is recorded; this one says not at all.
_GRAPH_KEY: Final = "gpu_graph_id"
_NO_GRAPH: Final = -1
# Option of a session: to which processors, counted from 1, each of its own threads keeps.
_WORKERS_KEY: Final = "session.intra_op_thread_affinities"


class OnnxRuntimeBackend:
    """Implements `Backend` with an `InferenceSession`, which is thread-safe by itself.

    On a CPU with several lanes there is a second session, with a lane's part of the threads, for runs beside others;
    see services/README.md, "alone with all cores, together with one each".
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        intra_op_threads: int = 0,
        lanes: int = 1,
        cache_folder: Path | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        """Load the graph and check it against the manifest.

        Args:
            spec: The model; its backend chooses the execution provider.
            intra_op_threads: Threads of one run; 0 takes one for each core this process may use.
            lanes: Runs at the same time.
            cache_folder: Where engines of TensorRT are kept between starts; none by default.
            cuda_graphs: On "cuda", record the work of each set of shapes once and replay it.

        Raises:
            ModelError: The file cannot be loaded, is not what the manifest says, or the execution
                provider cannot be had.
        """
        self.name: str = spec.backend
        self.precision: str = spec.precision
        path = spec.path(spec.graph.file)
        provider = _PROVIDERS[spec.backend]
        version = f"onnxruntime {ort.__version__}"
        if provider not in ort.get_available_providers():
            raise ModelError(
                f'model "{spec.name}" cannot run on "{spec.backend}": {version} is here without {provider}; '
                "pip install 'embedmesh[gpu]' in an environment without the package onnxruntime, which hides it"
            )
        if cuda_graphs and (spec.backend != "cuda" or spec.graph.layout == "packed"):
            raise ModelError(
                f'model "{spec.name}" cannot use CUDA graphs: they want the backend "cuda", and outputs whose shape '
                'follows from the shapes of the inputs, which those of layout "packed" do not'
            )
        # onnxruntime's own default counts the machine's cores, not those this process may use.
        cores = sorted(os.sched_getaffinity(0))
        threads = intra_op_threads or len(cores)
        providers = _providers(spec, cache_folder, cuda_graphs)
        self._beside: Any = None
        self._core: int | None = None
        options = _session_options(threads)
        if spec.backend == "onnxruntime" and threads == len(cores) > 1:
            # See README.md, "a run alone has a thread on each core".
            self._core = cores[0]
            options.add_session_config_entry(_WORKERS_KEY, ";".join(str(core + 1) for core in cores[1:]))
        try:
            self._session: Any = ort.InferenceSession(path, options, providers=providers)
            if min(lanes, threads) > 1 and spec.backend == "onnxruntime":
                self._beside = ort.InferenceSession(
                    path, _session_options(max(1, threads // lanes)), providers=providers
                )
        except Exception as error:  # noqa: BLE001  (onnxruntime's exceptions have no public base)
            raise unloadable(path, version, error) from None
        # Without its driver or libraries a provider is left out with no more than a line in the log.
        if provider not in self._session.get_providers():
            raise ModelError(
                f'model "{spec.name}" cannot run on "{spec.backend}": {version} could not start {provider}; '
                "its own message above says which driver or library is missing"
            )
        self._session.disable_fallback()
        self._outputs = list(dict.fromkeys(spec.outputs.values()))
        _check(self._session, spec)
        self._device = None if spec.backend == "onnxruntime" else _Device(self._session, "cuda", graphs=cuda_graphs)

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
        """Run the graph; feeds and outputs as `embedmesh_encoder.model` describes the layouts."""
        outputs = outputs or self._outputs
        if self._device:
            return self._device.run(feeds, outputs)
        if self._core is not None:
            _begin_on(self._core)
        return dict(zip(outputs, self._session.run(outputs, dict(feeds)), strict=True))

    @property
    def run_beside(self) -> Callable[..., dict[str, NDArray[Any]]] | None:
        """See `Backend`."""
        return self._run_beside if self._beside else None

    def _run_beside(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
        outputs = outputs or self._outputs
        return dict(zip(outputs, self._beside.run(outputs, dict(feeds)), strict=True))

    def close(self) -> None:
        """Free the sessions' memory and threads."""
        self._device = self._session = self._beside = None


class _Device:
    """Runs a session on inputs that stay allocated on a device, for each set of shapes and each concurrent run."""

    def __init__(self, session: Any, device: str, *, graphs: bool = False) -> None:
        self._session = session
        self._device = device
        # What is recorded for replay is all that the process does on the device, so nothing may run beside it.
        self._alone = threading.Lock() if graphs else None
        self._lock = threading.Lock()
        self._idle: dict[tuple[tuple[str, ...], tuple[tuple[int, ...], ...]], list[_Binding]] = {}
        self._made = 0

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        shapes = (tuple(outputs), tuple(array.shape for array in feeds.values()))
        with self._lock:
            idle = self._idle.get(shapes)
            binding = idle.pop() if idle else None
            if binding is None:
                self._made += 1
            # What is recorded cannot be forgotten: the first shapes are kept, later ones come and go.
            number = self._made if binding is None and self._made <= _BINDINGS else _NO_GRAPH
        with self._alone or nullcontext():
            if binding is None:
                binding = _Binding(self._session, self._device, feeds, outputs, number, graph=bool(self._alone))
            arrays = binding.run(feeds)
        if binding.number != _NO_GRAPH:
            with self._lock:
                self._idle.setdefault(shapes, []).append(binding)
        return dict(zip(outputs, arrays, strict=True))


class _Binding:
    """Inputs of one set of shapes in a device's memory, written in place for each run."""

    def __init__(
        self,
        session: Any,
        device: str,
        feeds: Mapping[str, NDArray[Any]],
        outputs: Sequence[str],
        number: int,
        *,
        graph: bool,
    ) -> None:
        self.number = number
        self._session = session
        self._binding = session.io_binding()
        self._values = {name: ort.OrtValue.ortvalue_from_numpy(array, device, 0) for name, array in feeds.items()}
        for name, value in self._values.items():
            self._binding.bind_ortvalue_input(name, value)
        # Their shapes may depend on the contents of the inputs, so the library allocates them at each run ...
        for output in outputs:
            self._binding.bind_output(output, device, 0)
        self._options = ort.RunOptions()
        if graph:
            self._options.add_run_config_entry(_GRAPH_KEY, str(_NO_GRAPH))
        if graph and number != _NO_GRAPH:
            # ... but what was recorded writes to the same place ever after.
            session.run_with_iobinding(self._binding, self._options)
            for output, value in zip(outputs, self._binding.get_outputs(), strict=True):
                place = ort.OrtValue.ortvalue_from_shape_and_type(value.shape(), np.float32, device, 0)
                self._binding.bind_ortvalue_output(output, place)
            self._options = ort.RunOptions()
            self._options.add_run_config_entry(_GRAPH_KEY, str(number))

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        for name, array in feeds.items():
            self._values[name].update_inplace(np.ascontiguousarray(array))
        self._session.run_with_iobinding(self._binding, self._options)
        outputs: list[NDArray[np.float32]] = self._binding.copy_outputs_to_cpu()
        return outputs


def _begin_on(core: int) -> None:
    """Move the calling thread to a core, if it may use it. It may leave it again at once."""
    cores = os.sched_getaffinity(0)
    if core in cores:
        # What a thread may use can change at any moment from outside, and a sandbox may refuse to move it.
        with suppress(OSError):
            os.sched_setaffinity(0, {core})
            os.sched_setaffinity(0, cores)


def _providers(spec: ModelSpec, cache_folder: Path | None, cuda_graphs: bool) -> list[tuple[str, dict[str, str]]]:
    """Give the execution providers in order of preference, with their options."""
    cpu: tuple[str, dict[str, str]] = ("CPUExecutionProvider", {})
    if spec.backend == "onnxruntime":
        return [cpu]
    # CUDA and cuDNN as pip installs them; where the system has them this finds nothing, which is no error.
    ort.preload_dlls()
    # TF32 would keep 10 bits of the 23, and the precision would still be called float32.
    cuda = {"use_tf32": "0", "enable_cuda_graph": str(int(cuda_graphs))}
    if spec.backend == "cuda":
        return [("CUDAExecutionProvider", cuda), cpu]
    if spec.precision == "float32":
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    tensorrt = {
        "trt_fp16_enable": str(int(spec.precision == "float16")),
        "trt_bf16_enable": str(int(spec.precision == "bfloat16")),
    }
    if cache_folder:
        # An engine takes minutes to build.
        folder = str(cache_folder)
        tensorrt |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": folder}
        tensorrt |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": folder}
    return [("TensorrtExecutionProvider", tensorrt), ("CUDAExecutionProvider", cuda), cpu]


def _session_options(intra_op_threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _ERROR_LEVEL
    # Workers spin between the operators of a run and not between runs, when they would take the core from the
    # event loop. MiniLM on two cores, against not at all: one text 5.4 instead of 6.6 ms, 3 % more a second in full
    # batches, no more CPU.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Memory patterns are kept for every shape ever seen, and an arena never shrinks from the largest
    # batch ever seen; without both a loaded MiniLM keeps at 165 instead of 205 MiB, as fast.
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = False
    return options


def _check(session: Any, spec: ModelSpec) -> None:
    """Compare the graph with the manifest."""

    def ports(ends: Any) -> dict[str, Port]:
        return {
            end.name: Port(_DTYPES.get(end.type, end.type.removeprefix("tensor(").removesuffix(")")), end.shape)
            for end in ends
        }

    check_signature(spec, str(spec.path(spec.graph.file)), ports(session.get_inputs()), ports(session.get_outputs()))
