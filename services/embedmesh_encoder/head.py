"""What follows pooling in some text models: dense layers, layer norms and cuts, in numpy on the CPU.

They are sentence-transformers' modules `Dense`, `LayerNorm` and `Normalize` and its `truncate_dim`, and the whitening
of `embedmesh models whiten`, over one vector a text: so little work beside the graph that they need no backend. Weights
are read from safetensors, which hold numbers and nothing that could run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from embedmesh.vectors import l2_norms, normalized
from embedmesh_encoder.model import HeadLayer, ModelError, ModelSpec

__all__ = ["Head"]

Float32 = NDArray[np.float32]
_Function = Callable[[Float32], Float32]

# PyTorch's default; sentence-transformers' LayerNorm has no other.
_EPSILON: Final = np.float32(1e-5)


class Head:
    """The layers of a model's head; one without layers gives vectors back as they are."""

    def __init__(self, spec: ModelSpec) -> None:
        """Load the weights.

        Raises:
            ModelError: They cannot be read, or are not what the manifest says.
        """
        self._layers = [_layer(spec, layer) for layer in (spec.head.layers if spec.head else ())]

    def __call__(self, vectors: Float32) -> Float32:
        """Apply the layers: float32 [n, inputs of the first] to [n, outputs of the last]."""
        for layer in self._layers:
            vectors = layer(vectors)
        return vectors


def _layer(spec: ModelSpec, layer: HeadLayer) -> _Function:
    if layer.kind == "normalize":
        return _unit
    if layer.kind == "cut":
        return lambda vectors: vectors[:, : layer.outputs]
    path = spec.path(layer.file)
    try:
        weights = load_file(path)
    except (OSError, SafetensorError, TypeError) as error:  # TypeError: numbers that numpy does not have
        raise ModelError(f"cannot read {path}: {error}") from None
    if layer.kind == "layer_norm":
        shapes: dict[str, tuple[int, ...]] = {"norm.weight": (layer.inputs,), "norm.bias": (layer.outputs,)}
        found = _exactly(str(path), weights, shapes)
        return _norm(found["norm.weight"], found["norm.bias"])
    shapes = {"linear.weight": (layer.outputs, layer.inputs)}
    if "linear.bias" in weights:
        shapes["linear.bias"] = (layer.outputs,)
    found = _exactly(str(path), weights, shapes)
    return _dense(found["linear.weight"], found.get("linear.bias"), _ACTIVATIONS[layer.activation])


def _exactly(path: str, weights: Mapping[str, NDArray[Any]], shapes: dict[str, tuple[int, ...]]) -> dict[str, Float32]:
    """Take the weights that a layer has, and see that there are no others; in float32."""
    found = {name: array.shape if array.dtype.kind == "f" else array.dtype.name for name, array in weights.items()}
    if found != shapes:
        raise ModelError(f"{path} does not fit the manifest: it holds {found}, the layer has {shapes}")
    return {name: weights[name].astype(np.float32) for name in shapes}


def _dense(weight: Float32, bias: Float32 | None, activation: _Function) -> _Function:
    def apply(vectors: Float32) -> Float32:
        product: Float32 = vectors @ weight.T
        return activation(product if bias is None else product + bias)

    return apply


def _norm(weight: Float32, bias: Float32) -> _Function:
    def apply(vectors: Float32) -> Float32:
        centred = vectors - vectors.mean(axis=1, keepdims=True)
        spread = np.sqrt((centred * centred).mean(axis=1, keepdims=True) + _EPSILON)
        scaled: Float32 = centred / spread * weight + bias
        return scaled

    return apply


def _unit(vectors: Float32) -> Float32:
    return normalized(vectors, l2_norms(vectors))


def _same(vectors: Float32) -> Float32:
    return vectors


def _tanh(vectors: Float32) -> Float32:
    result: Float32 = np.tanh(vectors)
    return result


def _relu(vectors: Float32) -> Float32:
    result: Float32 = np.maximum(vectors, np.float32(0))
    return result


def _sigmoid(vectors: Float32) -> Float32:
    # By tanh, which cannot overflow.
    return np.float32(0.5) * (_tanh(np.float32(0.5) * vectors) + np.float32(1))


_ACTIVATIONS: Final[Mapping[str, _Function]] = {"none": _same, "tanh": _tanh, "relu": _relu, "sigmoid": _sigmoid}
