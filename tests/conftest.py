"""What tests of several packages share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from embedmesh_cli.starter import ensure_starter
from embedmesh_encoder.model import write_manifest

# Of the towers below.
DIMENSIONS = 16
IMAGE_CONFIG: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
}
AUDIO_CONFIG: dict[str, Any] = {"feature_extractor_type": "EmbedMeshLogMel"}


@pytest.fixture(scope="session")
def starter_model() -> Path:
    """Folder of the real text model, made in the user's cache the first time."""
    return ensure_starter(lambda line: None)


@pytest.fixture(scope="session")
def tower_weights() -> Callable[[str], Any]:
    """The one matrix of a tower: float32 [3, 16] for images, [64, 16] for sounds."""

    def weights(modality: str) -> Any:
        rows = {"image": 3, "audio": 64}[modality]
        return np.random.default_rng(rows).normal(size=(rows, DIMENSIONS)).astype(np.float32)

    return weights


@pytest.fixture(scope="session")
def make_tower(tower_weights: Any) -> Callable[..., Path]:
    """Make the folder of a real, tiny ONNX model: the mean over pixels or frames, times a matrix.

    `masked`: sounds of all lengths share a batch, told apart by an attention mask. `busy`: every batch multiplies two
    matrices of so many rows and columns besides, which changes no vector and takes its time.
    """

    def make(folder: Path, modality: str, *, masked: bool = True, busy: int = 0, **changes: Any) -> Path:
        folder.mkdir(parents=True)
        float32, int64 = TensorProto.FLOAT, TensorProto.INT64
        weights = numpy_helper.from_array(tower_weights(modality), "weights")
        axes = numpy_helper.from_array(np.array([2, 3] if modality == "image" else [1]), "axes")
        if modality == "image":
            name, config, units = "pixel_values", IMAGE_CONFIG, 4
            inputs = [helper.make_tensor_value_info(name, float32, ["n", 3, "h", "w"])]
            nodes = [helper.make_node("ReduceMean", [name, "axes"], ["mean"], keepdims=0)]
        else:
            name, config, units = "input_features", AUDIO_CONFIG, 1000
            inputs = [helper.make_tensor_value_info(name, float32, ["n", "t", 64])]
            nodes = [helper.make_node("ReduceMean", [name, "axes"], ["mean"], keepdims=0)]
        constants = [weights, axes]
        if masked and modality == "audio":
            inputs.append(helper.make_tensor_value_info("attention_mask", int64, ["n", "t"]))
            constants.append(numpy_helper.from_array(np.array([2]), "last"))
            nodes = [
                helper.make_node("Cast", ["attention_mask"], ["mask"], to=float32),
                helper.make_node("Unsqueeze", ["mask", "last"], ["wide"]),
                helper.make_node("Mul", [name, "wide"], ["heard"]),
                helper.make_node("ReduceSum", ["heard", "axes"], ["sum"], keepdims=0),
                helper.make_node("ReduceSum", ["mask", "axes"], ["count"], keepdims=1),
                helper.make_node("Div", ["sum", "count"], ["mean"]),
            ]
        nodes.append(helper.make_node("MatMul", ["mean", "weights"], ["embeds" if not busy else "products"]))
        if busy:
            constants.append(numpy_helper.from_array(np.array([busy, busy]), "square"))
            constants.append(numpy_helper.from_array(np.zeros(1, np.float32), "nothing"))
            nodes += [
                helper.make_node("ReduceMean", ["products"], ["number"]),
                helper.make_node("Expand", ["number", "square"], ["matrix"]),
                helper.make_node("MatMul", ["matrix", "matrix"], ["product"]),
                helper.make_node("ReduceMean", ["product"], ["another"]),
                helper.make_node("Mul", ["another", "nothing"], ["zero"]),
                helper.make_node("Add", ["products", "zero"], ["embeds"]),
            ]
        outputs = [helper.make_tensor_value_info("embeds", float32, ["n", DIMENSIONS])]
        graph = helper.make_graph(nodes, "tower", inputs, outputs, constants)
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "m.onnx"
        )
        (folder / "preprocessor_config.json").write_text(json.dumps(config | changes.pop("config", {})))
        manifest = {
            "name": f"tiny-{modality}",
            "family": "tiny",
            "modality": modality,
            "space": "tiny",
            "dimensions": DIMENSIONS,
            "normalized": True,
            "max_input_units": units,
            "license": "Apache-2.0",
            "source": "made by a test",
            "backend": "onnxruntime",
            "graph": {
                "file": "m.onnx",
                "layout": "stacked",
                "inputs": [one.name for one in inputs],
                "output": "embeds",
            },
            modality: {"processor": "preprocessor_config.json"},
        }
        write_manifest(folder, manifest | changes, ["m.onnx", "preprocessor_config.json"])
        return folder

    return make
