"""Vectors of spans through a whole mesh: in the cache, in every width and type."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import embedmesh
from embedmesh import Text
from embedmesh_encoder.backend.fake import write_model as write_fake
from embedmesh_encoder.model import write_manifest

TEXT = "a text of several words"
SPANS = [(0, 6), (7, 17), (18, 23)]
RNG = np.random.default_rng(20261125)
TABLE: NDArray[np.float32] = RNG.normal(size=(262, 8)).astype(np.float32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A token's vector is a row of a table: a graph that needs no torch."""
    folder = tmp_path / "late"
    write_fake(folder)  # for its tokenizer, of one token a letter
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["n", "t"])
    output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["n", "t", 8])
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"]),
        ],
        "late",
        [ids],
        [output],
        [numpy_helper.from_array(TABLE, "table")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "model.onnx"
    )
    manifest = {
        "name": "late",
        "modality": "text",
        "space": "late",
        "dimensions": 8,
        "truncatable_dimensions": [4],
        "normalized": True,
        "max_input_units": 64,
        "license": "Apache-2.0",
        "source": "this test",
        "backend": "onnxruntime",
        "graph": {"file": "model.onnx", "layout": "padded", "pooling": "mean", "inputs": ["input_ids"]},
        "text": {"tokenizer": "tokenizer.json"},
    }
    write_manifest(folder, manifest, ["model.onnx", "tokenizer.json"])
    return folder


def unit(vector: NDArray[Any]) -> NDArray[Any]:
    normed: NDArray[Any] = vector / np.linalg.norm(vector)
    return normed


async def test_spans_through_a_mesh(start_mesh: Any, model: Path) -> None:
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(TEXT).ids[1:-1]
    pooled = [TABLE[ids[start:end]].mean(axis=0) for start, end in SPANS]
    inputs: list[str | Text] = ["a text", Text(TEXT, spans=SPANS), TEXT, Text(TEXT, span_units=10)]
    shapes: list[tuple[dict[str, Any], Any]] = [
        ({"dimensions": 4}, lambda vector: unit(vector[:4])),
        ({"normalize": False}, lambda vector: vector),
        ({"dtype": "float16"}, unit),
        ({"dtype": "int8"}, unit),
        ({"dtype": "binary"}, lambda vector: np.packbits(vector > 0)),
    ]
    async with start_mesh(text_models=(model,)) as mesh, embedmesh.AsyncClient(mesh.address) as client:
        for cached in (False, True):
            results = (await client.embed(inputs)).results
            assert [result.cached for result in results] == [cached] * 4
            assert [len(result.spans) for result in results] == [0, 3, 0, 3]
            assert [(span.start, span.end) for span in results[1].spans] == SPANS
            assert [(span.start, span.end) for span in results[3].spans] == [(0, 10), (10, 20), (20, 23)]
            np.testing.assert_array_equal(results[1].vector, results[2].vector)
            for span, vector in zip(results[1].spans, pooled, strict=True):
                np.testing.assert_allclose(span.vector, unit(vector), atol=1e-6)
        # Made of what the cache holds.
        for options, shape in shapes:
            (result,) = (await client.embed(inputs[1:2], **options)).results
            assert result.cached
            for span, vector in zip(result.spans, pooled, strict=True):
                np.testing.assert_allclose(span.vector * span.scale, shape(vector), atol=5e-3)
        bad = await client.embed([Text(TEXT, spans=[(5, 99)]), "good"])
        assert isinstance(bad.results[0].error, embedmesh.InvalidRequest)
        assert bad.results[0].error.field == "inputs[0].late_chunking.offsets"
        assert bad.results[1].error is None
