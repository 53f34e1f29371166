"""From trained weights to model folders: an ONNX graph with float16 weights, cast when it is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from embedmesh_encoder.model import ModelSpec, write_manifest
from starter.material import ROOT
from starter.towers import DIMENSIONS, AudioTower, ImageTower

__all__ = ["MODELS", "export_audio", "export_image"]

MODELS: Final = ROOT / "services" / "starter" / "models"
_OPSET: Final = 20
_WINDOW_FRAMES: Final = 300
_MANIFEST: Final[dict[str, Any]] = {
    "family": "starter",
    "space": "all-MiniLM-L6-v2",
    "dimensions": DIMENSIONS,
    "normalized": True,
    "license": "Apache-2.0",
    "source": "services/starter",
    "backend": "onnxruntime",
}


def export_image(tower: ImageTower, processor: Mapping[str, Any], folder: Path = MODELS / "image") -> ModelSpec:
    """Write the image tower as a model folder."""
    graph = _Graph()
    x = graph.conv("pixel_values", tower.stem[0], tower.stem[1], relu=True)
    for block in tower.body:
        y = graph.conv(x, block.first, block.first_norm, relu=True)
        y = graph.conv(y, block.second, block.second_norm)
        if not isinstance(block.short, nn.Identity):
            if isinstance(block.short[0], nn.AvgPool2d):
                x = graph.add("AveragePool", [x], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
            x = graph.conv(x, block.short[1], block.short[2])
        x = graph.add("Relu", [graph.add("Add", [y, x])])
    axes = graph.constant(np.array([2, 3], np.int64))
    pooled = [graph.add(name, [x, axes], keepdims=0) for name in ("ReduceMean", "ReduceMax")]
    graph.linear(graph.add("Concat", pooled, axis=1), tower.head, output="image_embeds")
    side = processor["size"]["height"]
    return _write(
        folder,
        graph.model({"pixel_values": (TensorProto.FLOAT, ["n", 3, side, side])}, "image_embeds"),
        processor,
        {
            "name": "starter-image",
            "modality": "image",
            "max_input_units": side * side // 256,
            "graph": {"file": "model.onnx", "layout": "stacked", "inputs": ["pixel_values"], "output": "image_embeds"},
            "image": {"processor": "preprocessor_config.json"},
        },
    )


def export_audio(tower: AudioTower, processor: Mapping[str, Any], folder: Path = MODELS / "audio") -> ModelSpec:
    """Write the audio tower as a model folder."""
    graph = _Graph()
    one = graph.constant(np.array([1], np.int64))
    two = graph.constant(np.array([2], np.int64))
    mask = graph.add("Unsqueeze", [graph.add("Cast", ["attention_mask"], to=TensorProto.FLOAT), one])
    x = graph.add("Mul", [graph.add("Transpose", ["input_features"], perm=[0, 2, 1]), mask])
    for block in tower.body:
        short = x if isinstance(block.short, nn.Identity) else graph.conv(x, block.short, None)
        if block.stride > 1:
            first, last = graph.constant(np.array([0], np.int64)), graph.constant(np.array([2**31], np.int64))
            mask = graph.add("Slice", [mask, first, last, two, graph.constant(np.array([block.stride], np.int64))])
        y = graph.add("Mul", [graph.conv(x, block.first, block.first_norm, relu=True), mask])
        y = graph.add("Relu", [graph.add("Add", [graph.conv(y, block.second, block.second_norm), short])])
        x = graph.add("Mul", [y, mask])
    outside = graph.add("Sub", [mask, graph.constant(np.array(1, np.float32))])
    outside = graph.add("Mul", [outside, graph.constant(np.array(1e4, np.float32))])
    scores = graph.add("Add", [graph.conv(x, tower.attention, None), outside])
    weights = graph.add("Softmax", [scores], axis=2)
    attended = graph.add("MatMul", [weights, graph.add("Transpose", [x], perm=[0, 2, 1])])
    maxima = graph.add("ReduceMax", [x, two], keepdims=0)
    pooled = graph.add("Concat", [graph.add("Flatten", [attended], axis=1), maxima], axis=1)
    hidden = graph.add("Relu", [graph.linear(pooled, tower.head[0])])
    graph.linear(hidden, tower.head[2], output="audio_embeds")
    inputs = {
        "input_features": (TensorProto.FLOAT, ["n", "frames", processor["num_mels"]]),
        "attention_mask": (TensorProto.INT64, ["n", "frames"]),
    }
    return _write(
        folder,
        graph.model(inputs, "audio_embeds"),
        processor,
        {
            "name": "starter-audio",
            "modality": "audio",
            "max_input_units": 20 * _WINDOW_FRAMES,
            "graph": {"file": "model.onnx", "layout": "stacked", "inputs": list(inputs), "output": "audio_embeds"},
            "audio": {"processor": "preprocessor_config.json", "window_units": _WINDOW_FRAMES},
        },
    )


class _Graph:
    """Collects nodes and weights; every value gets a number for a name."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def add(self, kind: str, inputs: Sequence[str], *, output: str = "", **attributes: Any) -> str:
        """Add a node with one output; gives its name."""
        name = output or f"v{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def constant(self, value: NDArray[Any]) -> str:
        """Add a value as it is."""
        self._weights.append(numpy_helper.from_array(value, f"c{len(self._weights)}"))
        return str(self._weights[-1].name)

    def weight(self, value: NDArray[np.float32]) -> str:
        """Add a weight in float16, and its cast to float32."""
        return self.add("Cast", [self.constant(value.astype(np.float16))], to=TensorProto.FLOAT)

    def conv(
        self,
        x: str,
        conv: nn.Conv1d | nn.Conv2d,
        norm: nn.BatchNorm1d | nn.BatchNorm2d | None,
        *,
        relu: bool = False,
    ) -> str:
        """Add a convolution with the normalisation behind it folded in."""
        weight = conv.weight.detach().double().numpy()
        bias = np.zeros(len(weight)) if conv.bias is None else conv.bias.detach().double().numpy()
        if norm is not None:
            assert norm.running_mean is not None and norm.running_var is not None  # noqa: S101, PT018
            mean, variance = norm.running_mean.double().numpy(), norm.running_var.double().numpy()
            factor = norm.weight.detach().double().numpy() / np.sqrt(variance + norm.eps)
            weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
            bias = (bias - mean) * factor + norm.bias.detach().double().numpy()
        pads = [int(p) for p in conv.padding] * 2
        strides = [int(s) for s in conv.stride]
        inputs = [x, self.weight(weight.astype(np.float32)), self.constant(bias.astype(np.float32))]
        y = self.add("Conv", inputs, pads=pads, strides=strides)
        return self.add("Relu", [y]) if relu else y

    def linear(self, x: str, layer: nn.Linear, *, output: str = "") -> str:
        """Add a linear layer."""
        weight = self.weight(layer.weight.detach().numpy())
        bias = self.constant(layer.bias.detach().numpy())
        return self.add("Gemm", [x, weight, bias], transB=1, output=output)

    def model(self, inputs: Mapping[str, tuple[int, list[Any]]], output: str) -> onnx.ModelProto:
        """Give the whole model, checked."""
        graph = helper.make_graph(
            self._nodes,
            "tower",
            [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", DIMENSIONS])],
            self._weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model


def _write(
    folder: Path, model: onnx.ModelProto, processor: Mapping[str, Any], manifest: Mapping[str, Any]
) -> ModelSpec:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    return write_manifest(folder, _MANIFEST | dict(manifest), ["model.onnx", "preprocessor_config.json"])
