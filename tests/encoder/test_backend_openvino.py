"""The openvino backend on the real model; what it shares with others is in test_backend.py."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedmesh.v1 import embedding_pb2 as pb
from embedmesh.vectors import l2_norms, normalized
from embedmesh_encoder.backend import Backend, BackendOptions, create_backend, look
from embedmesh_encoder.model import ModelError, ModelSpec, load_spec
from embedmesh_encoder.text import TextItem, TextPreparer

TEXTS = ("", "hello world", "a cat sat on the mat", "the quick brown fox " * 20, "naïve café 北京", "word " * 300)
CORES = len(os.sched_getaffinity(0))


@pytest.fixture(scope="session")
def spec(starter_model: Path) -> ModelSpec:
    return load_spec(starter_model)


def embed(
    spec: ModelSpec, options: BackendOptions | None = None, multiple: int = 16, backend: Backend | None = None
) -> np.ndarray:
    preparer = TextPreparer(spec, row_multiple=multiple)
    backend = backend or create_backend(spec, options)
    batch = [preparer.prepare(TextItem(text), pb.TRUNCATION_END) for text in TEXTS]
    rows = preparer.split(backend.run(preparer.collate(batch)), batch)
    backend.close()
    return normalized(rows, l2_norms(rows))


@pytest.fixture(scope="session")
def reference(spec: ModelSpec) -> np.ndarray:
    return embed(spec, multiple=1)


def test_full_precision_is_onnxruntimes(spec: ModelSpec, reference: np.ndarray) -> None:
    np.testing.assert_allclose(embed(spec.run_by("openvino", "float32")), reference, atol=1e-5)


@pytest.mark.skipif(not look().bfloat16, reason="this CPU has no instructions for bfloat16")
def test_bfloat16_is_close(spec: ModelSpec, reference: np.ndarray) -> None:
    vectors = embed(spec.run_by("openvino", "bfloat16"))
    assert (vectors * reference).sum(axis=1).min() >= 0.9999
    # And it is not float32 under another name.
    assert np.abs(vectors - reference).max() > 1e-4


@pytest.mark.parametrize("options", [BackendOptions(intra_op_threads=1), BackendOptions(lanes=2)])
def test_threads_and_lanes_change_no_vector(spec: ModelSpec, reference: np.ndarray, options: BackendOptions) -> None:
    np.testing.assert_allclose(embed(spec.run_by("openvino", "float32"), options), reference, atol=1e-5)


def streams(compiled: Any) -> tuple[int, int, bool]:
    """How many a compiled model has, their threads in all, and whether these are bound to cores."""
    names = ("NUM_STREAMS", "INFERENCE_NUM_THREADS", "ENABLE_CPU_PINNING")
    number, threads, bound = (compiled._model.get_property(name) for name in names)
    return int(number), threads, bound


@pytest.mark.skipif(CORES == 1, reason="one core")
def test_a_run_alone_has_all_cores_and_one_beside_others_its_part(spec: ModelSpec, reference: np.ndarray) -> None:
    backend: Any = create_backend(spec.run_by("openvino", "float32"), BackendOptions(lanes=2))
    assert list(map(streams, backend._compiled)) == [(1, CORES, True), (2, CORES - CORES % 2, False)]
    backend.run = backend.run_beside
    backend._compiled[0] = None  # each has its own
    np.testing.assert_allclose(embed(spec, backend=backend), reference, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (BackendOptions(), (1, CORES, True)),
        (BackendOptions(intra_op_threads=1), (1, 1, CORES == 1)),
        (BackendOptions(intra_op_threads=1, lanes=2), (2, min(2, CORES), False)),
    ],
    ids=["one lane", "one thread", "two lanes of one thread"],
)
def test_one_lane_or_thread_is_compiled_once(
    spec: ModelSpec, options: BackendOptions, expected: tuple[int, int, bool]
) -> None:
    backend: Any = create_backend(spec.run_by("openvino", "float32"), options)
    assert list(map(streams, backend._compiled)) == [expected]
    assert backend.run_beside is None


def test_a_large_model_is_compiled_once(
    spec: ModelSpec, reference: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedmesh_encoder.backend.options._TWICE_BYTES", 1)
    backend = create_backend(spec.run_by("openvino", "float32"), BackendOptions(lanes=2))
    assert backend.run_beside is None
    np.testing.assert_allclose(embed(spec, backend=backend), reference, atol=1e-5)


def test_a_cpu_without_bfloat16_is_told(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr("openvino.Core", Core)
    with pytest.raises(ModelError, match="cannot run in bfloat16: this CPU has no instructions for it"):
        create_backend(spec.run_by("openvino", "bfloat16"))


def test_compiled_models_are_kept(spec: ModelSpec, reference: np.ndarray, tmp_path: Path) -> None:
    options = BackendOptions(cache_folder=tmp_path / "cache")
    for _ in range(2):
        vectors = embed(spec.run_by("openvino", "float32"), options)
        np.testing.assert_allclose(vectors, reference, atol=1e-5)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_nothing_is_reported_to_anybody(tmp_path: Path) -> None:
    program = """
import sys
calls = []
sys.addaudithook(lambda event, args: calls.append(args) if event in ("socket.connect", "socket.getaddrinfo") else None)
import embedmesh_encoder.backend.openvino
import openvino
assert not [name for name in sys.modules if name.startswith("openvino_telemetry.")]
assert not calls, calls
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, env={"HOME": str(tmp_path)})
    assert not list(tmp_path.iterdir())
