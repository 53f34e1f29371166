"""The packed form of an encoder: texts lie end to end in rows, and none of them sees another.

Exact, because everything a model of these families knows of a token's place is its position in its text: embeddings of
positions, rotations, biases of relative positions and attention masks (causal, windows) are all functions of positions,
and are here given those of `position_ids`, which restart at each text. To that comes one condition: a token attends to
those of its own segment. A model's own code makes its masks; it is asked with positions in place of indexes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # type: ignore[import-not-found]

from embedmesh_cli.export.graph import Plan
from embedmesh_cli.export.heads import TokenHeads
from embedmesh_cli.export.weights import Loaded
from embedmesh_encoder.pooling import Pooling

__all__ = ["FAMILIES", "plan_packed", "pool_segments"]

_OUTPUT: Final = "sentence_embedding"

# How a family's tokens know their positions, by `model_type`.
_ABSOLUTE: Final = frozenset({"bert", "distilbert", "electra"})
_LATE: Final = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet"})  # absolute, from the id of padding on
_ROTARY: Final = frozenset(
    {"gemma", "gemma2", "gemma3_text", "llama", "mistral", "modernbert", "nomic_bert", "qwen2", "qwen3"}
)
_T5: Final = frozenset({"t5", "mt5", "umt5"})
FAMILIES: Final = _ABSOLUTE | _LATE | _ROTARY | _T5

# Added to the scores of foreign tokens: exp() of it is exactly 0 in float32.
_FAR: Final = -1e9
# Beyond it, all relative positions share a bucket; MPNet's is fixed, T5's in its configuration.
_MPNET_DISTANCE: Final = 128


def plan_packed(loaded: Loaded, pooling: Sequence[Pooling], head: Callable[[Any], Any], heads: TokenHeads) -> Plan:
    """Plan the graph of a model of one of `FAMILIES`, whose attention is eager.

    Args:
        loaded: The model.
        pooling: Ways to a dense vector; none where that is not wanted.
        head: What follows pooling.
        heads: What else follows the tokens.
    """
    # Three texts in two rows, with padding.
    inputs = {
        "input_ids": torch.arange(5, 19).reshape(2, 7),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 0]]),
        "segment_ids": torch.tensor([[0, 0, 0, 1, 1, -1, -1], [2, 2, 2, 2, 2, 2, -1]]),
    }
    axes = {**dict.fromkeys((*inputs, *heads.names), ("rows", "width")), _OUTPUT: ("texts",)}
    module = _PackedEncoder(loaded.model, loaded.kind, pooling, head, heads)
    outputs = [*([_OUTPUT] if pooling else []), *heads.names]
    return Plan("onnx/model.onnx", f"{loaded.title}, packed", module, inputs, outputs, axes)


class _PackedEncoder(torch.nn.Module):
    """A model with packed inputs, int64 [rows, width], one pooled vector a text, and what else its tokens give."""

    def __init__(
        self, model: Any, kind: str, pooling: Sequence[Pooling], head: Callable[[Any], Any], heads: TokenHeads
    ) -> None:
        super().__init__()
        self.heads = heads
        self.model = model
        self.head = head
        self._kind = kind
        self._pooling = tuple(pooling)
        self._biases = tuple(_biases(model, kind))
        self._takes = inspect.signature(model.forward).parameters

    def forward(self, input_ids: Any, position_ids: Any, segment_ids: Any) -> tuple[Any, ...]:
        """Give float32 [texts, d], where texts is the largest segment id plus one, and [rows, width, ...] of tokens."""
        places = _late(input_ids, position_ids, self.model) if self._kind in _LATE else position_ids
        arguments = {
            "position_ids": places,
            "token_type_ids": torch.zeros_like(input_ids),
            # Of all tokens: else the library would look for segments itself.
            "attention_mask": torch.ones_like(input_ids),
            "use_cache": False,
        }
        arguments = {name: value for name, value in arguments.items() if name in self._takes}
        with _masks(position_ids, segment_ids), _relative(self._biases, position_ids):
            hidden = self.model(input_ids=input_ids, **arguments).last_hidden_state
        others = tuple(self.heads(hidden))
        if not self._pooling:
            return others
        return (self.head(pool_segments(self._pooling, hidden, position_ids, segment_ids)), *others)


@contextmanager
def _masks(positions: Any, segments: Any) -> Iterator[None]:
    """Have the masks of eager attention made from positions, within segments."""
    same = segments[:, None, :, None] == segments[:, None, None, :]

    def mask(*, mask_function: Callable[..., Any], dtype: Any, **_: Any) -> Any:
        rows = torch.arange(positions.shape[0])[:, None, None, None]
        head = torch.zeros((1, 1, 1, 1), dtype=torch.long)
        seen = mask_function(rows, head, positions[:, None, :, None], positions[:, None, None, :])
        return torch.where(same & seen, torch.zeros((), dtype=dtype), torch.full((), _FAR, dtype=dtype))

    ALL_MASK_ATTENTION_FUNCTIONS["eager"] = mask
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["eager"]


def _late(ids: Any, positions: Any, model: Any) -> Any:
    """Count positions as RoBERTa does: from the id of padding on, past every token that is no padding itself."""
    padding = model.embeddings.padding_idx
    real = (ids != padding).long()
    count = torch.cumsum(real, dim=1)
    start = torch.arange(ids.shape[1]) - positions  # of the text, in its row
    before = torch.gather(count - real, 1, start)
    return (count - before) * real + padding


@dataclass(frozen=True, slots=True)
class _Bias:
    """A part of a model that adds a bias for each relative position.

    Attributes:
        part: Of torch, with the table `relative_attention_bias`.
        method: Its method that gives biases [1, heads, width, width].
        buckets: Rows of the table for all distances that have their own. Computed here, not in the graph: logarithms
            in it fall on whole numbers, which another library may round the other way.
    """

    part: Any
    method: str
    buckets: Any

    def of(self, positions: Any) -> Any:
        """Give biases [rows, heads, width, width] of positions [rows, width]."""
        most = len(self.buckets) // 2
        distances = positions[:, None, :] - positions[:, :, None]  # memory minus context
        table = self.part.relative_attention_bias(self.buckets)
        return table[distances.clamp(-most, most) + most].permute(0, 3, 1, 2)


def _biases(model: Any, kind: str) -> Iterator[_Bias]:
    """Find the parts that know relative positions."""
    if kind == "mpnet":
        bucket, most = model.encoder.relative_position_bucket, _MPNET_DISTANCE
        yield _Bias(model.encoder, "compute_position_bias", bucket(torch.arange(-most, most + 1)))
    for part in model.encoder.modules() if kind in _T5 else ():
        if getattr(part, "has_relative_attention_bias", False):
            bucket, most = part._relative_position_bucket, part.relative_attention_max_distance  # noqa: SLF001
            given = {
                "bidirectional": True,
                "num_buckets": part.relative_attention_num_buckets,
                "max_distance": most,
            }
            takes = inspect.signature(bucket).parameters  # UMT5's knows them by itself
            options = {name: value for name, value in given.items() if name in takes}
            yield _Bias(part, "compute_bias", bucket(torch.arange(-most, most + 1), **options))


@contextmanager
def _relative(biases: Sequence[_Bias], positions: Any) -> Iterator[None]:
    """Have the biases of relative positions looked up by positions."""

    def give(bias: Any, *_: Any, **__: Any) -> Any:
        return bias

    for bias in biases:
        setattr(bias.part, bias.method, partial(give, bias.of(positions)))
    try:
        yield
    finally:
        for bias in biases:
            delattr(bias.part, bias.method)


def pool_segments(ways: Sequence[Pooling], hidden: Any, positions: Any, segments: Any) -> Any:
    """Pool hidden states [rows, width, d] over segments, as `embedmesh_encoder.pooling` does over rows."""
    tokens = hidden.reshape(-1, hidden.shape[-1])
    position, segment = positions.reshape(1, -1), segments.reshape(1, -1)
    members = torch.arange(segments.max() + 1)[:, None] == segment  # [texts, tokens]
    counted = members.to(hidden.dtype)
    lengths = counted.sum(1, keepdim=True)

    def weighted(weights: Any) -> Any:
        return (counted * weights) @ tokens

    pooled: Mapping[str, Callable[[], Any]] = {
        "mean": lambda: counted @ tokens / lengths,
        "mean_sqrt_len": lambda: counted @ tokens / lengths.sqrt(),
        "weightedmean": lambda: weighted(position + 1) / (counted * (position + 1)).sum(1, keepdim=True),
        "cls": lambda: weighted(position == 0),
        "last": lambda: weighted(position == lengths - 1),
        "max": lambda: torch.where(members[:, :, None], tokens, torch.finfo(hidden.dtype).min).amax(1),
    }
    return torch.cat([pooled[way]() for way in ways], dim=1)
