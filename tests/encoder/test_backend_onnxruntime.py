"""What is the onnxruntime backend's own; what it shares with others is in test_backend.py."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedmesh_encoder.backend import BackendOptions, create_backend
from embedmesh_encoder.backend import onnxruntime as module
from embedmesh_encoder.model import ModelError, ModelSpec, load_spec


@pytest.fixture
def spec(tmp_path: Path, make_tower: Callable[..., Path]) -> ModelSpec:
    return load_spec(make_tower(tmp_path / "tower", "image"))


@pytest.mark.parametrize(
    ("backend", "provider"), [("cuda", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")]
)
def test_a_provider_that_the_build_lacks_is_named(spec: ModelSpec, backend: Any, provider: str) -> None:
    with pytest.raises(ModelError, match=rf"is here without {provider}; pip install 'embedmesh\[gpu\]' in an"):
        create_backend(spec.run_by(backend, "float32"))


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider' is not in available")
def test_a_provider_that_does_not_start_is_no_cpu(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a machine whose driver is missing: the library goes on without the provider.
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: names)
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: None)
    with pytest.raises(ModelError, match="could not start CUDAExecutionProvider"):
        create_backend(spec.run_by("cuda", "float32"))


def test_cuda_graphs_are_for_cuda(spec: ModelSpec) -> None:
    with pytest.raises(ModelError, match=r'cannot use CUDA graphs: they want the backend "cuda"'):
        create_backend(spec, BackendOptions(cuda_graphs=True))


def test_a_run_alone_has_all_threads_and_one_beside_others_its_part(spec: ModelSpec) -> None:
    backend = create_backend(spec, BackendOptions(intra_op_threads=5, lanes=2))
    assert isinstance(backend, module.OnnxRuntimeBackend)
    threads = [each.get_session_options().intra_op_num_threads for each in (backend._session, backend._beside)]
    assert threads == [5, 2]
    assert backend.run_beside
    feeds = {"pixel_values": np.random.default_rng(0).random((3, 3, 32, 32), np.float32)}
    alone = backend.run(feeds)["embeds"]
    backend._session = None  # each has its own
    np.testing.assert_allclose(backend.run_beside(feeds)["embeds"], alone, rtol=1e-5)
    backend.close()


CORES = sorted(os.sched_getaffinity(0))
several_cores = pytest.mark.skipif(len(CORES) == 1, reason="one core")
FEEDS = {"pixel_values": np.zeros((1, 3, 4, 4), np.float32)}


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The cores that the running thread was told to use, in turn."""
    told: list[set[int]] = []
    tell = os.sched_setaffinity

    def note(thread: int, cores: set[int]) -> None:
        assert thread == 0
        tell(thread, cores)
        told.append(cores)

    monkeypatch.setattr(os, "sched_setaffinity", note)
    return told


@several_cores
@pytest.mark.parametrize("lanes", [1, 2])
def test_a_run_alone_has_a_thread_on_each_core(spec: ModelSpec, moves: list[set[int]], lanes: int) -> None:
    threads = Path("/proc/self/task")
    before = set(threads.iterdir())
    backend = create_backend(spec, BackendOptions(lanes=lanes))
    workers = [int(thread.name) for thread in set(threads.iterdir()) - before]

    def bound() -> list[int]:
        cores = map(os.sched_getaffinity, workers)
        return sorted(min(own) for own in cores if len(own) == 1)

    # Each binds itself when it begins to run.
    patience = time.monotonic() + 20
    while bound() != CORES[1:] and time.monotonic() < patience:
        time.sleep(0.001)
    assert bound() == CORES[1:]
    # The caller begins on the core that no worker has, and is free to leave it.
    backend.run(FEEDS)
    assert moves == [{CORES[0]}, set(CORES)]
    if backend.run_beside:
        backend.run_beside(FEEDS)
    assert len(moves) == 2
    backend.close()


@several_cores
@pytest.mark.parametrize("threads", [1, len(CORES) + 1])
def test_threads_that_are_not_one_for_each_core_are_left_to_the_kernel(
    spec: ModelSpec, moves: list[set[int]], threads: int
) -> None:
    backend = create_backend(spec, BackendOptions(intra_op_threads=threads))
    backend.run(FEEDS)
    assert moves == []
    backend.close()


@several_cores
def test_a_core_that_was_taken_away_keeps_nobody_from_running(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = create_backend(spec)
    os.sched_setaffinity(0, CORES[1:])
    try:
        backend.run(FEEDS)
        assert os.sched_getaffinity(0) == set(CORES[1:])
    finally:
        os.sched_setaffinity(0, CORES)

    def refuse(thread: int, cores: set[int]) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    backend.run(FEEDS)
    backend.close()


@pytest.mark.parametrize("options", [BackendOptions(lanes=1), BackendOptions(lanes=2, intra_op_threads=1)])
def test_one_lane_or_thread_needs_one_session(spec: ModelSpec, options: BackendOptions) -> None:
    backend = create_backend(spec, options)
    assert isinstance(backend, module.OnnxRuntimeBackend)
    assert (backend.run_beside, backend._beside) == (None, None)
    backend.close()


def test_options_of_the_providers(spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: None)
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)

    def options(backend: Any, precision: Any = "float32", **given: Any) -> dict[str, dict[str, str]]:
        given = {"cache_folder": None, "cuda_graphs": False, **given}
        return dict(module._providers(spec.run_by(backend, precision), **given))

    assert options("onnxruntime") == {"CPUExecutionProvider": {}}
    cuda = options("cuda", cuda_graphs=True)
    assert list(cuda) == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert cuda["CUDAExecutionProvider"] == {"use_tf32": "0", "enable_cuda_graph": "1"}
    half = options("tensorrt", "float16", cache_folder=tmp_path)["TensorrtExecutionProvider"]
    assert (half["trt_fp16_enable"], half["trt_bf16_enable"]) == ("1", "0")
    assert half["trt_engine_cache_path"] == half["trt_timing_cache_path"] == str(tmp_path)
    assert "NVIDIA_TF32_OVERRIDE" not in os.environ
    full = options("tensorrt")
    assert list(full) == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    assert full["TensorrtExecutionProvider"] == {"trt_fp16_enable": "0", "trt_bf16_enable": "0"}
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")


@pytest.mark.parametrize("graphs", [False, True])
def test_bound_inputs_give_the_same_vectors(spec: ModelSpec, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, with the CPU as the device."""
    monkeypatch.setattr(module, "_BINDINGS", 4)
    backend = create_backend(spec)
    assert isinstance(backend, module.OnnxRuntimeBackend)
    device = module._Device(backend._session, "cpu", graphs=graphs)
    wrong = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(40):
            feeds = {"pixel_values": random.random((random.integers(1, 8), 3, 4, 4), np.float32)}
            # On a CPU, unlike on a GPU, the first array of its shape is itself the memory that later runs write to.
            own = {name: array.copy() for name, array in feeds.items()}
            if not np.array_equal(device.run(own, ["embeds"])["embeds"], backend.run(feeds)["embeds"]):
                wrong.append(feeds)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    kept = [binding for bindings in device._idle.values() for binding in bindings]
    assert sorted(binding.number for binding in kept) == [1, 2, 3, 4]
    assert all(
        binding._values["pixel_values"].shape() == list(shapes[0])
        for (_, shapes), (binding, *_) in device._idle.items()
    )
