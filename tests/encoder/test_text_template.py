"""A text in a template has the ids of the whole string, with the picture in its place and nothing but the text cut."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from embedmesh_encoder.model import ModelError, TextSpec
from embedmesh_encoder.text.template import TemplatedTokenizer

CORPUS = ["user: the quick brown fox jumps answer: over the lazy dog", "<image> is a word, too", "über 中文字 😀"]
TEMPLATE = "user: <image>\n{text} answer:"
PICTURE = 5
UNKNOWN = "<unk>"
LIMIT = 40
PIECES = ["fox ", "the quick", ", ", "\n", "  ", "<image>", "</s>", "中", "é", "😀", "x" * 30, "{text}", "answer:"]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=40).map("".join)


def byte_level() -> Tokenizer:
    """Like Qwen2: bytes, words by a regex."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(["<s>", "</s>", "<image>"])
    return tokenizer


def metaspace() -> Tokenizer:
    """Like Llama 2: one word, a normaliser in place of a pre-tokenizer; the picture's token is in the vocabulary."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>", "<image>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def unigram() -> Tokenizer:
    """Like Gemma and T5: pieces with scores."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=100, special_tokens=["<unk>", "<s>", "</s>", "<image>"], unk_token=UNKNOWN, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="module", params=[byte_level, metaspace, unigram])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = request.param()
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def picture_of(path: Path) -> int:
    found = Tokenizer.from_file(str(path)).token_to_id("<image>")
    assert found is not None
    return found


def spec(template: str = TEMPLATE, picture: str = "<image>", count: int = PICTURE) -> TextSpec:
    return TextSpec(tokenizer="tokenizer.json", template=template, image_token=picture, image_tokens=count)


def whole(path: Path, text: str) -> list[int]:
    """What the reference library makes of a text without the picture's token."""
    tokenizer = Tokenizer.from_file(str(path))
    return list(tokenizer.encode(TEMPLATE.format(text=text).replace("<image>", "<image>" * PICTURE)).ids)


@pytest.mark.parametrize("text", ["", "a fox", " \n", "the quick brown fox, </s> and 中 {text}", "answer:"])
def test_ids_are_those_of_the_whole_string(path: Path, text: str) -> None:
    tokens = TemplatedTokenizer(path, 200, spec()).encode(text)
    assert tokens.ids == whole(path, text)
    assert (tokens.total, tokens.exact) == (len(tokens.ids), True)


@settings(max_examples=60, deadline=None)
@given(text=texts, keep_end=st.booleans())
def test_only_the_text_is_cut_and_no_text_is_a_picture(path: Path, text: str, keep_end: bool) -> None:
    picture = picture_of(path)
    # A window of few characters is grown; one of many reads all at once.
    cut, windowed, full = (
        TemplatedTokenizer(path, limit, spec(), window=window).encode(text, keep_end=keep_end)
        for limit, window in ((LIMIT, 100_000), (LIMIT, 50), (10_000, 100_000))
    )
    for tokens in (cut, windowed, full):
        at = tokens.ids.index(picture)
        assert [i for i, each in enumerate(tokens.ids) if each == picture] == list(range(at, at + PICTURE))
    assert (cut.total, cut.exact, len(cut.ids)) == (full.total, True, min(LIMIT, full.total))
    assert windowed.ids == cut.ids
    assert LIMIT < windowed.total <= cut.total if not windowed.exact else windowed.total == cut.total
    # The template stays, and of the text what is next to it on one side.
    begin = full.ids.index(picture) + PICTURE
    lost = full.total - len(cut.ids)
    assert any(
        cut.ids == full.ids[:i] + full.ids[i + lost :]
        for i in (range(begin, begin + 4) if keep_end else range(begin, len(cut.ids) + 1))
    )


def test_a_megabyte_is_not_read_whole(path: Path) -> None:
    tokenizer = TemplatedTokenizer(path, LIMIT, spec())
    tokens = tokenizer.encode("the quick brown fox, " * 50_000)
    assert len(tokens.ids) == LIMIT < tokens.total
    if Tokenizer.from_file(str(path)).pre_tokenizer is not None:
        assert not tokens.exact


def test_a_text_that_says_image_is_no_picture(path: Path) -> None:
    tokenizer = TemplatedTokenizer(path, 200, spec())
    plain, literal = tokenizer.encode("a  fox").ids, tokenizer.encode("a <image> fox").ids
    picture = picture_of(path)
    assert literal.count(picture) == plain.count(picture) == PICTURE
    assert len(literal) > len(plain)
    # Where there is no picture at all, neither.
    alone = TemplatedTokenizer(path, 200, spec("user: {text} answer:", count=0))
    assert picture not in alone.encode("a <image> fox").ids


def test_what_cannot_work_is_refused(path: Path) -> None:
    with pytest.raises(ModelError, match='knows no token "<picture>"'):
        TemplatedTokenizer(path, 200, spec("<picture>{text}", "<picture>"))
    with pytest.raises(ModelError, match="max_input_units 12 leaves no room beside a template of"):
        TemplatedTokenizer(path, 12, spec())


def test_a_picture_token_that_takes_spaces_still_does(path: Path, tmp_path: Path) -> None:
    table = json.loads(path.read_text())
    for added in table["added_tokens"]:
        if added["content"] == "<image>":
            added["rstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    found = TemplatedTokenizer(tmp_path / "tokenizer.json", 200, spec()).encode("a fox").ids
    assert (
        found
        == Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        .encode(TEMPLATE.format(text="a fox").replace("<image>", "<image>" * PICTURE))
        .ids
    )
