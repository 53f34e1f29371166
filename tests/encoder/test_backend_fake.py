import math
import time
from pathlib import Path

import numpy as np
import pytest

from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_encoder.backend import Backend, create_backend
from embedmesh_encoder.backend.fake import FAIL, NAN, FakeBackend, write_model
from embedmesh_encoder.model import ModelSpec, load_spec, verify_files
from embedmesh_encoder.text import TextItem, TextPreparer


def embed(spec: ModelSpec, *texts: str, row_width: int = 0) -> np.ndarray:
    backend: Backend = FakeBackend(spec)
    preparer = TextPreparer(spec, row_width=row_width, row_multiple=8)
    batch = [preparer.prepare(TextItem(text), pb.TRUNCATION_END) for text in texts]
    return preparer.split(backend.run(preparer.collate(batch)), batch)


def test_the_folder_is_a_complete_model(tmp_path: Path) -> None:
    spec = write_model(tmp_path / "new", name="mine", dimensions=6, truncatable_dimensions=(2, 4), family="towers")
    verify_files(spec)
    assert load_spec(tmp_path / "new") == spec
    assert (spec.name, spec.family, spec.space, spec.dimensions) == ("mine", "towers", "mine", 6)
    assert spec.truncatable_dimensions == (4, 2)
    assert write_model(tmp_path / "again", name="other").revision == write_model(tmp_path / "third").revision


def test_vectors_depend_on_the_text_alone(tmp_path: Path) -> None:
    spec = write_model(tmp_path)
    vectors = embed(spec, "a", "b", "ab", "ba", "", "a")
    assert vectors.shape == (6, 384)
    assert vectors.dtype == np.float32
    assert len({row.tobytes() for row in vectors}) == 5
    np.testing.assert_array_equal(vectors[0], vectors[5])
    np.testing.assert_array_equal(vectors[[3, 0, 2]], embed(spec, "ba", "a", "ab", row_width=8))
    cosines = np.corrcoef(vectors[:5])
    assert np.abs(cosines - np.eye(5)).max() < 0.25


def test_another_seed_gives_other_vectors_and_another_revision(tmp_path: Path) -> None:
    one, two = write_model(tmp_path / "1", seed=1), write_model(tmp_path / "2", seed=2)
    assert one.revision != two.revision
    assert not np.array_equal(embed(one, "a"), embed(two, "a"))


def test_a_marked_text_fails_the_batch(tmp_path: Path) -> None:
    spec = write_model(tmp_path)
    with pytest.raises(RuntimeError, match="fails on batches that hold"):
        embed(spec, "good", f"bad {FAIL} text")


def test_a_marked_text_alone_is_not_finite(tmp_path: Path) -> None:
    vectors = embed(write_model(tmp_path), "good", f"bad {NAN} text")
    assert np.isfinite(vectors[0]).all()
    assert math.isnan(vectors[1].max())


def test_a_batch_takes_its_time(tmp_path: Path) -> None:
    spec = write_model(tmp_path, base_ms=20, ms_per_unit=5)
    start = time.perf_counter()
    embed(spec, "ab")  # 4 tokens
    assert time.perf_counter() - start >= 0.040


def test_the_manifest_makes_it_the_backend(tmp_path: Path) -> None:
    backend = create_backend(write_model(tmp_path))
    assert (backend.name, backend.precision) == ("fake", "float32")
    backend.close()
