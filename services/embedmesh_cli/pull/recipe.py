"""From a repository's files to manifests: what kind of model it is, and how the encoder serves just that.

Known are repositories of sentence-transformers (`modules.json`), and ONNX graphs as published for transformers.js: one
`model.onnx`, or a tower for each modality (`text_model.onnx`, `vision_model.onnx`, `audio_model.onnx`). What the
encoder could not serve exactly is refused in a sentence; nothing is guessed that changes a vector.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from tokenizers import Tokenizer

from embedmesh_cli.console import FAILED, USAGE, UserError, command_name
from embedmesh_cli.pull.colbert import Rows, is_late_interaction, is_stanford, named_token, read_rows
from embedmesh_cli.pull.graph import Graph, read_graph
from embedmesh_cli.pull.repository import Repository, read_json
from embedmesh_cli.pull.static import STATIC_LONGEST
from embedmesh_encoder.audio.features import AudioSpec
from embedmesh_encoder.image.processor import ImageProcessor, ImageSpec
from embedmesh_encoder.model import ModelError
from embedmesh_encoder.pooling import Pooling

__all__ = [
    "COLBERT_HEAD", "LEXICAL_HEAD", "LEXICAL_OUTPUT", "ROWS_OUTPUT", "SPLADE_OUTPUT",
    "Pipeline", "Splade", "Templates", "Tower", "Wishes", "find_towers", "is_static", "model_type", "read_pipeline",
]  # fmt: skip

# Outputs of graphs that `embedmesh models export` makes, beside the dense vector's.
SPLADE_OUTPUT: Final = "sparse_embedding"
LEXICAL_OUTPUT: Final = "token_weights"
ROWS_OUTPUT: Final = "token_vectors"
# BGE-M3's heads, as its authors name them, in safetensors.
LEXICAL_HEAD: Final = "sparse_linear.safetensors"
COLBERT_HEAD: Final = "colbert_linear.safetensors"

# Of sentence-transformers' Pooling, in the order in which older configurations join them.
_POOLING: Final[Mapping[str, Pooling]] = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weightedmean",
    "lasttoken": "last",
}
_POOLING_FLAGS: Final[Mapping[str, str]] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: Final[Mapping[str, str]] = {
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.linear.Identity": "none",
}
_TRANSFORMER_CONFIGS: Final = (
    "sentence_bert_config.json", "sentence_roberta_config.json", "sentence_distilbert_config.json",
    "sentence_camembert_config.json", "sentence_albert_config.json", "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)  # fmt: skip
# Their positions are counted from the id of padding plus one.
_LATE_POSITIONS: Final = frozenset(
    {"camembert", "clap_text_model", "data2vec-text", "longformer", "mpnet", "roberta", "xlm-roberta"}
)
_TOWER_FILES: Final = ("text_model.onnx", "vision_model.onnx", "audio_model.onnx")
_FOLDERS: Final = ("onnx/", "")
_PACKED: Final = frozenset({"input_ids", "position_ids", "segment_ids"})
_PIXELS: Final = "pixel_values"
_SOUNDS: Final = ("input_features", "input_values")
# PyLate's own class differs from the library's in nothing that is used here.
_ALIASES: Final[Mapping[str, str]] = {"pylate.models.Dense.Dense": "sentence_transformers.models.Dense"}
_INPUTS: Final = frozenset(
    {"input_ids", "attention_mask", "token_type_ids", "position_ids", _PIXELS, *_SOUNDS, "is_longer"}
)
# Outputs with a vector a token, and with one an input, the best first.
_TOKENS: Final = ("last_hidden_state", "token_embeddings")
_TOWER_OUTPUTS: Final = ("text_embeds", "image_embeds", "audio_embeds", "pooler_output")
_VECTORS: Final = ("sentence_embedding", *_TOWER_OUTPUTS[:3])
# Patch sizes where a configuration leaves its own out, and what stands beside the patches.
_PATCHES: Final[Mapping[str, tuple[int, int]]] = {
    "clip": (32, 1), "siglip": (16, 0), "vit": (16, 1), "deit": (16, 2), "dinov2": (14, 1),
}  # fmt: skip
_MATRYOSHKA: Final = re.compile(r'"matryoshka_dims":\s*\[([\d,\s]{1,1000})\]')
# Sentence-transformers' "no limit".
_ENDLESS: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class Templates:
    """What stands around texts of a model that reads them with pictures, too.

    Attributes:
        image: With the token of a picture, and {text}.
        text: With {text} alone.
        token: Of a picture.
        tokens: How many of them a picture becomes.
    """

    image: str
    text: str
    token: str = ""
    tokens: int = 0

    def of(self, modality: str) -> dict[str, Any]:
        """Give what the manifest of a tower says of them."""
        if modality == "text":
            return {"template": self.text, "image_token": self.token}
        return {"template": self.image, "image_token": self.token, "image_tokens": self.tokens}


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the caller says where the repository does not.

    Attributes:
        file: The graph to take.
        pooling: How tokens become one vector.
        normalize: Whether vectors are normalised.
        max_units: The longest input.
        splade: Whether it is a masked-language model to be pooled as SPLADE does.
        kinds: Kinds of vector to make, where that is not for the repository to say.
        templates: Of a model that reads pictures with texts.
    """

    file: str | None = None
    pooling: tuple[Pooling, ...] = ()
    normalize: bool | None = None
    max_units: int | None = None
    splade: bool = False
    kinds: tuple[str, ...] = ()
    templates: Templates | None = None


@dataclass(frozen=True, slots=True)
class Splade:
    """How the logits of a text's tokens become one sparse vector.

    Attributes:
        strategy: Whether the largest of a text's tokens counts, or their sum.
        twice: Whether the logarithm is taken twice.
    """

    strategy: Literal["max", "sum"] = "max"
    twice: bool = False


@dataclass(frozen=True, slots=True)
class Tower:
    """A model to write.

    Attributes:
        graph: Its graph.
        modality: What it embeds.
        manifest: Keys of `model.toml`, but those that name it.
        files: Names of all its files in the repository.
        notes: What its user should know.
    """

    graph: Graph
    modality: str
    manifest: Mapping[str, Any]
    files: Sequence[str]
    notes: Sequence[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """How the vectors of a text's tokens become those of a text.

    Attributes:
        prefix: Folder of the transformer's files in the repository, with its slash; "" for the repository's own.
        pooling: One way or several, joined; none where no dense vector is made.
        layers: What follows, as in the manifest's head.
        normalized: Whether dense vectors are normalised after that.
        width: That they are cut to in the end; 0 leaves them as they are.
        include_prompt: Whether pooling counts the tokens of prompts.
        splade: How its sparse vectors are made of logits.
        lexical: File of the head that gives BGE-M3's weights of tokens.
        rows: How its multi-vectors are made.
        static: Whether tokens are rows of a table, of which the mean is taken.
        notes: What its user should know.
    """

    prefix: str
    pooling: tuple[Pooling, ...]
    layers: Sequence[Mapping[str, Any]] = ()
    normalized: bool = False
    width: int = 0
    include_prompt: bool = True
    splade: Splade | None = None
    lexical: str = ""
    rows: Rows | None = None
    static: bool = False
    notes: Sequence[str] = ()


def find_towers(repository: Repository, wishes: Wishes, pipeline: Pipeline | None = None) -> list[Tower]:
    """Find out what a repository holds.

    Args:
        repository: Where the files are.
        wishes: What its caller says of it.
        pipeline: How its one text model works, where that is known.

    Raises:
        UserError: Nothing that the encoder can serve exactly; the message says why, and what to do.
    """
    with _understood(repository):
        if pipeline or "modules.json" in repository.files or wishes.splade or is_stanford(repository):
            return [_text_tower(repository, pipeline or _pipeline(repository, wishes), wishes)]
        if wishes.file:
            return [_tower(repository, wishes.file, wishes)]
        found = [
            next((folder + file for folder in _FOLDERS if folder + file in repository.files), "")
            for file in _TOWER_FILES
        ]
        if any(found):
            return [_tower(repository, file, wishes) for file in found if file]
        return [_tower(repository, _only_graph(repository, _FOLDERS), wishes)]


def is_static(repository: Repository) -> bool:
    """Tell whether a repository is a table of tokens, for which a graph is made at once."""
    with _understood(repository):
        kinds = (
            [str(module.get("type")) for module in _modules(repository)] if "modules.json" in repository.files else []
        )
        return bool(kinds) and kinds[0].endswith(".StaticEmbedding")


def read_pipeline(repository: Repository, wishes: Wishes) -> Pipeline:
    """Find out how a repository of one text model pools, and what follows.

    Raises:
        UserError: It does what the encoder cannot; the message says what.
    """
    with _understood(repository):
        pipeline = _pipeline(repository, wishes)
        _text(repository, pipeline, wishes)  # raises before anything large is fetched
        return pipeline


@contextmanager
def _understood(repository: Repository) -> Iterator[None]:
    """Say of a configuration that is not as its library writes it what is wrong."""
    try:
        yield
    except ModelError as error:
        raise UserError(f"{repository.name}: {error}.") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"a configuration file of {repository.name} is not as its library writes it "
            f"({type(error).__name__}: {error})."
        ) from None


def _only_graph(repository: Repository, folders: Sequence[str]) -> str:
    """Find the full-precision graph in its usual places."""
    for folder in folders:
        if (file := f"{folder}model.onnx") in repository.files:
            return file
    others = sorted(file for file in repository.files if file.endswith(".onnx"))
    if others:
        raise UserError(
            f"{repository.name} has no model.onnx in its usual places, only {', '.join(others)}: choose one with "
            "--file (quantised ones are never chosen for you)."
        )
    raise UserError(
        f"{repository.name} has no ONNX graph: `{command_name()} models export {repository.given}` makes one of its "
        "weights (pip install 'embedmesh[export]')."
    )


# --- sentence-transformers ------------------------------------------------------------------------


def _text_tower(repository: Repository, pipeline: Pipeline, wishes: Wishes) -> Tower:
    prefix = pipeline.prefix
    graph = _checked(repository, wishes.file or _only_graph(repository, [f"{prefix}onnx/", prefix, *_FOLDERS]), wishes)
    text, limit, notes = _text(repository, pipeline, wishes)
    tables: dict[str, Any] = {}
    if pipeline.pooling:
        tables = _dense(repository, graph, pipeline)
    if sparse := _sparse(repository, graph, pipeline):
        tables["sparse"] = sparse
    if pipeline.rows and (rows := _rows(repository, graph, pipeline)):
        tables["multi_vector"] = rows
    kinds = [
        kind for kind in ("dense", "sparse", "multi_vector") if ("dimensions" if kind == "dense" else kind) in tables
    ]
    left = [key for key, wanted in (("sparse", pipeline.lexical), ("multi_vector", pipeline.rows)) if wanted]
    if missing := [kind for kind in left if kind not in kinds]:
        notes = [
            *notes,
            f"{' and '.join(missing)}: not in this graph (`{command_name()} models export` makes one with all kinds)",
        ]
    head = tables.pop("head", None)
    if head and head["layers"][-1]["kind"] == "cut":
        notes = [*notes, f"vectors are cut to {pipeline.width} numbers (truncate_dim)"]
    # Where there is no dense vector, the graph's own output is what the only kind is made of.
    output = tables.pop("output", "") or next(tables[kind]["output"] for kind in kinds)
    manifest: dict[str, Any] = {
        "modality": "text",
        **{key: tables[key] for key in ("dimensions", "truncatable_dimensions", "normalized") if key in tables},
        "max_input_units": limit,
        "precision": graph.precision,
        "graph": _graph_table(graph, output, tables.pop("pooling", "graph")),
        "text": text,
        **({"head": head} if head else {}),
        **{key: tables[key] for key in ("sparse", "multi_vector") if key in tables},
    }
    if kinds != ["dense"]:
        manifest["kinds"] = kinds
    files = [
        *graph.files,
        text["tokenizer"],
        *(layer["file"] for layer in (head or {"layers": ()})["layers"] if "file" in layer),
    ]
    return Tower(graph, "text", manifest, files, [*notes, *pipeline.notes])


def _dense(repository: Repository, graph: Graph, pipeline: Pipeline) -> dict[str, Any]:
    """Say how a graph's outputs become a dense vector: keys and tables of the manifest, the graph's two apart."""
    prefix, layers = pipeline.prefix, pipeline.layers
    pooling: str | list[Pooling] = _short(pipeline.pooling)
    output = _token_output(graph)
    if output:
        width = _width(repository, graph, output, prefix)
        dimensions = layers[-1]["outputs"] if layers else width * len(pipeline.pooling)
    elif (shape := graph.outputs.get("sentence_embedding", ())) != ():
        # The whole pipeline was exported: pooling and what follows are inside.
        output, pooling, layers = "sentence_embedding", "graph", ()
        dimensions = _last(repository, graph, output, shape)
    else:
        raise UserError(_no_output(repository, graph))
    if pooling == "graph" and not pipeline.include_prompt:
        raise UserError(
            f"{repository.name} leaves prompts out of its pooling (include_prompt), but {graph.file} pools by itself: "
            f"`{command_name()} models export` makes a graph that does not."
        )
    if cut := _cut(pipeline, dimensions):
        layers, dimensions = [*layers, *cut], pipeline.width
    return {
        "dimensions": dimensions,
        **_matryoshka(repository, prefix, dimensions),
        "normalized": pipeline.normalized and not cut,
        "output": output,
        "pooling": pooling,
        **({"head": {"layers": layers}} if layers else {}),
    }


def _sparse(repository: Repository, graph: Graph, pipeline: Pipeline) -> dict[str, Any]:
    """Give the manifest's table of the sparse vector; an empty one if the graph makes none."""
    if pipeline.splade:
        output = next((name for name in (SPLADE_OUTPUT, "logits") if name in graph.outputs), "")
        pooled = output == SPLADE_OUTPUT
        if not output or (not pooled and pipeline.splade != Splade()):
            raise UserError(
                f"{graph.file} of {repository.name} gives {', '.join(graph.outputs)}, from which its sparse vectors "
                f"cannot be made here: `{command_name()} models export` makes a graph from which they can."
            )
        shape = graph.outputs[output]
        width = shape[-1] if shape and shape[-1] else _config(repository, pipeline.prefix).get("vocab_size")
        if not isinstance(width, int):
            raise UserError(f"neither {graph.file} nor config.json of {repository.name} says how many tokens it knows.")
        return {"output": output, "pooling": "graph" if pooled else "max", "dimensions": width}
    if pipeline.lexical and LEXICAL_OUTPUT in graph.outputs:
        return {
            "output": LEXICAL_OUTPUT,
            "pooling": "tokens",
            "dimensions": _config(repository, pipeline.prefix)["vocab_size"],
            "skip_tokens": _special_ids(repository, pipeline.prefix),
        }
    return {}


def _special_ids(repository: Repository, prefix: str) -> list[int]:
    """Give the tokens that BGE-M3 gives no weight."""
    tokenizer = _tokenizer(repository, prefix)[1]
    named = (named_token(repository, prefix, f"{name}_token") for name in ("cls", "eos", "pad", "unk"))
    ids = {tokenizer.token_to_id(token) for token in named if token}
    return sorted(number for number in ids if number is not None)


def _rows(repository: Repository, graph: Graph, pipeline: Pipeline) -> dict[str, Any]:
    """Give the manifest's table of the multi-vector; an empty one if the graph makes none."""
    rows = pipeline.rows
    assert rows  # noqa: S101  (the caller looked)
    plain = "" if rows.layers or _is_packed(graph) else _token_output(graph)
    output = ROWS_OUTPUT if ROWS_OUTPUT in graph.outputs else plain
    if not output:
        if pipeline.pooling:
            return {}
        raise UserError(
            f"{graph.file} of {repository.name} gives {', '.join(graph.outputs)}, which are not its rows: "
            f"`{command_name()} models export` makes a graph with them."
        )
    width = _width(repository, graph, output, pipeline.prefix)
    said = rows.layers[-1].get("outputs", width) if rows.layers else width
    if said != width:
        raise UserError(f"{graph.file} of {repository.name} has rows of {width} numbers, its modules of {said}.")
    return {"output": output, "dimensions": width, **rows.table}


def _pipeline(repository: Repository, wishes: Wishes) -> Pipeline:
    if "modules.json" not in repository.files:
        return _plain(repository, wishes)
    if wishes.pooling or wishes.splade or wishes.normalize is not None:
        raise UserError(
            f"modules.json of {repository.name} says how it pools and whether it normalises: leave --pooling and "
            "--normalize out.",
            USAGE,
        )
    modules = [(_class_name(repository, module), str(module.get("path", ""))) for module in _modules(repository)]
    kinds = [kind for kind, _ in modules]
    prefix = f"{modules[0][1]}/" if modules and modules[0][1] else ""
    if kinds in (["StaticEmbedding"], ["StaticEmbedding", "Normalize"]):
        return Pipeline(prefix, ("mean",), normalized=len(kinds) == 2, width=_final_width(repository), static=True)
    if kinds in (["MLMTransformer", "SpladePooling"], ["Transformer", "SpladePooling"]):
        return _wanted(repository, Pipeline(prefix, (), splade=_splade(repository, modules[1][1])), wishes)
    if kinds[:1] == ["Transformer"] and is_late_interaction(repository, kinds):

        def layer(path: str) -> dict[str, Any]:
            return _layer(repository, "Dense", path, place="token_embeddings")

        rows = read_rows(repository, prefix, modules[1:], layer)
        return _wanted(repository, Pipeline(prefix, (), rows=rows), wishes)
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise UserError(
            f"{repository.name} is made of {', '.join(kinds) or 'nothing'}: the encoder serves Transformer, "
            "Pooling and what may follow them (Dense, LayerNorm, Normalize), SpladePooling, ColBERT's modules, and "
            "StaticEmbedding with Normalize."
        )
    layers, normalized = _head(repository, modules[2:])
    ways, include_prompt = _ways(repository, modules[1][1])
    width = _final_width(repository)
    return _wanted(repository, Pipeline(prefix, ways, layers, normalized, width, include_prompt), wishes)


def _final_width(repository: Repository) -> int:
    """Read how many numbers vectors are cut to; 0 where they are not."""
    width = read_json(repository, "config_sentence_transformers.json").get("truncate_dim") or 0
    if type(width) is not int or width < 0:
        raise UserError(f"{repository.name} cuts its vectors to {json.dumps(width)} numbers, which is no width.")
    return width


def _cut(pipeline: Pipeline, dimensions: int) -> list[dict[str, Any]]:
    """Give the layers that cut vectors of so many numbers; sentence-transformers does not normalise them again."""
    if not 0 < pipeline.width < dimensions:
        return []
    first = [{"kind": "normalize", "inputs": dimensions, "outputs": dimensions}] if pipeline.normalized else []
    return [*first, {"kind": "cut", "inputs": dimensions, "outputs": pipeline.width}]


def _plain(repository: Repository, wishes: Wishes) -> Pipeline:
    """Read a repository without modules: its caller says what they would, unless it is in Stanford's layout."""
    if wishes.splade:
        return _wanted(repository, Pipeline("", (), splade=Splade()), wishes)
    if is_stanford(repository):
        return _wanted(
            repository, Pipeline("", (), rows=read_rows(repository, "", [("Dense", "")], _projection)), wishes
        )
    if not wishes.pooling:
        raise UserError(_no_pooling(repository), USAGE)
    return _wanted(repository, Pipeline("", wishes.pooling, normalized=bool(wishes.normalize)), wishes)


def _wanted(repository: Repository, pipeline: Pipeline, wishes: Wishes) -> Pipeline:
    """Add what BGE-M3 has beside its modules, or a caller wants of plain tokens; leave out what nobody wants."""
    name = repository.name
    if not pipeline.pooling:
        own = "sparse" if pipeline.splade else "multi_vector"
        if wishes.kinds not in ((), (own,)):
            raise UserError(f"{name} makes {own} vectors only: leave --kinds out.", USAGE)
        if width := _final_width(repository):
            raise UserError(f"{name} cuts its {own} vectors to {width} numbers, which the encoder cannot.")
        return pipeline
    heads = {"sparse": LEXICAL_HEAD, "multi_vector": COLBERT_HEAD}
    found = [kind for kind, head in heads.items() if head in repository.files]
    pickles = {kind: head.replace(".safetensors", ".pt") for kind, head in heads.items() if kind not in found}
    pickles = {kind: file for kind, file in pickles.items() if file in repository.files}
    kinds = wishes.kinds or ("dense", *found)
    if files := [file for kind, file in pickles.items() if kind in kinds]:
        raise UserError(f"{name} has {' and '.join(files)} as pickles only, which are never loaded: {_CONVERT}.", USAGE)
    if "sparse" in kinds and "sparse" not in found:
        raise UserError(f"{name} has no {LEXICAL_HEAD}, which gives tokens their weights: leave sparse out.", USAGE)
    rows = None
    if "multi_vector" in kinds:
        rows = _COLBERT if "multi_vector" in found else _STATES
    notes = [f"left out: {' and '.join(pickles.values())}, pickles, which are never loaded: {_CONVERT}"]
    return replace(
        pipeline,
        pooling=pipeline.pooling if "dense" in kinds else (),
        lexical=LEXICAL_HEAD if "sparse" in kinds else "",
        rows=rows,
        notes=notes if pickles and not wishes.kinds else (),
    )


# BGE-M3's, whose first row, that of the token for classification, is left to the dense vector.
_COLBERT: Final = Rows(({"kind": "dense", "file": COLBERT_HEAD},), {"skip_first": 1})
# What a token is after the last layer, for systems that take it further.
_STATES: Final = Rows(table={"normalized": False})
_CONVERT: Final = (
    "where you trust them, safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW) makes the same "
    "with .safetensors, to be put beside the other files in a folder"
)


def _splade(repository: Repository, path: str) -> Splade:
    config = read_json(repository, f"{path}/config.json", needed=True)
    if limit := read_json(repository, "config_sentence_transformers.json").get("max_active_dims"):
        raise UserError(f"{repository.name} keeps the {limit} largest weights only, which the encoder cannot.")
    strategy, activation = config.get("pooling_strategy", "max"), config.get("activation_function", "relu")
    if strategy not in ("max", "sum") or activation not in ("relu", "log1p_relu"):
        raise UserError(
            f"{repository.name} pools by {strategy} of {activation}, which is no SPLADE that the encoder knows."
        )
    return Splade(strategy, activation == "log1p_relu")


def _modules(repository: Repository) -> list[dict[str, Any]]:
    try:
        modules = json.loads((repository.fetch(["modules.json"]) / "modules.json").read_text(encoding="utf-8"))
    except ValueError:
        modules = None
    if not isinstance(modules, list) or not all(isinstance(each, dict) for each in modules):
        raise UserError(
            f"modules.json of {repository.name} is not the list of modules that sentence-transformers writes."
        )
    return modules


def _class_name(repository: Repository, module: Mapping[str, Any]) -> str:
    kind = _ALIASES.get(found := str(module.get("type")), found)
    if not kind.startswith("sentence_transformers."):
        raise UserError(f"{repository.name} needs code of its own ({kind}), which never runs here.")
    return kind.rpartition(".")[2]


def _ways(repository: Repository, path: str) -> tuple[tuple[Pooling, ...], bool]:
    """Read ways of pooling, and whether prompts are pooled."""
    config = read_json(repository, f"{path}/config.json", needed=True)
    ways = config.get("pooling_mode")
    if ways is None:
        ways = [way for flag, way in _POOLING_FLAGS.items() if config.get(flag)] or ["mean"]
    ways = [ways] if isinstance(ways, str) else ways
    if unknown := [way for way in ways if way not in _POOLING]:
        raise UserError(f"{repository.name} pools by {', '.join(map(str, unknown))}, which the encoder does not know.")
    return tuple(_POOLING[way] for way in ways), config.get("include_prompt") is not False


def _head(repository: Repository, modules: Sequence[tuple[str, str]]) -> tuple[list[dict[str, Any]], bool]:
    """Read what follows pooling: layers of the manifest's head, and whether vectors are normalised in the end."""
    layers: list[dict[str, Any]] = []
    normalized = False
    for kind, path in modules:
        if kind == "Dropout":  # does nothing outside of training
            continue
        if normalized and kind != "Normalize":
            raise UserError(f"{repository.name} has a {kind} after Normalize, which the encoder cannot.")
        if kind == "Normalize":
            normalized = True
        elif kind in ("Dense", "LayerNorm"):
            layers.append(_layer(repository, kind, path))
        else:
            raise UserError(f"{repository.name} has a module {kind}, which the encoder does not know.")
    return layers, normalized


def _layer(repository: Repository, kind: str, path: str, place: str = "sentence_embedding") -> dict[str, Any]:
    config = read_json(repository, f"{path}/config.json", needed=True)
    file = f"{path}/model.safetensors"
    if file not in repository.files:
        raise UserError(
            f"{repository.name} has the weights of {path} as a pickle only, which is never loaded: save it anew with "
            "sentence-transformers (`SentenceTransformer(ID).save_pretrained(FOLDER)`) and pull the folder."
        )
    if kind == "LayerNorm":
        width = int(config["dimension"])
        return {"kind": "layer_norm", "file": file, "inputs": width, "outputs": width}
    sizes = {"inputs": int(config["in_features"]), "outputs": int(config["out_features"])}
    name = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    places = {config.get(key) or place for key in ("module_input_name", "module_output_name")}
    if name not in _ACTIVATIONS or config.get("use_residual") or places != {place}:
        raise UserError(
            f"{path} of {repository.name} is a Dense that the encoder does not know (activation {name}, from and to "
            f"{', '.join(sorted(places))}{', residual' if config.get('use_residual') else ''})."
        )
    return {"kind": "dense", "file": file, **sizes, "activation": _ACTIVATIONS[name]}


# --- graphs ---------------------------------------------------------------------------------------


def _checked(repository: Repository, file: str, wishes: Wishes) -> Graph:
    """Read a graph that the encoder can feed; one that is quantised must have been asked for."""
    graph = read_graph(repository, file)
    unknown = [name for name in graph.inputs if name not in _INPUTS]
    if unknown and not _is_packed(graph):
        raise UserError(
            f"{file} of {repository.name} wants inputs that the encoder does not make ({', '.join(unknown[:3])}"
            f"{', ...' if len(unknown) > 3 else ''}): export it for feature extraction, without a cache."
        )
    if graph.precision == "int8" and not wishes.file:
        raise UserError(
            f"{file} of {repository.name} is quantised to int8, and there is no other: take it all the same with "
            f"--file {file}, or an original with `embedmesh models quantize`."
        )
    return graph


def _is_packed(graph: Graph) -> bool:
    return set(graph.inputs) == _PACKED


def _graph_table(graph: Graph, output: str, pooling: str | list[Pooling]) -> dict[str, Any]:
    if _is_packed(graph):
        return {"file": graph.file, "layout": "packed", "output": output}
    layout = "padded" if "input_ids" in graph.inputs else "stacked"
    return {
        "file": graph.file, "layout": layout, "inputs": list(graph.inputs), "output": output, "pooling": pooling,
    }  # fmt: skip


def _short(ways: Sequence[Pooling]) -> str | list[Pooling]:
    """Write ways of pooling as a manifest does."""
    return ways[0] if len(ways) == 1 else list(ways)


def _token_output(graph: Graph) -> str:
    """Find the output with a vector a token; "" if there is none."""
    for name in _TOKENS:
        if name in graph.outputs and ((shape := graph.outputs[name]) is None or len(shape) == 3):
            return name
    return ""


def _projection(path: str) -> dict[str, Any]:
    """Describe Stanford's projection, which lies among the weights."""
    del path
    return {"kind": "dense", "file": ""}


def _no_pooling(repository: Repository) -> str:
    return (
        f"{repository.name} does not say how the vectors of tokens become one (it has no modules.json): see its model "
        "card, and name it with --pooling mean, cls or last (splade for sparse vectors), and --normalize if vectors "
        "are normalised."
    )


def _no_output(repository: Repository, graph: Graph) -> str:
    return (
        f"{graph.file} of {repository.name} gives {', '.join(graph.outputs)}, none of which is known to hold vectors "
        f"({', '.join((*_TOKENS, *_VECTORS))}): export it for feature extraction."
    )


def _width(repository: Repository, graph: Graph, output: str, prefix: str) -> int:
    """Width of a token's vector."""
    shape = graph.outputs[output]
    if shape and shape[-1]:
        return shape[-1]
    config = _config(repository, prefix)
    for key in ("hidden_size", "d_model", "dim", "n_embd"):
        if isinstance(width := config.get(key), int):
            return width
    raise UserError(f"neither {graph.file} nor config.json of {repository.name} says how wide its vectors are.")


def _last(repository: Repository, graph: Graph, output: str, shape: Sequence[int | None] | None) -> int:
    """Width of an output with a vector an input."""
    if not shape or len(shape) != 2 or not shape[1]:
        config = read_json(repository, "config.json")
        width = config.get("projection_dim") or config.get("hidden_size")
        if not isinstance(width, int):
            raise UserError(f"{graph.file} of {repository.name} does not say how wide its output {output} is.")
        return width
    return shape[1]


def _tower(repository: Repository, file: str, wishes: Wishes) -> Tower:
    """Read a graph that stands alone."""
    graph = _checked(repository, file, wishes)
    inputs = set(graph.inputs)
    sounds = inputs.intersection(_SOUNDS)
    both = {"input_ids", _PIXELS} <= inputs and wishes.templates is not None
    if ("input_ids" in inputs) + (_PIXELS in inputs) + bool(sounds) != 1 + both:
        raise UserError(
            f"{file} of {repository.name} takes {', '.join(graph.inputs)}: the encoder wants a graph for each of text, "
            "images and sounds."
        )
    modality = "image" if _PIXELS in inputs else "text" if "input_ids" in inputs else "audio"
    output, pooling, width = _output(repository, graph, wishes)
    notes: list[str] = []
    tables: dict[str, dict[str, Any]] = {}
    limit = 0
    if modality != "text":
        tables[modality], limit = _image(repository, wishes) if modality == "image" else _audio(repository, wishes)
    if "input_ids" in inputs:
        tables["text"], limit, notes = _text(repository, Pipeline("", wishes.pooling), wishes)
        if model_type(repository) == "siglip":
            tables["text"]["pad"] = "max_input_units"  # it was trained on padding, and told of no mask
        if wishes.templates:
            tables["text"] |= wishes.templates.of(modality)
    assets = [table.get("processor") or table["tokenizer"] for table in tables.values()]
    dimensions = width * (len(pooling) if isinstance(pooling, list) else 1)
    manifest = {
        "modality": modality,
        "dimensions": dimensions,
        **_matryoshka(repository, "", dimensions),
        # Towers are compared by cosine, and their libraries normalise; whole pipelines do so in the graph, if at all.
        "normalized": output in _TOWER_OUTPUTS if wishes.normalize is None else wishes.normalize,
        "max_input_units": limit,
        "precision": graph.precision,
        "graph": _graph_table(graph, output, pooling),
        **tables,
    }
    return Tower(graph, modality, manifest, [*graph.files, *assets], notes)


def _output(repository: Repository, graph: Graph, wishes: Wishes) -> tuple[str, str | list[Pooling], int]:
    """Choose the output of a graph that stands alone: its name, pooling and width."""
    if not wishes.pooling:
        vectors = [name for name in _VECTORS if name in graph.outputs]
        if model_type(repository) == "siglip" and "pooler_output" in graph.outputs:
            vectors.append("pooler_output")  # SigLIP's towers end there, others' do not
        if vectors:
            return vectors[0], "graph", _last(repository, graph, vectors[0], graph.outputs[vectors[0]])
    tokens = _token_output(graph)
    if not tokens:
        raise UserError(_no_output(repository, graph))
    if not wishes.pooling:
        raise UserError(_no_pooling(repository), USAGE)
    return tokens, _short(wishes.pooling), _width(repository, graph, tokens, "")


# --- what surrounds the graph ---------------------------------------------------------------------


def _config(repository: Repository, prefix: str) -> dict[str, Any]:
    return read_json(repository, f"{prefix}config.json") or read_json(repository, "config.json")


def model_type(repository: Repository) -> str:
    """Give the architecture, that of a single tower by the name of the whole."""
    kind = str(read_json(repository, "config.json").get("model_type", ""))
    return "siglip" if kind.startswith("siglip") else kind.removesuffix("_model").split("_vision")[0].split("_text")[0]


def _text(repository: Repository, pipeline: Pipeline, wishes: Wishes) -> tuple[dict[str, Any], int, list[str]]:
    """Read how text becomes tokens: the manifest's table, the longest input, and what to know of prompts."""
    prefix = pipeline.prefix
    file, tokenizer, content = _tokenizer(repository, prefix)
    if pipeline.static:
        prompts, notes = _prompts(repository)
        table = {"tokenizer": file, "add_special_tokens": False, **({"prompts": prompts} if prompts else {})}
        # The library reads what the tokenizer leaves, which may cut.
        limit = (tokenizer.truncation or {}).get("max_length", STATIC_LONGEST)
        return table, min(wishes.max_units or limit, limit), notes
    settings: dict[str, Any] = {}
    for name in _TRANSFORMER_CONFIGS:
        settings = settings or read_json(repository, f"{prefix}{name}")
    if settings.get("do_lower_case") and not _lowers(json.loads(content).get("normalizer")):
        raise UserError(
            f"{repository.name} lowers the case of texts outside of its tokenizer, which the encoder does not."
        )
    task = settings.get("transformer_task", "fill-mask" if pipeline.splade else "feature-extraction")
    if task != ("fill-mask" if pipeline.splade else "feature-extraction"):
        raise UserError(f"{repository.name} uses its Transformer for {task}, the encoder for feature-extraction only.")
    pad_id = _pad_id(repository, prefix, tokenizer)
    prompts, notes = _prompts(repository)
    rows = pipeline.rows
    if rows and rows.limit:
        settings = {**settings, "max_seq_length": rows.limit}
    limit = _longest(repository, prefix, settings, wishes, pad_id)
    table = {"tokenizer": file, "pad_id": pad_id, **({"prompts": prompts} if prompts else {})}
    if not pipeline.include_prompt:
        table["include_prompt"] = False
    if rows:
        table |= rows.text
        if (queries := rows.table.get("query_length", rows.table.get("expand_to", 0))) > limit:
            raise UserError(
                f"{repository.name} has queries of {queries} tokens, but reads {limit}: it cannot be served as it is."
            )
        notes = [*notes, *rows.notes]
    return table, limit, notes


def _tokenizer(repository: Repository, prefix: str) -> tuple[str, Tokenizer, str]:
    """Read the tokenizer: its file, itself, and the file's content."""
    file = next((f"{at}tokenizer.json" for at in (prefix, "") if f"{at}tokenizer.json" in repository.files), None)
    if file is None:
        raise UserError(
            f"{repository.name} has no tokenizer.json: make one with `AutoTokenizer.from_pretrained(ID)"
            ".save_pretrained(FOLDER)` of transformers, beside its other files, and pull the folder."
        )
    path = repository.fetch([file]) / file
    try:
        content = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # noqa: BLE001  (it is what the library raises)
        raise UserError(f"{file} of {repository.name} is not a tokenizer: {error}.") from None
    return file, tokenizer, content


def _lowers(normalizer: Any) -> bool:
    if not isinstance(normalizer, dict):
        return False
    if normalizer.get("type") == "Sequence":
        return any(map(_lowers, normalizer["normalizers"]))
    return normalizer.get("type") == "Lowercase" or bool(normalizer.get("lowercase"))


def _pad_id(repository: Repository, prefix: str, tokenizer: Tokenizer) -> int:
    token = read_json(repository, f"{prefix}tokenizer_config.json").get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    found = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if found is None:
        found = (tokenizer.padding or {}).get("pad_id", _config(repository, prefix).get("pad_token_id"))
    return found if isinstance(found, int) else 0


def _prompts(repository: Repository) -> tuple[dict[str, str], list[str]]:
    """Read the prompts of sentence-transformers: those for roles, and a note on others."""
    config = read_json(repository, "config_sentence_transformers.json")
    named = {name: text for name, text in (config.get("prompts") or {}).items() if text}
    places = {"query": ("query",), "document": ("document", "passage", "corpus")}
    prompts: dict[str, str] = {}
    known = set()
    for role, names in places.items():
        name = next((each for each in names if each in named), None)
        if name:
            prompts[role] = named[name]
            known.add(name)
    if default := named.get(config.get("default_prompt_name") or ""):
        prompts["default"] = default
    others = {name: text for name, text in named.items() if name not in known}
    notes = [f"further prompts, to be given as the instruction of a call: {json.dumps(others, ensure_ascii=False)}"]
    return prompts, notes if others else []


def _longest(repository: Repository, prefix: str, settings: Mapping[str, Any], wishes: Wishes, pad_id: int) -> int:
    """Find out how many tokens the model reads."""
    config = _config(repository, prefix)
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else None
    positions = (text or config).get("max_position_embeddings")
    if text is not None and positions is None:  # transformers leaves its defaults out
        positions = {"clip": 77, "siglip": 64}.get(model_type(repository))
    if isinstance(positions, int) and (text or config).get("model_type") in _LATE_POSITIONS:
        positions -= (text or config).get("pad_token_id", pad_id) + 1
    tokenizer = read_json(repository, f"{prefix}tokenizer_config.json")
    limits = (settings.get("max_seq_length") or tokenizer.get("model_max_length"), positions)
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < _ENDLESS]
    if wishes.max_units:
        if known and wishes.max_units > min(known):
            raise UserError(f"{repository.name} reads at most {min(known)} tokens, not {wishes.max_units}.", USAGE)
        return wishes.max_units
    if not known:
        raise UserError(f"{repository.name} does not say how many tokens it reads: name it with --max-units.", USAGE)
    return min(known)


def _matryoshka(repository: Repository, prefix: str, dimensions: int) -> dict[str, list[int]]:
    """Read which smaller widths a model was trained for: in its configuration, or in the card of its training."""
    widths = _config(repository, prefix).get("matryoshka_dimensions")
    if widths is None and "README.md" in repository.files:
        # Sentence-transformers writes the parameters of a loss there, as JSON, and nowhere else.
        card = (repository.fetch(["README.md"]) / "README.md").read_text(encoding="utf-8", errors="replace")
        named = {int(width) for found in _MATRYOSHKA.findall(card) for width in found.split(",") if width.strip()}
        widths = sorted(named, reverse=True)
    if not isinstance(widths, list) or not all(isinstance(width, int) for width in widths):
        return {}
    return {"truncatable_dimensions": [width for width in widths if 0 < width < dimensions]}


def _processor(repository: Repository) -> tuple[str, dict[str, Any]]:
    file = "preprocessor_config.json"
    config = read_json(repository, file)
    if not config and "image_processor" in (both := read_json(repository, "processor_config.json")):
        return "processor_config.json", both["image_processor"]  # newer versions write one file for pictures and texts
    if not config:
        raise UserError(f"{repository.name} has no {file}, which says how its inputs are prepared.", FAILED)
    return file, config


def _image(repository: Repository, wishes: Wishes) -> tuple[dict[str, Any], int]:
    file, config = _processor(repository)
    processor = ImageProcessor(ImageSpec.from_preprocessor_config(config))
    height, width = processor.output_size(400, 300)
    model = read_json(repository, "config.json")
    model = model["vision_config"] if isinstance(model.get("vision_config"), dict) else model
    patch, extra = _PATCHES.get(model_type(repository), (0, 0))
    patch = model.get("patch_size", patch) if patch else 0
    units = (height // patch) * (width // patch) + extra if patch else math.ceil(height * width / 256)
    any_size = processor.output_size(300, 400) != (height, width)
    if any_size and wishes.templates:
        raise UserError(f"{repository.name} reads pictures of any size with texts, which the encoder cannot.")
    if any_size and not wishes.max_units:
        raise UserError(f"{repository.name} reads pictures of any size: name the largest with --max-units.", USAGE)
    return {"processor": file, "patch_size": patch, "extra_tokens": extra}, wishes.max_units or units


def _audio(repository: Repository, wishes: Wishes) -> tuple[dict[str, Any], int]:
    file, config = _processor(repository)
    units = AudioSpec.from_preprocessor_config(config).fixed_units or wishes.max_units
    if not units:
        raise UserError(f"{repository.name} reads sounds of any length: name the longest with --max-units.", USAGE)
    return {"processor": file}, units
