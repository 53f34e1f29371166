"""The reference: what sentence-transformers or transformers make of the weights that a model's authors published.

Prompts, pooling, longest input and normalisation are read by the library from the repository, not from our manifest,
so that a mistake in the manifest shows. Only where a repository does not say how it pools is the manifest believed.
Weights are read from safetensors alone, and no code of a repository runs.
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from embedmesh_cli.console import FAILED, USAGE, UserError
from embedmesh_cli.layers import Layers, apply_layers
from embedmesh_cli.likeness import Vectors
from embedmesh_encoder.model import ModelSpec
from embedmesh_encoder.pooling import Sparse, pool

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
        embed: Callable[[Sequence[Any], str], Vectors],
        *,
        roles: Sequence[str] = ("none",),
        longest: int = 0,
    ) -> None:
        self.name = name
        self.longest = longest
        self.roles = tuple(roles)
        self._embed = embed

    def embed(self, items: Sequence[Any], role: str) -> Vectors:
        """Give vectors as the library gives them, of every kind that the model makes.

        Args:
            items: Texts, or the bytes of files.
            role: One of `roles`.

        Raises:
            UserError: The library failed.
        """
        try:
            return self._embed(items, role)
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
        if spec.sparse and not spec.dimensions:
            return _splade(spec, where, revision, name)
        if spec.multi_vector and not spec.dimensions and _is_late_interaction(where, revision):
            return _late_interaction(spec, where, revision, name)
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

    def embed(items: Sequence[Any], role: str) -> Vectors:
        given = original.embed(items, role).dense
        assert given is not None  # noqa: S101  (whitening is of dense vectors)
        vectors = given @ weights["linear.weight"].T + weights["linear.bias"]
        if spec.normalized:
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return Vectors(vectors.astype(np.float32))

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
    limit = model.max_seq_length or 0
    longest = int(limit) if math.isfinite(limit) else 0
    if 0 < spec.max_input_units < longest:  # less than it could read may be wanted; more may not
        model.max_seq_length = spec.max_input_units
    prompts = {
        role: next((name for name in names if model.prompts.get(name)), None) for role, names in _PROMPTS.items()
    }

    heads = _heads(spec, where, revision, model.tokenizer) if spec.sparse or spec.multi_vector else None

    def embed(items: Sequence[Any], role: str) -> Vectors:
        prompt = {"prompt_name": prompts[role]} if prompts[role] else {} if role == "none" else {"prompt": ""}
        options = {"batch_size": _BATCH, "show_progress_bar": False, **prompt}
        if heads is None:
            return Vectors(np.asarray(model.encode(list(items), convert_to_numpy=True, **options), np.float32))
        return heads(model.encode(list(items), output_value=None, **options))

    roles = [role for role in ROLES if role == "none" or prompts[role] or model.default_prompt_name]
    return Reference(name, embed, roles=roles, longest=longest)


def _normalizes_before_whitening(spec: ModelSpec) -> bool:
    """Tell whether a layer of the head does so, or a graph that was exported with all that follows pooling."""
    layers = spec.head.layers if spec.head else ()
    whole = spec.graph.layout == "padded" and spec.graph.pooling == "graph"
    return whole or any(layer.kind == "normalize" for layer in layers)


def _heads(
    spec: ModelSpec, where: str, revision: str | None, tokenizer: Any
) -> Callable[[Sequence[Mapping[str, Any]]], Vectors]:
    """What BGE-M3's own code makes of tokens beside the dense vector; without its heads, the last hidden states."""
    from safetensors.numpy import load_file  # noqa: PLC0415

    def head(file: str) -> dict[str, Float32]:
        path = _file(where, revision, file)
        return {name: array.astype(np.float32) for name, array in load_file(path).items()} if path else {}

    lexical = head("sparse_linear.safetensors") if spec.sparse else {}
    colbert = head("colbert_linear.safetensors") if spec.multi_vector else {}
    unused = {
        number
        for name in ("cls", "eos", "pad", "unk")
        if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None
    }

    def linear(weights: Mapping[str, Float32], hidden: Float32) -> Float32:
        product: Float32 = hidden @ weights["weight"].T + weights.get("bias", np.float32(0))
        return product

    def embed(found: Sequence[Mapping[str, Any]]) -> Vectors:
        dense, sparse, rows = [], [], []
        for one in found:
            real = one["attention_mask"].numpy().astype(bool)
            hidden, ids = one["token_embeddings"].numpy()[real], one["input_ids"].numpy()[real]
            dense.append(one["sentence_embedding"].numpy())
            if lexical:
                largest: dict[int, float] = {}
                for number, weight in zip(ids.tolist(), linear(lexical, hidden)[:, 0].tolist(), strict=True):
                    if number not in unused and weight > max(0.0, largest.get(number, 0.0)):
                        largest[number] = weight
                sparse.append(_sorted(largest))
            if spec.multi_vector:
                matrix = linear(colbert, hidden[1:]) if colbert else hidden
                rows.append(matrix / np.linalg.norm(matrix, axis=1, keepdims=True) if colbert else matrix)
        return Vectors(
            np.array(dense, np.float32) if spec.dimensions else None,
            sparse if lexical else None,
            rows if spec.multi_vector else None,
        )

    return embed


def _sorted(weights: Mapping[int, float]) -> Sparse:
    indices = sorted(weights)
    return np.array(indices, np.uint32), np.array([weights[index] for index in indices], np.float32)


def _splade(spec: ModelSpec, where: str, revision: str | None, name: str) -> Reference:
    """A sparse model; of a plain masked-language model the library makes SPLADE with the largest weights."""
    from sentence_transformers import SparseEncoder  # noqa: PLC0415

    model = SparseEncoder(where, revision=revision, device="cpu", model_kwargs={"use_safetensors": True})
    longest = int(model.max_seq_length or 0)
    if 0 < spec.max_input_units < longest:
        model.max_seq_length = spec.max_input_units

    def embed(items: Sequence[Any], role: str) -> Vectors:
        options = {"batch_size": _BATCH, "show_progress_bar": False, "convert_to_sparse_tensor": False}
        encode = {"query": model.encode_query, "document": model.encode_document}.get(role, model.encode)
        return Vectors(sparse=[_nonzero(weights.numpy()) for weights in encode(list(items), **options)])

    return Reference(name, embed, roles=_roles(model), longest=longest)


def _nonzero(weights: Float32) -> Sparse:
    (indices,) = np.nonzero(weights)
    return indices.astype(np.uint32), weights[indices]


def _late_interaction(spec: ModelSpec, where: str, revision: str | None, name: str) -> Reference:
    """A model in the way of ColBERT; sentence-transformers reads PyLate's and Stanford's, too."""
    from sentence_transformers import MultiVectorEncoder  # noqa: PLC0415

    model = MultiVectorEncoder(where, revision=revision, device="cpu", model_kwargs={"use_safetensors": True})
    longest = int(model[0].document_length or model.max_seq_length or 0)
    if 0 < spec.max_input_units < longest:
        model[0].document_length = spec.max_input_units

    def embed(items: Sequence[Any], role: str) -> Vectors:
        encode = model.encode_query if role == "query" else model.encode_document
        found = encode(list(items), batch_size=_BATCH, show_progress_bar=False, convert_to_numpy=True)
        return Vectors(multi_vector=[np.asarray(each, np.float32) for each in found])

    return Reference(name, embed, roles=("query", "document"), longest=longest)


def _roles(model: Any) -> list[str]:
    """Give the roles that have a prompt of their own, and none."""
    named = {role: any(model.prompts.get(name) for name in names) for role, names in _PROMPTS.items()}
    return [role for role in ROLES if role == "none" or named[role]]


def _is_late_interaction(where: str, revision: str | None) -> bool:
    """Tell whether an original is in the way of ColBERT, by its own word."""
    for file, key, values in (
        ("config_sentence_transformers.json", "model_type", ("ColBERT", "MultiVectorEncoder")),
        ("config.json", "architectures", (["HF_ColBERT"],)),
    ):
        path = _file(where, revision, file)
        if path and json.loads(path.read_text(encoding="utf-8")).get(key) in values:
            return True
    return False


def _says_how(where: str, revision: str | None) -> bool:
    """Tell whether an original is of sentence-transformers, which says how it pools."""
    return _file(where, revision, "modules.json") is not None


def _file(where: str, revision: str | None, file: str) -> Path | None:
    """Have a file of an original on this disk; None if it has none of this name."""
    if Path(where).is_dir():
        path = Path(where) / file
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download  # noqa: PLC0415
    from huggingface_hub.errors import EntryNotFoundError  # noqa: PLC0415

    try:
        return Path(hf_hub_download(where, file, revision=revision))
    except EntryNotFoundError:
        return None


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

    def embed(items: Sequence[Any], role: str) -> Vectors:
        del role
        with torch.no_grad():
            vectors = np.concatenate([vector(item) for item in items]).astype(np.float32)
        last = spec.normalized and not spec.whitening  # else normalised in the end, if at all
        return Vectors(vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if last else vectors)

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
