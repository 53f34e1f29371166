"""The gRPC face of an encoder: the only place that sees protobuf requests.

`EmbedService` is the one path that every modality takes; a servicer per modality only names its
messages and says how one input is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

from embedmesh.errors import (
    EmbedMeshError,
    InputTooLarge,
    InvalidArgument,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    UnsupportedOutput,
    to_status,
)
from embedmesh.v1 import (
    audio_pb2,
    audio_pb2_grpc,
    catalog_pb2,
    catalog_pb2_grpc,
    image_pb2,
    image_pb2_grpc,
    text_pb2,
    text_pb2_grpc,
)
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh.vectors import (
    DenseOutput,
    decode,
    finish_dense,
    finish_multi_vector,
    finish_sparse,
    require_shape_of_kinds,
)
from embedmesh_encoder.audio import AudioItem
from embedmesh_encoder.batcher import Priority
from embedmesh_encoder.encoder import Encoded, Encoder
from embedmesh_encoder.image import ImageItem
from embedmesh_encoder.model import ModelSpec
from embedmesh_encoder.preparation import DENSE, Others
from embedmesh_encoder.text import Chunking, LateChunking, TextItem
from embedmesh_server.interceptor import deadline_of
from embedmesh_server.metrics import EncoderMetrics
from embedmesh_server.tracing import NO_TRACING, Tracing

__all__ = [
    "AUDIO_SERVICE",
    "CATALOG_SERVICE",
    "IMAGE_SERVICE",
    "TEXT_SERVICE",
    "AudioEncoderServicer",
    "EmbedService",
    "ImageEncoderServicer",
    "ModelCatalogServicer",
    "Models",
    "TextEncoderServicer",
]

TEXT_SERVICE: Final[str] = text_pb2.DESCRIPTOR.services_by_name["TextEncoder"].full_name
IMAGE_SERVICE: Final[str] = image_pb2.DESCRIPTOR.services_by_name["ImageEncoder"].full_name
AUDIO_SERVICE: Final[str] = audio_pb2.DESCRIPTOR.services_by_name["AudioEncoder"].full_name
CATALOG_SERVICE: Final[str] = catalog_pb2.DESCRIPTOR.services_by_name["ModelCatalog"].full_name

_MODALITIES: Final = {
    "text": catalog_pb2.MODALITY_TEXT,
    "image": catalog_pb2.MODALITY_IMAGE,
    "audio": catalog_pb2.MODALITY_AUDIO,
}
_PRIORITIES: Final = {
    pb.PRIORITY_UNSPECIFIED: Priority.INTERACTIVE,
    pb.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
    pb.PRIORITY_BULK: Priority.BULK,
}


class _Request(Protocol):
    """What the requests of all modalities have in common, besides `inputs` of a type of its own."""

    model: str
    truncation: pb.Truncation.ValueType
    priority: pb.Priority.ValueType

    @property
    def inputs(self) -> Sequence[Any]: ...
    @property
    def output(self) -> pb.OutputOptions: ...


class _Response(Protocol):
    """What the responses of all modalities have in common."""

    @property
    def models(self) -> Any: ...
    @property
    def results(self) -> Any: ...
    @property
    def usage(self) -> pb.Usage: ...


R = TypeVar("R", bound=_Response)


class Models:
    """The models that a node offers, loaded or not.

    Calls that name no revision get the last offered of that name that is loaded; calls that name no model get the
    default one.

    Args:
        specs: See `offer`.
        default: Name of the default model; without it the first one's.
    """

    def __init__(self, specs: Sequence[ModelSpec] = (), default: str = "") -> None:
        self._default = default
        self._offered: dict[str, dict[str, ModelSpec]] = {}
        self._encoders: dict[tuple[str, str], Encoder] = {}
        self._specs: Sequence[ModelSpec] = ()
        self.offer(specs)

    def __repr__(self) -> str:
        return f"<Models ready={len(self._encoders)}/{sum(map(len, self._offered.values()))}>"

    @property
    def specs(self) -> Sequence[ModelSpec]:
        """All models; of those of one name the one first that answers calls that name no revision."""
        return self._specs

    @property
    def default(self) -> ModelSpec | None:
        """The one that answers calls that name no model."""
        return next((spec for spec in self.specs if spec.name == (self._default or spec.name)), None)

    @property
    def encoders(self) -> Sequence[Encoder]:
        """The loaded ones."""
        return tuple(self._encoders.values())

    def encoder(self, spec: ModelSpec) -> Encoder | None:
        """Give the encoder of a model, if it is loaded."""
        return self._encoders.get((spec.name, spec.revision))

    def offer(self, specs: Sequence[ModelSpec]) -> Sequence[Encoder]:
        """Offer these models and no others; gives the encoders that no call will reach any more.

        Args:
            specs: In the order in which they are named, of those of one name the newest last.
        """
        self._offered = {}
        for spec in specs:
            revisions = self._offered.setdefault(spec.name, {})
            revisions.pop(spec.revision, None)  # named twice, the last place counts
            revisions[spec.revision] = spec
        offered = {(spec.name, spec.revision) for spec in specs}
        left = [self._encoders.pop(key) for key in tuple(self._encoders) if key not in offered]
        self._arrange()
        return left

    def add(self, encoder: Encoder) -> Encoder | None:
        """Serve a model from now on; gives the encoder in whose place this one does."""
        key = (encoder.spec.name, encoder.spec.revision)
        before = self._encoders.get(key)
        self._encoders[key] = encoder
        self._arrange()
        return before

    def find(self, wanted: str) -> Encoder:
        """Give the encoder for "name", "name@revision", or "" for the default.

        Raises:
            ModelNotFound: No model of this node has that name and revision.
            NotReady: It is not loaded.
        """
        name, _, revision = wanted.partition("@")
        fitting = [spec for spec in self.specs if spec.name == name and revision in ("", spec.revision)]
        spec = next(iter(fitting), None) if wanted else self.default
        if spec is None:
            here = ", ".join(f"{each.name}@{each.revision}" for each in self.specs) or "none"
            raise ModelNotFound(
                f'no model "{wanted or self._default}" here; there is {here}',
                field="model",
                metadata={"model": wanted},
            )
        encoder = self.encoder(spec)
        if encoder is None:
            raise NotReady(
                f'model "{spec.name}" (revision {spec.revision}) is not loaded: it is loading, or the '
                "log of its encoder says why it cannot be",
                retry_after=1.0,
                metadata={"model": spec.name},
            )
        return encoder

    def _arrange(self) -> None:
        listed: list[ModelSpec] = []
        for revisions in self._offered.values():
            newest_first = []
            for spec in reversed(revisions.values()):
                encoder = self.encoder(spec)
                newest_first.append(encoder.spec if encoder else spec)
            listed += sorted(newest_first, key=lambda spec: self.encoder(spec) is None)  # stable
        self._specs = tuple(listed)


class EmbedService:
    """Embeds the inputs of a request of any modality."""

    def __init__(
        self,
        models: Models,
        metrics: EncoderMetrics,
        *,
        max_inputs: int,
        default_timeout_seconds: float = 60.0,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self._models = models
        self._metrics = metrics
        self._max_inputs = max_inputs
        self._default_timeout = default_timeout_seconds
        self._tracing = tracing

    def find(self, wanted: str) -> Encoder:
        """See `Models.find`."""
        return self._models.find(wanted)

    async def embed(
        self,
        request: _Request,
        response: R,
        read: Callable[[Any], Any],
        content: str,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> R:
        """Answer a request.

        Args:
            request: The request.
            response: An empty response, filled and given back.
            read: Gives what the model's preparer takes for one of the inputs; raises
                EmbedMeshError for that input alone.
            content: Name of the field of an input that an error without a field is about.
            context: The call.

        Raises:
            EmbedMeshError: The call as a whole, by the contract.
        """
        encoder = self._models.find(request.model)
        if self._tracing.on:
            spec = encoder.spec
            self._tracing.note(
                model=spec.name, revision=spec.revision, modality=spec.modality, inputs=len(request.inputs)
            )
        if len(request.inputs) > self._max_inputs:
            raise InputTooLarge.over("the request", len(request.inputs), self._max_inputs, "inputs", field="inputs")
        kinds = _kinds(request.output, encoder.spec)
        output = _dense_output(request.output, encoder.spec)
        _known(pb.Truncation, request.truncation, "truncation")
        _known(pb.Priority, request.priority, "priority")

        outcomes = await encoder.embed(
            [_read(read, each) for each in request.inputs],
            kinds=kinds,
            truncation=request.truncation,
            priority=_PRIORITIES[request.priority],
            deadline=deadline_of(context, self._default_timeout),
        )
        started = time.perf_counter()
        _fill(response, encoder.spec, outcomes, output, content)
        response.usage.model_seconds = encoder.batch_seconds
        self._metrics.stage_seconds.labels(encoder.spec.name, "finish").observe(time.perf_counter() - started)
        if self._tracing.on:
            self._tracing.note(units=response.usage.input_units, failed=response.usage.failed_inputs)
        return response


class TextEncoderServicer(text_pb2_grpc.TextEncoderServicer):
    """`embedmesh.v1.TextEncoder`."""

    def __init__(self, service: EmbedService) -> None:
        self._service = service

    async def EmbedText(  # noqa: D102  (described by the contract)
        self, request: text_pb2.EmbedTextRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> text_pb2.EmbedTextResponse:
        spec = self._service.find(request.model).spec
        read = partial(_read_text, _chunking(request, spec))
        return await self._service.embed(request, text_pb2.EmbedTextResponse(), read, "text", context)


class ImageEncoderServicer(image_pb2_grpc.ImageEncoderServicer):
    """`embedmesh.v1.ImageEncoder`."""

    def __init__(self, service: EmbedService) -> None:
        self._service = service

    async def EmbedImage(  # noqa: D102  (described by the contract)
        self, request: image_pb2.EmbedImageRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> image_pb2.EmbedImageResponse:
        return await self._service.embed(request, image_pb2.EmbedImageResponse(), _read_image, "content", context)


class AudioEncoderServicer(audio_pb2_grpc.AudioEncoderServicer):
    """`embedmesh.v1.AudioEncoder`."""

    def __init__(self, service: EmbedService) -> None:
        self._service = service

    async def EmbedAudio(  # noqa: D102  (described by the contract)
        self, request: audio_pb2.EmbedAudioRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> audio_pb2.EmbedAudioResponse:
        return await self._service.embed(request, audio_pb2.EmbedAudioResponse(), _read_audio, "source", context)


class ModelCatalogServicer(catalog_pb2_grpc.ModelCatalogServicer):
    """`embedmesh.v1.ModelCatalog`."""

    def __init__(self, models: Models, *, max_inputs: int) -> None:
        self._models = models
        self._max_inputs = max_inputs

    async def ListModels(  # noqa: D102  (described by the contract)
        self, request: catalog_pb2.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> catalog_pb2.ListModelsResponse:
        del request, context
        response = catalog_pb2.ListModelsResponse()
        default = self._models.default
        for spec in self._models.specs:
            encoder = self._models.encoder(spec)
            response.models.add(
                model=spec.ref(),
                family=spec.family,
                modality=_MODALITIES[spec.modality],
                kinds=spec.kinds,
                dimensions=spec.dimensions,
                truncatable_dimensions=spec.truncatable_dimensions,
                sparse_dimensions=spec.sparse.dimensions if spec.sparse else 0,
                multi_vector_dimensions=spec.multi_vector.dimensions if spec.multi_vector else 0,
                max_input_units=spec.max_input_units,
                max_inputs=self._max_inputs,
                is_default=spec is default,
                ready=encoder is not None and encoder.ready,
                normalized=spec.normalized,
                limits=encoder.limits if encoder else {},
                reads_text_with_images=spec.modality == "image" and spec.text is not None,
            )
        return response


def _known(enum: Any, value: int, field: str) -> None:
    """Refuse a number that this version of the contract does not name."""
    if value not in enum.DESCRIPTOR.values_by_number:
        raise InvalidRequest(f"{field} {value} is unknown to this node", field=field)


def _read(read: Callable[[Any], Any], message: Any) -> Any:
    try:
        return read(message)
    except EmbedMeshError as error:
        return error


def _chunking(request: text_pb2.EmbedTextRequest, spec: ModelSpec) -> Chunking:
    units, overlap = request.chunking.units, request.chunking.overlap
    if request.HasField("chunking") and request.truncation != pb.TRUNCATION_CHUNK:
        raise InvalidRequest("chunking is for the truncation CHUNK, which was not asked for", field="chunking")
    if units > spec.max_input_units:
        raise InvalidRequest(
            f'chunks of {units} tokens are more than the {spec.max_input_units} that model "{spec.name}" reads',
            field="chunking.units",
        )
    if overlap >= (units or spec.max_input_units):
        raise InvalidRequest(
            f"an overlap of {overlap} tokens leaves nothing new in chunks of {units or spec.max_input_units}",
            field="chunking.overlap",
        )
    return Chunking(units, overlap)


def _read_text(chunking: Chunking, message: text_pb2.TextInput) -> TextItem:
    _known(text_pb2.TextRole, message.role, "role")
    late = message.late_chunking
    return TextItem(
        message.text,
        message.role,
        message.instruction,
        tuple(message.instructions),
        chunking,
        LateChunking(tuple(late.offsets), late.units) if message.HasField("late_chunking") else None,
    )


def _read_image(message: image_pb2.ImageInput) -> ImageItem:
    return ImageItem(message.content, message.text, message.instruction)


def _read_audio(message: audio_pb2.AudioInput) -> AudioItem:
    match message.WhichOneof("source"):
        case "content":
            return AudioItem(content=message.content)
        case "pcm":
            try:
                return AudioItem(samples=decode(message.pcm.samples), rate=message.pcm.sample_rate_hz)
            except InvalidRequest as error:
                error.field = "pcm.samples"
                raise
        case _:
            raise InvalidRequest("the input needs either the bytes of a sound or its samples")


def _kinds(options: pb.OutputOptions, spec: ModelSpec) -> frozenset[pb.EmbeddingKind.ValueType]:
    """Give the kinds wanted."""
    kinds = frozenset(options.kinds) or DENSE
    for kind in kinds:
        _known(pb.EmbeddingKind, kind, "output.kinds")
        if kind not in spec.kinds:
            offered = ", ".join(pb.EmbeddingKind.Name(each) for each in spec.kinds)
            raise UnsupportedOutput(
                f'model "{spec.name}" makes no vectors of kind {pb.EmbeddingKind.Name(kind)}, only {offered}',
                field="output.kinds",
                metadata={"option": "kinds"},
            )
    require_shape_of_kinds(kinds, options)
    return kinds


def _dense_output(options: pb.OutputOptions, spec: ModelSpec) -> DenseOutput:
    """Fill the model's defaults in."""
    if options.dimensions not in (0, spec.dimensions, *spec.truncatable_dimensions):
        offered = ", ".join(map(str, (spec.dimensions, *spec.truncatable_dimensions)))
        raise UnsupportedOutput(
            f'model "{spec.name}" makes vectors of {offered} dimensions, not {options.dimensions}',
            field="output.dimensions",
            metadata={"option": "dimensions"},
        )
    _known(pb.Dtype, options.dtype, "output.dtype")
    return DenseOutput(
        dimensions=options.dimensions,
        normalize=options.normalize if options.HasField("normalize") else spec.normalized,
        dtype=options.dtype or pb.DTYPE_FLOAT32,
    )


def _fill(
    response: _Response,
    spec: ModelSpec,
    outcomes: Sequence[Encoded | EmbedMeshError],
    output: DenseOutput,
    content: str,
) -> None:
    """Write results in place: building messages from keywords is several times slower.

    On the event loop, because protobuf keeps the GIL: 0.1 ms for 32 vectors of 384 floats, 0.7 ms for 256.
    """
    response.models.append(spec.ref())
    rows: list[tuple[NDArray[np.float32], float]] = []
    tensors: list[pb.Tensor] = []
    units = failed = 0
    for i, outcome in enumerate(outcomes):
        result: pb.EmbedResult = response.results.add()
        if isinstance(outcome, EmbedMeshError):
            if isinstance(outcome, InvalidArgument):
                outcome.field = f"inputs[{i}].{outcome.field or content}"
            result.error.CopyFrom(to_status(outcome))
            failed += 1
            continue
        if outcome.vector.size:
            rows.append((outcome.vector, outcome.norm))
            result.embedding.dense_norm = outcome.norm
            tensors.append(result.embedding.dense)
        spans = outcome.others.spans if outcome.others else None
        if spans is not None and outcome.offsets is not None:
            for (start, end), vector, norm in zip(outcome.offsets.tolist(), *spans, strict=True):
                span = result.embedding.spans.add(start=start, end=end, dense_norm=norm)
                tensors.append(span.dense)
                rows.append((vector, norm))
        if outcome.others:
            _fill_others(result.embedding, spec, outcome.others, output.dtype)
        result.input_units = outcome.units
        units += outcome.units
        if outcome.truncated:
            result.truncated = True
            result.original_units = outcome.original_units
    if rows:
        norms = np.array([norm for _, norm in rows], np.float32) if spec.normalized else None
        finish_dense(np.stack([vector for vector, _ in rows]), norms, output, tensors)
    response.usage.input_units = units
    response.usage.failed_inputs = failed


def _fill_others(embedding: pb.Embedding, spec: ModelSpec, others: Others, dtype: pb.Dtype.ValueType) -> None:
    if others.sparse and spec.sparse:
        finish_sparse(*others.sparse, spec.sparse.dimensions, dtype, embedding.sparse)
    if others.multi_vector is not None:
        finish_multi_vector(others.multi_vector, dtype, embedding.multi_vector)
