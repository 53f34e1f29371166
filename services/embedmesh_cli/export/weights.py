"""From a repository's safetensors to a torch model of transformers, without any code or pickle of the repository."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import transformers  # type: ignore[import-not-found]

from embedmesh_cli.console import USAGE, UserError
from embedmesh_cli.layers import Layers, apply_layers
from embedmesh_cli.pull.repository import Repository, read_json

__all__ = ["Loaded", "load_model"]

_ONE: Final = "model.safetensors"
_SHARDED: Final = "model.safetensors.index.json"
_ENCODERS: Final[Mapping[str, str]] = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
# Parts that no vector passes through: graphs end at the tokens, or at a projection of their own.
_UNUSED: Final = ("pooler.", "lm_head.")
# Rotary positions that are stretched by the longest input of a batch.
_STRETCHED: Final = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in this process.

    Attributes:
        model: Of torch, in float32, for inference.
        kind: Its architecture, `model_type` in its configuration.
        files: Names of its weights in the repository.
        layers: What the manifest says of a choice among its layers; none where it is whole.
    """

    model: Any
    kind: str
    files: Sequence[str]
    layers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What it is, for people."""
        cut = f", {self.layers['kept']} of {self.layers['of']} layers" if self.layers else ""
        count = sum(weight.numel() for weight in self.model.parameters())
        return f"a {self.kind} of {count / 1e6:.1f} M parameters{cut}"


def load_model(
    repository: Repository, prefix: str, layers: Layers, *, library_code: bool, masked: bool = False
) -> Loaded:
    """Load the model whose files lie below `prefix`.

    Args:
        repository: Where it is.
        prefix: Its folder there, with a slash; "" for the repository's own.
        layers: Which of its layers to take.
        library_code: Take the library's implementation though the repository brings its own.
        masked: Take it with the head that gives logits of masked tokens.

    Raises:
        UserError: It has no safetensors or no such layers, is incomplete, needs code of its own, or cannot give the
            same vectors in every company.
    """
    config = read_json(repository, f"{prefix}config.json", needed=True)
    kind = str(config.get("model_type"))
    _refuse_others(repository, prefix, config, library_code=library_code)
    files = _weights(repository, prefix)
    folder = repository.fetch([f"{prefix}config.json", *files]) / prefix
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    loader = getattr(transformers, "AutoModelForMaskedLM" if masked else _ENCODERS.get(kind, "AutoModel"))
    try:
        model, found = loader.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # noqa: BLE001  (a repository may be wrong in many ways)
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"transformers cannot load {repository.name}: {line.rstrip('.')}.") from None
    # The library would fill them with chance.
    unused = _UNUSED[:1] if masked else _UNUSED
    if missing := sorted(name for name in found["missing_keys"] if not name.startswith(unused)):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"the weights of {repository.name} are incomplete: {', '.join(missing[:3])}{more} are missing.")
    if not layers.suffix:
        return Loaded(model.eval(), kind, files)
    total = apply_layers(model, layers, repository.name)
    table: dict[str, Any] = {"kept": layers.kept or total, "of": total}
    if layers.averaged:
        table["averaged"] = list(layers.averaged)
    return Loaded(model.eval(), kind, files, table)


def _refuse_others(repository: Repository, prefix: str, config: Mapping[str, Any], *, library_code: bool) -> None:
    name = repository.name
    if f"{prefix}adapter_config.json" in repository.files:
        raise UserError(f"{name} is an adapter: merge it into its base (`merge_and_unload` of peft) and export that.")
    if "quantization_config" in config:
        raise UserError(f"the weights of {name} are quantised: export the original they were made from.")
    if any(key.startswith("AutoModel") for key in config.get("auto_map") or {}) and not library_code:
        raise UserError(
            f"{name} brings code of its own, which never runs here, and may give other vectors than transformers' "
            f"own {config.get('model_type')}: if its authors say that the latter is right, add --library-code.",
            USAGE,
        )
    if config.get("is_encoder_decoder") and config.get("model_type") not in (*_ENCODERS, "whisper"):
        raise UserError(
            f"{name} is an encoder with a decoder ({config.get('model_type')}): of those only "
            f"{', '.join(_ENCODERS)} and whisper are known."
        )
    ropes = [config.get(key) for key in ("rope_parameters", "rope_scaling")]
    ropes += [rope for each in ropes if isinstance(each, dict) for rope in each.values()]
    for rope in ropes:
        if isinstance(rope, dict) and (way := rope.get("rope_type", rope.get("type"))) in _STRETCHED:
            raise UserError(
                f"{name} stretches its positions by the longest text of a batch ({way}), so that vectors would depend "
                "on company."
            )


def _weights(repository: Repository, prefix: str) -> list[str]:
    """Give the names of the files that hold the weights."""
    if prefix + _ONE in repository.files:
        return [prefix + _ONE]
    if prefix + _SHARDED not in repository.files:
        others = sorted(file for file in repository.files if file.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5")))
        held = (
            f"its weights as pickles only ({', '.join(others[:3])}), which are never loaded" if others else "no weights"
        )
        raise UserError(
            f"{repository.name} has {held}: save it anew as safetensors (`save_pretrained` of transformers, where you "
            "trust the repository) and export the folder."
        )
    index = read_json(repository, prefix + _SHARDED)
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
        raise UserError(f"{prefix}{_SHARDED} of {repository.name} does not say where the weights lie.")
    return [prefix + _SHARDED, *sorted({prefix + file for file in shards.values()})]
