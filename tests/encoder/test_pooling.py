import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh_encoder.pooling import Pooling, pool

HIDDEN = np.array([[[1, -2], [3, -4], [9, 9]], [[1, 0], [2, 0], [6, 3]]], np.float32)
LENGTHS = np.array([2, 3])
WAYS: list[Pooling] = ["mean", "cls", "max", "mean_sqrt_len", "weightedmean", "last"]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [[2, -3], [3, 1]]),
        ("cls", [[1, -2], [1, 0]]),
        ("max", [[3, -2], [6, 3]]),
        ("mean_sqrt_len", [[4 / 2**0.5, -6 / 2**0.5], [9 / 3**0.5, 3 / 3**0.5]]),
        ("weightedmean", [[7 / 3, -10 / 3], [23 / 6, 9 / 6]]),
        ("last", [[3, -4], [6, 3]]),
        (("last", "cls"), [[3, -4, 1, -2], [6, 3, 1, 0]]),
    ],
)
def test_tokens_become_one_vector(how: Pooling | tuple[Pooling, ...], expected: list[list[float]]) -> None:
    vectors = pool(how, HIDDEN, LENGTHS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [[3, -4], [4, 1.5]]),
        ("cls", [[3, -4], [2, 0]]),
        ("max", [[3, -4], [6, 3]]),
        ("mean_sqrt_len", [[3, -4], [8 / 2**0.5, 3 / 2**0.5]]),
        ("weightedmean", [[3, -4], [22 / 5, 9 / 5]]),
        ("last", [[3, -4], [6, 3]]),
    ],
)
def test_a_prompt_is_left_out(how: Pooling, expected: list[list[float]]) -> None:
    np.testing.assert_allclose(pool(how, HIDDEN, LENGTHS, np.array([1, 1])), expected, rtol=1e-6)


@given(how=st.sampled_from(WAYS), padding=st.integers(0, 5), seed=st.integers(0, 99))
def test_padding_changes_nothing_whatever_it_holds(how: Pooling, padding: int, seed: int) -> None:
    hidden = np.random.default_rng(seed).normal(size=(1, 4, 8)).astype(np.float32)
    wide = np.concatenate([hidden, np.full((1, padding, 8), np.nan, np.float32)], axis=1)
    lengths = np.array([4])
    np.testing.assert_array_equal(pool(how, wide, lengths), pool(how, hidden, lengths))


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")  # those of the reference library are not ours
@pytest.mark.parametrize(
    ("how", "theirs"),
    [
        ("mean", "mean"),
        ("cls", "cls"),
        ("max", "max"),
        ("mean_sqrt_len", "mean_sqrt_len_tokens"),
        ("weightedmean", "weightedmean"),
        ("last", "lasttoken"),
    ],
)
def test_equal_to_sentence_transformers(how: Pooling, theirs: str) -> None:
    torch = pytest.importorskip("torch", reason="compares with the reference library")
    modules = pytest.importorskip("sentence_transformers.models", reason="compares with the reference library")
    rng = np.random.default_rng(5)
    hidden = rng.normal(size=(6, 9, 16)).astype(np.float32)
    lengths = np.array([1, 2, 5, 8, 9, 9])
    mask = torch.tensor(np.arange(9)[None, :] < lengths[:, None]).long()
    features = {"token_embeddings": torch.tensor(hidden), "attention_mask": mask}
    expected = modules.Pooling(16, pooling_mode=theirs)(features)["sentence_embedding"].numpy()
    np.testing.assert_allclose(pool(how, hidden, lengths), expected, rtol=1e-5, atol=1e-6)
