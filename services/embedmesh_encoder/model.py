"""A model is a folder with a manifest, `model.toml`: read, checked and fingerprinted here.

    format = 1
    name = "all-MiniLM-L6-v2"          # letters, digits and . _ - /
    family = "starter"                 # towers that answer under one name; default: the name
    modality = "text"                  # text, image or audio
    space = "all-MiniLM-L6-v2"         # vectors may be compared only within one space
    kinds = ["dense"]                  # default
    dimensions = 384
    truncatable_dimensions = []        # smaller widths the model was trained for; default: none
    normalized = true                  # whether the reference library normalises the vectors
    max_input_units = 256              # tokens, special ones included
    license = "Apache-2.0"
    source = "https://..."             # where the weights come from
    backend = "onnxruntime"            # or "fake"
    precision = "float32"              # default

    [graph]
    file = "model.onnx"
    layout = "packed"                  # see below; or "padded"
    output = "sentence_embedding"      # default for packed; "last_hidden_state" for padded
    pooling = "graph"                  # default: the graph pools; padded only: mean, cls, max,
                                       # mean_sqrt_len, last (numpy, see pooling.py)
    inputs = ["input_ids", "attention_mask"]     # padded only; may add "token_type_ids"

    [text]                             # modality text
    tokenizer = "tokenizer.json"       # file of the `tokenizers` library
    pad_id = 0                         # padded only; default 0
    prompts = { query = "", document = "" }      # put before the text, by role; default: none

    [fake]                             # backend fake; all default to 0
    base_ms = 0.0                      # how long a batch takes: base_ms + ms_per_unit * units
    ms_per_unit = 0.0
    seed = 0                           # another seed, other vectors

    [files]                            # every file the model reads, below this folder
    "model.onnx" = "<sha256>"
    "tokenizer.json" = "<sha256>"

Layout *packed*: several texts lie end to end in rows. `input_ids`, `position_ids` (restarting
at each text) and `segment_ids` (index of the text in the batch, -1 for padding) are int64
[rows, width]; the output is float32 [texts, dimensions], already pooled.
Layout *padded*: one text a row. Inputs are int64 [texts, longest]; the output is float32
[texts, longest, dimensions], or [texts, dimensions] with pooling "graph".

The *revision* is a fingerprint of everything that changes a vector: the files, graph and text
tables, longest input, normalisation, precision, backend. Name, family, space, licence,
source and timing are no part of it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Final, Literal, TypeVar, cast

from embedmesh.v1 import embedding_pb2 as pb

__all__ = [
    "MANIFEST",
    "FakeSpec",
    "GraphSpec",
    "ModelError",
    "ModelSpec",
    "TextSpec",
    "find_models",
    "load_spec",
    "verify_files",
    "write_manifest",
]

MANIFEST: Final = "model.toml"
POOLINGS: Final = ("graph", "mean", "cls", "max", "mean_sqrt_len", "last")
PACKED_INPUTS: Final = ("input_ids", "position_ids", "segment_ids")

_FORMAT: Final = 1
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_KINDS: Final[dict[str, pb.EmbeddingKind.ValueType]] = {"dense": pb.EMBEDDING_KIND_DENSE}

T = TypeVar("T")


class ModelError(ValueError):
    """A model cannot be used; the message says which, why, and what to do."""


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """The ONNX graph; see the module for the two layouts.

    Attributes:
        file: Path below the model's folder; "" for the fake backend.
        layout: How a batch is laid out.
        inputs: Names of the int64 inputs.
        output: Name of the float32 output.
        pooling: "graph" when the output is one vector a text, else how pooling.py pools it.
    """

    file: str
    layout: Literal["packed", "padded"]
    inputs: tuple[str, ...]
    output: str
    pooling: str


@dataclass(frozen=True, slots=True)
class TextSpec:
    """How text becomes tokens.

    Attributes:
        tokenizer: Path of a `tokenizer.json` below the model's folder.
        pad_id: Token id that fills padded rows.
        query_prompt: Put before texts of role QUERY.
        document_prompt: Put before texts of role DOCUMENT.
    """

    tokenizer: str
    pad_id: int = 0
    query_prompt: str = ""
    document_prompt: str = ""


@dataclass(frozen=True, slots=True)
class FakeSpec:
    """Behaviour of the fake backend.

    Attributes:
        base_ms: Milliseconds that every batch takes.
        ms_per_unit: Milliseconds that every unit adds.
        seed: Another seed gives other vectors and another revision.
    """

    base_ms: float = 0.0
    ms_per_unit: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class ModelSpec:
    """What a manifest says; see the module."""

    folder: Path
    name: str
    family: str
    modality: Literal["text", "image", "audio"]
    space: str
    kinds: tuple[pb.EmbeddingKind.ValueType, ...]
    dimensions: int
    truncatable_dimensions: tuple[int, ...]
    normalized: bool
    max_input_units: int
    license: str
    source: str
    backend: Literal["onnxruntime", "fake"]
    precision: Literal["float32"]
    graph: GraphSpec
    text: TextSpec | None
    fake: FakeSpec | None
    files: Mapping[str, str] = field(repr=False)

    @cached_property
    def revision(self) -> str:
        """Fingerprint of everything that changes a vector, 16 hexadecimal digits."""
        decides = {
            "format": _FORMAT,
            "files": dict(self.files),
            "graph": asdict(self.graph),
            "text": self.text and asdict(self.text),
            "max_input_units": self.max_input_units,
            "normalized": self.normalized,
            "precision": self.precision,
            "backend": self.backend,
            "seed": self.fake.seed if self.fake else 0,
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]

    def ref(self) -> pb.ModelRef:
        """Name this model as results do."""
        return pb.ModelRef(name=self.name, revision=self.revision, space=self.space)

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
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(
            f"{folder} is not a model folder: it has no {MANIFEST} (`embedmesh models list` shows the models at hand)"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ModelError(f"cannot read {manifest}: {error}") from None
    problems: list[str] = []
    spec = _read(folder, _Table(table, "", problems))
    for file in spec.files:
        if not _inside(folder, file):
            problems.append(f'file "{file}" is outside of the model\'s folder')
        elif not spec.path(file).is_file():
            problems.append(f'file "{file}" is missing')
    _raise_if(problems, manifest)
    return spec


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
    _raise_if(problems, spec.folder / MANIFEST)


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


class _Table:
    """One table of a manifest: hands out checked values and collects problems instead of raising."""

    def __init__(self, data: Mapping[str, Any], where: str, problems: list[str]) -> None:
        self._data = data
        self._where = where
        self._problems = problems
        self._known: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._data

    def keys(self) -> Collection[str]:
        return self._data.keys()

    def problem(self, key: str, what: str) -> None:
        self._problems.append(f"{self._where}{key} {what}")

    def take(self, key: str, kind: Callable[[Any], str], default: T | None = None) -> T:
        """Give the value of `key`; `kind` says what is wrong with it ("" when nothing is)."""
        self._known.append(key)
        if key not in self._data:
            if default is None:
                self.problem(key, "is missing")
            return cast("T", default)
        wrong = kind(self._data[key])
        if wrong:
            self.problem(key, f"{wrong}, got {json.dumps(self._data[key], default=str)}")
            return cast("T", default)
        return cast("T", self._data[key])

    def table(self, key: str) -> _Table:
        """Give a table within this one, an empty one when it is missing."""
        self._known.append(key)
        data = self._data.get(key, {})
        if not isinstance(data, dict):
            self.problem(key, "must be a table")
            data = {}
        return _Table(data, f"{self._where}{key}.", self._problems)

    def finish(self) -> None:
        """Report the keys that nobody asked for."""
        for key in self._data:
            if key not in self._known:
                near = difflib.get_close_matches(key, self._known, n=1)
                self.problem(key, f"is unknown{f', did you mean {near[0]}?' if near else ''}")


def _string(value: Any) -> str:
    return "" if isinstance(value, str) else "must be a string"


def _name(value: Any) -> str:
    good = isinstance(value, str) and _NAME.fullmatch(value)
    return "" if good else "must be a name of letters, digits and . _ - /"


def _flag(value: Any) -> str:
    return "" if isinstance(value, bool) else "must be true or false"


def _count(value: Any) -> str:
    good = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return "" if good else "must be a whole number above 0"


def _index(value: Any) -> str:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return "" if good else "must be a whole number, 0 or above"


def _milliseconds(value: Any) -> str:
    good = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
    return "" if good else "must be a number of milliseconds, 0 or above"


def _one_of(*choices: Any) -> Callable[[Any], str]:
    return lambda value: "" if value in choices else f"must be {' or '.join(json.dumps(c) for c in choices)}"


def _list_of(kind: Callable[[Any], str], what: str) -> Callable[[Any], str]:
    return lambda value: "" if isinstance(value, list) and not any(map(kind, value)) else f"must be a list of {what}"


def _read(folder: Path, top: _Table) -> ModelSpec:
    """Read the manifest; what it returns is sound only when no problem was reported."""
    top.take("format", _one_of(_FORMAT))
    name: str = top.take("name", _name)
    modality: Any = top.take("modality", _one_of("text", "image", "audio"))
    backend: Any = top.take("backend", _one_of("onnxruntime", "fake"))
    dimensions: int = top.take("dimensions", _count)
    widths: list[int] = top.take("truncatable_dimensions", _list_of(_count, "whole numbers"), [])
    if dimensions and any(width >= dimensions for width in widths):
        top.problem("truncatable_dimensions", f"must all be smaller than dimensions ({dimensions}), got {widths}")
    kinds: list[str] = top.take("kinds", _list_of(_one_of(*_KINDS), " or ".join(_KINDS)), ["dense"])
    if not kinds:
        top.problem("kinds", "must not be empty")
    files = _read_files(top)
    graph = _read_graph(top, backend, files)
    text = _read_text(top, files) if modality == "text" else None
    fake = _read_fake(top) if backend == "fake" else None
    spec = ModelSpec(
        folder=folder,
        name=name,
        family=top.take("family", _name, name),
        modality=modality,
        space=top.take("space", _name),
        kinds=tuple(_KINDS[kind] for kind in kinds),
        dimensions=dimensions,
        truncatable_dimensions=tuple(sorted(set(widths), reverse=True)),
        normalized=top.take("normalized", _flag),
        max_input_units=top.take("max_input_units", _count),
        license=top.take("license", _string),
        source=top.take("source", _string),
        backend=backend,
        precision=top.take("precision", _one_of("float32"), "float32"),
        graph=graph,
        text=text,
        fake=fake,
        files=files,
    )
    top.finish()
    return spec


def _read_files(top: _Table) -> Mapping[str, str]:
    table = top.table("files")
    if "files" not in top:
        top.problem("files", "is missing: list every file of the model with its sha256")
    hexadecimal = lambda value: (  # noqa: E731  (a checker like those above, used once)
        "" if isinstance(value, str) and _SHA256.fullmatch(value) else "must be a sha256 in hexadecimal"
    )
    return MappingProxyType({file: table.take(file, hexadecimal) for file in table.keys()})  # noqa: SIM118


def _listed(table: _Table, key: str, files: Mapping[str, str]) -> str:
    """Take the path of a file that must be in [files]."""
    file: str = table.take(key, _string)
    if file and file not in files:
        table.problem(key, f'names "{file}", which is not listed in [files]')
    return file


def _read_graph(top: _Table, backend: str, files: Mapping[str, str]) -> GraphSpec:
    table = top.table("graph")
    layout: Any = table.take("layout", _one_of("packed", "padded"))
    packed = layout == "packed"
    if backend == "fake" and not packed:
        table.problem("layout", 'must be "packed" when the backend is "fake"')
    pooling: str = table.take("pooling", _one_of(*POOLINGS), "graph")
    if packed and pooling != "graph":
        table.problem("pooling", 'must be "graph" when the layout is "packed": such a graph pools by itself')
    if packed:
        inputs = list(PACKED_INPUTS)
    else:
        allowed = _one_of("input_ids", "attention_mask", "token_type_ids")
        inputs = table.take("inputs", _list_of(allowed, "input names"), ["input_ids", "attention_mask"])
    graph = GraphSpec(
        file=_listed(table, "file", files) if backend != "fake" else "",
        layout=layout,
        inputs=tuple(inputs),
        output=table.take("output", _string, "sentence_embedding" if packed else "last_hidden_state"),
        pooling=pooling,
    )
    table.finish()
    return graph


def _read_text(top: _Table, files: Mapping[str, str]) -> TextSpec:
    table = top.table("text")
    prompts = table.table("prompts")
    text = TextSpec(
        tokenizer=_listed(table, "tokenizer", files),
        pad_id=table.take("pad_id", _index, 0),
        query_prompt=prompts.take("query", _string, ""),
        document_prompt=prompts.take("document", _string, ""),
    )
    prompts.finish()
    table.finish()
    return text


def _read_fake(top: _Table) -> FakeSpec:
    table = top.table("fake")
    fake = FakeSpec(
        base_ms=table.take("base_ms", _milliseconds, 0.0),
        ms_per_unit=table.take("ms_per_unit", _milliseconds, 0.0),
        seed=table.take("seed", _index, 0),
    )
    table.finish()
    return fake


def _inside(folder: Path, file: str) -> bool:
    """Whether a path of the manifest stays in the folder, symbolic links followed."""
    pure = PurePosixPath(file)
    if pure.is_absolute() or ".." in pure.parts:
        return False
    return (folder / file).resolve().is_relative_to(folder.resolve())


def _raise_if(problems: list[str], manifest: Path) -> None:
    if len(problems) == 1:
        raise ModelError(f"{manifest}: {problems[0]}")
    if problems:
        raise ModelError(f"{manifest} has {len(problems)} problems:" + "".join(f"\n  - {p}" for p in problems))


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
