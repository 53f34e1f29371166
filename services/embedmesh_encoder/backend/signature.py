"""Holds a loaded graph's inputs and output against the manifest, whatever library loaded it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from embedmesh_encoder.model import MANIFEST, ModelError, ModelSpec

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
    problems = []
    for name in spec.graph.inputs:
        if name not in inputs:
            problems.append(f'it has no input "{name}" (its inputs: {", ".join(inputs)})')
        elif inputs[name].dtype != (wanted := input_type(name)):
            problems.append(f'input "{name}" is {inputs[name].dtype}, not {wanted}')
    extra = [name for name in inputs if name not in spec.graph.inputs]
    if extra:
        problems.append(f"it wants inputs that the manifest does not name: {', '.join(extra)}")
    output = outputs.get(spec.graph.output)
    if output is None:
        problems.append(f'it has no output "{spec.graph.output}" (its outputs: {", ".join(outputs)})')
    else:
        ranks = _RANKS[spec.graph.layout] if spec.graph.pooling == "graph" else (3,)
        if output.dtype != "float32":
            problems.append(f'output "{spec.graph.output}" is {output.dtype}, not float32')
        shape = f'output "{spec.graph.output}" has shape {list(output.shape)}'
        # An exporter may leave shapes or single sizes out; what is there must be right.
        if output.shape and len(output.shape) not in ranks:
            problems.append(f'{shape}; {ranks[0]} axes were expected with pooling "{spec.graph.pooling}"')
        elif (
            output.shape
            and isinstance(width := output.shape[-1 if ranks[0] == 3 else 1], int)
            and width != spec.graph_dimensions
        ):
            wanted = f"{spec.graph_dimensions}, from which come " if spec.graph_dimensions != spec.dimensions else ""
            problems.append(f"{shape}; the manifest says {wanted}dimensions = {spec.dimensions}")
    if problems:
        raise ModelError(f"{graph} does not fit {MANIFEST}: {'; '.join(problems)}")
