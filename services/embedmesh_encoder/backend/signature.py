"""Holds a loaded graph's inputs and output against the manifest, whatever library loaded it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_encoder.model import MANIFEST, ModelError, ModelSpec, SparseTable

__all__ = ["Port", "check_signature", "input_type"]

# Of inputs that are no token ids, positions or masks.
_INPUT_TYPES: Final = {
    "pixel_values": "float32",
    "input_features": "float32",
    "input_values": "float32",
    "is_longer": "bool",
}
# Axes of the output of a graph that pools; convolutional networks pool images to [n, d, 1, 1].
_RANKS: Final[Mapping[str, tuple[int, ...]]] = {"packed": (2,), "padded": (2,), "stacked": (2, 4)}


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a graph.

    Attributes:
        dtype: Name of the element type as numpy has it, or the library's own where numpy has none.
        shape: Sizes; an axis that is not an int is free. Empty when the graph says nothing.
    """

    dtype: str
    shape: Sequence[object] = ()


def input_type(name: str) -> str:
    """Give the element type that the input of this name must have, as numpy calls it."""
    return _INPUT_TYPES.get(name, "int64")


def check_signature(spec: ModelSpec, graph: str, inputs: Mapping[str, Port], outputs: Mapping[str, Port]) -> None:
    """Compare a graph with the manifest.

    Args:
        spec: The model.
        graph: What to call the graph in messages, such as its path.
        inputs: The graph's, by name.
        outputs: Likewise.

    Raises:
        ModelError: They do not fit; all problems are in the message.
    """
    problems: list[str] = []
    for name in spec.graph.inputs:
        if name not in inputs:
            problems.append(f'it has no input "{name}" (its inputs: {", ".join(inputs)})')
        elif inputs[name].dtype != (wanted := input_type(name)):
            problems.append(f'input "{name}" is {inputs[name].dtype}, not {wanted}')
    extra = [name for name in inputs if name not in spec.graph.inputs]
    if extra:
        problems.append(f"it wants inputs that the manifest does not name: {', '.join(extra)}")
    problems += _output_problems(spec, outputs)
    if problems:
        raise ModelError(f"{graph} does not fit {MANIFEST}: {'; '.join(problems)}")


def _output_problems(spec: ModelSpec, outputs: Mapping[str, Port]) -> Iterator[str]:
    for kind, name in spec.outputs.items():
        if name not in outputs:
            yield f'it has no output "{name}" (its outputs: {", ".join(outputs)})'
            continue
        output = outputs[name]
        if output.dtype != "float32":
            yield f'output "{name}" is {output.dtype}, not float32'
        # An exporter may leave shapes or single sizes out; what is there must be right.
        if output.shape:
            check = _dense_problem if kind == pb.EMBEDDING_KIND_DENSE else _other_problem
            if problem := check(spec, kind, list(output.shape)):
                yield f'output "{name}" has shape {list(output.shape)}; {problem}'


def _dense_problem(spec: ModelSpec, kind: pb.EmbeddingKind.ValueType, shape: list[object]) -> str:
    del kind
    ranks = _RANKS[spec.graph.layout] if spec.graph.pooling == "graph" else (3,)
    if len(shape) not in ranks:
        return f'{ranks[0]} axes were expected with pooling "{spec.graph.pooling}"'
    width = shape[-1 if ranks[0] == 3 else 1]
    if isinstance(width, int) and width != spec.graph_dimensions:
        wanted = f"{spec.graph_dimensions}, from which come " if spec.graph_dimensions != spec.dimensions else ""
        return f"the manifest says {wanted}dimensions = {spec.dimensions}"
    return ""


def _other_problem(spec: ModelSpec, kind: pb.EmbeddingKind.ValueType, shape: list[object]) -> str:
    table, name = (spec.sparse, "sparse") if kind == pb.EMBEDDING_KIND_SPARSE else (spec.multi_vector, "multi_vector")
    assert table  # noqa: S101  (the manifest has one for each kind)
    pooling = table.pooling if isinstance(table, SparseTable) else ""
    width = 1 if pooling == "tokens" else table.dimensions
    ranks = {"graph": (2,), "tokens": (2, 3)}.get(pooling, (3,))
    if len(shape) not in ranks:
        return f"{' or '.join(map(str, ranks))} axes were expected" + f' with pooling "{pooling}"' * bool(pooling)
    last = shape[-1]
    if not isinstance(last, int) or last == width or (pooling == "tokens" and len(shape) == 2):
        return ""
    return (
        "one weight a token was expected" if pooling == "tokens" else f"the manifest says {name}.dimensions = {width}"
    )
