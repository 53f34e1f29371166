"""One text to token ids, a batch to feeds, outputs to vectors."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.errors import InputTooLarge, InvalidRequest
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh.v1 import text_pb2
from embedmesh_encoder.backend.fake import write_model
from embedmesh_encoder.model import GraphSpec, ModelError, ModelSpec, TextSpec
from embedmesh_encoder.preparation import Prepared, Preparer
from embedmesh_encoder.text import LateChunking, TextItem, TextPreparer
from embedmesh_encoder.text.preparer import fill_rows

END, START, REFUSE = pb.TRUNCATION_END, pb.TRUNCATION_START, pb.TRUNCATION_REFUSE
QUERY, DOCUMENT = text_pb2.TEXT_ROLE_QUERY, text_pb2.TEXT_ROLE_DOCUMENT
CLS, SEP = 2, 3


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    prompts = {"query": "query: ", "document": "passage: "}
    return write_model(tmp_path_factory.mktemp("model"), dimensions=4, max_input_units=16, prompts=prompts)


@pytest.fixture(scope="module")
def preparer(spec: ModelSpec) -> TextPreparer:
    return TextPreparer(spec, 1000)


def padded(spec: ModelSpec, pooling: str, *inputs: str) -> ModelSpec:
    chosen = {"inputs": inputs} if inputs else {}
    graph = GraphSpec.model_validate({"layout": "padded", "pooling": pooling, **chosen})
    return spec.model_copy(update={"graph": graph, "text": TextSpec(tokenizer="tokenizer.json", pad_id=1)})


def prepared(*lengths: int) -> list[Prepared]:
    return [Prepared(np.arange(100 * i, 100 * i + n), n, n, truncated=False) for i, n in enumerate(lengths, start=1)]


def test_it_is_a_preparer(preparer: TextPreparer) -> None:
    checked: Preparer = preparer
    assert checked.limits == {"text_bytes": 1000, "text_passes": 128}
    assert not checked.padded


def test_a_short_text_is_read_whole(preparer: TextPreparer) -> None:
    result = preparer.prepare(TextItem("abc"), END)
    assert result.data.dtype == np.int64
    a = result.data[1]
    assert result.data.tolist() == [CLS, a, a + 1, a + 2, SEP]
    assert (result.units, result.original_units, result.truncated) == (5, 5, False)


def without_prompts(spec: ModelSpec) -> TextPreparer:
    assert spec.text
    graph = GraphSpec.model_validate({"layout": "padded", "pooling": "mean"})
    text = spec.text.model_copy(update={"include_prompt": False})
    return TextPreparer(spec.model_copy(update={"graph": graph, "text": text}))


def test_a_prompt_is_not_pooled(spec: ModelSpec) -> None:
    preparer = without_prompts(spec)
    prompts = [
        (TextItem("abc", text_pb2.TEXT_ROLE_QUERY), len("query: ")),
        (TextItem("abc", text_pb2.TEXT_ROLE_QUERY, "now: "), len("now: ")),
        (TextItem("", instruction="now: "), len("now: ")),
        (TextItem("abc"), -1),
    ]
    batch = [preparer.prepare(item, END) for item, _ in prompts]
    # [CLS] goes with the prompt; without one nothing is left out.
    assert [each.prompt for each in batch] == [1 + length for _, length in prompts]
    feeds = preparer.collate(batch)
    hidden = feeds["input_ids"][:, :, None].astype(np.float32)
    vectors = preparer.split({"last_hidden_state": hidden}, batch)
    wanted = [each.data[each.prompt :].mean() for each in batch]
    np.testing.assert_allclose(vectors[:, 0], wanted, rtol=1e-6)


def test_a_prompt_is_not_pooled_in_chunks_nor_beside_spans(spec: ModelSpec) -> None:
    preparer = without_prompts(spec)
    for prompt, left_out in (("p:", 3), ("", 0)):
        item = TextItem("abcdefghijklmnopqrst", instruction=prompt)
        assert [each.prompt for each in preparer.prepare(item, pb.TRUNCATION_CHUNK).passes] == [left_out] * 2
        spans = TextItem("abcdef", instruction=prompt, late_chunking=LateChunking(units=3))
        found = preparer.prepare(spans, END)
        assert found.prompt == left_out == preparer.prepare(TextItem("abcdef", instruction=prompt), END).prompt
        assert found.spans is not None
        assert len(found.spans) == 2


def test_a_prompt_that_is_cut_is_left_out_as_far_as_it_is_there(spec: ModelSpec) -> None:
    preparer = without_prompts(spec)
    item = TextItem("x" * 12, text_pb2.TEXT_ROLE_QUERY)  # 12 + 7 of the prompt + 2 special ones, of which 16 are read
    assert preparer.prepare(item, END).prompt == 8
    assert preparer.prepare(item, START).prompt == 3
    assert preparer.prepare(TextItem("x" * 20_000, text_pb2.TEXT_ROLE_QUERY), START).prompt == 0
    # Of such a text the last special token is pooled, as in the library; without one, nothing is left.
    assert preparer.prepare(TextItem("abc", instruction="p" * 30), END).prompt == 15
    assert spec.text
    bare = spec.model_copy(update={"text": spec.text.model_copy(update={"add_special_tokens": False})})
    with pytest.raises(InputTooLarge, match="the prompt has 16 tokens, the limit is 15"):
        without_prompts(bare).prepare(TextItem("abc", instruction="p" * 30), END)


def test_queries_are_cut_and_filled_up(tmp_path: Path) -> None:
    spec = write_model(tmp_path, kinds=("multi_vector",), max_input_units=16)
    assert spec.multi_vector
    graph = GraphSpec.model_validate({"layout": "padded"})
    table = {"query_length": 8, "expand_to": 8, "expansion_token": 1, "skip_first": 0}
    multi_vector = spec.multi_vector.model_copy(update=table)
    preparer = TextPreparer(spec.model_copy(update={"graph": graph, "multi_vector": multi_vector}))
    items = [TextItem(text, role) for text in ("ab.", "abcdefgh") for role in (QUERY, DOCUMENT)]
    batch = [preparer.prepare(item, END) for item in items]
    assert [(each.units, each.original_units, each.truncated, each.expansion) for each in batch] == [
        (8, 8, False, 3),
        (5, 5, False, 0),
        (8, 10, True, 0),
        (10, 10, False, 0),
    ]
    assert batch[0].data.tolist()[-4:] == [SEP, 1, 1, 1]
    # Every token of a query has a row, those that fill it up, too; a document's "." has none.
    assert [int(each.rows.sum()) for each in batch if each.rows is not None] == [8, 4, 8, 10]
    feeds = preparer.collate(batch)
    assert feeds["attention_mask"].sum(axis=1).tolist() == [5, 5, 8, 10]
    assert feeds["input_ids"][0].tolist()[5:8] == [1, 1, 1]
    with pytest.raises(InputTooLarge, match="the text has 10 tokens, the limit is 8"):
        preparer.prepare(items[2], REFUSE)
    short = multi_vector.model_copy(update={"query_length": 2})
    with pytest.raises(ModelError, match=r"query_length = 2, which leaves no room for a text \(3 tokens at least\)"):
        TextPreparer(spec.model_copy(update={"multi_vector": short}))


def test_tokens_of_the_vocabulary_are_found_in_texts(tmp_path: Path) -> None:
    spec = write_model(tmp_path)
    assert spec.text

    def tokens(text: str, **changes: object) -> list[int]:
        assert spec.text
        changed = spec.model_copy(update={"text": spec.text.model_copy(update=changes)})
        return list(TextPreparer(changed).prepare(TextItem(text), END).data)

    assert len(tokens("ab")) == 4
    assert tokens("ab", add_special_tokens=False) == tokens("ab")[1:-1]
    a = tokens("a")[1]
    assert tokens("aa", extra_special_tokens=("a",)) == [CLS, a, a, SEP]
    with pytest.raises(ModelError, match=r"has no token '\[Q\]', which the manifest has among extra_special_tokens"):
        tokens("a", extra_special_tokens=("[Q]",))


@pytest.mark.parametrize("text", ["", " ", "\0", "\n\t"])
def test_empty_and_blank_texts_have_a_vector(preparer: TextPreparer, text: str) -> None:
    assert preparer.prepare(TextItem(text), REFUSE).units == 2 + len(text)


def test_end_keeps_the_beginning_and_start_the_end(spec: ModelSpec, preparer: TextPreparer) -> None:
    whole = TextPreparer(spec.model_copy(update={"max_input_units": 99}))
    ids = whole.prepare(TextItem("abcdefghijklmnopqrstuvwxyz"), END).data.tolist()
    for truncation in (END, pb.TRUNCATION_UNSPECIFIED):
        cut = preparer.prepare(TextItem("abcdefghijklmnopqrstuvwxyz"), truncation)
        assert cut.data.tolist() == [CLS, *ids[1:15], SEP]
        assert (cut.units, cut.original_units, cut.truncated) == (16, 28, True)
    cut = preparer.prepare(TextItem("abcdefghijklmnopqrstuvwxyz"), START)
    assert cut.data.tolist() == [CLS, *ids[13:27], SEP]
    assert (cut.units, cut.original_units, cut.truncated) == (16, 28, True)


def test_refuse_answers_long_texts_with_the_figures(preparer: TextPreparer) -> None:
    assert preparer.prepare(TextItem("a" * 14), REFUSE).units == 16
    with pytest.raises(InputTooLarge, match="the text has 17 tokens, the limit is 16") as caught:
        preparer.prepare(TextItem("a" * 15), REFUSE)
    assert caught.value.metadata == {"limit": "16", "actual": "17", "unit": "tokens"}


def test_refuse_says_when_it_stopped_counting(spec: ModelSpec) -> None:
    preparer = TextPreparer(spec)
    with pytest.raises(InputTooLarge, match=r"the text has at least \d+ tokens, the limit is 16") as caught:
        preparer.prepare(TextItem("word " * 10_000), REFUSE)
    assert 16 < int(caught.value.metadata["actual"]) < 50_000


def test_bytes_are_limited_before_tokenising(preparer: TextPreparer) -> None:
    assert preparer.prepare(TextItem("é" * 500), END).truncated
    with pytest.raises(InputTooLarge, match="the text has 1002 bytes, the limit is 1000") as caught:
        preparer.prepare(TextItem("é" * 501), END)
    assert caught.value.metadata == {"limit": "1000", "actual": "1002", "unit": "bytes"}
    with pytest.raises(InputTooLarge):
        preparer.prepare(TextItem("a" * 500, instruction="b" * 501), END)


@pytest.mark.parametrize("item", [TextItem("ab\ud800"), TextItem("a", instruction="\udfff")])
def test_lone_surrogates_are_no_text(preparer: TextPreparer, item: TextItem) -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        preparer.prepare(item, END)


def test_prompts_are_put_before_the_text(spec: ModelSpec) -> None:
    preparer = TextPreparer(spec.model_copy(update={"max_input_units": 99}))

    def ids(text: str, role: text_pb2.TextRole.ValueType = text_pb2.TEXT_ROLE_UNSPECIFIED, how: str = "") -> list[int]:
        found: list[int] = preparer.prepare(TextItem(text, role, how), END).data.tolist()
        return found

    assert ids("cats", text_pb2.TEXT_ROLE_QUERY) == ids("query: cats")
    assert ids("cats", text_pb2.TEXT_ROLE_DOCUMENT) == ids("passage: cats")
    assert ids("cats", text_pb2.TEXT_ROLE_QUERY, "find: ") == ids("find: cats")
    assert ids("cats") != ids("query: cats")


def test_texts_lie_end_to_end_in_one_row(preparer: TextPreparer) -> None:
    feeds = preparer.collate(prepared(2, 3, 1))
    assert {name: feed.dtype for name, feed in feeds.items()} == dict.fromkeys(feeds, np.dtype(np.int64))
    assert feeds["input_ids"].tolist() == [[100, 101, 200, 201, 202, 300]]
    assert feeds["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0]]
    assert feeds["segment_ids"].tolist() == [[0, 0, 1, 1, 1, 2]]


def test_rows_are_filled_up_to_a_multiple(spec: ModelSpec) -> None:
    feeds = TextPreparer(spec, row_multiple=4).collate(prepared(2, 3))
    assert feeds["input_ids"].tolist() == [[100, 101, 200, 201, 202, 0, 0, 0]]
    assert feeds["segment_ids"].tolist() == [[0, 0, 1, 1, 1, -1, -1, -1]]


def test_texts_are_packed_into_rows(spec: ModelSpec) -> None:
    feeds = TextPreparer(spec, row_width=5).collate(prepared(2, 4, 3))
    assert feeds["segment_ids"].tolist() == [[1, 1, 1, 1, -1], [0, 0, 2, 2, 2]]
    assert feeds["position_ids"].tolist() == [[0, 1, 2, 3, 0], [0, 1, 0, 1, 2]]
    assert feeds["input_ids"].tolist() == [[200, 201, 202, 203, 0], [100, 101, 300, 301, 302]]


@given(units=st.lists(st.integers(1, 40), min_size=1, max_size=60), width=st.integers(1, 50))
def test_rows_hold_every_text_once_and_no_more_than_fits(units: list[int], width: int) -> None:
    rows = fill_rows(units, width)
    assert sorted(i for row in rows for i in row) == list(range(len(units)))
    for row in rows:
        assert len(row) == 1 or sum(units[i] for i in row) <= width
    # First-fit: no two rows could have been one.
    filled = sorted(sum(units[i] for i in row) for row in rows)
    assert len(filled) < 2 or filled[0] + filled[1] > width


@pytest.mark.parametrize(("lengths", "width"), [((2, 3), 6), ((6, 1), 6), ((14, 2), 16), ((16,), 16), ((20,), 20)])
def test_padded_rows_are_rounded_up_to_what_the_model_reads(
    spec: ModelSpec, lengths: tuple[int, ...], width: int
) -> None:
    feeds = TextPreparer(padded(spec, "mean"), row_multiple=6).collate(prepared(*lengths))
    assert feeds["input_ids"].shape == (len(lengths), width)
    assert feeds["attention_mask"].sum(axis=1).tolist() == list(lengths)


def test_padded_graphs_get_masked_rows(spec: ModelSpec) -> None:
    preparer = TextPreparer(padded(spec, "mean"))
    assert preparer.padded
    feeds = preparer.collate(prepared(2, 3))
    assert list(feeds) == ["input_ids", "attention_mask"]
    assert feeds["input_ids"].tolist() == [[100, 101, 1], [200, 201, 202]]
    assert feeds["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert {feed.dtype for feed in feeds.values()} == {np.dtype(np.int64)}
    with_types = TextPreparer(padded(spec, "mean", "input_ids", "attention_mask", "token_type_ids"))
    assert with_types.collate(prepared(2, 3))["token_type_ids"].tolist() == [[0, 0, 0], [0, 0, 0]]


def test_positions_and_padding_to_the_end_as_a_graph_wants_them(spec: ModelSpec) -> None:
    wanted = padded(spec, "mean", "input_ids", "position_ids")
    assert TextPreparer(wanted).collate(prepared(2, 3))["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]
    whole = TextSpec(tokenizer="tokenizer.json", pad_id=1, pad="max_input_units")
    feeds = TextPreparer(wanted.model_copy(update={"text": whole})).collate(prepared(2, 3))
    assert feeds["input_ids"].shape == feeds["position_ids"].shape == (2, 16)
    assert feeds["input_ids"][0].tolist() == [100, 101, *[1] * 14]


def test_texts_without_a_role_take_the_default_prompt(tmp_path: Path) -> None:
    spec = write_model(tmp_path, prompts={"query": "query: ", "default": "passage: "})
    preparer = TextPreparer(spec)

    def ids(item: TextItem) -> list[int]:
        found: list[int] = preparer.prepare(item, END).data.tolist()
        return found

    assert ids(TextItem("cat")) == ids(TextItem("passage: cat", text_pb2.TEXT_ROLE_DOCUMENT))
    assert ids(TextItem("cat", text_pb2.TEXT_ROLE_QUERY)) == ids(TextItem("cat", instruction="query: "))


def test_outputs_become_one_vector_a_text(spec: ModelSpec, preparer: TextPreparer) -> None:
    pooled = np.ones((2, 4), np.float32)
    assert preparer.split({"sentence_embedding": pooled}, prepared(2, 3)) is pooled
    hidden = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    vectors = TextPreparer(padded(spec, "mean")).split({"last_hidden_state": hidden}, prepared(2, 3))
    assert vectors.tolist() == [[2, 3, 4, 5], [16, 17, 18, 19]]


def test_a_model_of_another_modality_is_refused(spec: ModelSpec) -> None:
    with pytest.raises(ModelError, match='model "fake-text" is for image, not for text'):
        TextPreparer(spec.model_copy(update={"modality": "image", "text": None}))
