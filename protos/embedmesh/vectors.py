"""Between `Tensor` messages and numpy arrays, and from a full vector to the one asked for.

Servers and clients share these functions, so that a vector cut, normalised or quantised
anywhere in the mesh is the same vector.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from embedmesh.errors import InvalidRequest, UnsupportedOutput
from embedmesh.v1 import embedding_pb2 as pb

__all__ = [
    "DenseOutput",
    "decode",
    "dequantize",
    "encode_into",
    "finish_dense",
    "finish_multi_vector",
    "finish_sparse",
    "l2_norms",
    "normalized",
    "require_shape_of_kinds",
]

Float32 = NDArray[np.float32]

_NUMPY: Final[dict[int, np.dtype[Any]]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_FLOAT16: np.dtype("<f2"),
    pb.DTYPE_INT8: np.dtype("i1"),
    pb.DTYPE_UINT8: np.dtype("u1"),
    pb.DTYPE_UINT32: np.dtype("<u4"),
}
_WIRE: Final[dict[np.dtype[Any], int]] = {dtype: code for code, dtype in _NUMPY.items()}
# Torch's and sentence-transformers' normalize divide by max(norm, 1e-12).
_NORM_FLOOR: Final = np.float32(1e-12)
_DTYPES_OF_OTHERS: Final = (pb.DTYPE_UNSPECIFIED, pb.DTYPE_FLOAT32, pb.DTYPE_FLOAT16)
# Beyond it binary16 is infinite, and vectors that are not finite never leave.
_FLOAT16_MAX: Final = np.float32(65504)


@dataclass(frozen=True, slots=True)
class DenseOutput:
    """How dense vectors are wanted; `OutputOptions` after the model's defaults were filled in.

    Attributes:
        dimensions: Width; 0 keeps the full width.
        normalize: L2 norm 1 after the cut.
        dtype: One of FLOAT32, FLOAT16, INT8, BINARY.
    """

    dimensions: int = 0
    normalize: bool = True
    dtype: pb.Dtype.ValueType = pb.DTYPE_FLOAT32

    def __post_init__(self) -> None:
        if self.dtype not in (pb.DTYPE_FLOAT32, pb.DTYPE_FLOAT16, pb.DTYPE_INT8, pb.DTYPE_BINARY):
            raise UnsupportedOutput(
                f"dtype {self.dtype} is not offered; choose FLOAT32, FLOAT16, INT8 or BINARY",
                field="output.dtype",
                metadata={"option": "dtype"},
            )


def require_shape_of_kinds(kinds: Collection[pb.EmbeddingKind.ValueType], options: pb.OutputOptions) -> None:
    """Refuse a width, normalisation or dtype that none of the kinds wanted is offered in.

    Raises:
        UnsupportedOutput: `dimensions` or `normalize` without a dense vector, or a dtype that a kind does not have.
    """
    option = message = ""
    if pb.EMBEDDING_KIND_DENSE not in kinds:
        option = "dimensions" if options.dimensions else "normalize" if options.HasField("normalize") else ""
        message = f"{option} is for vectors of kind DENSE, which were not asked for"
    if options.dtype not in _DTYPES_OF_OTHERS and not set(kinds) <= {pb.EMBEDDING_KIND_DENSE}:
        option = "dtype"
        message = (
            "vectors of kind SPARSE and MULTI_VECTOR are offered as FLOAT32 or FLOAT16; ask for others by themselves"
        )
    if option:
        raise UnsupportedOutput(message, field=f"output.{option}", metadata={"option": option})


def decode(tensor: pb.Tensor) -> NDArray[Any]:
    """View a tensor as a read-only array without copying.

    BINARY gives uint8 with the last axis packed eight to a byte (undo it with
    `numpy.unpackbits`); INT8 gives the integers (see `dequantize`).

    Raises:
        InvalidRequest: Unknown dtype, or the data is not as long as the shape says.
    """
    shape = tuple(tensor.shape)
    if tensor.dtype == pb.DTYPE_BINARY:
        dtype = np.dtype("u1")
        shape = (*shape[:-1], -(-shape[-1] // 8)) if shape else shape
    else:
        found = _NUMPY.get(tensor.dtype)
        if found is None:
            raise InvalidRequest(f"unknown dtype {tensor.dtype} in a tensor")
        dtype = found
    expected = math.prod(shape) * dtype.itemsize
    if len(tensor.data) != expected:
        raise InvalidRequest(f"a tensor of shape {list(tensor.shape)} needs {expected} bytes, got {len(tensor.data)}")
    return np.frombuffer(tensor.data, dtype).reshape(shape)


def dequantize(tensor: pb.Tensor) -> Float32:
    """Give the values a tensor stands for as float32, same shape as the tensor says; BINARY gives -1 and 1."""
    values = decode(tensor)
    if tensor.dtype == pb.DTYPE_BINARY:
        bits = np.unpackbits(values, axis=-1, count=tensor.shape[-1])
        return bits.astype(np.float32) * 2 - 1
    floats = values.astype(np.float32)
    return floats * np.float32(tensor.scale) if tensor.dtype == pb.DTYPE_INT8 and tensor.scale else floats


def encode_into(tensor: pb.Tensor, array: NDArray[Any]) -> None:
    """Write an array into an (empty) tensor message, in place: several times faster than building one."""
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    tensor.dtype = pb.Dtype.ValueType(_WIRE[little.dtype])
    tensor.shape.extend(array.shape)
    tensor.data = little.tobytes()


def l2_norms(rows: Float32) -> Float32:
    """L2 norms of `rows` [n, d], shape [n]."""
    norms: Float32 = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    return norms


def normalized(rows: Float32, norms: Float32) -> Float32:
    """Divide `rows` [n, d] by max(norm, 1e-12), as `torch.nn.functional.normalize` does; `norms` is [n]."""
    return (rows / np.maximum(norms, _NORM_FLOOR)[:, None]).astype(np.float32, copy=False)


def finish_dense(rows: Float32, norms: Float32 | None, output: DenseOutput, out: list[pb.Tensor]) -> None:
    """Cut, scale and encode full vectors into the tensors that go out.

    Args:
        rows: Full-width vectors, float32 [n, d].
        norms: What to multiply row i with to undo its normalisation, shape [n]; None
            when the rows are as pooled.
        output: The width, normalisation and dtype wanted.
        out: n empty tensors, filled in place.

    Normalisation is that of `normalized`. INT8 is symmetric per vector with scale max(|x|)/127 (0, and
    zeros, where that is no normal float32); BINARY is `numpy.packbits(x > 0)`, as
    `sentence_transformers.quantize_embeddings(precision="ubinary")`; FLOAT16 saturates at 65504.
    """
    cut = 0 < output.dimensions < rows.shape[1]
    if cut:
        rows = rows[:, : output.dimensions]
    if output.normalize:
        if cut or norms is None:
            rows = normalized(rows, l2_norms(rows))
    elif norms is not None:
        rows = rows * norms[:, None]
    width = rows.shape[1]
    scales: Float32 | None = None
    if output.dtype == pb.DTYPE_INT8:
        scales = (np.abs(rows).max(axis=1) / 127).astype(np.float32)
        scales[scales < np.finfo(np.float32).tiny] = 0  # too coarse to divide by
        packed: NDArray[Any] = np.rint(rows / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8)
    elif output.dtype == pb.DTYPE_BINARY:
        packed = np.packbits(rows > 0, axis=1)
    elif output.dtype == pb.DTYPE_FLOAT16:
        packed = _float16(rows)
    else:
        packed = rows.astype("<f4", copy=False)
    data = np.ascontiguousarray(packed).tobytes()
    stride = len(data) // len(out) if out else 0
    for i, tensor in enumerate(out):
        tensor.dtype = output.dtype
        tensor.shape.append(width)
        tensor.data = data[i * stride : (i + 1) * stride]
        if scales is not None:
            tensor.scale = float(scales[i])


def finish_sparse(
    indices: NDArray[np.uint32],
    values: Float32,
    dimensions: int,
    dtype: pb.Dtype.ValueType,
    out: pb.SparseVector,
) -> None:
    """Encode a sparse vector into an (empty) message, in place.

    Args:
        indices: Ascending, uint32 [k].
        values: float32 [k], no zeros.
        dimensions: Of the vocabulary.
        dtype: FLOAT32, or FLOAT16, which saturates at 65504 and leaves out what it would make 0.
        out: The message.
    """
    if dtype == pb.DTYPE_FLOAT16:
        packed = _float16(values)
        kept = packed != 0
        indices, values = indices[kept], packed[kept]
    encode_into(out.indices, indices)
    encode_into(out.values, values)
    out.dimensions = dimensions


def finish_multi_vector(rows: Float32, dtype: pb.Dtype.ValueType, out: pb.Tensor) -> None:
    """Encode float32 [n, d] into an (empty) tensor, in place; FLOAT16 saturates at 65504."""
    encode_into(out, _float16(rows) if dtype == pb.DTYPE_FLOAT16 else rows)


def _float16(values: Float32) -> NDArray[np.float16]:
    return values.clip(-_FLOAT16_MAX, _FLOAT16_MAX).astype("<f2")
