"""What an ONNX file says of itself: inputs, outputs, precision, and the files its weights lie in."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from embedmesh_cli.console import UserError
from embedmesh_cli.pull.repository import Repository
from embedmesh_encoder.model import Precision

__all__ = ["Graph", "read_graph"]

_INT8: Final = frozenset({"MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "DequantizeLinear", "QGemm"})
_INT8_PREFIXES: Final = ("DynamicQuantize", "QAttention")
_FEW_BITS: Final = frozenset({"MatMulNBits", "GatherBlockQuantized", "MatMulBnb4", "MatMulFpQ4"})


@dataclass(frozen=True, slots=True)
class Graph:
    """An ONNX graph.

    Attributes:
        file: Its name in the repository.
        files: The same and those of its weights, names in the repository.
        inputs: Their names.
        outputs: Shapes by name: sizes, None for free ones; None for a shape that is not told.
        precision: Of its weights.
    """

    file: str
    files: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: Mapping[str, tuple[int | None, ...] | None]
    precision: Precision


def read_graph(repository: Repository, file: str) -> Graph:
    """Fetch a graph and what its weights lie in, and read it.

    Raises:
        UserError: It is no ONNX file, its weights are missing or lie outside, or no precision has a name for it.
    """
    import onnx  # noqa: PLC0415  (slow to import)
    from google.protobuf.message import DecodeError  # noqa: PLC0415

    try:
        model = onnx.load(str(repository.fetch([file]) / file), load_external_data=False)
    except DecodeError:
        raise UserError(f"{file} of {repository.name} is not an ONNX file, or a damaged one: pull it again.") from None
    graph = model.graph
    if not graph.output:
        raise UserError(f"{file} of {repository.name} is not an ONNX file, or a damaged one: it has no outputs.")
    weights = {weight.name for weight in graph.initializer}
    files = [file, *sorted(set(_external(repository, file, graph)))]
    repository.fetch(files)
    return Graph(
        file,
        tuple(files),
        tuple(port.name for port in graph.input if port.name not in weights),
        {port.name: _shape(port) for port in graph.output},
        _precision(repository, file, graph),
    )


def _external(repository: Repository, file: str, graph: Any) -> Iterator[str]:
    """Give the files that hold weights of a graph."""
    for tensor in _tensors(graph):
        for entry in tensor.external_data:
            if entry.key != "location":
                continue
            name = posixpath.normpath(posixpath.join(posixpath.dirname(file), entry.value))
            if name.startswith(("../", "/")) or name not in repository.files:
                raise UserError(
                    f"{file} of {repository.name} says that its weights lie in {entry.value}, which is not there: "
                    "the repository is incomplete."
                )
            yield name


def _tensors(graph: Any) -> Iterator[Any]:
    """Give all constants of a graph: weights, attributes of nodes, and those of the graphs inside of nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensors(inner)


def _shape(port: Any) -> tuple[int | None, ...] | None:
    tensor = port.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in tensor.shape.dim)


def _precision(repository: Repository, file: str, graph: Any) -> Precision:
    import onnx  # noqa: PLC0415  (slow to import)

    kinds = {node.op_type for node in graph.node}
    if few := kinds & _FEW_BITS:
        raise UserError(
            f"{file} of {repository.name} has weights of a few bits ({', '.join(sorted(few))}), which the encoder "
            "has no name for: choose another with --file."
        )
    if kinds & _INT8 or any(kind.startswith(_INT8_PREFIXES) for kind in kinds):
        return "int8"
    types = {tensor.data_type for tensor in _tensors(graph) if len(tensor.dims) > 1}
    if onnx.TensorProto.BFLOAT16 in types:
        return "bfloat16"
    return "float16" if onnx.TensorProto.FLOAT16 in types else "float32"
