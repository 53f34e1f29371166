from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from embedmesh_encoder.head import Head
from embedmesh_encoder.model import ModelError, ModelSpec, write_manifest

RNG = np.random.default_rng(3)
Float32 = NDArray[np.float32]
VECTORS = RNG.normal(size=(5, 6)).astype(np.float32) * 3
WEIGHT, BIAS = RNG.normal(size=(4, 6)).astype(np.float32), RNG.normal(size=4).astype(np.float32)
DENSE = {"kind": "dense", "file": "dense.safetensors", "inputs": 6, "outputs": 4}
NORM = {"kind": "layer_norm", "file": "norm.safetensors", "inputs": 4, "outputs": 4}
UNIT = {"kind": "normalize", "inputs": 4, "outputs": 4}
CUT = {"kind": "cut", "inputs": 4, "outputs": 3}
Make = Callable[..., ModelSpec]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a model with a head; `weights` in place of those of its files."""

    def write(*layers: Mapping[str, Any], weights: Mapping[str, Mapping[str, Any]] | None = None) -> ModelSpec:
        files: dict[str, Mapping[str, Any]] = {
            "dense.safetensors": {"linear.weight": WEIGHT, "linear.bias": BIAS},
            "norm.safetensors": {"norm.weight": BIAS, "norm.bias": -BIAS},
        }
        for name, content in (files | dict(weights or {})).items():
            save_file(dict(content), tmp_path / name)
        for name in ("model.onnx", "tokenizer.json"):
            (tmp_path / name).write_bytes(b"{}")
        manifest = {
            "name": "headed",
            "modality": "text",
            "space": "headed",
            "dimensions": layers[-1]["outputs"] if layers else 6,
            "normalized": False,
            "max_input_units": 8,
            "license": "none",
            "source": "made by a test",
            "backend": "onnxruntime",
            "graph": {"file": "model.onnx", "layout": "padded", "pooling": "mean"},
            "text": {"tokenizer": "tokenizer.json"},
            **({"head": {"layers": list(layers)}} if layers else {}),
        }
        return write_manifest(tmp_path, manifest, ["model.onnx", "tokenizer.json", *files])

    return write


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("none", lambda x: x),
        ("tanh", np.tanh),
        ("relu", lambda x: np.maximum(x, 0)),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x))),
    ],
)
def test_dense(make: Make, activation: str, function: Callable[[Any], Any]) -> None:
    vectors = Head(make({**DENSE, "activation": activation}))(VECTORS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, function(VECTORS.astype(float) @ WEIGHT.T + BIAS), rtol=1e-4, atol=1e-6)


def test_dense_without_bias_in_half_precision(make: Make) -> None:
    spec = make(DENSE, weights={"dense.safetensors": {"linear.weight": WEIGHT.astype(np.float16)}})
    vectors = Head(spec)(VECTORS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, VECTORS @ WEIGHT.astype(np.float16).astype(np.float32).T, rtol=1e-5)


def test_layers_follow_each_other(make: Make) -> None:
    x = VECTORS.astype(float) @ WEIGHT.T + BIAS
    x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5) * BIAS - BIAS
    np.testing.assert_allclose(Head(make(DENSE, NORM))(VECTORS), x, rtol=1e-4, atol=1e-6)


def test_vectors_are_normalised_and_cut(make: Make) -> None:
    x = VECTORS.astype(float) @ WEIGHT.T + BIAS
    x = (x / np.linalg.norm(x, axis=1, keepdims=True))[:, :3]
    vectors = Head(make(DENSE, UNIT, CUT))(VECTORS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, x, rtol=1e-4, atol=1e-6)


def test_a_head_may_follow_a_graph_that_pools(make: Make) -> None:
    spec = make(DENSE, CUT)
    table = {key: getattr(spec, key) for key in ("name", "modality", "space", "dimensions", "normalized", "license")}
    table |= {
        "max_input_units": 8,
        "source": spec.source,
        "backend": "onnxruntime",
        "text": {"tokenizer": "tokenizer.json"},
    }
    graph = {"file": "model.onnx", "layout": "packed"}
    packed = write_manifest(spec.folder, {**table, "graph": graph, "head": {"layers": [DENSE, CUT]}}, spec.files)
    assert (packed.graph_dimensions, packed.dimensions, packed.graph.pooling) == (6, 3, "graph")


def test_no_head_changes_nothing(make: Make) -> None:
    assert Head(make())(VECTORS) is VECTORS


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"linear.weight": WEIGHT[:, :5]},
            "it holds {'linear.weight': (4, 5)}, the layer has {'linear.weight': (4, 6)}",
        ),
        ({"weight": WEIGHT}, "does not fit the manifest: it holds {'weight': (4, 6)}"),
        ({"linear.weight": WEIGHT, "residual.weight": WEIGHT}, "does not fit the manifest"),
        ({"linear.weight": WEIGHT.astype(np.int8)}, "it holds {'linear.weight': 'int8'}"),
    ],
)
def test_other_weights_are_refused(make: Make, weights: Mapping[str, Any], message: str) -> None:
    spec = make(DENSE, weights={"dense.safetensors": weights})
    with pytest.raises(ModelError) as caught:
        Head(spec)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"\xff" * 100])
def test_what_is_no_safetensors_is_refused(make: Make, content: bytes) -> None:
    spec = make(DENSE)
    spec.path("dense.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"cannot read .*dense\.safetensors"):
        Head(spec)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            (DENSE, {**NORM, "inputs": 5, "outputs": 5}),
            'head has a layer "norm.safetensors" with inputs = 5, but 4 come to it',
        ),
        (({**DENSE, "file": "other"},), 'head names "other", which is not listed in [files]'),
        (({**DENSE, "activation": "gelu"},), "head.layers.0.activation must be 'none', 'tanh', 'relu' or 'sigmoid'"),
        (({**DENSE, "kind": "conv"},), "head.layers.0.kind must be 'dense', 'layer_norm', 'normalize' or 'cut'"),
        (({"kind": "dense", "inputs": 6, "outputs": 4},), "head.layers.0.file is missing"),
        ((DENSE, {**CUT, "file": "dense.safetensors"}), "head.layers.1.file is only for kinds with weights"),
        ((DENSE, {**CUT, "outputs": 5}), "head.layers.1.outputs must be at most inputs (4) in a cut, got 5"),
        (
            (DENSE, {**UNIT, "outputs": 3}),
            "head.layers.1.outputs must be inputs (4) where all that comes is kept, got 3",
        ),
        ((DENSE, {**CUT, "inputs": 5}), 'head has a layer "cut" with inputs = 5, but 4 come to it'),
        (({**DENSE, "bias": True},), "bias is unknown"),
    ],
)
def test_a_mistake_in_the_manifest_is_named(make: Make, layers: Any, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        make(*layers)
    assert message in str(caught.value)


def test_the_head_is_part_of_the_revision(make: Make) -> None:
    revisions = {make(DENSE).revision, make({**DENSE, "activation": "tanh"}).revision, make(DENSE, NORM).revision}
    assert len(revisions) == 3
