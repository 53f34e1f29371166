"""Spans of a text: which tokens they are, and what is refused."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedmesh import errors
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh.v1 import text_pb2
from embedmesh_encoder.backend.fake import write_model
from embedmesh_encoder.model import GraphSpec, load_spec
from embedmesh_encoder.text import LateChunking, TextItem, TextPreparer

OpenHouse = Callable[..., Awaitable[Any]]


def padded(spec: Any) -> TextPreparer:
    """The preparer of a model like `spec` whose graph gives a vector for each token."""
    graph = GraphSpec(layout="padded", file="model.onnx", pooling="mean")
    return TextPreparer(spec.model_copy(update={"graph": graph}))


@pytest.fixture(scope="module")
def preparer(tmp_path_factory: pytest.TempPathFactory) -> TextPreparer:
    return padded(write_model(tmp_path_factory.mktemp("late"), prompts={"query": "q: "}, max_input_units=2000))


def late(text: str, *offsets: int, units: int = 0, role: Any = 0) -> TextItem:
    return TextItem(text, role, late_chunking=LateChunking(offsets, units))


def spans(preparer: TextPreparer, item: TextItem) -> list[Any]:
    prepared = preparer.prepare(item, pb.TRUNCATION_END)
    assert prepared.spans is not None
    return list(prepared.spans.tolist())


def test_spans_are_the_tokens_that_end_in_them(preparer: TextPreparer) -> None:
    assert spans(preparer, late("hello world", 0, 5, 5, 11)) == [[1, 6], [6, 12]]
    # Behind a prompt, with gaps, overlapping.
    assert spans(preparer, late("hello world", 1, 3, 2, 11, role=1)) == [[5, 7], [6, 15]]
    # Letters outside of ASCII take several tokens: characters, not bytes, are counted.
    prepared = preparer.prepare(late("aß文b", 0, 2, 2, 3, 3, 4), pb.TRUNCATION_END)
    assert prepared.spans is not None
    assert prepared.spans.tolist() == [[1, 4], [4, 7], [7, 8]]


def test_spans_of_so_many_tokens(preparer: TextPreparer) -> None:
    for length in range(1, 12):
        prepared = preparer.prepare(late("x" * length, units=3), pb.TRUNCATION_END)
        assert prepared.offsets is not None
        assert prepared.offsets.tolist() == [[start, min(start + 3, length)] for start in range(0, length, 3)]
    assert preparer.prepare(late("文文", units=1), pb.TRUNCATION_END).offsets.tolist() == [[0, 1], [1, 2]]  # type: ignore[union-attr]
    assert preparer.prepare(late("", units=1), pb.TRUNCATION_END).spans is None
    assert preparer.prepare(late("x" * 9, units=2**32 - 1), pb.TRUNCATION_END).offsets.tolist() == [[0, 9]]  # type: ignore[union-attr]


def test_words_of_the_real_tokenizer(starter_model: Path) -> None:
    preparer = padded(load_spec(starter_model))
    text = "Unbelievably, the café (of old) closed."
    words = ["Unbelievably,", "the", "café", "(of old)", "closed."]
    places = [(text.index(word), text.index(word) + len(word)) for word in words]
    prepared = preparer.prepare(late(text, *np.ravel(places).tolist()), pb.TRUNCATION_END)
    assert prepared.spans is not None
    for word, (start, end) in zip(words, prepared.spans.tolist(), strict=True):
        alone = preparer.prepare(TextItem(word), pb.TRUNCATION_END).data[1:-1]
        assert prepared.data[start:end].tolist() == alone.tolist()


def test_a_vector_is_the_mean_of_its_tokens(preparer: TextPreparer) -> None:
    prepared = preparer.prepare(late("abcdef", 0, 2, 3, 4), pb.TRUNCATION_END)
    hidden = np.random.default_rng(1).normal(size=(2, 9, 4)).astype(np.float32)
    got = preparer.split_spans({"last_hidden_state": hidden}, 1, prepared)
    np.testing.assert_allclose(got, [hidden[1, 1:3].mean(axis=0), hidden[1, 4]], atol=1e-6)


@pytest.mark.parametrize(
    ("offsets", "units", "message"),
    [
        ((), 0, "either offsets or units"),
        ((0, 1), 1, "either offsets or units"),
        ((0, 1, 2), 0, "3 offsets make no pairs"),
        ((0, 0), 0, "span 0 is characters 0 to 0"),
        ((3, 2), 0, "span 0 is characters 3 to 2"),
        ((0, 5), 0, "within the 4 characters"),
        ((0, 2**32 - 1), 0, "within the 4 characters"),
        ((2, 3, 1, 2), 0, "span 1 is characters 1 to 2"),
    ],
)
def test_spans_that_make_no_sense(preparer: TextPreparer, offsets: Sequence[int], units: int, message: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=message) as caught:
        preparer.prepare(late("text", *offsets, units=units), pb.TRUNCATION_END)
    assert caught.value.field.startswith("late_chunking")


def test_a_span_without_a_token(starter_model: Path) -> None:
    with pytest.raises(errors.InvalidRequest, match="span 1 of the text, characters 1 to 2, holds the end of no token"):
        padded(load_spec(starter_model)).prepare(late("a b", 0, 1, 1, 2), pb.TRUNCATION_END)


@pytest.mark.parametrize("truncation", [pb.TRUNCATION_END, pb.TRUNCATION_START, pb.TRUNCATION_CHUNK])
def test_a_text_that_is_too_long_for_one_pass(preparer: TextPreparer, truncation: Any) -> None:
    for length in (1999, 1 << 20):
        with pytest.raises(errors.InputTooLarge, match="limit is 2000") as caught:
            preparer.prepare(late("x" * length, units=10), truncation)
        assert "all of which late chunking reads at once: cut the text" in caught.value.message


def test_too_many_spans(preparer: TextPreparer) -> None:
    with pytest.raises(errors.InputTooLarge, match="1025 spans, the limit is 1024"):
        preparer.prepare(late("x" * 1025, units=1), pb.TRUNCATION_END)
    with pytest.raises(errors.InputTooLarge, match="100000 spans, the limit is 1024"):
        preparer.prepare(late("text", *[0, 1] * 100_000), pb.TRUNCATION_END)
    assert preparer.limits["text_spans"] == 1024


async def test_a_packed_graph_says_what_to_do(open_house: OpenHouse) -> None:
    house = await open_house()
    inputs = [text_pb2.TextInput(text="a"), text_pb2.TextInput(text="a", late_chunking=text_pb2.LateChunking(units=1))]
    both = text_pb2.TextInput(text="a", instructions=["i"], late_chunking=text_pb2.LateChunking(units=1))
    good, refused, wrong = (await house.text.EmbedText(text_pb2.EmbedTextRequest(inputs=[*inputs, both]))).results
    assert good.HasField("embedding")
    error = errors.from_status(refused.error)
    assert isinstance(error, errors.UnsupportedOutput)
    assert error.field == "inputs[1].late_chunking"
    assert "export --layout padded" in error.message
    assert errors.from_status(wrong.error).field == "inputs[2].late_chunking"
