"""Texts that take several passes of the model: several instructions, and chunks of a long text."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from embedmesh import errors
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh.v1 import text_pb2
from embedmesh.vectors import decode
from embedmesh_encoder.backend import create_backend
from embedmesh_encoder.backend.fake import FAIL, NAN
from embedmesh_encoder.model import load_spec
from embedmesh_encoder.pooling import largest
from embedmesh_encoder.text import Chunking, TextItem, TextPreparer

OpenHouse = Callable[..., Awaitable[Any]]
Make = Callable[..., Any]

CHUNK = pb.TRUNCATION_CHUNK
# One token a letter.
LETTERS = "abcdefghijklmnopqrstuvwxyz"


async def pooled(encoder: Any, *texts: str) -> NDArray[np.float32]:
    """The vectors as pooled of texts that fit into one pass."""
    return np.stack([one.vector * one.norm for one in await encoder.embed([TextItem(text) for text in texts])])


def check(encoded: Any, mean: NDArray[Any]) -> None:
    np.testing.assert_allclose(encoded.vector, mean / np.linalg.norm(mean), atol=1e-6)
    assert encoded.norm == pytest.approx(np.linalg.norm(mean), rel=1e-5)


async def test_instructions_are_averaged_as_pooled(make_encoder: Make) -> None:
    encoder, gate, _ = make_encoder(model={"prompts": {"query": "query: "}})
    [got] = await encoder.embed([TextItem("text", instructions=("one: ", "another: "))])
    check(got, (await pooled(encoder, "one: text", "another: text")).mean(axis=0))
    assert (got.units, got.original_units, got.truncated) == (11 + 15, 11 + 15, False)
    assert gate.batches[0] == 2  # the passes share a batch like any inputs


async def test_chunks_are_averaged_by_their_tokens_of_text(make_encoder: Make) -> None:
    encoder, _, _ = make_encoder(model={"max_input_units": 12, "prompts": {"document": "p:"}})
    item = TextItem(LETTERS, text_pb2.TEXT_ROLE_DOCUMENT)
    [got] = await encoder.embed([item], truncation=CHUNK)
    chunks = [LETTERS[start : start + 8] for start in (0, 8, 16, 24)]
    vectors = await pooled(encoder, *("p:" + chunk for chunk in chunks))
    check(got, np.average(vectors, axis=0, weights=[8, 8, 8, 2]))
    assert (got.units, got.original_units, got.truncated) == (4 * 4 + 26, 4 * 4 + 26, False)


async def test_chunks_may_be_shorter_and_overlap(make_encoder: Make) -> None:
    encoder, _, _ = make_encoder()
    [got] = await encoder.embed([TextItem(LETTERS, chunking=Chunking(units=12, overlap=4))], truncation=CHUNK)
    chunks = [LETTERS[start : start + 10] for start in (0, 6, 12, 18)]
    check(got, np.average(await pooled(encoder, *chunks), axis=0, weights=[10, 10, 10, 8]))


async def test_instructions_and_chunks_go_together(make_encoder: Make) -> None:
    encoder, _, _ = make_encoder(model={"max_input_units": 22})
    [got] = await encoder.embed([TextItem(LETTERS, instructions=("a", "long: "))], truncation=CHUNK)
    one = np.average(await pooled(encoder, "a" + LETTERS[:19], "a" + LETTERS[19:]), axis=0, weights=[19, 7])
    two = np.average(await pooled(encoder, "long: " + LETTERS[:14], "long: " + LETTERS[14:]), axis=0, weights=[14, 12])
    check(got, (one + two) / 2)


@pytest.mark.parametrize("length", [0, 1, 29, 30])
async def test_a_text_that_fits_is_not_cut(make_encoder: Make, length: int) -> None:
    encoder, _, _ = make_encoder(model={"max_input_units": 32})
    [whole] = await encoder.embed([TextItem("x" * length)])
    [chunked] = await encoder.embed([TextItem("x" * length)], truncation=CHUNK)
    np.testing.assert_array_equal(chunked.vector, whole.vector)
    assert chunked.units == length + 2


@pytest.mark.parametrize("length", range(31, 44))
async def test_every_token_is_in_a_chunk(make_encoder: Make, length: int) -> None:
    encoder, _, _ = make_encoder(model={"max_input_units": 12})
    text = "".join(chr(33 + i) for i in range(length))
    for overlap in (0, 1, 9):
        passes = encoder._preparer.prepare(TextItem(text, chunking=Chunking(0, overlap)), CHUNK).passes
        assert sum(each.weight for each in passes) == pytest.approx(1)
        chunks = [each.data[1:-1].tolist() for each in passes]
        joined = chunks[0]
        for before, chunk in pairwise(chunks):
            assert 0 < len(chunk) <= 10
            assert before[len(before) - overlap :] == chunk[:overlap]
            assert len(chunk) > overlap  # no chunk is all repetition
            joined = joined + chunk[overlap:]
        assert len(joined) == len(set(joined)) == length


async def test_vectors_as_pooled_are_averaged_where_a_model_does_not_normalise(make_encoder: Make) -> None:
    encoder, _, _ = make_encoder(model={"normalized": False, "max_input_units": 12})
    [got] = await encoder.embed([TextItem(LETTERS[:15])], truncation=CHUNK)
    parts = await encoder.embed([TextItem(LETTERS[:10]), TextItem(LETTERS[10:15])])
    np.testing.assert_allclose(got.vector, (2 * parts[0].vector + parts[1].vector) / 3, atol=1e-6)
    assert got.norm == pytest.approx(np.linalg.norm(got.vector), rel=1e-5)


async def test_other_kinds_take_the_largest_weight_and_all_rows(make_encoder: Make) -> None:
    kinds = frozenset((pb.EMBEDDING_KIND_SPARSE, pb.EMBEDDING_KIND_MULTI_VECTOR))
    encoder, _, _ = make_encoder(
        model={"kinds": ("dense", "sparse", "multi_vector"), "max_input_units": 12, "multi_vector_dimensions": 4}
    )
    text = "abcabcabcabcxyz"
    [got] = await encoder.embed([TextItem(text)], kinds=kinds, truncation=CHUNK)
    parts = await encoder.embed([TextItem(text[:10]), TextItem(text[10:])], kinds=kinds)
    weights: dict[int, float] = {}
    for part in parts:
        for index, value in zip(*(array.tolist() for array in part.others.sparse), strict=True):
            weights[index] = max(value, weights.get(index, -1.0))
    indices, values = got.others.sparse
    assert list(zip(indices.tolist(), values.tolist(), strict=True)) == sorted(weights.items())
    rows = np.concatenate([part.others.multi_vector for part in parts])
    np.testing.assert_array_equal(got.others.multi_vector, rows)
    assert got.vector.size == 0


def test_largest_of_nothing_in_common() -> None:
    indices, values = largest(
        [
            (np.array([2, 7], np.uint32), np.array([1, 2], np.float32)),
            (np.array([2], np.uint32), np.ones(1, np.float32)),
        ]
    )
    assert (indices.tolist(), values.tolist()) == ([2, 7], [1.0, 2.0])
    assert indices.dtype == np.uint32


@pytest.mark.parametrize(
    ("given", "kind", "field", "message"),
    [
        ({"instructions": ["i"], "instruction": "j"}, errors.InvalidRequest, "instruction", "not both"),
        ({"instructions": ["i"], "role": 1}, errors.InvalidRequest, "role", "not both"),
        ({"instructions": ["i", ""]}, errors.InvalidRequest, "instructions", "empty"),
        ({"instructions": ["i"] * 10_000}, errors.InputTooLarge, "instructions", "10000 instructions, the limit is 16"),
        ({"instructions": ["i" * (1 << 20)]}, errors.InputTooLarge, "text", "bytes"),
        ({"text": "x" * (1 << 20)}, errors.InputTooLarge, "text", "104858 chunks, the limit is 128"),
        ({"text": "x" * 1300, "instructions": ["i", "j"]}, errors.InputTooLarge, "text", "chunks, the limit is 64"),
        ({"instruction": "long" * 9}, errors.InvalidRequest, "text", "has room for 0 of the text"),
    ],
)
async def test_bad_texts_fail_alone(
    open_house: OpenHouse, given: dict[str, Any], kind: Any, field: str, message: str
) -> None:
    house = await open_house({"max_input_units": 12})
    bad = text_pb2.TextInput(**{"text": LETTERS, **given})
    good = text_pb2.TextInput(text=LETTERS)
    request = text_pb2.EmbedTextRequest(inputs=[good, bad, good], truncation=CHUNK, model="fake-text")
    results = (await house.text.EmbedText(request)).results
    error = errors.from_status(results[1].error)
    assert isinstance(error, kind)
    assert error.field == f"inputs[1].{field}"
    assert message in error.message
    assert results[0].input_units == results[2].input_units == 3 * 2 + 26
    assert decode(results[0].embedding.dense).shape == (64,)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"chunking": pb.Chunking(units=10)}, "chunking"),
        ({"truncation": pb.TRUNCATION_END, "chunking": pb.Chunking()}, "chunking"),
        ({"truncation": CHUNK, "chunking": pb.Chunking(units=33)}, "chunking.units"),
        ({"truncation": CHUNK, "chunking": pb.Chunking(units=10, overlap=10)}, "chunking.overlap"),
        ({"truncation": CHUNK, "chunking": pb.Chunking(overlap=2**32 - 1)}, "chunking.overlap"),
    ],
)
async def test_chunking_that_makes_no_sense_fails_the_call(
    open_house: OpenHouse, fields: dict[str, Any], field: str
) -> None:
    house = await open_house({"max_input_units": 32})
    with pytest.raises(errors.InvalidRequest) as caught:
        try:
            await house.embed("a", **fields)
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc_error(error) from None
    assert caught.value.field == field


@pytest.mark.parametrize("poison", [FAIL, NAN])
async def test_a_chunk_that_fails_is_an_error_of_its_text_alone(make_encoder: Make, poison: str) -> None:
    encoder, _, registry = make_encoder(model={"max_input_units": 12})
    good, bad = TextItem(LETTERS), TextItem(LETTERS + poison + LETTERS)
    first, failed, last = await encoder.embed([good, bad, good], truncation=CHUNK)
    np.testing.assert_array_equal(first.vector, last.vector)
    assert isinstance(failed, errors.InferenceFailed)
    labels = {"model": "fake-text", "outcome": "INFERENCE_FAILED"}
    assert registry.get_sample_value("embedmesh_encoder_inputs_total", labels) == 1


async def test_the_rest_of_a_failed_text_leaves_the_queue(make_encoder: Make) -> None:
    encoder, gate, registry = make_encoder(model={"max_input_units": 12}, batch_cost=12)
    result = await encoder.embed([TextItem(FAIL + LETTERS * 10)], truncation=CHUNK)
    assert isinstance(result[0], errors.InferenceFailed)
    await asyncio.sleep(0)
    assert len(gate.batches) <= 2  # the next one may have left before anybody heard of the failure
    dropped = registry.get_sample_value("embedmesh_dropped_inputs_total", {"model": "fake-text", "reason": "cancelled"})
    assert dropped is not None
    assert dropped > 20


async def test_cancelling_and_deadlines_drop_all_passes(make_encoder: Make) -> None:
    encoder, gate, registry = make_encoder(model={"max_input_units": 12}, batch_cost=12)

    def queued() -> float:
        return (
            registry.get_sample_value("embedmesh_queue_inputs", {"model": "fake-text", "priority": "interactive"}) or 0
        )

    gate.shut()
    task = asyncio.create_task(encoder.embed([TextItem(LETTERS * 4)], truncation=CHUNK))
    await gate.entered(1)
    assert queued() > 5
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert queued() == 0
    soon = asyncio.get_running_loop().time() + 0.05
    with pytest.raises(errors.DeadlineExceeded):
        await encoder.embed([TextItem(LETTERS * 4)], truncation=CHUNK, deadline=soon)
    await asyncio.sleep(0)
    assert queued() == 0


async def test_a_joined_multi_vector_fits_into_a_message(make_encoder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedmesh_encoder.encoder._MULTI_VECTOR_BYTES", 30 * 4 * 16)
    encoder, _, _ = make_encoder(model={"kinds": ("multi_vector",), "max_input_units": 12})
    kinds = frozenset((pb.EMBEDDING_KIND_MULTI_VECTOR,))
    items = [TextItem(LETTERS), TextItem("ab" * 20)]
    fits, too_large = await encoder.embed(items, kinds=kinds, truncation=CHUNK)
    assert fits.others.multi_vector.shape == (29, 16)
    assert isinstance(too_large, errors.InputTooLarge)
    assert "2816 bytes, the limit is 1920" in too_large.message


def test_chunks_of_the_real_model_are_its_own_tokens(starter_model: Path) -> None:
    """Words of one token each: a chunk is what the model gives for these words alone."""
    spec = load_spec(starter_model)
    preparer, backend = TextPreparer(spec), create_backend(spec)
    words = ("the quick brown fox jumps over a lazy dog while many small birds sing in old green trees " * 8).split()

    def run(batch: Sequence[Any]) -> NDArray[np.float32]:
        return preparer.split(backend.run(preparer.collate(batch)), batch)

    passes = preparer.prepare(TextItem(" ".join(words), chunking=Chunking(units=34, overlap=8)), CHUNK).passes
    alone: list[Any] = [
        preparer.prepare(TextItem(" ".join(words[start : start + 32])), pb.TRUNCATION_END)
        for start in range(0, len(words) - 8, 24)
    ]
    assert [each.data.tolist() for each in passes] == [each.data.tolist() for each in alone]
    np.testing.assert_allclose(run(passes), run(alone), atol=1e-6)
    backend.close()
