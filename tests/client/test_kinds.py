"""Sparse and multi-vectors, of both clients: typed, checked, and refused where they were not asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import embedmesh
from embedmesh import SparseVector, vectors
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh.v1 import gateway_pb2

ALL = ("dense", "sparse", "multi_vector")


def answer_with(
    gateway: Any, spoil: Callable[[pb.Embedding], object] = lambda embedding: None
) -> Callable[[gateway_pb2.EmbedRequest, Any], gateway_pb2.EmbedResponse]:
    """Give text i the weights {i: 0.5, i + 7: 0.25}, and i + 1 rows of [i, 1]; the first answer is spoilt."""

    def answer(request: gateway_pb2.EmbedRequest, context: Any) -> gateway_pb2.EmbedResponse:
        response: gateway_pb2.EmbedResponse = gateway.answer(request)
        for item, result in zip(request.inputs, response.results, strict=True):
            number, embedding, output = int(item.text.text), result.embedding, request.output
            if pb.EMBEDDING_KIND_DENSE not in output.kinds:
                embedding.ClearField("dense")
            if pb.EMBEDDING_KIND_SPARSE in output.kinds:
                places, weights = np.array([number, number + 7], np.uint32), np.array([0.5, 0.25], np.float32)
                vectors.finish_sparse(places, weights, 100, output.dtype, embedding.sparse)
            if pb.EMBEDDING_KIND_MULTI_VECTOR in output.kinds:
                rows = np.tile(np.array([number, 1], np.float32), (number + 1, 1))
                vectors.finish_multi_vector(rows, output.dtype, embedding.multi_vector)
        spoil(response.results[0].embedding)
        return response

    return answer


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_kind_of_one_call(connect: Any, gateway: Any, dtype: str) -> None:
    gateway.on_embed = answer_with(gateway)
    response = connect(gateway.address).embed(["3", "0"], kinds=ALL, dtype=dtype)
    assert response.vectors.shape == (2, 4)
    for number, result in zip((3, 0), response.results, strict=True):
        assert result.vector[0] == number
        assert isinstance(result.sparse, SparseVector)
        assert result.sparse.indices.dtype == np.uint32
        assert result.sparse.indices.tolist() == [number, number + 7]
        assert result.sparse.values.tolist() == [0.5, 0.25]
        assert result.sparse.dimensions == 100
        assert result.multi_vector.shape == (number + 1, 2)
        assert result.multi_vector.dtype == result.sparse.values.dtype == np.dtype(dtype)
        assert not result.multi_vector.flags.writeable
    assert len(gateway.requests) == 1


def test_a_kind_that_was_not_asked_for_says_so(connect: Any, gateway: Any) -> None:
    gateway.on_embed = answer_with(gateway)
    client = connect(gateway.address)
    (dense,) = client.embed(["1"]).results
    response = client.embed(["1"], kinds=["sparse"])
    for owner, name, kind in (
        (dense, "sparse", "sparse"),
        (dense, "multi_vector", "multi_vector"),
        (response.results[0], "vector", "dense"),
        (response, "vectors", "dense"),
    ):
        with pytest.raises(ValueError, match=f"no vector of kind '{kind}' was asked for; name it in `kinds`"):
            getattr(owner, name)
    assert response.results[0].sparse.indices.tolist() == [1, 8]


def test_an_input_that_failed_raises_its_error_whatever_the_kind(connect: Any, gateway: Any) -> None:
    response = connect(gateway.address).embed(["1", "\ud800"], kinds=ALL)
    bad = response.results[1]
    for name in ("vector", "sparse", "multi_vector"):
        with pytest.raises(embedmesh.InvalidRequest):
            getattr(bad, name)


def test_streams_have_kinds_too(connect: Any, gateway: Any) -> None:
    answer = answer_with(gateway)
    gateway.on_chunk = lambda chunk, context: gateway_pb2.EmbedStreamResponse(
        sequence=chunk.sequence, response=answer(chunk.request, context)
    )
    results = connect(gateway.address).stream([str(i) for i in range(5)], kinds=["multi_vector"], chunk_inputs=2)
    assert [len(result.multi_vector) for result in results] == [1, 2, 3, 4, 5]


def test_answers_of_multi_vectors_stay_small(connect: Any, gateway: Any) -> None:
    gateway.on_embed = answer_with(gateway)
    client = connect(gateway.address)
    client.embed(["1"] * 40, kinds=ALL)
    assert sorted(len(request.inputs) for request in gateway.requests) == [8, 16, 16]
    client.embed(["1"] * 40, kinds=["sparse"])
    assert len(gateway.requests) == 4


def spoil_length(embedding: pb.Embedding) -> None:
    embedding.sparse.values.shape[0] = 1
    embedding.sparse.values.data = embedding.sparse.values.data[:4]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda embedding: embedding.ClearField("sparse"),
        lambda embedding: embedding.ClearField("multi_vector"),
        lambda embedding: embedding.multi_vector.shape.append(1),
        lambda embedding: embedding.multi_vector.shape.insert(0, 9),
        lambda embedding: embedding.sparse.indices.MergeFrom(pb.Tensor(dtype=pb.DTYPE_FLOAT32)),
        lambda embedding: embedding.sparse.values.MergeFrom(pb.Tensor(dtype=pb.DTYPE_UINT32)),
        spoil_length,
    ],
)
def test_hostile_answers_are_errors_of_their_inputs(connect: Any, gateway: Any, spoil: Any) -> None:
    gateway.on_embed = answer_with(gateway, spoil)
    bad, good = connect(gateway.address).embed(["1", "2"], kinds=ALL).results
    assert isinstance(bad.error, embedmesh.InternalError)
    assert good.sparse.indices.tolist() == [2, 9]


@pytest.mark.parametrize(
    ("kinds", "error", "message"),
    [
        ([], embedmesh.InvalidRequest, "kinds is empty; choose 'dense', 'sparse', 'multi_vector'"),
        (["colbert"], embedmesh.InvalidRequest, "kinds is 'colbert'; choose 'dense', 'sparse', 'multi_vector'"),
        ("sparse", TypeError, "kinds are many, got 'sparse'"),
        (1, TypeError, "kinds are many, got 1"),
    ],
)
def test_kinds_that_do_not_exist(connect: Any, gateway: Any, kinds: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        connect(gateway.address).embed(["1"], kinds=kinds)
    assert gateway.requests == []


def sparse(weights: dict[int, float], dimensions: int = 10) -> SparseVector:
    return SparseVector(np.array(list(weights), np.uint32), np.array(list(weights.values()), np.float16), dimensions)


def test_sparse_vectors_are_compared_by_their_inner_product() -> None:
    one = sparse({1: 0.5, 4: 2, 9: 1})
    assert one.dot(sparse({0: 3, 4: 0.25, 9: 2})) == 0.5 + 2
    assert one.dot(sparse({})) == 0
    with pytest.raises(ValueError, match="over 10 and 11 entries cannot be compared"):
        one.dot(sparse({1: 1}, 11))
