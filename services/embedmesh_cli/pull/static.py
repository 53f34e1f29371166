"""Static embeddings, sentence-transformers' and model2vec's: a graph of a table of tokens.

The vector of a text is the mean of its tokens' rows. Its graph is made here, without torch: packed, as small as that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from embedmesh_cli.console import UserError
from embedmesh_cli.pull.repository import Repository

__all__ = ["STATIC_LONGEST", "STATIC_OUTPUT", "static_weights", "write_static_graph"]

STATIC_OUTPUT: Final = "sentence_embedding"
# Such a model reads texts of any length; a limit there must be. Some 100 kB of text.
STATIC_LONGEST: Final = 32_768
_OPSET: Final = 20
_IR: Final = 10


def static_weights(repository: Repository, prefix: str) -> str:
    """Name the file of the table.

    Raises:
        UserError: There is none of safetensors.
    """
    file = f"{prefix}model.safetensors"
    if file not in repository.files:
        raise UserError(f"{repository.name} has no {file}: pickles and other forms of its table are never loaded.")
    return file


def write_static_graph(repository: Repository, prefix: str, path: Path) -> None:
    """Write the graph of a repository's table.

    Raises:
        UserError: The weights are not as sentence-transformers or model2vec write them.
    """
    import onnx  # noqa: PLC0415  (slow to import)
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415

    table = _table(repository, static_weights(repository, prefix))
    constants: dict[str, NDArray[Any]] = {
        "table": table,
        "flat": np.array([-1], np.int64),
        "texts_axis": np.array([1], np.int64),
        "tokens_axis": np.array([0], np.int64),
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
    }
    node = helper.make_node
    nodes = [
        # Of which text each token is, as a matrix [texts, tokens]; padding is of none.
        node("Reshape", ["segment_ids", "flat"], ["segments"]),
        node("ReduceMax", ["segments"], ["last"], keepdims=0),
        node("Add", ["last", "one"], ["count"]),
        node("Range", ["zero", "count", "one"], ["texts"]),
        node("Unsqueeze", ["texts", "texts_axis"], ["text_column"]),
        node("Unsqueeze", ["segments", "tokens_axis"], ["token_row"]),
        node("Equal", ["text_column", "token_row"], ["members"]),
        node("Cast", ["members"], ["weights"], to=TensorProto.FLOAT),
        node("ReduceSum", ["weights", "texts_axis"], ["lengths"], keepdims=1),
        node("Reshape", ["input_ids", "flat"], ["ids"]),
        node("Gather", ["table", "ids"], ["rows"]),
        node("MatMul", ["weights", "rows"], ["sums"]),
        node("Div", ["sums", "lengths"], [STATIC_OUTPUT]),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["rows", "width"])
        for name in ("input_ids", "position_ids", "segment_ids")
    ]
    output = helper.make_tensor_value_info(STATIC_OUTPUT, TensorProto.FLOAT, ["texts", table.shape[1]])
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "static", inputs, [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))


def _table(repository: Repository, file: str) -> NDArray[np.float32]:
    """Read the row of each token: model2vec may share rows among tokens, and weigh them."""
    try:
        found: Mapping[str, NDArray[Any]] = load_file(repository.fetch([file]) / file)
    except (OSError, SafetensorError, TypeError) as error:  # TypeError: numbers that numpy does not have
        raise UserError(f"{file} of {repository.name} cannot be read: {error}.") from None
    table = found.get("embedding.weight", found.get("embeddings"))
    if table is None or table.ndim != 2 or table.dtype.kind != "f":
        shapes = {name: f"{array.dtype.name} {list(array.shape)}" for name, array in found.items()}
        raise UserError(f"{file} of {repository.name} holds no table of numbers for tokens, but {shapes}.")
    if "embedding.weight" in found:
        return table.astype(np.float32)
    mapping, weights = found.get("mapping"), found.get("weights")
    if mapping is not None:
        if (
            mapping.ndim != 1
            or mapping.dtype.kind not in "iu"
            or not (0 <= mapping.min() <= mapping.max() < len(table))
        ):
            raise UserError(f"the mapping in {file} of {repository.name} leads beyond its {len(table)} rows.")
        table = table[mapping]
    rows = table.astype(np.float32)
    if weights is None:
        return rows
    if weights.shape != (len(rows),):
        raise UserError(f"{file} of {repository.name} has {weights.shape} weights for {len(rows)} tokens.")
    weighed: NDArray[np.float32] = rows * weights.astype(np.float32)[:, None]
    return weighed
