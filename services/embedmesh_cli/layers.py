"""Which layers of a text model's original make its vectors: fewer than all, or the mean of several hidden states.

A cut is that of sentence-transformers' AdaptiveLayerLoss and 2D-Matryoshka: the first layers stay, and with them
whatever the architecture puts behind its last one (a norm, in decoders, T5 and ModernBERT). Hidden states are counted
as transformers does: 0 is the embeddings, i what layer i gives, the last one behind that norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

from embedmesh_cli.console import USAGE, UserError

__all__ = ["Layers", "apply_layers"]


@dataclass(frozen=True, slots=True)
class Layers:
    """What is taken of a model's layers.

    Attributes:
        kept: How many, from the first on; 0 for all.
        averaged: Hidden states whose mean is pooled; none for the last.
    """

    kept: int = 0
    averaged: tuple[int, ...] = ()

    @property
    def suffix(self) -> str:
        """What tells a model of this choice from others, at the end of its name; "" for the model as it is."""
        averaged = "-h" + "-".join(map(str, self.averaged)) if self.averaged else ""
        return (f"-l{self.kept}" if self.kept else "") + averaged


def apply_layers(model: Any, layers: Layers, name: str) -> int:
    """Make a model of transformers give what a choice of its layers gives, as `last_hidden_state`.

    Args:
        model: Of torch; changed.
        layers: The choice.
        name: Of the model, for people.

    Returns:
        How many layers the model had.

    Raises:
        UserError: It has no such layers, or no list of them that could be cut (ALBERT has one layer for all).
    """
    total = int(model.config.num_hidden_layers)
    kept = layers.kept or total
    if kept > total:
        raise UserError(f"{name} has {total} layers, of which --layers takes 1 to {total}, not {kept}.", USAGE)
    if beyond := [state for state in layers.averaged if state > kept]:
        raise UserError(
            f"{name} has hidden states 0 (the embeddings) to {kept}{' then' if kept < total else ''}, not {beyond[0]}.",
            USAGE,
        )
    if kept < total:
        found = next(_lists(model, total), None)
        if found is None:
            raise UserError(
                f"{name} keeps no list of its {total} layers ({model.config.model_type}), so that it cannot be cut."
            )
        parent, attribute = found
        setattr(parent, attribute, getattr(parent, attribute)[:kept])
        model.config.num_hidden_layers = kept
    if layers.averaged:
        _average(model, layers.averaged)
    return total


def _lists(model: Any, length: int) -> Iterator[tuple[Any, str]]:
    """Find lists of so many parts, the outermost first: a layer may be a list itself."""
    import torch  # noqa: PLC0415  (slow to import)

    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == length:
                yield parent, name


def _average(model: Any, states: Sequence[int]) -> None:
    forward = model.forward

    @wraps(forward)  # whose parameters some look at
    def averaged(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options | {"output_hidden_states": True})
        output["last_hidden_state"] = sum(output.hidden_states[state] for state in states) / len(states)
        return output

    model.forward = averaged
