"""What follows a model's tokens beside the dense vector: BGE-M3's heads, ColBERT's rows, SPLADE's pooling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from safetensors.torch import load_file

from embedmesh_cli.console import UserError
from embedmesh_cli.export.weights import Loaded
from embedmesh_cli.pull.recipe import COLBERT_HEAD, LEXICAL_HEAD, LEXICAL_OUTPUT, ROWS_OUTPUT, Pipeline, Splade
from embedmesh_cli.pull.repository import Repository

__all__ = ["SpladeEncoder", "TokenHeads", "read_layers"]

_ACTIVATIONS: Final[Mapping[str, Callable[[], Any]]] = {
    "none": torch.nn.Identity,
    "tanh": torch.nn.Tanh,
    "relu": torch.nn.ReLU,
    "sigmoid": torch.nn.Sigmoid,
}


def read_layers(repository: Repository, layers: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Make dense layers and layer norms, as `embedmesh_encoder.head` has them.

    Raises:
        UserError: Their weights are not what their configuration says.
    """
    made: list[Any] = []
    for layer in layers:
        weights = load_file(repository.fetch([layer["file"]]) / layer["file"])
        if layer["kind"] == "layer_norm":
            module, prefix = torch.nn.LayerNorm(layer["outputs"]), "norm."
        else:
            module = torch.nn.Linear(layer["inputs"], layer["outputs"], bias="linear.bias" in weights)
            prefix = "linear."
        named = {name.removeprefix(prefix): weight.float() for name, weight in weights.items()}
        try:
            module.load_state_dict(named)
        except RuntimeError:
            raise UserError(f"{layer['file']} of {repository.name} does not fit its configuration.") from None
        made += [module, _ACTIVATIONS[layer.get("activation", "none")]()]
    return made


class TokenHeads(torch.nn.Module):
    """From the hidden states of tokens to what else they give.

    Attributes:
        names: Of its outputs.
        files: Of its weights.
    """

    def __init__(self, repository: Repository, pipeline: Pipeline, loaded: Loaded) -> None:
        """Load the weights.

        Raises:
            UserError: They do not fit the model.
        """
        super().__init__()
        width = int(loaded.model.config.hidden_size) if pipeline.lexical or pipeline.rows else 0
        self.names: list[str] = []
        self.files: list[str] = []
        self.lexical = self.rows = None
        if pipeline.lexical:
            self.lexical = _linear(repository, LEXICAL_HEAD, width, outputs=1)
            self.names.append(LEXICAL_OUTPUT)
            self.files.append(LEXICAL_HEAD)
        if pipeline.rows:
            self.rows = torch.nn.Sequential(*self._rows(repository, pipeline.rows.layers, loaded, width))
            self.names.append(ROWS_OUTPUT)
        self.eval()

    def forward(self, hidden: Any) -> list[Any]:
        """Give the outputs, of hidden states [rows, width, d]."""
        found = [] if self.lexical is None else [torch.relu(self.lexical(hidden))]
        return found if self.rows is None else [*found, self.rows(hidden)]

    def _rows(
        self, repository: Repository, layers: Sequence[Mapping[str, Any]], loaded: Loaded, width: int
    ) -> list[Any]:
        made: list[Any] = []
        for layer in layers:
            file = layer["file"]
            if file == COLBERT_HEAD:
                made.append(_linear(repository, file, width))
            elif not file:
                made.append(_stanford(repository, loaded, width))
                continue
            else:
                made += read_layers(repository, [layer])
                if layer["inputs"] != width:
                    raise UserError(f"{file} of {repository.name} takes {layer['inputs']} numbers, not {width}.")
                width = layer["outputs"]
            self.files.append(file)
        return made


class SpladeEncoder(torch.nn.Module):
    """A masked-language model whose logits are pooled in its graph: of a text's tokens no more than one array stays."""

    def __init__(self, model: Any, splade: Splade) -> None:
        super().__init__()
        self.model = model
        self._splade = splade

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        """Give float32 [texts, vocabulary]."""
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        logits = torch.where(attention_mask[:, :, None] > 0, logits, torch.zeros((), dtype=logits.dtype))
        if self._splade.strategy == "max":  # the logarithm of the largest is the largest logarithm
            return self._weights(logits.amax(1))
        return self._weights(logits).sum(1)

    def _weights(self, logits: Any) -> Any:
        once = torch.log1p(torch.relu(logits))
        return torch.log1p(once) if self._splade.twice else once


def _linear(repository: Repository, file: str, inputs: int, outputs: int = 0) -> Any:
    """Load a layer whose tensors are named as torch names those of a bare one."""
    weights = load_file(repository.fetch([file]) / file)
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    rows = found.get("weight", (0,))[0]
    wanted = {"weight": (outputs or rows, inputs), "bias": (outputs or rows,)}
    if not rows or found not in (wanted, {"weight": wanted["weight"]}):
        raise UserError(
            f"{file} of {repository.name} does not fit the model, whose tokens have {inputs} numbers: it holds {found}."
        )
    layer = torch.nn.Linear(inputs, rows, bias="bias" in weights)
    layer.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return layer


def _stanford(repository: Repository, loaded: Loaded, inputs: int) -> Any:
    """Find the projection among a model's weights."""
    for file in loaded.files:
        if file.endswith(".safetensors"):
            weight = load_file(repository.fetch([file]) / file).get("linear.weight")
            if weight is not None and weight.ndim == 2 and weight.shape[1] == inputs:
                layer = torch.nn.Linear(inputs, weight.shape[0], bias=False)
                layer.load_state_dict({"weight": weight.float()})
                return layer
    raise UserError(f"the weights of {repository.name} hold no linear.weight for tokens of {inputs} numbers.")
