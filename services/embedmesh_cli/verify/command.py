"""The command `embedmesh models verify`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Protocol, cast

import numpy as np
import typer

from embedmesh._plan import KindName
from embedmesh.client import Client
from embedmesh.errors import EmbedMeshError
from embedmesh.inputs import Audio, Image, Role
from embedmesh.v1 import text_pb2
from embedmesh_cli.connection import credentials
from embedmesh_cli.console import FAILED, USAGE, UserError, explain, explained, plain_console
from embedmesh_cli.home import find_model
from embedmesh_cli.likeness import LEAST_COSINE, MOST_APART, Likeness, Vectors, compare, join
from embedmesh_cli.local import LocalModel, contents, demo_files, demo_texts
from embedmesh_cli.verify.reference import Reference, load_reference
from embedmesh_encoder.model import ModelError, ModelSpec, verify_files

__all__ = ["verify"]

_NORMS: Final = 1e-3
_SHOWN: Final = 60
_SECONDS: Final = 600.0
_MOST_FILES: Final = 24
_ROLES: Final = {
    "none": text_pb2.TEXT_ROLE_UNSPECIFIED,
    "query": text_pb2.TEXT_ROLE_QUERY,
    "document": text_pb2.TEXT_ROLE_DOCUMENT,
}


_SERVED_ROLES: Final[Mapping[str, Role | None]] = {"none": None, "query": "query", "document": "document"}


class _Subject(Protocol):
    """Whatever gives vectors: this process, or a mesh.

    Attributes:
        revision: Of the model that gave them.
    """

    revision: str

    def embed(self, items: Sequence[Any], role: str, *, alone: bool) -> Vectors:
        """Embed texts or contents of files, together or one by one."""

    def close(self) -> None:
        """Let it go."""


class _Local:
    """The model, run in this process."""

    def __init__(self, spec: ModelSpec) -> None:
        from embedmesh_encoder.modalities import MODALITIES  # noqa: PLC0415  (slow to import)

        self.revision = spec.revision
        self._spec = spec
        self._make = MODALITIES[spec.modality].item
        self._model = LocalModel(spec)

    def embed(self, items: Sequence[Any], role: str, *, alone: bool) -> Vectors:
        made = [self._make(item) for item in items]
        if self._spec.modality == "text":
            from embedmesh_encoder.text import TextItem  # noqa: PLC0415

            made = [TextItem(item, _ROLES[role]) for item in items]
        groups = [[item] for item in made] if alone else [made]
        return join([self._model.vectors(batch) for group in groups for batch in self._model.batches(group)])

    def close(self) -> None:
        self._model.close()


class _Served:
    """The model as a mesh serves it."""

    def __init__(self, spec: ModelSpec, address: str) -> None:
        self._spec = spec
        self._address = address
        self._client = Client(address, **credentials())
        self.revision = ""

    def embed(self, items: Sequence[Any], role: str, *, alone: bool) -> Vectors:
        wrap = {"text": str, "image": Image, "audio": Audio}[self._spec.modality]
        inputs = [wrap(item) for item in items]
        groups = [[each] for each in inputs] if alone else [inputs]
        kinds = cast("tuple[KindName, ...]", self._spec.kind_names)
        try:
            answers = [
                self._client.embed(
                    group,
                    model=self._spec.name,
                    role=_SERVED_ROLES[role],
                    kinds=kinds,
                    cache="bypass",
                    timeout=_SECONDS,
                )
                for group in groups
            ]
        except EmbedMeshError as error:
            raise explain(error, self._address) from None
        results = [result for answer in answers for result in answer.results]
        if failed := next((result.error for result in results if result.error), None):
            raise UserError(f"{self._address} could not embed some of the samples: {failed}.")
        self.revision = answers[0].models[0].revision
        return Vectors(
            np.array([result.vector for result in results]) if "dense" in kinds else None,
            [(result.sparse.indices, result.sparse.values) for result in results] if "sparse" in kinds else None,
            [result.multi_vector for result in results] if "multi_vector" in kinds else None,
        )

    def close(self) -> None:
        self._client.close()


@dataclass(frozen=True, slots=True)
class _Comparison:
    """How alike vectors of a kind are to the reference's, for texts of one role (or inputs without one)."""

    kind: str
    role: str
    cosine_min: float
    cosine_mean: float
    norm_difference: float
    element_difference: float
    worst: Sequence[tuple[float, str]]


@dataclass(frozen=True, slots=True)
class _Limits:
    """What the caller wants: the least cosine, and how many of the worst inputs to see.

    Attributes:
        weights: Of sparse vectors, the largest difference of a weight; 0 where the precision promises none.
    """

    cosine: float
    weights: float
    worst: int


@dataclass(slots=True)
class _Report:
    """What was found; without problems the model is verified."""

    model: str
    revision: str
    where: str
    files: int = 0
    samples: int = 0
    nonfinite: int = 0
    company_difference: float = 0.0
    reference: str | None = None
    comparisons: list[_Comparison] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def verify(
    model: Annotated[str, typer.Argument(metavar="NAME|FOLDER", help="Name of a model at hand, or its folder.")],
    *,
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Take the vectors that the mesh at this host:port serves."),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="What to embed: a file with a text a line, or a folder of pictures or sounds. A few dozen of all "
            "lengths are built in.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="ID|FOLDER", help="The original; where the model was pulled from unless given."),
    ] = None,
    no_reference: Annotated[
        bool, typer.Option("--no-reference", help="Compare with nothing; see to files, finiteness and company only.")
    ] = False,
    min_cosine: Annotated[
        float, typer.Option(metavar="X", min=0, max=1, help="Least cosine to the reference that any sample may have.")
    ] = LEAST_COSINE,
    worst: Annotated[int, typer.Option(metavar="N", min=0, help="How many of the least alike inputs to show.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Compare a model's vectors with those of the reference library; status 0 only if all is well.

    Also: whether files are what the manifest says, whether all numbers are finite, and whether a vector depends
    on what else is in its batch. Of multi-vectors each row is compared, of sparse ones each weight.
    """
    spec = find_model(model)
    report = _Report(spec.name, spec.revision, address or str(spec.folder))
    try:
        verify_files(spec)
        report.files = len(spec.files)
    except ModelError as error:
        report.problems.append(str(error))
    # A model with other files than those that it was made of is not worth a look.
    if not report.problems:
        with explained(samples or spec.folder):
            original = None if no_reference else load_reference(spec, reference)
            items = _items(spec, samples)
            subject: _Subject = _Served(spec, address) if address else _Local(spec)
            try:
                vectors = _examine(spec, report, subject, items, original.roles if original else ("none",))
            finally:
                subject.close()
            if original:
                if spec.modality == "text" and 0 < original.longest < spec.max_input_units:
                    report.problems.append(f"reads {spec.max_input_units} tokens, the reference {original.longest}")
                _hold_against(
                    original,
                    report,
                    items,
                    vectors,
                    _Limits(min_cosine, MOST_APART["sparse"] if spec.precision == "float32" else 0.0, worst),
                )
    if as_json:
        sys.stdout.write(json.dumps({"verified": not report.problems, **asdict(report)}) + "\n")
    else:
        _print(report, min_cosine)
    if report.problems:
        raise typer.Exit(FAILED)


def _items(spec: ModelSpec, path: Path | None) -> list[Any]:
    """Read what to embed: texts, or contents of files."""
    if spec.modality == "text":
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path else _texts()
        found: list[Any] = [line for line in lines if line.strip()]
    elif path:
        found = contents(path)
    else:
        found = demo_files(spec.modality)[:_MOST_FILES]
    if not found:
        raise UserError(f"{path} holds nothing to verify with.", USAGE)
    return found


def _texts() -> list[str]:
    """Give texts from a word to more than any usual model reads."""
    lines = demo_texts()
    joined = [" ".join(lines[start : start + count]) for start, count in ((10, 3), (20, 7), (40, 15), (60, 40))]
    others = ["a", "Straße, naïve café", "東京は日本の首都です。", "ПРИВЕТ, мир!", "don't   stop\t🙂 (v2.0)"]
    return [*lines[::25], *others, *joined]


def _examine(
    spec: ModelSpec, report: _Report, subject: _Subject, items: Sequence[Any], roles: Sequence[str]
) -> dict[str, Vectors]:
    """Embed the samples with each role; write into the report whether numbers are finite, and free of company."""
    vectors = {role: subject.embed(items, role, alone=False) for role in roles}
    alone = subject.embed(items, roles[0], alone=True)
    report.samples, report.revision = len(items), subject.revision
    finite = np.all([each.finite() for each in (alone, *vectors.values())], axis=0)
    report.nonfinite = int((~finite).sum())
    if report.nonfinite:
        report.problems.append(f"the vectors of {report.nonfinite} samples are not finite")
        return {}
    for one in compare(alone, vectors[roles[0]]):
        report.company_difference = max(report.company_difference, one.apart)
        if one.problem or (spec.precision == "float32" and not one.apart <= MOST_APART[one.kind]):
            by = one.problem or f"by {one.apart:.1e}"
            report.problems.append(f"{_plural(one.kind)} depend on what else is in their batch, {by}")
    return vectors


def _hold_against(
    original: Reference, report: _Report, items: Sequence[Any], vectors: Mapping[str, Vectors], limits: _Limits
) -> None:
    """Compare vectors of each role with the reference's."""
    report.reference = original.name
    for role, ours in vectors.items():
        for one in compare(ours, original.embed(items, role)):
            if one.problem:
                report.problems.append(f"{one.problem}{_of(role)}")
                continue
            comparison = _compared(role, items, one, limits.worst)
            report.comparisons.append(comparison)
            what = "" if one.kind == "dense" else f" of {_plural(one.kind)}"
            if not comparison.cosine_min >= limits.cosine:
                report.problems.append(
                    f"the least cosine{what}{_of(role)} is {comparison.cosine_min:.7f}, below {limits.cosine}"
                )
            if not comparison.norm_difference <= _NORMS:
                report.problems.append(
                    f"the lengths of {_plural(one.kind)}{_of(role)} differ by up to {one.norms:.1e} of the reference's"
                )
            if one.kind == "sparse" and limits.weights and not one.apart <= limits.weights:
                report.problems.append(
                    f"the weights of sparse vectors{_of(role)} differ by up to {one.apart:.1e} from the reference's"
                )


def _compared(role: str, items: Sequence[Any], found: Likeness, worst: int) -> _Comparison:
    cosines = found.cosines
    order = np.argsort(cosines)[:worst]
    return _Comparison(
        found.kind,
        role,
        float(cosines.min()),
        float(cosines.mean()),
        found.norms,
        found.apart,
        [(float(cosines[i]), _named(items[i], int(i))) for i in order],
    )


def _plural(kind: str) -> str:
    return {"dense": "vectors", "sparse": "sparse vectors", "multi_vector": "multi-vectors"}[kind]


def _named(item: Any, number: int) -> str:
    if not isinstance(item, str):
        return f"file {number + 1}, {len(item)} bytes"
    return json.dumps(item[:_SHOWN] + ("..." if len(item) > _SHOWN else ""), ensure_ascii=False)


def _of(role: str) -> str:
    return "" if role == "none" else f" of role {role}"


def _print(report: _Report, min_cosine: float) -> None:
    lines = [f"{report.model}@{report.revision} ({report.where})"]
    if report.files:
        lines.append(f"files      {report.files}, each with its sha256")
    if report.samples:
        lines += [
            f"samples    {report.samples}, {report.nonfinite} of them with numbers that are not finite",
            f"company    largest difference of an element, alone and in batches: {report.company_difference:.1e}",
        ]
    if report.reference:
        lines.append(f"reference  {report.reference}")
    for one in report.comparisons:
        lines.append(
            f"cosine     min {one.cosine_min:.7f}, mean {one.cosine_mean:.7f}"
            f"{f' of {_plural(one.kind)}' if one.kind != 'dense' else ''}{_of(one.role)} (at least {min_cosine})"
        )
        if one.kind == "sparse":
            lines.append(f"weights    largest difference{_of(one.role)}: {one.element_difference:.1e}")
        lines += [f"           {cosine:.7f}  {name}" for cosine, name in one.worst]
    lines.append("verified" if not report.problems else "NOT VERIFIED")
    lines += [f"  - {problem}" for problem in report.problems]
    plain_console().print("\n".join(lines), markup=False)
