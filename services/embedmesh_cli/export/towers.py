"""Towers of images and sounds, and of texts beside them: a graph each, named as those for transformers.js are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from embedmesh_cli.console import USAGE, UserError
from embedmesh_cli.export.check import Reference
from embedmesh_cli.export.graph import Output, Plan
from embedmesh_cli.export.weights import Loaded
from embedmesh_cli.likeness import Vectors
from embedmesh_cli.pull.recipe import Wishes
from embedmesh_cli.pull.repository import Repository
from embedmesh_encoder.modalities import default_preparer
from embedmesh_encoder.model import ModelSpec
from embedmesh_encoder.preparation import Prepared

__all__ = ["TOWERS", "of_tower", "plan_towers"]

_PREPROCESSOR: Final = "preprocessor_config.json"
_FILES: Final = {"text": "text_model", "image": "vision_model", "audio": "audio_model"}


@dataclass(frozen=True, slots=True)
class _Tower:
    """What one tower of an architecture takes and gives.

    Attributes:
        inputs: By name: names of the axes that are of any size, "" for others.
        output: In transformers.
        method: Of the model, that gives it.
        name: Of the output in the graph, where it is pooled; else it is a vector a token.
    """

    inputs: Mapping[str, Sequence[str]]
    output: str
    method: str = "forward"
    name: str = ""


_TEXT: Final = {"input_ids": ("n", "longest"), "attention_mask": ("n", "longest")}
_PIXELS: Final = {"pixel_values": ("n",)}
_ANY_PIXELS: Final = {"pixel_values": ("n", "", "height", "width")}
_STATES: Final = "last_hidden_state"
_POOLED: Final = "pooler_output"
_WAVES: Final = {"input_values": ("n", "samples"), "attention_mask": ("n", "samples")}
# By `model_type` and modality. Inputs that the processor of a repository does not make are left out.
_TOWERS: Final[Mapping[str, Mapping[str, _Tower]]] = {
    "clip": {
        "text": _Tower(_TEXT, _POOLED, "get_text_features", "text_embeds"),
        "image": _Tower(_PIXELS, _POOLED, "get_image_features", "image_embeds"),
    },
    "siglip": {
        # Of one length: it was trained on padding, and told of no mask.
        "text": _Tower({"input_ids": ("n",)}, _POOLED, "get_text_features", _POOLED),
        "image": _Tower(_PIXELS, _POOLED, "get_image_features", _POOLED),
    },
    "clap": {
        "text": _Tower(_TEXT, _POOLED, "get_text_features", "text_embeds"),
        "audio": _Tower({"input_features": ("n",), "is_longer": ("n",)}, _POOLED, "get_audio_features", "audio_embeds"),
    },
    "vit": {"image": _Tower(_PIXELS, _STATES)},
    "dinov2": {"image": _Tower(_PIXELS, _STATES)},
    "convnext": {"image": _Tower(_ANY_PIXELS, _POOLED, name="image_embeds")},
    "audio-spectrogram-transformer": {"audio": _Tower({"input_values": ("n",)}, _POOLED, name="audio_embeds")},
    "whisper": {"audio": _Tower({"input_features": ("n",)}, _STATES, "encoder")},
    "wav2vec2": {"audio": _Tower(_WAVES, _STATES)},
}
TOWERS: Final = frozenset(_TOWERS)


def plan_towers(repository: Repository, loaded: Loaded, wishes: Wishes) -> dict[str, Plan]:
    """Plan the graphs of a model, by modality.

    Raises:
        UserError: The repository does not say how inputs are prepared, or its caller asks for what it does not give.
    """
    towers = _TOWERS[loaded.kind]
    if _PREPROCESSOR not in repository.files:
        raise UserError(f"{repository.name} has no {_PREPROCESSOR}, which says how its inputs are prepared.")
    pools = all(tower.name for tower in towers.values())
    if pools and wishes.pooling:
        raise UserError(f"a {loaded.kind} pools by itself: leave --pooling out.", USAGE)
    if not pools and not wishes.pooling:
        raise UserError(
            f"{repository.name} gives a vector for each part of its input: say how they become one with --pooling cls "
            "or mean (see its model card), and --normalize if vectors are normalised.",
            USAGE,
        )
    folder = repository.fetch([_PREPROCESSOR])
    plans = {}
    for modality, tower in towers.items():
        given = _EXAMPLES[modality](folder, loaded.model.config)
        inputs = {name: given[name] for name in tower.inputs if name in given}
        name = tower.name or tower.output
        axes = {**{each: tower.inputs[each] for each in inputs}, name: ("n",) if tower.name else ("n", "parts")}
        file = f"onnx/{_FILES[modality] if len(towers) > 1 else 'model'}.onnx"
        module = Output(loaded.model, inputs, tower.output, tower.method)
        plans[modality] = Plan(file, f"the {modality} tower of {loaded.title}", module, inputs, [name], axes)
    return plans


def of_tower(plan: Plan) -> Reference:
    """Give what embeds one prepared input by torch, alone."""

    def embed(spec: ModelSpec, prepared: Prepared) -> Vectors:
        preparer = default_preparer(spec)
        feeds = preparer.collate([prepared])
        with torch.no_grad():
            output = plan.module(*(torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in plan.inputs))
        return Vectors(preparer.split({plan.outputs[0]: output.numpy()}, [prepared]))

    return embed


def _text_example(folder: Any, config: Any) -> dict[str, Any]:
    del folder
    text = config.text_config
    length = text.max_position_embeddings if config.model_type == "siglip" else 7
    ids = torch.arange(5, 5 + 2 * length).reshape(2, length) % text.vocab_size
    # CLIP pools where the text ends.
    ids[:, -1] = getattr(text, "eos_token_id", None) or 0
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _image_example(folder: Any, config: Any) -> dict[str, Any]:
    from transformers import AutoImageProcessor  # type: ignore[import-not-found]  # noqa: PLC0415  (slow to import)

    del config
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    return dict(processor([Image.new("RGB", (400, 300), (90, 120, 150))] * 2, return_tensors="pt"))


def _audio_example(folder: Any, config: Any) -> dict[str, Any]:
    from transformers import AutoFeatureExtractor  # noqa: PLC0415  (slow to import)

    extractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
    rate = extractor.sampling_rate
    wave = np.sin(np.arange(2 * rate) / 9).astype(np.float32)
    made = dict(extractor([wave, wave], sampling_rate=rate, return_tensors="pt"))
    if not getattr(getattr(config, "audio_config", None), "enable_fusion", False):
        made.pop("is_longer", None)
    # The encoder feeds masks as it does those of texts.
    return {
        name: array if array.is_floating_point() or array.dtype == torch.bool else array.long()
        for name, array in made.items()
    }


_EXAMPLES: Final[Mapping[str, Callable[[Any, Any], dict[str, Any]]]] = {
    "text": _text_example, "image": _image_example, "audio": _audio_example,
}  # fmt: skip
