"""Builds the packed ONNX graph of a BERT encoder from its weights, without torch.

The architecture is that of Devlin et al., "BERT" (2019), as `transformers` implements it, with
three differences that change no vector:

* Texts lie end to end in rows. A token attends to the tokens of its own segment only, by an
  additive mask made from `segment_ids`. Padding is a segment of its own (-1), so that every
  softmax has something to sum and nothing becomes NaN.
* Mean pooling over each segment is part of the graph: one product of a 0/1 matrix [texts, tokens]
  with the hidden states.
* The token type embedding, always row 0, is added to the position table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

__all__ = ["BertConfig", "build_packed_bert"]

# Gelu (opset 20) with the exact erf is one fused kernel in onnxruntime, LayerNormalization (17) too.
_OPSET: Final = 20
_IR: Final = 9
# Added to the scores of foreign tokens: exp() of it is exactly 0 in float32.
_FAR: Final = -1e9


@dataclass(frozen=True, slots=True)
class BertConfig:
    """Sizes of a BERT encoder, named as in its `config.json`."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float


class _Graph:
    """Collects nodes and weights; methods return the name of what they made."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[TensorProto] = []

    def weight(self, name: str, value: NDArray[Any]) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def op(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def linear(self, x: str, name: str, weight: NDArray[Any], bias: NDArray[Any]) -> str:
        """Multiply with a weight of torch's orientation [out, in]."""
        product = self.op("MatMul", [x, self.weight(f"{name}.weight", weight.T)], f"{name}.product")
        return self.op("Add", [product, self.weight(f"{name}.bias", bias)], name)


def build_packed_bert(weights: Mapping[str, NDArray[np.float32]], config: BertConfig) -> ModelProto:
    """Build the graph.

    Args:
        weights: float32 arrays under the names of `transformers.BertModel`.
        config: The sizes.

    Returns:
        A model with int64 inputs `input_ids`, `position_ids`, `segment_ids` [rows, width] and the
        float32 output `sentence_embedding` [texts, hidden_size], where texts is the largest
        segment id plus one; as pooled, not normalised.

    Raises:
        KeyError: A weight is missing.
    """
    g = _Graph()
    size, heads = config.hidden_size, config.num_attention_heads
    head = size // heads

    def norm(x: str, name: str) -> str:
        scale = g.weight(f"{name}.weight", weights[f"{name}.weight"])
        bias = g.weight(f"{name}.bias", weights[f"{name}.bias"])
        return g.op("LayerNormalization", [x, scale, bias], name, axis=-1, epsilon=config.layer_norm_eps)

    words = g.weight("words", weights["embeddings.word_embeddings.weight"])
    types = weights["embeddings.token_type_embeddings.weight"][0]
    places = g.weight("positions", weights["embeddings.position_embeddings.weight"] + types)
    word = g.op("Gather", [words, "input_ids"], "word")
    place = g.op("Gather", [places, "position_ids"], "place")
    x = norm(g.op("Add", [word, place], "embedded"), "embeddings.LayerNorm")

    column = g.op("Unsqueeze", ["segment_ids", g.weight("axes.column", np.array([1, 3]))], "segment.column")
    row = g.op("Unsqueeze", ["segment_ids", g.weight("axes.row", np.array([1, 2]))], "segment.row")
    same = g.op("Equal", [column, row], "same_segment")  # [rows, 1, width, width]
    near = g.weight("near", np.array(0, np.float32))
    far = g.weight("far", np.array(_FAR, np.float32))
    mask = g.op("Where", [same, near, far], "mask")

    split_heads = g.weight("shape.heads", np.array([0, 0, heads, head]))
    join_heads = g.weight("shape.join", np.array([0, 0, size]))
    scale = g.weight("scale", np.array(1 / np.sqrt(head), np.float32))

    def dense(x: str, name: str) -> str:
        return g.linear(x, name, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def by_head(x: str, name: str, perm: Sequence[int]) -> str:
        rows = g.op("Reshape", [dense(x, name), split_heads], f"{name}.heads")
        return g.op("Transpose", [rows], f"{name}.transposed", perm=perm)

    for layer in range(config.num_hidden_layers):
        at = f"encoder.layer.{layer}"
        # [rows, width, heads, head] -> [rows, heads, width, head], the keys [rows, heads, head, width]
        q = by_head(x, f"{at}.attention.self.query", [0, 2, 1, 3])
        k = by_head(x, f"{at}.attention.self.key", [0, 2, 3, 1])
        v = by_head(x, f"{at}.attention.self.value", [0, 2, 1, 3])
        scores = g.op("Mul", [g.op("MatMul", [q, k], f"{at}.scores"), scale], f"{at}.scores.scaled")
        shares = g.op("Softmax", [g.op("Add", [scores, mask], f"{at}.scores.masked")], f"{at}.shares", axis=-1)
        mixed = g.op("Transpose", [g.op("MatMul", [shares, v], f"{at}.mixed")], f"{at}.mixed.rows", perm=[0, 2, 1, 3])
        mixed = g.op("Reshape", [mixed, join_heads], f"{at}.mixed.joined")

        out = dense(mixed, f"{at}.attention.output.dense")
        x = norm(g.op("Add", [out, x], f"{at}.attention.sum"), f"{at}.attention.output.LayerNorm")
        inner = dense(x, f"{at}.intermediate.dense")
        inner = g.op("Gelu", [inner], f"{at}.gelu", approximate="none")
        out = dense(inner, f"{at}.output.dense")
        x = norm(g.op("Add", [out, x], f"{at}.sum"), f"{at}.output.LayerNorm")

    _pool_segments(g, x, size)
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["rows", "width"])
        for name in ("input_ids", "position_ids", "segment_ids")
    ]
    output = helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["texts", size])
    graph = helper.make_graph(g.nodes, "packed_bert", inputs, [output], g.weights)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR, producer_name="embedmesh"
    )


def _pool_segments(g: _Graph, x: str, size: int) -> None:
    """Average the hidden states `x` [rows, width, size] over each segment: `sentence_embedding` [texts, size]."""
    tokens = g.op("Reshape", [x, g.weight("shape.tokens", np.array([-1, size]))], "tokens")
    flat = g.op("Reshape", ["segment_ids", g.weight("shape.flat", np.array([1, -1]))], "segment.flat")
    one = g.weight("one", np.array(1, np.int64))
    count = g.op("Add", [g.op("ReduceMax", ["segment_ids"], "segment.last", keepdims=0), one], "texts")
    texts = g.op("Range", [g.weight("zero", np.array(0, np.int64)), count, one], "texts.range")
    texts = g.op("Unsqueeze", [texts, g.weight("axes.texts", np.array([1]))], "texts.column")
    members = g.op("Cast", [g.op("Equal", [texts, flat], "members.bool")], "members", to=TensorProto.FLOAT)
    sums = g.op("MatMul", [members, tokens], "sums")
    lengths = g.op("ReduceSum", [members, g.weight("axes.tokens", np.array([1]))], "lengths", keepdims=1)
    g.op("Div", [sums, lengths], "sentence_embedding")
