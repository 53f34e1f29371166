"""Dense, sparse and multi-vectors of one text, in one call and one run of the graph, on the fake backend."""

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from embedmesh import errors
from embedmesh.v1 import catalog_pb2, text_pb2
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh.vectors import decode
from embedmesh_encoder.backend.fake import FAIL, NAN, FakeBackend, write_model
from embedmesh_encoder.model import ModelError, ModelSpec
from embedmesh_encoder.text import TextItem, TextPreparer

OpenHouse = Callable[..., Awaitable[Any]]

DENSE, SPARSE, MULTI = pb.EMBEDDING_KIND_DENSE, pb.EMBEDDING_KIND_SPARSE, pb.EMBEDDING_KIND_MULTI_VECTOR
ALL: dict[str, Any] = {"kinds": ("dense", "sparse", "multi_vector")}
TEXTS = ["abcabc", "", "the quick. brown. fox", "....", "z" * 500]


def expected(spec: ModelSpec, text: str, *, query: bool = False) -> tuple[dict[int, float], NDArray[Any]]:
    """Pool what the fake gives for a text alone, token by token, as BGE-M3's own code does."""
    assert spec.sparse is not None
    assert spec.multi_vector is not None
    prepared = TextPreparer(spec).prepare(TextItem(text), pb.TRUNCATION_END)
    count = prepared.units
    feeds = {
        "input_ids": prepared.data[None],
        "position_ids": np.arange(count)[None],
        "segment_ids": np.zeros((1, count), np.int64),
    }
    outputs = FakeBackend(spec).run(feeds)
    weights: dict[int, float] = {}
    rows = []
    for position, token in enumerate(prepared.data.tolist()):
        weight = float(outputs["token_weights"][0, position, 0])
        if token not in spec.sparse.skip_tokens and weight > 0:
            weights[token] = max(weight, weights.get(token, 0.0))
        if position > 0 and (query or token not in spec.multi_vector.skip_tokens):
            rows.append(outputs["token_vectors"][0, position])
    matrix = np.array(rows, np.float32).reshape(-1, spec.multi_vector.dimensions)
    return weights, matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def check(embedding: pb.Embedding, wanted: tuple[dict[int, float], NDArray[Any]]) -> None:
    weights, rows = wanted
    indices = decode(embedding.sparse.indices)
    assert indices.dtype == np.uint32
    assert dict(zip(indices.tolist(), decode(embedding.sparse.values).tolist(), strict=True)) == weights
    assert (np.diff(indices.astype(np.int64)) > 0).all()
    found = decode(embedding.multi_vector)
    assert found.shape == rows.shape
    np.testing.assert_allclose(found, rows, atol=1e-6)


async def test_one_call_gives_all_kinds_in_one_run_of_the_graph(open_house: OpenHouse) -> None:
    house = await open_house(ALL)
    spec = house.models.specs[0]
    response = await house.embed(*TEXTS, output=pb.OutputOptions(kinds=[DENSE, SPARSE, MULTI]))
    dense = await house.embed(*TEXTS)
    assert sum(house.gate.batches) == 2 * len(TEXTS)
    for text, result, alone in zip(TEXTS, response.results, dense.results, strict=True):
        check(result.embedding, expected(spec, text))
        assert result.embedding.dense == alone.embedding.dense
        assert result.embedding.dense_norm == alone.embedding.dense_norm
        assert (result.input_units, result.truncated) == (alone.input_units, alone.truncated)
        assert not alone.embedding.HasField("sparse")
        assert not alone.embedding.HasField("multi_vector")
    assert response.results[-1].truncated
    assert response.usage.input_units == dense.usage.input_units


async def test_no_output_is_taken_from_the_graph_that_nobody_wants(open_house: OpenHouse) -> None:
    house = await open_house(ALL)
    for kinds, names in (
        ([], ("sentence_embedding",)),
        ([SPARSE], ("token_weights",)),
        ([MULTI, DENSE], ("sentence_embedding", "token_vectors")),
    ):
        house.gate.outputs.clear()
        await house.embed("a", output=pb.OutputOptions(kinds=kinds))
        assert house.gate.outputs == [names]


async def test_callers_of_unlike_kinds_share_a_batch(open_house: OpenHouse) -> None:
    house = await open_house(ALL)
    spec = house.models.specs[0]
    running = await house.block()
    wishes = [[DENSE], [SPARSE], [MULTI], [DENSE, SPARSE, MULTI]]
    calls = [house.embed(f"text {i}", output=pb.OutputOptions(kinds=kinds)) for i, kinds in enumerate(wishes)]
    await house.until(lambda: house.sample("queue_cost_units") == sum(2 + len(f"text {i}") for i in range(4)))
    house.gate.open()
    await running
    for i, (kinds, call) in enumerate(zip(wishes, calls, strict=True)):
        (result,) = (await call).results
        embedding = result.embedding
        found = (embedding.HasField("dense"), embedding.HasField("sparse"), embedding.HasField("multi_vector"))
        assert found == (DENSE in kinds, SPARSE in kinds, MULTI in kinds)
        if len(kinds) == 3:
            check(embedding, expected(spec, f"text {i}"))
    assert house.gate.batches == [1, 4]


async def test_punctuation_is_left_out_of_documents_only(open_house: OpenHouse) -> None:
    house = await open_house(ALL)
    request = text_pb2.EmbedTextRequest(output=pb.OutputOptions(kinds=[SPARSE, MULTI]))
    request.inputs.add(text="a.b.", role=text_pb2.TEXT_ROLE_QUERY)
    request.inputs.add(text="a.b.", role=text_pb2.TEXT_ROLE_DOCUMENT)
    query, document = (await house.text.EmbedText(request)).results
    check(query.embedding, expected(house.models.specs[0], "a.b.", query=True))
    check(document.embedding, expected(house.models.specs[0], "a.b."))
    assert (query.embedding.multi_vector.shape[0], document.embedding.multi_vector.shape[0]) == (5, 3)


@pytest.mark.parametrize("kinds", [[SPARSE], [MULTI], [DENSE, SPARSE, MULTI]])
async def test_numbers_that_are_not_finite_never_leave(
    open_house: OpenHouse, kinds: list[pb.EmbeddingKind.ValueType]
) -> None:
    house = await open_house(ALL)
    response = await house.embed("a", f"b{NAN}", "c", output=pb.OutputOptions(kinds=kinds))
    assert [result.HasField("error") for result in response.results] == [False, True, False]
    assert isinstance(errors.from_status(response.results[1].error), errors.InferenceFailed)
    assert response.usage.failed_inputs == 1
    assert house.sample("nonfinite_vectors_total") == 1
    failed = await house.embed("a", FAIL, output=pb.OutputOptions(kinds=kinds))
    assert [result.HasField("error") for result in failed.results] == [False, True]


async def test_a_model_without_dense_vectors(open_house: OpenHouse) -> None:
    house = await open_house({"kinds": ("multi_vector",), "truncatable_dimensions": (), "multi_vector_dimensions": 5})
    (result,) = (await house.embed("ab", output=pb.OutputOptions(kinds=[MULTI]))).results
    assert list(result.embedding.multi_vector.shape) == [3, 5]
    assert not result.embedding.HasField("dense")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await house.embed("ab")
    error = errors.from_rpc_error(caught.value)
    assert isinstance(error, errors.UnsupportedOutput)
    assert error.message.endswith("no vectors of kind EMBEDDING_KIND_DENSE, only EMBEDDING_KIND_MULTI_VECTOR")
    (info,) = (await house.catalog.ListModels(catalog_pb2.ListModelsRequest())).models
    assert (list(info.kinds), info.dimensions, info.sparse_dimensions, info.multi_vector_dimensions) == (
        [MULTI],
        0,
        0,
        5,
    )


@pytest.mark.parametrize(
    ("output", "option", "words"),
    [
        ({"kinds": [SPARSE], "dimensions": 64}, "dimensions", "for vectors of kind DENSE"),
        ({"kinds": [SPARSE, MULTI], "normalize": True}, "normalize", "for vectors of kind DENSE"),
        ({"kinds": [MULTI], "dtype": pb.DTYPE_BINARY}, "dtype", "FLOAT32 or FLOAT16"),
        ({"kinds": [DENSE, SPARSE], "dtype": pb.DTYPE_INT8}, "dtype", "FLOAT32 or FLOAT16"),
    ],
)
async def test_options_that_a_kind_does_not_have_are_refused_with_what_is_offered(
    open_house: OpenHouse, output: Mapping[str, Any], option: str, words: str
) -> None:
    house = await open_house(ALL)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await house.embed("a", output=pb.OutputOptions(**output))
    error = errors.from_rpc_error(caught.value)
    assert isinstance(error, errors.UnsupportedOutput)
    assert (error.field, error.metadata["option"]) == (f"output.{option}", option)
    assert words in error.message
    assert house.gate.batches == []


async def test_half_the_bytes(open_house: OpenHouse) -> None:
    house = await open_house(ALL)
    output = pb.OutputOptions(kinds=[DENSE, SPARSE, MULTI], dtype=pb.DTYPE_FLOAT16)
    (result,) = (await house.embed("abc", output=output)).results
    weights, rows = expected(house.models.specs[0], "abc")
    assert decode(result.embedding.dense).dtype == np.float16
    np.testing.assert_allclose(decode(result.embedding.sparse.values), [weights[i] for i in sorted(weights)], rtol=1e-3)
    np.testing.assert_allclose(decode(result.embedding.multi_vector), rows, atol=1e-3)


@pytest.mark.parametrize("row_width", [0, 8])
def test_texts_are_found_again_in_packed_rows(tmp_path: Path, row_width: int) -> None:
    spec = write_model(tmp_path, **ALL, max_input_units=16)
    preparer = TextPreparer(spec, row_width=row_width, row_multiple=4)
    backend = FakeBackend(spec)

    def rows(*texts: str) -> list[bytes]:
        batch = [preparer.prepare(TextItem(text), pb.TRUNCATION_END) for text in texts]
        vectors = backend.run(preparer.collate(batch))["token_vectors"]
        return [vectors[place].tobytes() for place in preparer._places(batch)]

    texts = ["abc", "d", "efghijklm", "", "no", "pqrstuvwxyz"]
    assert rows(*texts) == [rows(text)[0] for text in texts]


def test_a_tokenizer_with_more_tokens_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    spec = write_model(tmp_path, **ALL)
    assert spec.sparse is not None
    small = spec.model_copy(update={"sparse": spec.sparse.model_copy(update={"dimensions": 100})})
    with pytest.raises(ModelError, match=r"has 262 tokens, too many for sparse\.dimensions = 100"):
        TextPreparer(small)
