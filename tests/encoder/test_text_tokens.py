"""Tokenising a window gives the ids of tokenising everything and cutting afterwards."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from embedmesh_encoder.model import ModelError
from embedmesh_encoder.text.tokens import WINDOW, WindowedTokenizer

# Small enough that texts of a few hundred characters are many windows long.
LIMIT = 12
SMALL_WINDOW = 80
UNKNOWN = "<unk>"

CORPUS = ["the quick brown fox jumps over the lazy dog, 1234567 times", "über die Brücke und ins Dorf", "中文字 日本語"]
PIECES = [
    "a",
    "word ",
    " the quick",
    "1234567",
    "unbelievably",
    "x" * 40,
    " ",
    " " * 30,
    "\n",
    "\t\u3000",
    ".",
    "don't",
    "-=[]",
    "中",
    "文字漢字",
    "ひらがな",
    "e\u0301",
    "\u0301" * 20,
    "=\u0338",
    "\u1112\u1161\u11ab",
    "ﬁ",
    "İ",
    "😀",
    "👩\u200d👩\u200d👧",
    "🇩🇪",
    "\0",
    "\u200b",
    "[SEP]",
    "[CLS",
    "[MASK]x",
    "กขค",
    "שָׁ",
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=60).map("".join)
repeated = st.tuples(st.sampled_from(PIECES) | st.text(min_size=1, max_size=5), st.integers(1, 400)).map(
    lambda pair: pair[0] * pair[1]
)
long_texts = st.lists(texts | repeated, min_size=1, max_size=4).map("".join)


class Counting:
    """Counts the characters that the tokenizer is given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.characters = 0

    def encode_batch(self, texts: list[str], **options: Any) -> Any:
        self.characters += sum(map(len, texts))
        return self._tokenizer.encode_batch(texts, **options)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.characters += sum(map(len, texts))
        return self._tokenizer.encode_batch_fast(texts, **options)


def counted(windowed: WindowedTokenizer, text: str, *, keep_end: bool = False) -> int:
    counting = Counting(windowed._tokenizer)
    windowed._tokenizer = counting  # type: ignore[assignment]
    windowed.encode(text, keep_end=keep_end)
    return counting.characters


@functools.cache
def reference(path: Path, limit: int | None, side: str) -> Tokenizer:
    """The library's own truncation; none without a limit."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    if limit is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(limit, direction=side)
    return tokenizer


@functools.cache
def windowed_tokenizer(path: Path, limit: int, window: int) -> WindowedTokenizer:
    return WindowedTokenizer(path, limit, window)


def agree(path: Path, limit: int, text: str, window: int) -> None:
    total = len(reference(path, None, "").encode(text).ids)
    for keep_end, side in ((False, "right"), (True, "left")):
        tokens = windowed_tokenizer(path, limit, window).encode(text, keep_end=keep_end)
        assert tokens.ids == reference(path, limit, side).encode(text).ids
        if tokens.exact:
            assert tokens.total == total
        else:
            assert limit < tokens.total <= total


@pytest.fixture(scope="module")
def minilm(starter_model: Path) -> Path:
    return starter_model / "tokenizer.json"


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like XLM-R: words begin with a metaspace."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<s>", "</s>", UNKNOWN], unk_token=UNKNOWN, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return saved(tokenizer, tmp_path_factory, ("<s>", "</s>"))


@pytest.fixture(scope="module")
def digits_by_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like recent GPTs: a regex whose matches depend on everything to the left."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\s\p{N}]+|\s+(?!\S)|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<e>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return saved(tokenizer, tmp_path_factory, (None, "<e>"))


@pytest.fixture(scope="module")
def wordless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No pre-tokenizer: merges reach across spaces."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=[UNKNOWN, "<s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return saved(tokenizer, tmp_path_factory, ("<s>", None))


def saved(tokenizer: Tokenizer, folders: pytest.TempPathFactory, around: tuple[str | None, str | None]) -> Path:
    template = " ".join(part for part in (around[0], "$A", around[1]) if part)
    specials = [(token, tokenizer.token_to_id(token)) for token in around if token]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    path = folders.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@settings(max_examples=150, deadline=None)
@given(text=long_texts)
def test_equal_to_tokenising_everything(minilm: Path, text: str) -> None:
    agree(minilm, LIMIT, text, SMALL_WINDOW)


@pytest.mark.parametrize("kind", ["unigram", "digits_by_three", "wordless"])
@settings(max_examples=60, deadline=None)
@given(text=long_texts)
def test_equal_for_other_tokenizers(request: pytest.FixtureRequest, kind: str, text: str) -> None:
    agree(request.getfixturevalue(kind), LIMIT, text, SMALL_WINDOW)


@pytest.mark.parametrize("piece", PIECES)
def test_equal_for_texts_of_many_windows(minilm: Path, piece: str) -> None:
    agree(minilm, 256, piece * (100_000 // len(piece)), WINDOW)


@pytest.mark.parametrize(
    "piece", ["word ", "The quick, brown fox. ", "中文字", "-=", "e\u0301 ", "3.14159 ", "[SEP]", "don't"]
)
@pytest.mark.parametrize("keep_end", [False, True])
def test_cost_does_not_grow_with_what_is_cut(minilm: Path, piece: str, keep_end: bool) -> None:
    windowed = WindowedTokenizer(minilm, 256)
    assert counted(windowed, piece * (1_000_000 // len(piece)), keep_end=keep_end) == WINDOW


@pytest.mark.parametrize("piece", ["a", " ", "\0", "\u0301", "😀"])
def test_without_word_ends_everything_is_read_a_few_times(minilm: Path, piece: str) -> None:
    text = piece * 1_000_000
    assert counted(WindowedTokenizer(minilm, 256), text) <= 7 / 3 * len(text)


def test_sparse_text_costs_what_it_takes_to_find_the_tokens(minilm: Path) -> None:
    text = (" " * 99 + "a") * 10_000
    needed = 256 * 100
    assert counted(WindowedTokenizer(minilm, 256), text) < 5 * needed


def test_counts_are_exact_within_the_window(minilm: Path) -> None:
    tokens = WindowedTokenizer(minilm, 256).encode("- " * (WINDOW // 2))
    assert (len(tokens.ids), tokens.total, tokens.exact) == (256, WINDOW // 2 + 2, True)


def test_a_text_that_just_fits_is_not_cut_by_its_trailing_space(minilm: Path) -> None:
    tokens = WindowedTokenizer(minilm, 256).encode("word " * 254 + " " * 20_000)
    assert (len(tokens.ids), tokens.total, tokens.exact) == (256, 256, True)


def test_the_files_own_truncation_and_padding_are_off(minilm: Path) -> None:
    own = json.loads(minilm.read_text())
    assert own["truncation"]["max_length"] == 128  # what upstream ships, and sentence-transformers overrides
    assert len(WindowedTokenizer(minilm, 256).encode("word " * 200).ids) == 202
    assert WindowedTokenizer(minilm, 256).encode("").ids == [101, 102]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": 3}'])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ModelError, match=r"cannot read the tokenizer .*tokenizer\.json"):
        WindowedTokenizer(path, 256)


def test_there_must_be_room_beside_special_tokens(minilm: Path) -> None:
    with pytest.raises(ModelError, match="max_input_units 2 leaves no room"):
        WindowedTokenizer(minilm, 2)
