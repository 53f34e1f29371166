"""What comes back: one outcome an input, in the order of the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from embedmesh.errors import EmbedErrors, EmbedMeshError

__all__ = ["EmbedResponse", "EmbedResult", "ModelInfo", "ModelRef", "Span", "SparseVector", "Usage"]


_Kind = TypeVar("_Kind")


@dataclass(frozen=True, slots=True)
class ModelRef:
    """Which model made a vector.

    Attributes:
        name: Name of the model.
        revision: Fingerprint of everything that changes a vector.
        space: Vectors may be compared if and only if their space is equal.
    """

    name: str
    revision: str
    space: str


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that the mesh offers; the fields are those of `embedmesh.v1.ModelInfo`.

    Attributes:
        name: What `embed(model=...)` takes.
        revision: Fingerprint of everything that changes a vector.
        space: Vectors may be compared if and only if their space is equal.
        family: Name under which the models of several modalities answer together.
        modality: "text", "image" or "audio".
        kinds: Kinds of vector: "dense", "sparse", "multi_vector".
        dimensions: Full width of the dense vectors; 0 where there are none.
        truncatable_dimensions: The smaller widths that `dimensions=` may ask for.
        max_input_units: The most tokens, patches or frames read of one input.
        max_inputs: The most inputs of one encoder call.
        is_default: Answers when a request of this modality names no model.
        ready: False while the model loads, or when it could not be loaded.
        normalized: What `normalize=None` means for it.
        limits: Named limits on one input, for example {"text_bytes": 1048576}.
        sparse_dimensions: Size of the vocabulary of the sparse vectors; 0 where there are none.
        multi_vector_dimensions: Width of the rows of the multi-vectors; 0 where there are none.
        reads_text_with_images: Whether a picture's text is read with it, into one vector.
    """

    name: str
    revision: str
    space: str
    family: str
    modality: str
    kinds: tuple[str, ...]
    dimensions: int
    truncatable_dimensions: tuple[int, ...]
    max_input_units: int
    max_inputs: int
    is_default: bool
    ready: bool
    normalized: bool
    limits: dict[str, int]
    sparse_dimensions: int = 0
    multi_vector_dimensions: int = 0
    reads_text_with_images: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """Totals over the inputs of one answer.

    Attributes:
        input_units: Tokens, patches and frames of all inputs that gave a vector.
        cached_inputs: Number of inputs answered from the cache.
        failed_inputs: Number of inputs that gave an error.
    """

    input_units: int = 0
    cached_inputs: int = 0
    failed_inputs: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class SparseVector:
    """Weights of some entries of a vocabulary; all others are 0.

    Attributes:
        indices: The entries, strictly ascending, uint32 [k], read-only.
        values: Their weights, [k], read-only; dtype as asked for.
        dimensions: Size of the vocabulary.
    """

    indices: NDArray[np.uint32]
    values: NDArray[Any]
    dimensions: int

    def dot(self, other: SparseVector) -> float:
        """Give the inner product, which is how sparse vectors are compared.

        Raises:
            ValueError: The vocabularies differ.
        """
        if self.dimensions != other.dimensions:
            raise ValueError(f"vectors over {self.dimensions} and {other.dimensions} entries cannot be compared")
        _, mine, theirs = np.intersect1d(self.indices, other.indices, assume_unique=True, return_indices=True)
        return float(self.values[mine].astype(np.float32) @ other.values[theirs].astype(np.float32))


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """A part of a text that was asked for by `Text.spans` or `Text.span_units`.

    Attributes:
        start: Its first character.
        end: One after its last.
        vector: As `EmbedResult.vector`.
        scale: As `EmbedResult.scale`.
    """

    start: int
    end: int
    vector: NDArray[Any] = field(repr=False)
    scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class EmbedResult:
    """The outcome of one input: vectors of the kinds asked for, or an error of its own.

    Attributes:
        index: Which input this answers, counted from 0.
        error: Why there is no vector; None when there is one.
        model: Which model made the vector; None with an error.
        input_units: Tokens, patches or audio frames the model reads for this input.
        original_units: What the whole input would have taken: more than `input_units` when truncated.
        truncated: True when part of the input was not read.
        cached: True when no model ran for this input.
        scale: dtype "int8" only: `vector * scale` gives the floats back; else 1.
        spans: The parts of the text that were asked for, in their order; with the kind "dense" only.
    """

    index: int
    error: EmbedMeshError | None = None
    model: ModelRef | None = None
    input_units: int = 0
    original_units: int = 0
    truncated: bool = False
    cached: bool = False
    scale: float = 1.0
    spans: tuple[Span, ...] = ()
    _vector: NDArray[Any] | None = field(default=None, repr=False)
    _sparse: SparseVector | None = field(default=None, repr=False)
    _multi_vector: NDArray[Any] | None = field(default=None, repr=False)

    @property
    def vector(self) -> NDArray[Any]:
        """The dense vector, shape [d], read-only; dtype "binary" gives uint8 of shape [ceil(d / 8)].

        Raises:
            EmbedMeshError: This input's `error`, if it has one.
            ValueError: Another kind was asked for.
        """
        return self._given("dense", self._vector)

    @property
    def sparse(self) -> SparseVector:
        """The sparse vector; raises as `vector` does."""
        return self._given("sparse", self._sparse)

    @property
    def multi_vector(self) -> NDArray[Any]:
        """One row a token, shape [n, d], read-only, for `embedmesh.muvera.max_sim`; raises as `vector` does."""
        return self._given("multi_vector", self._multi_vector)

    def _given(self, kind: str, found: _Kind | None) -> _Kind:
        if self.error is not None:
            raise self.error.with_traceback(None)
        if found is None:
            raise ValueError(f"no vector of kind {kind!r} was asked for; name it in `kinds`")
        return found


@dataclass(frozen=True)
class EmbedResponse:
    """The answer to `embed`.

    Attributes:
        results: `results[i]` answers `inputs[i]`; always as many as there were inputs.
    """

    results: Sequence[EmbedResult]

    @cached_property
    def vectors(self) -> NDArray[Any]:
        """All dense vectors as one array [n, d], row i for input i; dtype as asked for ("binary": [n, ceil(d / 8)]).

        Raises:
            EmbedErrors: At least one input failed; the others stay readable in `results`.
            ValueError: The vectors differ in width, because different models answered; or none were asked for.
        """
        errors = {result.index: result.error for result in self.results if result.error is not None}
        if errors:
            raise EmbedErrors(errors, len(self.results))
        if not self.results:
            return np.empty((0, 0), np.float32)
        widths = {result.vector.shape[0] for result in self.results}
        if len(widths) > 1:
            raise ValueError(f"vectors of different widths {sorted(widths)} make no array; read them from .results")
        return np.stack([result.vector for result in self.results])

    @cached_property
    def models(self) -> tuple[ModelRef, ...]:
        """The models that made these vectors, each once, in order of first use."""
        return tuple(dict.fromkeys(result.model for result in self.results if result.model is not None))

    @cached_property
    def usage(self) -> Usage:
        """Totals over all results."""
        fine = [result for result in self.results if result.error is None]
        return Usage(
            input_units=sum(result.input_units for result in fine),
            cached_inputs=sum(result.cached for result in fine),
            failed_inputs=len(self.results) - len(fine),
        )

    def __repr__(self) -> str:
        models = ", ".join(model.name for model in self.models)
        return f"<EmbedResponse {len(self.results)} results, {self.usage.failed_inputs} failed, models: {models}>"
