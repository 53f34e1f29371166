"""What every backend that loads a graph must do, on tiny graphs built here."""

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, save

from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_encoder.backend import BackendOptions, create_backend
from embedmesh_encoder.backend.fake import write_model as write_fake
from embedmesh_encoder.model import ModelError, ModelSpec, write_manifest
from embedmesh_encoder.text import TextItem, TextPreparer

LOCAL = ("onnxruntime", "openvino")
PADDED = {"file": "model.onnx", "layout": "padded", "pooling": "mean"}
INPUTS = ("input_ids", "attention_mask")
Shape = Sequence[str | int] | None


def graph(
    path: Path,
    *,
    inputs: Sequence[str] = INPUTS,
    kind: int = TensorProto.INT64,
    output: str = "last_hidden_state",
    shape: Shape = ("n", "length", 2),
) -> None:
    """Write a graph that gives each token the vector [id, mask]."""
    nodes = [helper.make_node("Cast", [name], [f"{name}.float"], to=TensorProto.FLOAT) for name in inputs[:2]]
    nodes += [helper.make_node("Unsqueeze", [f"{name}.float", "axes"], [f"{name}.column"]) for name in inputs[:2]]
    nodes.append(helper.make_node("Concat", [f"{name}.column" for name in inputs[:2]], [output], axis=2))
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "tiny",
            [helper.make_tensor_value_info(name, kind, ["n", "length"]) for name in inputs],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
            [helper.make_tensor("axes", TensorProto.INT64, [1], [2])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    save(model, path)


@pytest.fixture(params=LOCAL)
def backend_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def manifest(
    folder: Path, backend: str, dimensions: int = 2, tables: Mapping[str, Any] | None = None, **changes: Any
) -> ModelSpec:
    write_fake(folder)  # for its tokenizer
    entries: dict[str, Any] = {
        "name": "tiny",
        "modality": "text",
        "space": "tiny",
        "dimensions": dimensions,
        "normalized": False,
        "max_input_units": 16,
        "license": "Apache-2.0",
        "source": "this test",
        "backend": backend,
        "graph": {**PADDED, **changes},
        "text": {"tokenizer": "tokenizer.json"},
        **(tables or {}),
    }
    return write_manifest(folder, entries, ["model.onnx", "tokenizer.json"])


def test_a_padded_graph_embeds(tmp_path: Path, backend_name: str) -> None:
    graph(tmp_path / "model.onnx")
    spec = manifest(tmp_path, backend_name)
    backend = create_backend(spec, BackendOptions(intra_op_threads=1))
    assert (backend.name, backend.precision) == (backend_name, "float32")
    preparer = TextPreparer(spec)
    batch = [preparer.prepare(TextItem(text), pb.TRUNCATION_END) for text in ("", "abc")]
    vectors = preparer.split(backend.run(preparer.collate(batch)), batch)
    np.testing.assert_allclose(vectors, [[one.data.mean(), 1.0] for one in batch], rtol=1e-6)
    backend.close()


def test_several_threads_may_run_at_once(tmp_path: Path, backend_name: str) -> None:
    graph(tmp_path / "model.onnx")
    backend = create_backend(manifest(tmp_path, backend_name))
    wrong = []

    def run(value: int) -> None:
        feeds = {name: np.full((1 + value, 3), value, np.int64) for name in INPUTS}
        for _ in range(50):
            output = backend.run(feeds)["last_hidden_state"]
            if output.shape != (1 + value, 3, 2) or not (output == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=run, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_file_that_is_no_graph_is_named(tmp_path: Path, backend_name: str) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    message = rf"cannot load .*model\.onnx with {backend_name} [\d.]+: .*(rotobuf|parsed)"
    with pytest.raises(ModelError, match=message):
        create_backend(manifest(tmp_path, backend_name))


@pytest.mark.parametrize(
    ("made", "changes", "message"),
    [
        ({"inputs": ("ids", "attention_mask")}, {}, 'it has no input "input_ids" (its inputs: ids, attention_mask)'),
        (
            {"inputs": (*INPUTS, "token_type_ids")},
            {},
            "it wants inputs that the manifest does not name: token_type_ids",
        ),
        ({"kind": TensorProto.INT32}, {}, 'input "input_ids" is int32, not int64'),
        ({"output": "hidden"}, {}, 'it has no output "last_hidden_state" (its outputs: hidden)'),
        ({}, {"pooling": "graph"}, '2 axes were expected with pooling "graph"'),
        ({}, {"dimensions": 3}, "the manifest says dimensions = 3"),
    ],
)
def test_the_graph_must_be_what_the_manifest_says(
    tmp_path: Path, backend_name: str, made: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    graph(tmp_path / "model.onnx", **made)
    with pytest.raises(ModelError) as caught:
        create_backend(manifest(tmp_path, backend_name, **changes))
    assert message in str(caught.value)
    assert "does not fit model.toml" in str(caught.value)


@pytest.mark.parametrize("shape", [None, ("n", "length", "width")])
def test_a_graph_may_leave_its_output_shape_open(tmp_path: Path, backend_name: str, shape: Shape) -> None:
    graph(tmp_path / "model.onnx", shape=shape)
    create_backend(manifest(tmp_path, backend_name)).close()


def test_an_integer_output_is_refused(tmp_path: Path, backend_name: str) -> None:
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Add", ["input_ids", "attention_mask"], ["last_hidden_state"])],
            "integers",
            [helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "length", 2]) for name in INPUTS],
            [helper.make_tensor_value_info("last_hidden_state", TensorProto.INT64, ["n", "length", 2])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    save(model, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="is int64, not float32"):
        create_backend(manifest(tmp_path, backend_name))


KINDS: dict[str, Any] = {
    "kinds": ["dense", "sparse", "multi_vector"],
    "sparse": {"output": "weights", "pooling": "tokens", "dimensions": 300},
    "multi_vector": {"output": "rows", "dimensions": 2, "normalized": False},
}


def graph_of_kinds(path: Path) -> None:
    """Write one that gives each token its id as weight, and [id, id] as row; and [mean id, mean id] for the text."""
    shapes = {"rows": ("n", "length", 2), "weights": ("n", "length", 1), "sentence": ("n", 2)}
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["ids", "mask"], ["real"]),
        helper.make_node("Unsqueeze", ["real", "axes"], ["weights"]),
        helper.make_node("Concat", ["weights", "weights"], ["rows"], axis=2),
        helper.make_node("ReduceMean", ["rows"], ["sentence"], axes=[1], keepdims=0),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "kinds",
            [helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "length"]) for name in INPUTS],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
            [helper.make_tensor("axes", TensorProto.INT64, [1], [2])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    save(model, path)


def test_a_graph_gives_several_outputs_or_those_asked_for(tmp_path: Path, backend_name: str) -> None:
    graph_of_kinds(tmp_path / "model.onnx")
    spec = manifest(tmp_path, backend_name, pooling="graph", output="sentence", tables=KINDS)
    backend = create_backend(spec)
    preparer = TextPreparer(spec)
    batch = [preparer.prepare(TextItem(text), pb.TRUNCATION_END) for text in ("ba", "abca")]
    batch = [dataclasses.replace(one, kinds=frozenset(spec.kinds)) for one in batch]
    feeds = preparer.collate(batch)
    outputs = backend.run(feeds)
    assert set(outputs) == {"sentence", "weights", "rows"}
    some = backend.run(feeds, ["rows", "weights"])
    assert list(some) == ["rows", "weights"]
    for name, output in some.items():
        np.testing.assert_array_equal(output, outputs[name])
    for other, prepared in zip(preparer.split_others(outputs, batch), batch, strict=True):
        assert other.sparse is not None
        assert other.multi_vector is not None
        assert other.sparse[0].tolist() == other.sparse[1].tolist() == sorted(set(prepared.data.tolist()))
        np.testing.assert_array_equal(other.multi_vector, np.stack([prepared.data] * 2, axis=1))
    backend.close()


@pytest.mark.parametrize(
    ("kind", "table", "message"),
    [
        ("sparse", {"output": "logits"}, 'no output "logits" (its outputs: '),
        ("sparse", {"output": "rows"}, "one weight a token was expected"),
        ("sparse", {"output": "rows", "pooling": "max"}, "the manifest says sparse.dimensions = 300"),
        ("sparse", {"output": "rows", "pooling": "graph"}, '2 axes were expected with pooling "graph"'),
        ("multi_vector", {"output": "sentence"}, "3 axes were expected"),
        ("multi_vector", {"dimensions": 3}, "the manifest says multi_vector.dimensions = 3"),
    ],
)
def test_the_outputs_of_other_kinds_must_be_what_the_manifest_says(
    tmp_path: Path, backend_name: str, kind: str, table: dict[str, Any], message: str
) -> None:
    graph_of_kinds(tmp_path / "model.onnx")
    tables = {**KINDS, kind: {**KINDS[kind], **table}}
    with pytest.raises(ModelError) as caught:
        create_backend(manifest(tmp_path, backend_name, pooling="graph", output="sentence", tables=tables))
    assert message in str(caught.value)
