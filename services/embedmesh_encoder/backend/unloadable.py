"""Says what to do about a graph that a library cannot load; the library's own words are for its developers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from embedmesh_encoder.model import ModelError

__all__ = ["unloadable"]

# Of onnxruntime's words or openvino's, what they mean.
_MEANINGS: Final = {
    r"Protobuf parsing failed|No graph was found|can't be parsed": (
        "the file is no ONNX graph, or only a part of one: fetch or export the model again"
    ),
    r"Opset (?P<found>\d+) is under development.* till opset (?P<most>\d+)": (
        "the graph is of opset {found}, and opset {most} is the newest that can be read: export the model with that "
        "one, or update the library"
    ),
    r"Unsupported model IR version: (?P<found>\d+), max supported IR version: (?P<most>\d+)": (
        "the graph is of IR version {found}, and {most} is the newest that can be read: export the model with that "
        "one, or update the library"
    ),
    r"(No Op registered for|No conversion rule found for operations:) (?P<found>\w+)": (
        "it knows no operator {found}: export the model without it, or choose another backend"
    ),
    r"[Ee]xternal data|External initializer|externally stored data": (
        "weights that lie in a file beside the graph are missing or cut short: fetch the model again with all its "
        "files, and list them in [files]"
    ),
}


def unloadable(path: Path, library: str, error: Exception) -> ModelError:
    """Explain why `library` (name and version) cannot load the graph in `path`."""
    words = " ".join(str(error).split())
    for pattern, meaning in _MEANINGS.items():
        if match := re.search(pattern, words):
            meant = meaning.format(**match.groupdict())
            break
    else:
        meant = "fetch or export the model again, or choose another backend"
    return ModelError(f"cannot load {path} with {library}: {meant}. Its own words: {words}")
