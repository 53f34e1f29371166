"""The reference: what sentence-transformers or transformers make of the weights that a model's authors published.

Prompts, pooling, longest input and normalisation are read by the library from the repository, not from our manifest,
so that a mistake in the manifest shows. Only where a repository does not say how it pools is the manifest believed.
Weights are read from safetensors alone, and no code of a repository runs.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from embedmesh_cli.console import FAILED, USAGE, UserError
from embedmesh_cli.layers import Layers, apply_layers
from embedmesh_encoder.model import ModelSpec
from embedmesh_encoder.pooling import pool

__all__ = ["ROLES", "Reference", "load_reference"]

Float32 = NDArray[np.float32]

ROLES: Final = ("none", "query", "document")
# The names under which sentence-transformers keeps the prompt of a role, the first that is there.
_PROMPTS: Final = {"none": (), "query": ("query",), "document": ("document", "passage", "corpus")}
_POOLING: Final = {"mean_sqrt_len": "mean_sqrt_len_tokens", "last": "lasttoken"}
_BATCH: Final = 8


class Reference:
    """A loaded reference.

    Attributes:
        name: What it is, for people.
        longest: How many tokens it reads; 0 where that does not apply.
        roles: Those that have a prompt of their own, and none.
    """

    def __init__(
        self,
        name: str,
        embed: Callable[[Sequence[Any], str], Float32],
        *,
        roles: Sequence[str] = ("none",),
        longest: int = 0,
    ) -> None:
        self.name = name
        self.longest = longest
        self.roles = tuple(roles)
        self._embed = embed

    def embed(self, items: Sequence[Any], role: str) -> Float32:
        """Give vectors as the library gives them: float32 [n, dimensions].

        Args:
            items: Texts, or the bytes of files.
            role: One of `roles`.

        Raises:
            UserError: The library failed.
        """
        try:
            return self._embed(items, role).astype(np.float32)
        except Exception as error:  # noqa: BLE001  (whatever it raises, it is no comparison)
            raise UserError(f"the reference {self.name} failed: {type(error).__name__}: {error}.") from None


def load_reference(spec: ModelSpec, wanted: str | None) -> Reference:
    """Load the reference of a model.

    Args:
        spec: The model.
        wanted: Folder or id (with @revision) of the original; what the manifest names as source unless given.

    Raises:
        UserError: It cannot be had, or a library is missing.
    """
    if spec.text and spec.text.template:
        raise UserError(
            f"verify knows no reference for models that read texts in a template, as {spec.name} does: it was held "
            "against torch when it was exported; see to its files with --no-reference.",
            USAGE,
        )
    where, revision = _original(spec, wanted)
    try:
        import sentence_transformers  # type: ignore[import-not-found]  # noqa: PLC0415
        import transformers  # type: ignore[import-not-found]  # noqa: PLC0415
    except ImportError:
        raise UserError(
            "verify compares with sentence-transformers, which is not installed: pip install 'embedmesh[verify]', or "
            "see to the rest with --no-reference.",
            USAGE,
        ) from None
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    library = f"sentence-transformers {sentence_transformers.__version__}, transformers {transformers.__version__}"
    name = f"{where}{f'@{revision}' if revision else ''} by {library}"
    try:
        if spec.modality == "text" and not spec.graph.output.endswith(("_embeds", "pooler_output")):
            found = _sentences(spec, where, revision, name)
        else:
            found = _features(spec, where, revision, name)
        return _whitened(spec, found) if spec.whitening else found
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  (a repository may be wrong in many ways)
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the reference {where} cannot be loaded ({line}): it must hold its weights as safetensors; name another "
            "folder or id with --reference.",
            FAILED,
        ) from None


def _whitened(spec: ModelSpec, original: Reference) -> Reference:
    """Do to the vectors of an original what the last layer of the model's head does, in double precision."""
    from safetensors.numpy import load_file  # noqa: PLC0415

    assert spec.head  # noqa: S101  (a manifest with [whitening] has one)
    file = spec.head.layers[-1].file
    weights = {name: array.astype(np.float64) for name, array in load_file(spec.path(file)).items()}

    def embed(items: Sequence[Any], role: str) -> Float32:
        vectors = original.embed(items, role) @ weights["linear.weight"].T + weights["linear.bias"]
        if spec.normalized:
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors.astype(np.float32)

    name = f"{original.name}, whitened by {file}"
    return Reference(name, embed, roles=original.roles, longest=original.longest)


def _original(spec: ModelSpec, wanted: str | None) -> tuple[str, str | None]:
    """Give folder or id, and revision."""
    if wanted:
        if Path(wanted).is_dir():
            return wanted, None
        name, _, revision = wanted.partition("@")
        return name, revision or None
    if Path(spec.source).is_dir():
        return spec.source, None
    found = re.fullmatch(r"https?://[^/]+/([\w.-]+/[\w.-]+)(?:/tree/(\w+))?/?", spec.source)
    if not found:
        raise UserError(
            f'the manifest of {spec.name} says "{spec.source}" of where it comes from: name the original, a folder or '
            "an id on the Hub, with --reference.",
            USAGE,
        )
    return found[1], found[2]


def _sentences(spec: ModelSpec, where: str, revision: str | None, name: str) -> Reference:
    from sentence_transformers import SentenceTransformer, models  # noqa: PLC0415

    safe = {"use_safetensors": True}
    if _says_how(where, revision):
        model = SentenceTransformer(where, revision=revision, device="cpu", model_kwargs=safe)
    else:
        if spec.graph.pooling == "graph":
            raise UserError(
                f"{where} does not say how it pools (it has no modules.json), and {spec.name} leaves it to its "
                "graph: name the original with --reference.",
                USAGE,
            )
        ways = [spec.graph.pooling] if isinstance(spec.graph.pooling, str) else spec.graph.pooling
        transformer = models.Transformer(where, model_kwargs={**safe, "revision": revision})
        modes = tuple(_POOLING.get(way, way) for way in ways)
        pooling = models.Pooling(transformer.get_embedding_dimension(), pooling_mode=modes)
        model = SentenceTransformer(
            modules=[transformer, pooling, *([models.Normalize()] if spec.normalized else [])], device="cpu"
        )
    if spec.whitening and not _normalizes_before_whitening(spec):
        for at in reversed([at for at, module in enumerate(model) if isinstance(module, models.Normalize)]):
            del model[at]
    if spec.layers:
        apply_layers(model[0].auto_model, Layers(spec.layers.kept, spec.layers.averaged), name)
    longest = int(model.max_seq_length or 0)
    if 0 < spec.max_input_units < longest:  # less than it could read may be wanted; more may not
        model.max_seq_length = spec.max_input_units
    prompts = {
        role: next((name for name in names if model.prompts.get(name)), None) for role, names in _PROMPTS.items()
    }

    def embed(items: Sequence[Any], role: str) -> Float32:
        prompt = {"prompt_name": prompts[role]} if prompts[role] else {} if role == "none" else {"prompt": ""}
        vectors: Float32 = model.encode(
            list(items), batch_size=_BATCH, show_progress_bar=False, convert_to_numpy=True, **prompt
        )
        return vectors

    roles = [role for role in ROLES if role == "none" or prompts[role] or model.default_prompt_name]
    return Reference(name, embed, roles=roles, longest=longest)


def _normalizes_before_whitening(spec: ModelSpec) -> bool:
    """Tell whether a layer of the head does so, or a graph that was exported with all that follows pooling."""
    layers = spec.head.layers if spec.head else ()
    whole = spec.graph.layout == "padded" and spec.graph.pooling == "graph"
    return whole or any(layer.kind == "normalize" for layer in layers)


def _says_how(where: str, revision: str | None) -> bool:
    """Tell whether an original is of sentence-transformers, which says how it pools."""
    if Path(where).is_dir():
        return (Path(where) / "modules.json").is_file()
    from huggingface_hub import hf_hub_download  # noqa: PLC0415
    from huggingface_hub.errors import EntryNotFoundError  # noqa: PLC0415

    try:
        hf_hub_download(where, "modules.json", revision=revision)
    except EntryNotFoundError:
        return False
    return True


def _features(spec: ModelSpec, where: str, revision: str | None, name: str) -> Reference:
    """One tower of a model, or a model of images or sounds, by transformers."""
    import torch  # noqa: PLC0415
    from transformers import AutoModel  # noqa: PLC0415

    model = AutoModel.from_pretrained(where, revision=revision, use_safetensors=True).eval()
    inputs = _inputs(spec, where, revision, siglip=model.config.model_type.startswith("siglip"))

    def vector(item: Any) -> Float32:
        features = inputs(item)
        if spec.graph.pooling == "graph":
            given = getattr(model, f"get_{spec.modality}_features")(**features)
            given = getattr(given, "pooler_output", given)  # transformers 5 gives more than the vectors
            row: Float32 = given.numpy()
            return row
        hidden = model(**features).last_hidden_state.numpy()
        return pool(spec.graph.pooling, hidden, np.array([hidden.shape[1]]))

    def embed(items: Sequence[Any], role: str) -> Float32:
        del role
        with torch.no_grad():
            vectors = np.concatenate([vector(item) for item in items])
        last = spec.normalized and not spec.whitening  # else normalised in the end, if at all
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if last else vectors

    return Reference(name, embed)


def _inputs(spec: ModelSpec, where: str, revision: str | None, *, siglip: bool) -> Callable[[Any], Any]:
    """Give what turns an input into the model's arrays."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer  # noqa: PLC0415

    if spec.modality == "text":
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision)
        padding = "max_length" if siglip else False
        return lambda text: tokenizer(
            [text], padding=padding, truncation=True, max_length=spec.max_input_units, return_tensors="pt"
        )
    if spec.modality == "image":
        from PIL import Image, ImageOps  # noqa: PLC0415
        from transformers.image_transforms import convert_to_rgb  # type: ignore[import-not-found]  # noqa: PLC0415

        processor = AutoImageProcessor.from_pretrained(where, revision=revision, backend="pil")

        def look(content: bytes) -> Any:
            # The library's own function: what is transparent becomes white, not whatever lies beneath.
            pixels = convert_to_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(content))), return_numpy=True)
            return processor(Image.fromarray(pixels), return_tensors="pt")

        return look
    import soundfile  # noqa: PLC0415
    import soxr  # noqa: PLC0415

    extractor = AutoFeatureExtractor.from_pretrained(where, revision=revision)
    rate = extractor.sampling_rate

    def read(content: bytes) -> Any:
        samples, given = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
        wave = soxr.resample(samples.mean(axis=1), given, rate, quality="HQ")
        return extractor(wave, sampling_rate=rate, return_tensors="pt")

    return read
