"""Between messages and arrays, and from the full vector to the one asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from embedmesh import errors, vectors
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh.vectors import DenseOutput

FINITE = st.floats(-1e4, 1e4, width=32)
ROWS = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=FINITE)
PLAIN = [np.float32, np.float16, np.int8, np.uint8, np.uint32]


def finish(rows: NDArray[np.float32], output: DenseOutput, norms: NDArray[np.float32] | None = None) -> list[pb.Tensor]:
    tensors = [pb.Tensor() for _ in rows]
    vectors.finish_dense(rows, norms, output, tensors)
    return tensors


def reference(rows: NDArray[np.float32], *, dimensions: int, normalize: bool) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)[:, : dimensions or None]
    if normalize:
        wide = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    return wide


@given(st.data(), st.sampled_from(PLAIN))
def test_arrays_survive_the_wire(data: st.DataObject, dtype: Any) -> None:
    array = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0)))
    tensor = pb.Tensor()
    vectors.encode_into(tensor, array)
    decoded = vectors.decode(pb.Tensor.FromString(tensor.SerializeToString()))
    assert decoded.dtype == dtype
    assert not decoded.flags.writeable
    np.testing.assert_array_equal(decoded, array)


def test_tensors_are_little_endian_and_row_major() -> None:
    tensor = pb.Tensor()
    vectors.encode_into(tensor, np.array([[1, 2], [3, 4]], ">u4").T)
    assert tensor.data == b"\1\0\0\0\3\0\0\0\2\0\0\0\4\0\0\0"
    assert (tensor.dtype, list(tensor.shape)) == (pb.DTYPE_UINT32, [2, 2])


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (pb.Tensor(shape=[1], data=b"1234"), "unknown dtype 0"),
        (pb.Tensor(dtype=99, shape=[1], data=b"1234"), "unknown dtype 99"),  # type: ignore[arg-type]
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2], data=b"1234"), r"shape \[2\] needs 8 bytes, got 4"),
        (pb.Tensor(dtype=pb.DTYPE_FLOAT16, shape=[2], data=b"12345"), "needs 4 bytes, got 5"),
        (pb.Tensor(dtype=pb.DTYPE_BINARY, shape=[9], data=b"1"), "needs 2 bytes, got 1"),
        (pb.Tensor(dtype=pb.DTYPE_BINARY, shape=[3, 9], data=b"1234"), "needs 6 bytes, got 4"),
        (pb.Tensor(dtype=pb.DTYPE_UINT8, shape=[2**32 - 1] * 3, data=b""), "needs"),
    ],
)
def test_tensors_that_contradict_themselves_are_refused(tensor: pb.Tensor, sentence: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=sentence):
        vectors.decode(tensor)


def test_bits_are_packed_by_row() -> None:
    tensor = pb.Tensor(dtype=pb.DTYPE_BINARY, shape=[2, 9], data=b"\x80\x80\x01\x00")
    assert vectors.decode(tensor).shape == (2, 2)
    np.testing.assert_array_equal(vectors.dequantize(tensor), [[1, -1, -1, -1, -1, -1, -1, -1, 1], [-1] * 7 + [1, -1]])


def test_what_integers_stand_for() -> None:
    scaled = pb.Tensor(dtype=pb.DTYPE_INT8, shape=[3], data=b"\x7f\x00\x81", scale=0.5)
    np.testing.assert_array_equal(vectors.dequantize(scaled), np.array([63.5, 0, -63.5], np.float32))
    scaled.scale = 0
    np.testing.assert_array_equal(vectors.dequantize(scaled), [127, 0, -127])


@given(ROWS, st.integers(0, 50), st.booleans())
def test_cut_and_normalised_as_numpy_would(rows: NDArray[np.float32], dimensions: int, normalize: bool) -> None:
    tensors = finish(rows, DenseOutput(dimensions=dimensions, normalize=normalize))
    got = np.stack([vectors.decode(tensor) for tensor in tensors])
    assert got.dtype == np.float32
    np.testing.assert_allclose(
        got, reference(rows, dimensions=dimensions, normalize=normalize), rtol=1e-5, atol=1e-6 if normalize else 0
    )


@given(ROWS)
def test_what_was_normalised_can_be_had_as_pooled_again(rows: NDArray[np.float32]) -> None:
    norms = vectors.l2_norms(rows)
    slack = max(1e-12, float(norms.max()) * 1e-5)
    normalised = np.stack([vectors.decode(tensor) for tensor in finish(rows, DenseOutput())])
    passed = finish(normalised, DenseOutput(), norms)
    assert [tensor.data for tensor in passed] == [row.tobytes() for row in normalised]
    pooled = finish(normalised, DenseOutput(normalize=False), norms)
    np.testing.assert_allclose(
        np.stack([vectors.decode(tensor) for tensor in pooled]),
        rows,
        rtol=1e-4,
        atol=slack,
    )


def test_a_cut_of_a_normalised_vector_is_normalised_again() -> None:
    rows = np.array([[0.6, 0, 0.8]], np.float32)
    (tensor,) = finish(rows, DenseOutput(dimensions=2), np.array([5], np.float32))
    np.testing.assert_allclose(vectors.decode(tensor), [1, 0])
    (tensor,) = finish(rows, DenseOutput(dimensions=2, normalize=False), np.array([5], np.float32))
    np.testing.assert_allclose(vectors.decode(tensor), [3, 0])


@pytest.mark.parametrize("dtype", [pb.DTYPE_FLOAT32, pb.DTYPE_FLOAT16, pb.DTYPE_INT8, pb.DTYPE_BINARY])
def test_zero_vectors_stay_zero_and_nothing_stays_nothing(dtype: Any) -> None:
    (tensor,) = finish(np.zeros((1, 9), np.float32), DenseOutput(dtype=dtype))
    assert list(tensor.shape) == [9]
    assert not vectors.decode(tensor).any()
    assert tensor.scale == 0
    assert finish(np.zeros((0, 9), np.float32), DenseOutput(dtype=dtype)) == []


@given(ROWS)
def test_int8_is_symmetric_and_within_half_a_step(rows: NDArray[np.float32]) -> None:
    for row, tensor in zip(rows, finish(rows, DenseOutput(normalize=False, dtype=pb.DTYPE_INT8)), strict=True):
        integers = vectors.decode(tensor)
        assert integers.dtype == np.int8
        assert integers.min() >= -127
        # A vector whose scale is no normal float32 becomes zeros.
        step = tensor.scale * 0.501 or 127.1 * float(np.finfo(np.float32).tiny)
        np.testing.assert_allclose(vectors.dequantize(tensor), row, rtol=1e-5, atol=step)
        if tensor.scale:
            assert np.abs(integers).max() == 127


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.sampled_from([8, 64])), elements=FINITE))
def test_binary_is_what_sentence_transformers_calls_ubinary(rows: NDArray[np.float32]) -> None:
    tensors = finish(rows, DenseOutput(normalize=False, dtype=pb.DTYPE_BINARY))
    got = np.stack([vectors.decode(tensor) for tensor in tensors])
    # The formula of that library's quantize_embeddings for precision "ubinary".
    np.testing.assert_array_equal(got, np.packbits(rows > 0).reshape(rows.shape[0], -1))
    assert all(tensor.shape == [rows.shape[1]] for tensor in tensors)


@given(ROWS)
def test_float16_is_the_nearest(rows: NDArray[np.float32]) -> None:
    tensors = finish(rows, DenseOutput(normalize=False, dtype=pb.DTYPE_FLOAT16))
    np.testing.assert_array_equal(np.stack([vectors.decode(tensor) for tensor in tensors]), rows.astype(np.float16))
    np.testing.assert_allclose(
        np.stack([vectors.dequantize(tensor) for tensor in tensors]), rows, rtol=2**-11, atol=2**-25
    )


def test_float16_is_always_finite() -> None:
    (tensor,) = finish(np.array([[1e9, -1e9]], np.float32), DenseOutput(normalize=False, dtype=pb.DTYPE_FLOAT16))
    np.testing.assert_array_equal(vectors.decode(tensor), np.array([65504, -65504], np.float16))


@pytest.mark.parametrize("dtype", [pb.DTYPE_UNSPECIFIED, pb.DTYPE_UINT8, pb.DTYPE_UINT32, 99])
def test_dtypes_that_are_not_offered(dtype: Any) -> None:
    with pytest.raises(errors.UnsupportedOutput) as caught:
        DenseOutput(dtype=dtype)
    assert caught.value.metadata == {"option": "dtype"}
