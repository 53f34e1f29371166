"""Graphs as disks, downloads and exporters break them: each is told by folder, file and remedy."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from embedmesh_encoder.backend import create_backend
from embedmesh_encoder.model import ModelError, ModelSpec, load_spec, verify_files
from embedmesh_encoder.text import TextPreparer

DATA = "model.onnx_data"
Describe = Callable[..., ModelSpec]


@pytest.fixture
def describe(describe: Describe) -> Describe:
    """For a graph of `graph`."""
    table = {"file": "model.onnx", "layout": "padded", "pooling": "mean", "inputs": ["input_ids"]}
    return partial(describe, graph=table)


def graph(*, opset: int = 17, ir_version: int = 9, operator: str = "Mul") -> onnx.ModelProto:
    """Make a graph that gives each token [id, id], times weights of one."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "length"]) for name in ("input_ids",)]
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["numbers", "axes"], ["column"]),
        helper.make_node(operator, ["column", "weights"], ["last_hidden_state"]),
    ]
    output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["n", "length", 2])
    constants = [
        helper.make_tensor("axes", TensorProto.INT64, [1], [2]),
        numpy_helper.from_array(np.ones(2, np.float32), "weights"),
    ]
    return helper.make_model(
        helper.make_graph(nodes, "tiny", inputs, [output], constants),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=ir_version,
    )


def truncated(path: Path) -> None:
    path.write_bytes(graph().SerializeToString()[:-5])


def page(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")


def opset(path: Path) -> None:
    onnx.save(graph(opset=99), path)


def ir_version(path: Path) -> None:
    onnx.save(graph(ir_version=99), path)


def operator(path: Path) -> None:
    onnx.save(graph(operator="Frobnicate"), path)


def without_data(path: Path) -> None:
    onnx.save(graph(), path, save_as_external_data=True, location=DATA, size_threshold=0)
    (path.parent / DATA).unlink()


def short_data(path: Path) -> None:
    onnx.save(graph(), path, save_as_external_data=True, location=DATA, size_threshold=0)
    (path.parent / DATA).write_bytes(b"\0\0\0\0")


def unlike_the_manifest(path: Path) -> None:
    model = graph()
    model.graph.node[-1].output[0] = model.graph.output[0].name = "logits"
    onnx.save(model, path)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncated, "is no ONNX graph, or only a part of one: fetch or export the model again"),
        (page, "is no ONNX graph, or only a part of one: fetch or export the model again"),
        (operator, "it knows no operator Frobnicate: export the model without it"),
        (without_data, "beside the graph are missing or cut short: fetch the model again with all its files"),
        (short_data, "beside the graph are missing or cut short: fetch the model again with all its files"),
        (unlike_the_manifest, 'does not fit model.toml: it has no output "last_hidden_state" (its outputs: logits)'),
    ],
)
def test_a_broken_graph(
    tmp_path: Path, describe: Describe, backend: str, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(tmp_path / "model.onnx")
    with pytest.raises(ModelError) as caught:
        create_backend(describe(backend=backend))
    message = str(caught.value)
    assert words in message
    assert str(tmp_path / "model.onnx") in message
    assert "\n" not in message


# openvino goes by the operators, and reads both.
@pytest.mark.parametrize(
    ("spoil", "words"),
    [(opset, "the graph is of opset 99, and opset "), (ir_version, "the graph is of IR version 99, and ")],
)
def test_a_graph_of_the_future(tmp_path: Path, describe: Describe, spoil: Callable[[Path], None], words: str) -> None:
    spoil(tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=words + r"\d+ is the newest that can be read: export the model with that one"):
        create_backend(describe())


def test_a_file_that_is_another(tmp_path: Path, describe: Describe) -> None:
    onnx.save(graph(), tmp_path / "model.onnx")
    spec = describe()
    (tmp_path / "model.onnx").write_bytes(b"another")
    with pytest.raises(ModelError, match=r'model\.toml: file "model.onnx" has sha256 .* fetch the model again'):
        verify_files(spec)


def test_tokenizers(tmp_path: Path, describe: Describe) -> None:
    onnx.save(graph(), tmp_path / "model.onnx")
    (tmp_path / "tokenizer.json").write_text("")
    spec = describe()
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "None"}}')
    with pytest.raises(ModelError, match=r"cannot read the tokenizer .*/tokenizer\.json: .* fetch the model again"):
        TextPreparer(spec)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r'model\.toml: .*"tokenizer\.json" is missing .*: fetch the model again'):
        load_spec(tmp_path)
