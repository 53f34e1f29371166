"""Models that read a picture and a text together: a graph for both, and a packed one for a text alone.

Known is LLaVA, where pictures are of one size and become as many tokens each. The language model of both graphs is the
same, so that their vectors share a space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from tokenizers import Tokenizer

from embedmesh_cli.console import USAGE, UserError
from embedmesh_cli.export.check import Reference
from embedmesh_cli.export.graph import Plan
from embedmesh_cli.export.packed import FAMILIES, pool_segments
from embedmesh_cli.export.weights import Loaded
from embedmesh_cli.likeness import Vectors
from embedmesh_cli.pull.recipe import Templates, Wishes
from embedmesh_cli.pull.repository import Repository, read_json
from embedmesh_encoder.model import ModelSpec
from embedmesh_encoder.pooling import Pooling, pool
from embedmesh_encoder.preparation import Prepared

__all__ = ["PICTURES", "check_pictures", "language_of", "of_picture", "plan_pictures"]

PICTURES: Final = frozenset({"llava"})

_OUTPUT: Final = "image_embeds"
_TOWERS: Final = frozenset({"clip_vision_model", "siglip_vision_model"})


def check_pictures(repository: Repository, wishes: Wishes) -> None:
    """See that a model of one of `PICTURES` can be exported, before its weights are fetched.

    Raises:
        UserError: It is of other parts than are known, or its caller left out what no file says.
    """
    config = read_json(repository, "config.json")
    parts = [(config.get(part) or {}).get("model_type") for part in ("vision_config", "text_config")]
    if parts[0] not in _TOWERS or parts[1] not in FAMILIES:
        raise UserError(
            f"{repository.name} puts a {parts[0]} and a {parts[1]} together: of the former only "
            f"{' and '.join(sorted(_TOWERS))} are known, of the latter {', '.join(sorted(FAMILIES))}."
        )
    if not wishes.pooling or not wishes.templates:
        raise UserError(
            f"{repository.name} reads pictures with texts, and no file says how they become one vector: name it with "
            "--pooling (mostly last), --image-template such as $'USER: <image>\\n{text} ASSISTANT:', --text-template "
            "such as 'USER: {text} ASSISTANT:' (see its model card), and --normalize if vectors are normalised.",
            USAGE,
        )


def plan_pictures(repository: Repository, loaded: Loaded, wishes: Wishes, text: Plan) -> tuple[dict[str, Plan], Wishes]:
    """Plan the graphs of a model, by modality; and say what was found out.

    Args:
        repository: Where its files are.
        loaded: The model.
        wishes: What its caller says of it.
        text: The graph of its part that reads texts alone (`language_of`).

    Raises:
        UserError: Its tokenizer does not know the token of a picture.
    """
    config, templates = loaded.model.config, wishes.templates
    assert templates  # noqa: S101  (checked before)
    tokenizer = Tokenizer.from_file(str(repository.fetch(["tokenizer.json"]) / "tokenizer.json"))
    token = tokenizer.id_to_token(config.image_token_id)
    if token is None:
        raise UserError(f"tokenizer.json of {repository.name} has no token {config.image_token_id}, that of a picture.")
    size = config.vision_config.image_size
    # Two rows, one of them with padding.
    pixels = torch.zeros(2, 3, size, size)
    with torch.no_grad():
        count = _features(loaded.model, pixels).shape[1]
    ids = torch.full((2, count + 4), config.image_token_id)
    ids[:, 0], ids[:, count + 1 :] = 1, 2
    mask = (torch.arange(count + 4) < torch.tensor([[count + 4], [count + 2]])).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    axes = {"input_ids": ("n", "longest"), "attention_mask": ("n", "longest"), "pixel_values": ("n",), _OUTPUT: ("n",)}
    module = _PictureWithText(loaded.model, wishes.pooling)
    what = f"{loaded.title}, for pictures with texts"
    plans = {
        "image": Plan("onnx/vision_model.onnx", what, module, inputs, [_OUTPUT], axes),
        "text": dataclasses.replace(text, file="onnx/text_model.onnx"),
    }
    found = Templates(templates.image, templates.text, token, count)
    return plans, dataclasses.replace(wishes, pooling=(), normalize=bool(wishes.normalize), templates=found)


def language_of(loaded: Loaded) -> Loaded:
    """Give the part that reads texts alone."""
    return Loaded(loaded.model.language_model, loaded.model.config.text_config.model_type, loaded.files)


def of_picture(loaded: Loaded, pooling: Sequence[Pooling]) -> Reference:
    """Give what embeds a picture with its text by the library's own forward pass, alone."""

    def embed(spec: ModelSpec, prepared: Prepared) -> Vectors:
        del spec
        pixels, text = prepared.data
        ids = torch.from_numpy(text.data[None])
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.from_numpy(pixels[None]),
        }
        with torch.no_grad():
            hidden = loaded.model(**inputs).last_hidden_state.numpy()
        return Vectors(pool(pooling, hidden, np.array([ids.shape[1]])))

    return embed


class _PictureWithText(torch.nn.Module):
    """The forward pass of the library, whose own takes a batch of no other size than it was traced with."""

    def __init__(self, model: Any, pooling: Sequence[Pooling]) -> None:
        super().__init__()
        self.model = model
        self._ways = tuple(pooling)

    def forward(self, ids: Any, mask: Any, pixels: Any) -> Any:
        """Give the vectors, [n, d]."""
        model = self.model
        place = ids == model.config.image_token_id
        features = _features(model, pixels)
        # The first token of a picture takes its first feature; row by row, so that no row reads another's picture.
        order = (place.long().cumsum(1) - 1).clamp(0, features.shape[1] - 1)
        seen = features.gather(1, order[:, :, None].expand(-1, -1, features.shape[2]))
        # The token itself may lie beyond the table.
        embedded = model.get_input_embeddings()(ids.masked_fill(place, 0))
        hidden = model.language_model(
            inputs_embeds=torch.where(place[:, :, None], seen, embedded), attention_mask=mask, use_cache=False
        ).last_hidden_state
        positions = torch.arange(ids.shape[1])[None, :].expand(ids.shape)
        rows = torch.arange(ids.shape[0])[:, None].expand(ids.shape)
        return pool_segments(self._ways, hidden, positions, rows.masked_fill(mask == 0, -1))


def _features(model: Any, pixels: Any) -> Any:
    """Give the tokens of pictures, [n, tokens, d], as `LlavaModel.get_image_features` does for one."""
    config = model.config
    layers = config.vision_feature_layer
    states = model.vision_tower(pixels, output_hidden_states=True).hidden_states
    chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    if config.vision_feature_select_strategy == "default":
        chosen = [state[:, 1:] for state in chosen]
    return model.multi_modal_projector(torch.cat(chosen, dim=-1))
