"""A model is a folder with a manifest, `model.toml`: read, checked and fingerprinted here.

    format = 1
    name = "all-MiniLM-L6-v2"          # letters, digits and . _ - /
    family = "starter"                 # towers that answer under one name; default: the name
    modality = "text"                  # text, image or audio
    space = "all-MiniLM-L6-v2"         # vectors may be compared only within one space
    kinds = ["dense"]                  # default; also "sparse" and "multi_vector", each with a table of its own
    dimensions = 384                   # of the dense vector; this key, the next and normalized only with it
    truncatable_dimensions = []        # smaller widths the model was trained for; default: none
    normalized = true                  # whether the reference library normalises the vectors
    max_input_units = 256              # tokens, special ones included
    license = "Apache-2.0"
    source = "https://..."             # where the weights come from
    backend = "onnxruntime"            # what runs it unless the node is told otherwise; also cuda,
                                       # tensorrt (both by onnxruntime), openvino, triton, fake
    precision = "float32"              # of the arithmetic: default float32, or bfloat16 (from the same
                                       # graph); float16 and int8 where the graph itself is so

    [graph]
    file = "model.onnx"                # may be left out for triton, which has the graph
    layout = "packed"                  # see below; or "padded", or "stacked"
    output = "sentence_embedding"      # default for packed; "last_hidden_state" for the others
    pooling = "graph"                  # default: the graph pools; not packed: mean, cls, max, mean_sqrt_len,
                                       # weightedmean, last (numpy, see pooling.py), or a list, joined
    inputs = ["input_ids", "attention_mask"]     # not packed; may add "token_type_ids",
                                       # "position_ids", or leave the mask out

    [text]                             # modality text; or image, whose pictures are then read with a text
    tokenizer = "tokenizer.json"       # file of the `tokenizers` library
    pad_id = 0                         # padded only; default 0
    prompts = { query = "", document = "" }      # put before the text, by role; `default` where a call
                                       # names no role; default: none
    include_prompt = true              # default; whether pooling counts tokens of prompts; not if the graph pools
    add_special_tokens = true          # default; whether the tokenizer's own tokens surround a text
    extra_special_tokens = []          # of the vocabulary, found in texts (and prompts) as they stand; default: none
    pad = "longest"                    # padded only: to the longest of a batch (default), or to "max_input_units"
    template = "Q: {text} A:"          # what stands around prompt and text, and is never cut; default: nothing. In the
                                       # table of an image model it holds image_token, too
    image_token = "<image>"            # of the tokenizer; a text that says so has no such token. Default: none
    image_tokens = 576                 # modality image: how many of them a picture becomes

    [head]                             # modality text: what follows pooling, the graph's too (numpy, see head.py)
    layers = [                         # in order; those with weights as PyTorch computes them
      { kind = "dense", file = "2_Dense/model.safetensors", inputs = 768, outputs = 384, activation = "tanh" },
      { kind = "layer_norm", file = "3_LayerNorm/model.safetensors", inputs = 384, outputs = 384 },
      { kind = "normalize", inputs = 384, outputs = 384 },     # to L2 norm 1, where more follows
      { kind = "cut", inputs = 384, outputs = 256 },           # to the first numbers
    ]

    [sparse]                           # kind sparse, modality text
    output = "logits"                  # of the graph
    pooling = "max"                    # SPLADE: log(1 + relu(logit)), the largest over a text's tokens; "tokens",
                                       # BGE-M3's lexical weights: relu of a token's weight, the largest of equal
                                       # ids; "graph" pools by itself
    dimensions = 30522                 # of the vocabulary
    skip_tokens = []                   # ids without a weight, for "tokens" the special ones; default: none

    [multi_vector]                     # kind multi_vector, modality text: one row a token
    output = "token_vectors"           # of the graph
    dimensions = 128
    normalized = true                  # default: each row to L2 norm 1
    skip_first = 0                     # rows left out at the beginning of a text, as BGE-M3 does with one; default 0
    skip_tokens = []                   # ids without a row, as ColBERT does with punctuation; default: none
    skip_in_queries = false            # whether that is so in texts of role QUERY, too; default
    query_length = 0                   # most tokens of a text of role QUERY; default 0: max_input_units
    expand_to = 0                      # tokens that such a text is filled up to, each with a row; default 0: none
    expansion_token = 103              # what with, e.g. the id of [MASK]; only with expand_to
    attend_to_expansion = false        # default; whether the others attend to them: if not, only padded

    [image]                            # modality image
    processor = "preprocessor_config.json"       # file of transformers
    patch_size = 32                    # side of a patch; default 0: a unit is 256 pixels; with [text] a token
    extra_tokens = 1                   # units beside the patches, e.g. the class token; default 0

    [audio]                            # modality audio
    processor = "preprocessor_config.json"       # file of transformers
    window_units = 0                   # frames of a window, where the windows of a long sound are
                                       # averaged; default 0: a long sound is cut

    [triton]                           # backend triton: which model of the server
    model = "minilm"
    version = "1"                      # one only: another version, another revision

    [fake]                             # backend fake; all default to 0
    base_ms = 0.0                      # how long a batch takes: base_ms + ms_per_unit * units
    ms_per_unit = 0.0
    seed = 0                           # another seed, other vectors

    [layers]                           # what `embedmesh models export` took of the original's layers, if not all
    kept = 6                           # from the first on
    of = 12
    averaged = [1, 6]                  # hidden states whose mean is pooled, 0 the embeddings; default: the last alone

    [whitening]                        # what `embedmesh models whiten` fitted the head's last layer to
    of = "all-MiniLM-L6-v2@0d14bd3a5ae07686"
    texts = 20000

    [variant]                          # what `embedmesh models quantize` made this from, and measured
    of = "all-MiniLM-L6-v2@0d14bd3a5ae07686"
    samples = 1000
    cosine_min = 0.9858                # to the original's vectors
    cosine_p1 = 0.9875
    cosine_mean = 0.9931
    company_min = 0.9856               # between a sample's own vectors, in a batch and alone

    [files]                            # every file the model reads, below this folder
    "model.onnx" = "<sha256>"
    "tokenizer.json" = "<sha256>"

Layout *packed*: several texts lie end to end in rows. `input_ids`, `position_ids` (restarting
at each text) and `segment_ids` (index of the text in the batch, -1 for padding) are int64
[rows, width]; the output is float32 [texts, dimensions], already pooled.
Layout *padded*: one text a row. Inputs are int64 [texts, longest]; the output is float32
[texts, longest, d], or [texts, d] with pooling "graph", where d is `dimensions` unless several ways of
pooling or a head make another width of it.
In both, the outputs of the other kinds are float32 with two axes like those of `input_ids`, then one for the
vocabulary (sparse "max"), the weight (sparse "tokens": 1, or no axis) or the row; "graph" gives [texts, vocabulary].
An image model with [text] is padded, too: one picture with its text a row, `pixel_values` besides.
Layout *stacked*: images or sounds, one a row. The input is `pixel_values`, or what the feature
extractor makes (`input_features`, `input_values`; `attention_mask`, `is_longer`); the output as for padded.

The *revision* is a fingerprint of everything that changes a vector: the files, graph, text, head, sparse,
multi_vector, image, audio and triton tables, longest input, normalisation, precision, backend. The last two are those
that really run it (`ModelSpec.run_by`), so that no node can make vectors of another precision under
the same revision. Name, family, space, licence, source, timing and variant are no part of it; nor are
layers and whitening, which the graph and the head have.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic_core import ErrorDetails

from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_encoder.pooling import Pooling

__all__ = [
    "MANIFEST",
    "AudioTable",
    "BackendName",
    "FakeSpec",
    "GraphSpec",
    "HeadLayer",
    "HeadTable",
    "ImageTable",
    "LayersTable",
    "ModelError",
    "ModelSpec",
    "MultiVectorTable",
    "Precision",
    "SparseTable",
    "TextSpec",
    "TritonTable",
    "VariantTable",
    "WhiteningTable",
    "find_models",
    "load_spec",
    "verify_files",
    "write_manifest",
]

MANIFEST: Final = "model.toml"

BackendName = Literal["onnxruntime", "cuda", "tensorrt", "openvino", "triton", "fake"]
Precision = Literal["float32", "bfloat16", "float16", "int8"]

_FORMAT: Final = 1
# Defaults by layout. Factories must bear data without it: some versions of pydantic call them after a mistake.
_INPUTS: Final[dict[Any, tuple[str, ...]]] = {
    "packed": ("input_ids", "position_ids", "segment_ids"),
    "padded": ("input_ids", "attention_mask"),
}
_OUTPUTS: Final[dict[Any, str]] = {
    "packed": "sentence_embedding",
    "padded": "last_hidden_state",
    "stacked": "last_hidden_state",
}
_WEIGHTED: Final = frozenset({"dense", "layer_norm"})
_LAYOUTS: Final = {"text": ("packed", "padded"), "image": ("stacked", "padded"), "audio": ("stacked",)}
_KINDS: Final[dict[str, pb.EmbeddingKind.ValueType]] = {
    "dense": pb.EMBEDDING_KIND_DENSE,
    "sparse": pb.EMBEDDING_KIND_SPARSE,
    "multi_vector": pb.EMBEDDING_KIND_MULTI_VECTOR,
}


class ModelError(ValueError):
    """A model cannot be used; the message says which, why, and what to do."""


def _kind(name: object) -> object:
    if isinstance(name, str) and name in _KINDS:
        return _KINDS[name]
    raise ValueError(f"must be {' or '.join(map(json.dumps, _KINDS))}, got {json.dumps(name, default=str)}")


def _of_dense(without: int) -> WrapValidator:
    """See that a key of the dense vector is there if and only if the model makes one; gives its value without."""

    def validate(value: object, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        dense = pb.EMBEDDING_KIND_DENSE in info.data.get("kinds", (pb.EMBEDDING_KIND_DENSE,))
        if value is not None:
            if not dense:
                raise ValueError('is only for the kind "dense", which this model does not make')
            return handler(value)
        if dense:
            raise ValueError("is missing")
        return without

    return WrapValidator(validate)


def _pooling(ways: object) -> object:
    """See that it is a known way, or several; a union's own errors would be one for each member."""
    known = get_args(Pooling)
    if isinstance(ways, list | tuple) and ways and all(way in known for way in ways):
        return tuple(ways)
    if ways == "graph" or ways in known:
        return ways
    raise ValueError(f'must be "graph", {", ".join(map(json.dumps, known))}, or a list of the latter')


def _present(file: str, info: ValidationInfo) -> str:
    """See that a file lies in the model's folder, symbolic links followed."""
    if folder := info.data.get("folder"):
        path = Path(file)
        inside = (folder / path).resolve().is_relative_to(folder.resolve())
        if path.is_absolute() or ".." in path.parts or not inside:
            raise ValueError("is outside of the model's folder")
        if not (folder / path).is_file():
            raise ValueError("is missing from the model's folder: fetch the model again")
    return file


def _template_fits(text: TextSpec, modality: str | None) -> None:
    if text.template and (text.extra_special_tokens or not text.include_prompt or not text.add_special_tokens):
        raise ValueError(
            "cannot have a template beside include_prompt, add_special_tokens or extra_special_tokens: nobody has "
            "compared such vectors with a reference"
        )
    if text.template and text.template.count("{text}") != 1:
        raise ValueError('must have a template with "{text}" in it, once')
    pictures = text.template.count(text.image_token) if text.image_token else 0
    if modality == "image" and (pictures != 1 or not text.image_tokens):
        raise ValueError("must have a template with the image_token in it, once, and say how many image_tokens it is")
    if modality == "text" and (pictures or text.image_tokens or (text.image_token and not text.template)):
        raise ValueError("must have a template without image_token: its model reads no pictures")


def _listed(file: str, info: ValidationInfo) -> None:
    if file not in info.data.get("files", [file]):
        raise ValueError(f'names "{file}", which is not listed in [files]' if file else "names no file")


def _queries_fit(table: MultiVectorTable, info: ValidationInfo) -> None:
    """See that a model can treat queries in a way of their own."""
    if not (table.query_length or table.expand_to):
        return
    if len(info.data.get("kinds", ())) > 1:
        raise ValueError("cannot have query_length or expand_to in a model that makes other kinds of the same tokens")
    longest = info.data.get("max_input_units")
    if longest is not None and (most := max(table.query_length, table.expand_to)) > longest:
        raise ValueError(f"has queries of {most} tokens, but max_input_units = {longest}")
    graph = info.data.get("graph")
    if table.expand_to and not table.attend_to_expansion and graph and "attention_mask" not in graph.inputs:
        raise ValueError('cannot have expand_to without attend_to_expansion: the graph has no input "attention_mask"')


_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")]
_Kind = Annotated[pb.EmbeddingKind.ValueType, BeforeValidator(_kind)]
_Input = Annotated[
    str,
    Field(
        pattern=r"^(input_ids|attention_mask|token_type_ids|position_ids|pixel_values|input_features|input_values|is_longer)$",
    ),
]
_File = Annotated[str, AfterValidator(_present)]
_Pooling = Annotated[Literal["graph", Pooling] | tuple[Pooling, ...], BeforeValidator(_pooling)]
_Dimensions = Annotated[PositiveInt, _of_dense(without=0)]
_Normalized = Annotated[bool, _of_dense(without=False)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class GraphSpec(_Table):
    """The ONNX graph: `file` is "" for the fake backend, and may be for triton; inputs and output are names in it."""

    layout: Literal["packed", "padded", "stacked"]
    file: str = ""
    inputs: tuple[_Input, ...] = Field(default_factory=lambda data: _INPUTS.get(data.get("layout"), ()), strict=False)
    output: str = Field(default_factory=lambda data: _OUTPUTS.get(data.get("layout"), ""))
    pooling: _Pooling = "graph"

    @field_validator("inputs", "pooling")
    @classmethod
    def _packed_graphs_are_fixed(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("layout") == "packed" and value != "graph":
            raise ValueError('cannot be set when the layout is "packed": a packed graph pools by itself')
        return value


class PromptSpec(_Table):
    """What is put before texts, by role."""

    query: str = ""
    document: str = ""
    default: str = ""


class TextSpec(_Table):
    """How text becomes tokens."""

    tokenizer: str
    pad_id: NonNegativeInt = 0
    prompts: PromptSpec = PromptSpec()
    pad: Literal["longest", "max_input_units"] = "longest"
    include_prompt: bool = True
    add_special_tokens: bool = True
    extra_special_tokens: tuple[str, ...] = Field(default=(), strict=False)
    template: str = ""
    image_token: str = ""
    image_tokens: NonNegativeInt = 0

    @property
    def query_prompt(self) -> str:
        """Put before texts of role QUERY."""
        return self.prompts.query

    @property
    def document_prompt(self) -> str:
        """Put before texts of role DOCUMENT."""
        return self.prompts.document

    def decides(self) -> dict[str, Any]:
        """What changes a vector, under keys that must not change; keys of later versions only where they are used."""
        first = {"tokenizer", "pad_id"}
        table = self.model_dump(include=first)
        table |= {f"{role}_prompt": prompt for role, prompt in self.prompts.model_dump(exclude={"default"}).items()}
        if self.prompts.default:
            table["default_prompt"] = self.prompts.default
        if self.pad != "longest":
            table["pad"] = self.pad
        return table | self.model_dump(exclude=first | {"prompts", "pad"}, exclude_defaults=True)


class HeadLayer(_Table):
    """A layer between pooling and the vector; its weights, if it has any, are a file of safetensors."""

    kind: Literal["dense", "layer_norm", "normalize", "cut"]
    file: str = Field("", validate_default=True)
    inputs: PositiveInt
    outputs: PositiveInt
    activation: Literal["none", "tanh", "relu", "sigmoid"] = "none"

    @field_validator("file")
    @classmethod
    def _file_fits(cls, file: str, info: ValidationInfo) -> str:
        if (info.data.get("kind", "dense") in _WEIGHTED) != bool(file):
            raise ValueError('is only for kinds with weights ("dense", "layer_norm")' if file else "is missing")
        return file

    @field_validator("outputs")
    @classmethod
    def _outputs_fit(cls, outputs: int, info: ValidationInfo) -> int:
        kind, inputs = info.data.get("kind", "dense"), info.data.get("inputs", outputs)
        if kind == "cut" and outputs > inputs:
            raise ValueError(f"must be at most inputs ({inputs}) in a cut, got {outputs}")
        if kind in ("layer_norm", "normalize") and outputs != inputs:
            raise ValueError(f"must be inputs ({inputs}) where all that comes is kept, got {outputs}")
        return outputs


class HeadTable(_Table):
    """What follows pooling."""

    layers: Annotated[tuple[HeadLayer, ...], Field(min_length=1, strict=False)]


class SparseTable(_Table):
    """Which output gives the sparse vector, and how."""

    output: str
    pooling: Literal["max", "tokens", "graph"]
    dimensions: PositiveInt
    skip_tokens: tuple[NonNegativeInt, ...] = Field((), strict=False)

    def decides(self) -> dict[str, Any]:
        """What changes a vector."""
        return self.model_dump()


class MultiVectorTable(_Table):
    """Which output gives a row for each token, and which rows are kept."""

    output: str
    dimensions: PositiveInt
    normalized: bool = True
    skip_first: NonNegativeInt = 0
    skip_tokens: tuple[NonNegativeInt, ...] = Field((), strict=False)
    skip_in_queries: bool = False
    query_length: NonNegativeInt = 0
    expand_to: NonNegativeInt = 0
    expansion_token: NonNegativeInt | None = Field(None, validate_default=True)
    attend_to_expansion: bool = False

    @field_validator("expansion_token")
    @classmethod
    def _expansion_fits(cls, token: int | None, info: ValidationInfo) -> int | None:
        length, most = info.data.get("expand_to"), info.data.get("query_length")
        if length is not None and bool(length) != (token is not None):
            raise ValueError("is only for queries that are filled up (expand_to)" if length == 0 else "is missing")
        if length and most and length > most:
            raise ValueError(f"would fill queries up to {length} tokens, but query_length = {most}")
        return token

    def decides(self) -> dict[str, Any]:
        """What changes a vector; keys of later versions only where they are used."""
        later = {"query_length", "expand_to", "expansion_token", "attend_to_expansion"}
        return self.model_dump(exclude=later) | self.model_dump(include=later, exclude_defaults=True)


class ImageTable(_Table):
    """How a picture becomes pixels."""

    processor: str
    patch_size: NonNegativeInt = 0
    extra_tokens: NonNegativeInt = 0


class AudioTable(_Table):
    """How a sound becomes features."""

    processor: str
    window_units: NonNegativeInt = 0


class TritonTable(_Table):
    """Which model of a Triton server it is."""

    model: Annotated[str, Field(min_length=1)]
    version: Annotated[str, Field(pattern=r"^[1-9][0-9]*$")]


class LayersTable(_Table):
    """Which layers of the original the graph has; for people, and for comparisons with the original."""

    kept: PositiveInt
    of: PositiveInt
    averaged: tuple[NonNegativeInt, ...] = Field((), strict=False)


class WhiteningTable(_Table):
    """What the head's last layer was fitted to; for people, and for comparisons with the original."""

    of: str
    texts: PositiveInt


class VariantTable(_Table):
    """What a model was made from, and how alike it is; for people."""

    of: str
    samples: NonNegativeInt
    cosine_min: float
    cosine_p1: float
    cosine_mean: float
    company_min: float


class FakeSpec(_Table):
    """Behaviour of the fake backend."""

    base_ms: NonNegativeFloat = 0.0
    ms_per_unit: NonNegativeFloat = 0.0
    seed: NonNegativeInt = 0


class ModelSpec(_Table):
    """What a manifest says; see the module. Validators see the fields above their own."""

    folder: Path  # no key of the manifest, which cannot hold a Path
    format: Literal[1]
    name: _Name
    family: _Name = Field(default_factory=lambda data: data.get("name"))
    modality: Literal["text", "image", "audio"]
    space: _Name
    kinds: tuple[_Kind, ...] = Field((pb.EMBEDDING_KIND_DENSE,), min_length=1, strict=False)
    dimensions: _Dimensions = Field(None, validate_default=True)
    truncatable_dimensions: tuple[PositiveInt, ...] = Field((), strict=False)
    normalized: _Normalized = Field(None, validate_default=True)
    max_input_units: PositiveInt
    license: str
    source: str
    backend: BackendName
    precision: Precision = "float32"
    files: Annotated[Mapping[_File, _Sha256], AfterValidator(MappingProxyType)] = Field(repr=False)
    graph: GraphSpec
    text: TextSpec | None = Field(None, validate_default=True)
    image: ImageTable | None = Field(None, validate_default=True)
    audio: AudioTable | None = Field(None, validate_default=True)
    head: HeadTable | None = None
    sparse: SparseTable | None = Field(None, validate_default=True)
    multi_vector: MultiVectorTable | None = Field(None, validate_default=True)
    triton: TritonTable | None = Field(None, validate_default=True)
    layers: LayersTable | None = None
    whitening: WhiteningTable | None = None
    variant: VariantTable | None = None
    fake: FakeSpec | None = Field(default_factory=lambda data: FakeSpec() if data.get("backend") == "fake" else None)

    @field_validator("truncatable_dimensions")
    @classmethod
    def _widths_fit(cls, widths: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        dimensions = info.data.get("dimensions")
        if dimensions is not None and any(width >= dimensions for width in widths):
            raise ValueError(f"must all be smaller than dimensions ({dimensions}), got {list(widths)}")
        return tuple(sorted(set(widths), reverse=True))

    @field_validator("graph")
    @classmethod
    def _graph_fits(cls, graph: GraphSpec, info: ValidationInfo) -> GraphSpec:
        backend = info.data.get("backend")
        if backend == "fake" and (graph.file or graph.layout != "packed"):
            raise ValueError('must have the layout "packed" and no file when the backend is "fake"')
        if backend not in ("fake", None) and (graph.file or backend != "triton"):
            _listed(graph.file, info)
        allowed = _LAYOUTS.get(info.data.get("modality", ""), (graph.layout,))
        if graph.layout not in allowed:
            raise ValueError(f"must have the layout {' or '.join(map(json.dumps, allowed))} for this modality")
        if not graph.inputs:
            raise ValueError('must name its inputs when the layout is "stacked", e.g. ["pixel_values"]')
        return graph

    @field_validator("text", "image", "audio")
    @classmethod
    def _table_fits(cls, table: Any, info: ValidationInfo) -> Any:
        modality, graph = info.data.get("modality"), info.data.get("graph")
        wanted = modality == info.field_name
        known, missing = f'is only for the modality "{info.field_name}"', "is missing"
        if info.field_name == "text" and modality == "image":
            wanted = graph is not None and graph.layout == "padded"
            known += ', and for the layout "padded" of the modality "image"'
            missing += ', or the graph must have the layout "stacked"'
        if modality and wanted != (table is not None):
            raise ValueError(known if table else missing)
        if isinstance(table, TextSpec):
            _template_fits(table, modality)
        if table:
            _listed(table.tokenizer if isinstance(table, TextSpec) else table.processor, info)
        graph = info.data.get("graph")
        if isinstance(table, TextSpec) and not table.include_prompt and graph and graph.pooling == "graph":
            raise ValueError("cannot have include_prompt = false: the graph pools, and knows nothing of prompts")
        return table

    @field_validator("head")
    @classmethod
    def _head_fits(cls, head: HeadTable | None, info: ValidationInfo) -> HeadTable | None:
        graph = info.data.get("graph")
        if head is None or graph is None:
            return head
        if info.data.get("modality") != "text":
            raise ValueError('is only for the modality "text"')
        width = head.layers[0].inputs
        for layer in head.layers:
            if layer.file:
                _listed(layer.file, info)
            if layer.inputs != width:
                raise ValueError(
                    f'has a layer "{layer.file or layer.kind}" with inputs = {layer.inputs}, but {width} come to it'
                )
            width = layer.outputs
        if width != info.data.get("dimensions", width):
            raise ValueError(f"ends with outputs = {width}, but dimensions = {info.data['dimensions']}")
        return head

    @field_validator("whitening")
    @classmethod
    def _whitening_fits(cls, whitening: WhiteningTable | None, info: ValidationInfo) -> WhiteningTable | None:
        head = info.data.get("head")
        if whitening and "head" in info.data and (head is None or head.layers[-1].kind != "dense"):
            raise ValueError("is only for models whose head ends with a dense layer")
        return whitening

    @field_validator("sparse", "multi_vector")
    @classmethod
    def _kind_fits(cls, table: SparseTable | MultiVectorTable | None, info: ValidationInfo) -> Any:
        kinds = info.data.get("kinds")
        if kinds is None or info.field_name is None:
            return table
        if (_KINDS[info.field_name] in kinds) != (table is not None):
            raise ValueError(f'is only for the kind "{info.field_name}"' if table else "is missing")
        if table and info.data.get("modality") != "text":
            raise ValueError('is only for the modality "text"')
        if isinstance(table, SparseTable) and info.data.get("backend") == "fake" and table.pooling != "tokens":
            raise ValueError('must have the pooling "tokens" when the backend is "fake"')
        if isinstance(table, SparseTable) and any(token >= table.dimensions for token in table.skip_tokens):
            raise ValueError(f"has skip_tokens beyond its dimensions ({table.dimensions})")
        if isinstance(table, MultiVectorTable):
            _queries_fit(table, info)
        return table

    @field_validator("triton")
    @classmethod
    def _triton_fits(cls, triton: TritonTable | None, info: ValidationInfo) -> TritonTable | None:
        if info.data.get("backend") == "triton" and triton is None:
            raise ValueError('is missing: the backend "triton" must know which model of the server it is')
        return triton

    @field_validator("fake")
    @classmethod
    def _fake_fits(cls, fake: FakeSpec, info: ValidationInfo) -> FakeSpec:
        if info.data.get("backend") not in ("fake", None):
            raise ValueError('is only for the backend "fake"')
        return fake

    @cached_property
    def revision(self) -> str:
        """Fingerprint of everything that changes a vector, 16 hexadecimal digits; `run_by` renews it."""
        decides = {
            "format": self.format,
            "files": dict(self.files),
            "graph": self.graph.model_dump(),
            "text": self.text and self.text.decides(),
            "max_input_units": self.max_input_units,
            "normalized": self.normalized,
            "precision": self.precision,
            "backend": self.backend,
            "seed": self.fake.seed if self.fake else 0,
        }
        if self.head:
            decides["head"] = self.head.model_dump()
        for other in (self.sparse, self.multi_vector):
            if other:
                decides[other.__class__.__name__] = other.decides()
        for table in ("image", "audio"):
            if self.modality == table:
                decides[table] = getattr(self, table).model_dump()
        if self.backend == "triton" and self.triton:
            decides["triton"] = self.triton.model_dump()
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]

    def run_by(self, backend: BackendName, precision: Precision) -> ModelSpec:
        """Give the same model as another backend runs it: another revision, unless nothing changes."""
        spec = self.model_copy(update={"backend": backend, "precision": precision})
        spec.__dict__.pop("revision", None)  # model_copy takes the cached one along
        return spec

    @property
    def graph_dimensions(self) -> int:
        """Width of the graph's output: `dimensions`, unless pooling or a head changes it."""
        pooled = self.head.layers[0].inputs if self.head else self.dimensions
        ways = self.graph.pooling
        return pooled if isinstance(ways, str) else pooled // len(ways)

    @property
    def kind_names(self) -> tuple[str, ...]:
        """The kinds of vector it makes, as manifests name them."""
        return tuple(name for name, kind in _KINDS.items() if kind in self.kinds)

    @property
    def outputs(self) -> Mapping[pb.EmbeddingKind.ValueType, str]:
        """Names of the graph's outputs that give each kind; one may give several."""
        names = {pb.EMBEDDING_KIND_DENSE: self.graph.output} if pb.EMBEDDING_KIND_DENSE in self.kinds else {}
        if self.sparse:
            names[pb.EMBEDDING_KIND_SPARSE] = self.sparse.output
        if self.multi_vector:
            names[pb.EMBEDDING_KIND_MULTI_VECTOR] = self.multi_vector.output
        return names

    def ref(self) -> pb.ModelRef:
        """Name this model as results do."""
        return pb.ModelRef(name=self.name, revision=self.revision, space=self.space)

    @property
    def file_bytes(self) -> int:
        """What its files take on disk."""
        return sum(self.path(file).stat().st_size for file in self.files)

    def path(self, file: str) -> Path:
        """Give the path of one of the model's files."""
        return self.folder / file


def load_spec(folder: Path) -> ModelSpec:
    """Read and check a model's manifest. Files are only seen to exist; see `verify_files`.

    Raises:
        ModelError: There is no manifest, or it has mistakes; all of them are in the message.
    """
    manifest = folder / MANIFEST
    try:
        table = tomllib.loads(manifest.read_text(encoding="utf-8"))
        return ModelSpec.model_validate({"folder": folder, **table})
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(
            f"{folder} is not a model folder: it has no {MANIFEST} (`embedmesh models list` shows the models at hand)"
        ) from None
    except ValidationError as error:
        raise _error(manifest, [_sentence(issue) for issue in error.errors() if issue["type"] != _SKIPPED]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ModelError(f"cannot read {manifest}: {error}") from None


def verify_files(spec: ModelSpec) -> None:
    """Check the sha256 of every file of the model; takes about a second per gigabyte.

    Raises:
        ModelError: Files are missing or changed; all of them are in the message.
    """
    problems = []
    for file, expected in spec.files.items():
        try:
            with spec.path(file).open("rb") as stream:
                actual = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            problems.append(f'file "{file}" cannot be read: {error.strerror}')
            continue
        if actual != expected:
            problems.append(f'file "{file}" has sha256 {actual}, the manifest says {expected}: fetch the model again')
    if problems:
        raise _error(spec.folder / MANIFEST, problems)


def find_models(folders: Iterable[Path]) -> dict[Path, ModelSpec | ModelError]:
    """Read every model that is one of `folders` or lies directly in one, in order of path.

    A folder that does not exist holds no models; a model with mistakes maps to its error.
    """
    found: dict[Path, ModelSpec | ModelError] = {}
    for folder in folders:
        for manifest in sorted([*folder.glob(MANIFEST), *folder.glob(f"*/{MANIFEST}")]):
            try:
                found[manifest.parent] = load_spec(manifest.parent)
            except ModelError as error:
                found[manifest.parent] = error
    return found


def write_manifest(folder: Path, manifest: Mapping[str, Any], files: Iterable[str]) -> ModelSpec:
    """Write `model.toml` with the sha256 of `files` (paths below `folder`), and read it back.

    Args:
        folder: The model's folder, in which the files already lie.
        manifest: Keys as in the module's description, without `format` and `files`; tables are mappings.
        files: Every file the model reads.

    Raises:
        ModelError: The manifest has mistakes.
    """
    hashes = {}
    for file in sorted(files):
        with (folder / file).open("rb") as stream:
            hashes[file] = hashlib.file_digest(stream, "sha256").hexdigest()
    table = {"format": _FORMAT, **manifest, "files": hashes}
    lines = [f"{key} = {_toml(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{key}]", *(f"{_toml_key(name)} = {_toml(item)}" for name, item in value.items())]
    (folder / MANIFEST).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return load_spec(folder)


_TABLES: Final[dict[tuple[str, ...], type[_Table]]] = {
    (): ModelSpec,
    ("graph",): GraphSpec,
    ("text",): TextSpec,
    ("text", "prompts"): PromptSpec,
    ("image",): ImageTable,
    ("audio",): AudioTable,
    ("head",): HeadTable,
    ("head", "layers"): HeadLayer,
    ("sparse",): SparseTable,
    ("multi_vector",): MultiVectorTable,
    ("triton",): TritonTable,
    ("layers",): LayersTable,
    ("whitening",): WhiteningTable,
    ("variant",): VariantTable,
    ("fake",): FakeSpec,
}
# pydantic's words for these are about Python, not about TOML.
_WORDS: Final = {
    "missing": "is missing",
    "is_instance_of": "is unknown",
    "model_type": "must be a table",
    "dict_type": "must be a table",
    "tuple_type": "must be a list",
}
_SKIPPED: Final = "default_factory_not_called"  # follows from another problem


def _sentence(issue: ErrorDetails) -> str:
    """Say what is wrong with one key of a manifest."""
    kind, loc = issue["type"], tuple(part for part in issue["loc"] if part != "[key]")
    where = ".".join(_toml_key(str(part)) for part in loc)
    if kind == "extra_forbidden":
        table = _TABLES[tuple(part for part in loc[:-1] if isinstance(part, str))]
        near = difflib.get_close_matches(str(loc[-1]), table.model_fields, n=1)
        return f"{where} is unknown{f', did you mean {near[0]}?' if near else ''}"
    text = _WORDS.get(kind) or re.sub(r"^\w+ should", "must", issue["msg"].removeprefix("Value error, "))
    got = "" if kind in ("missing", "value_error") else f", got {json.dumps(issue['input'], default=str)}"
    return f"{where} {text}{got}"


def _error(manifest: Path, problems: list[str]) -> ModelError:
    if len(problems) == 1:
        return ModelError(f"{manifest}: {problems[0]}")
    return ModelError(f"{manifest} has {len(problems)} problems:" + "".join(f"\n  - {p}" for p in problems))


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def _toml(value: Any) -> str:
    """Write a value of a manifest: strings, numbers, booleans, lists and inline tables."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml_key(key)} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # JSON's literals are TOML's, except that TOML has no surrogate escapes and no bare DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
