"""Calls to the encoders of one modality, balanced and retried by gRPC itself."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, Self

import grpc
import numpy as np
from google.protobuf.message import Message

from embedmesh.errors import (
    DeadlineExceeded,
    EmbedMeshError,
    EncoderUnreachable,
    InternalError,
    from_rpc_error,
    to_status,
)
from embedmesh.v1 import audio_pb2, catalog_pb2, image_pb2, text_pb2
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_server.files import Followed
from embedmesh_server.interceptor import REQUEST_ID_KEY, request_id
from embedmesh_server.metrics import GatewayMetrics
from embedmesh_server.tls import Identity
from embedmesh_server.tracing import NO_TRACING, Tracing

__all__ = ["MODALITIES", "Answer", "Terms", "Upstream", "broken", "is_whole"]

_log = logging.getLogger(__name__)

MODALITIES: Final = ("text", "image", "audio")
_METHODS: Final[dict[str, tuple[str, Any, Any]]] = {
    "text": ("/embedmesh.v1.TextEncoder/EmbedText", text_pb2.EmbedTextRequest, text_pb2.EmbedTextResponse),
    "image": ("/embedmesh.v1.ImageEncoder/EmbedImage", image_pb2.EmbedImageRequest, image_pb2.EmbedImageResponse),
    "audio": ("/embedmesh.v1.AudioEncoder/EmbedAudio", audio_pb2.EmbedAudioRequest, audio_pb2.EmbedAudioResponse),
}
_LIST_MODELS: Final = "/embedmesh.v1.ModelCatalog/ListModels"

# Embedding is idempotent, so a call may always be sent again when no encoder took it
# (UNAVAILABLE; and CANCELLED, with which a grpc.aio server that begins to stop ends the calls
# that arrive before its GOAWAY does: 33 and 38 failed calls in two SIGTERMs without it, 0 and 0
# with it). A full one (RESOURCE_EXHAUSTED) is not asked again: its caller is told when to return.
_SERVICE_CONFIG: Final = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "0.5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
                },
            }
        ],
        # Retries stop when half of these tokens are lost: a failure takes one, a success gives one back. Losing
        # one of two replicas under load takes as many as it had calls in flight.
        "retryThrottling": {"maxTokens": 1000, "tokenRatio": 1},
    }
)


# How long a channel with a new certificate may take to connect before that is told.
_CONNECT_SECONDS: Final = 10.0


class Answer(NamedTuple):
    """What is known of one input: a full-width vector, or an error of this input alone.

    Shared between requests and repeated inputs, so never changed once made.

    Attributes:
        result: As the encoder gave it, with `model_index` 0 and `cached` unset.
        model: Who made the vector; unset fields with an error.
        cached: Whether it came from the cache.
    """

    result: pb.EmbedResult
    model: pb.ModelRef
    cached: bool = False


@dataclass(frozen=True, slots=True)
class Terms:
    """What all inputs of a call have in common.

    Attributes:
        model: Name, "name@revision", or "" for the encoder's default.
        kinds: Kinds of vector wanted.
        truncation: What to do with inputs that are too long.
        priority: Who waits.
        chunking: Units and overlap of the chunks that texts are cut into, where the truncation says so.
    """

    model: str
    kinds: tuple[pb.EmbeddingKind.ValueType, ...]
    truncation: pb.Truncation.ValueType
    priority: pb.Priority.ValueType
    chunking: tuple[int, int] = (0, 0)

    @property
    def queue(self) -> tuple[str, pb.Priority.ValueType]:
        """What inputs have in common that wait in one queue of an encoder."""
        return self.model, self.priority


class _Response(Protocol):
    @property
    def models(self) -> Sequence[pb.ModelRef]: ...
    @property
    def results(self) -> Sequence[pb.EmbedResult]: ...
    @property
    def usage(self) -> pb.Usage: ...


class Upstream:
    """The encoders behind one gRPC target.

    Args:
        modality: "text", "image" or "audio".
        target: For example "dns:///encoder-text:50051" or "ipv4:127.0.0.1:50051,127.0.0.1:50061".
        max_message_bytes: Largest message sent or received.
        longest_call: Seconds that a call without a deadline may take.
        metrics: Counts calls and inputs.
        tls: What to show, and whom to trust; None calls without TLS.
        tls_name: Name in the encoders' certificates, where it is not the target's host.
        tracing: Records calls.

    Attributes:
        waiting: Seconds that the newest call of each `Terms.queue` took beside the model's own work: the encoder's
            queue and event loop, the way there and back.
    """

    def __init__(
        self,
        modality: str,
        target: str,
        *,
        max_message_bytes: int,
        longest_call: float,
        metrics: GatewayMetrics,
        tls: Followed[Identity] | None = None,
        tls_name: str = "",
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self.modality = modality
        self.target = target
        self.max_message_bytes = max_message_bytes
        self.waiting: dict[tuple[str, pb.Priority.ValueType], float] = {}
        self._longest_call = longest_call
        # Labelled once: finding a label costs more than counting.
        self._sent_inputs = metrics.upstream_inputs.labels(modality)
        self._ended = functools.cache(functools.partial(metrics.upstream_requests.labels, modality))
        self._path, self._request_type, _ = _METHODS[modality]
        self._tls = tls
        self._tracing = tracing
        self._options = [
            ("grpc.service_config", _SERVICE_CONFIG),
            ("grpc.service_config_disable_resolution", 1),
            ("grpc.enable_retries", 1),
            # A request larger than this buffer (256 KiB by default) would silently not be retried.
            ("grpc.per_rpc_retry_buffer_size", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            # Despite its name, the time a connection attempt may take.
            ("grpc.min_reconnect_backoff_ms", 2000),
            # New replicas are looked for when a connection ends, at most this often (30 s by default).
            ("grpc.dns_min_time_between_resolutions_ms", 2000),
            # A host that vanished without a word is noticed within 20 s.
            ("grpc.keepalive_time_ms", 15_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            # The inner hop never leaves the cluster, whatever http_proxy says.
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
            *([("grpc.ssl_target_name_override", tls_name)] if tls_name else []),
        ]
        self._renewal: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._take(self._open())
        if tls is not None:
            tls.on_change(self._renew)

    def _open(self) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(self.target, options=self._options)
        identity = self._tls.value
        credentials = grpc.ssl_channel_credentials(
            identity.authorities, identity.key or None, identity.certificate or None
        )
        return grpc.aio.secure_channel(self.target, credentials, options=self._options)

    def _take(self, channel: grpc.aio.Channel) -> None:
        """Send what comes from now on through `channel`."""
        self._channel = channel
        method, _, response_type = _METHODS[self.modality]
        self._embed: Any = channel.unary_unary(
            method,
            request_serializer=self._request_type.SerializeToString,
            response_deserializer=response_type.FromString,
        )
        self._list: Any = channel.unary_unary(
            _LIST_MODELS,
            request_serializer=catalog_pb2.ListModelsRequest.SerializeToString,
            response_deserializer=catalog_pb2.ListModelsResponse.FromString,
        )

    def _renew(self, _: Identity) -> None:
        """Put a channel with the new certificate in the place of the old one, whose calls may finish.

        A channel's certificate cannot be changed.
        """
        if self._renewal is not None:
            self._renewal.cancel()
        self._renewal = asyncio.create_task(self._replace())

    async def _replace(self) -> None:
        fresh = self._open()
        try:
            while not await _connects(fresh, _CONNECT_SECONDS) and self._connected():
                # What works is not given up for what does not: perhaps the encoders learn of the authority later.
                _log.error("%s encoders cannot be reached with the new certificate, the old one stays", self.modality)
        except BaseException:
            await fresh.close()
            raise
        old = self._channel
        self._take(fresh)
        closing = asyncio.create_task(old.close(self._longest_call))
        self._leaving.add(closing)
        closing.add_done_callback(self._leaving.discard)

    def _connected(self) -> bool:
        return self._channel.get_state() in (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.IDLE)

    def __repr__(self) -> str:
        return f"<Upstream {self.modality} {self.target} {self._channel.get_state().name}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.wait({self._renewal})
        # Nobody calls any more, so the old ones have nothing to wait for.
        await asyncio.gather(*self._leaving)
        await self._channel.close()

    async def list_models(self, *, within: float) -> list[catalog_pb2.ModelInfo]:
        """Ask one of the encoders what it offers in this modality, waiting at most `within` seconds.

        Raises:
            EmbedMeshError: None answered; a note says how gRPC puts it.
        """
        try:
            with self._tracing.call(_LIST_MODELS) as span:
                response = await self._list(catalog_pb2.ListModelsRequest(), timeout=within, metadata=span.metadata)
        except grpc.aio.AioRpcError as error:
            mapped = self._mapped(error)
            mapped.add_note(error.details() or "")
            raise mapped from None
        number = catalog_pb2.Modality.Value(f"MODALITY_{self.modality.upper()}")
        return [info for info in response.models if info.modality == number]

    async def embed(self, inputs: Sequence[Message], terms: Terms, *, deadline: float) -> list[Answer]:
        """Have inputs embedded at full width in one call.

        Args:
            inputs: TextInput, ImageInput or AudioInput messages, at most what one call may carry.
            terms: What they have in common.
            deadline: In seconds of the running loop's clock; `math.inf` for none.

        Returns:
            Entry i answers inputs[i], with an INTERNAL error where the encoder broke the contract.

        Raises:
            EmbedMeshError: The call failed as a whole; as the encoder said it, or EncoderUnreachable,
                DeadlineExceeded, InternalError.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        left = deadline - started
        if left <= 0:
            raise DeadlineExceeded("the deadline passed before the encoder was called")
        request = self._request_type(
            model=terms.model,
            inputs=inputs,
            output=pb.OutputOptions(kinds=terms.kinds),
            truncation=terms.truncation,
            priority=terms.priority,
        )
        if self.modality == "text" and terms.truncation == pb.TRUNCATION_CHUNK:
            units, overlap = terms.chunking
            request.chunking.CopyFrom(pb.Chunking(units=units, overlap=overlap))
        self._sent_inputs.inc(len(inputs))
        code = grpc.StatusCode.CANCELLED
        with self._tracing.call(self._path) as span:
            span.set(modality=self.modality, inputs=len(inputs))
            try:
                response = await self._embed(
                    request,
                    timeout=left if math.isfinite(left) else self._longest_call,
                    metadata=((REQUEST_ID_KEY, request_id()), *span.metadata),
                )
                code = grpc.StatusCode.OK
            except grpc.aio.AioRpcError as error:
                code = error.code()
                raise self._mapped(error) from None
            finally:
                span.answer(code)
                self._ended(code.name).inc()
        if model_seconds := response.usage.model_seconds:
            self.waiting[terms.queue] = loop.time() - started - model_seconds
        return self._checked(response, len(inputs))

    def _mapped(self, error: grpc.aio.AioRpcError) -> EmbedMeshError:
        mapped = from_rpc_error(error)
        if mapped.reason or mapped.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return mapped
        # What carries no reason was said by gRPC itself. CANCELLED is how a server that is being
        # stopped ends calls; our own cancellation never gets here.
        if mapped.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            return EncoderUnreachable(
                f"no {self.modality} encoder answers", retry_after=1.0, metadata={"modality": self.modality}
            )
        _log.error("%s encoder failed outside the contract: %s", self.modality, error.details())
        return _defect(self.modality, "failed in an unexpected way")

    def _checked(self, response: _Response, expected: int) -> list[Answer]:
        results, models = response.results, response.models
        if len(results) != expected:
            _log.error("%s encoder gave %d results for %d inputs", self.modality, len(results), expected)
            raise _defect(self.modality, "gave the wrong number of results")
        answers: list[Answer] = []
        for result in results:
            outcome = result.WhichOneof("outcome")
            if outcome == "error":
                answers.append(Answer(result, pb.ModelRef()))
            elif outcome != "embedding":
                answers.append(broken(self.modality, "gave a result without outcome"))
            elif result.model_index >= len(models):
                answers.append(broken(self.modality, "named a model that is not there"))
            elif not is_whole(result.embedding):
                answers.append(broken(self.modality, "gave a malformed vector"))
            else:
                model = models[result.model_index]
                result.model_index = 0
                result.cached = False
                answers.append(Answer(result, model))
        return answers


async def _connects(channel: grpc.aio.Channel, seconds: float) -> bool:
    """Wait until `channel` is connected, `seconds` at most."""
    try:
        async with asyncio.timeout(seconds):
            await channel.channel_ready()
    except TimeoutError:
        return False
    return True


_NO_INFO: Final = catalog_pb2.ModelInfo()


def is_whole(embedding: pb.Embedding, info: catalog_pb2.ModelInfo = _NO_INFO) -> bool:
    """Whether every kind that is there is well-formed float32, as encoders are asked for, as wide as `info` says."""
    if embedding.HasField("dense") and not _is_vector(embedding.dense, info.dimensions):
        return False
    if embedding.HasField("sparse") and not _is_sparse(embedding.sparse, info.sparse_dimensions):
        return False
    if embedding.spans and not all(_is_vector(span.dense, info.dimensions) for span in embedding.spans):
        return False
    return not embedding.HasField("multi_vector") or _is_matrix(embedding.multi_vector, info.multi_vector_dimensions)


def _is_vector(tensor: pb.Tensor, dimensions: int) -> bool:
    shape = tensor.shape
    return (
        len(shape) == 1
        and len(tensor.data) == 4 * shape[0] > 0
        and tensor.dtype == pb.DTYPE_FLOAT32
        and (not dimensions or shape[0] == dimensions)
    )


def _is_matrix(tensor: pb.Tensor, dimensions: int) -> bool:
    shape = tensor.shape
    return (
        len(shape) == 2
        and shape[1] > 0
        and len(tensor.data) == 4 * shape[0] * shape[1]
        and tensor.dtype == pb.DTYPE_FLOAT32
        and (not dimensions or shape[1] == dimensions)
    )


def _is_sparse(sparse: pb.SparseVector, dimensions: int) -> bool:
    indices, values = sparse.indices, sparse.values
    if not (
        len(indices.shape) == len(values.shape) == 1
        and indices.shape[0] == values.shape[0]
        and len(indices.data) == len(values.data) == 4 * indices.shape[0]
        and (indices.dtype, values.dtype) == (pb.DTYPE_UINT32, pb.DTYPE_FLOAT32)
        and sparse.dimensions > 0
        and (not dimensions or sparse.dimensions == dimensions)
    ):
        return False
    places = np.frombuffer(indices.data, "<u4")
    return not places.size or bool(places[-1] < sparse.dimensions and (places[1:] > places[:-1]).all())


def broken(modality: str, what: str) -> Answer:
    """Answer one input with INTERNAL, because an encoder broke the contract."""
    _log.error("the %s encoder %s", modality, what, extra={"request_id": request_id()})
    return Answer(pb.EmbedResult(error=to_status(_defect(modality, what))), pb.ModelRef())


def _defect(modality: str, what: str) -> InternalError:
    return InternalError(f"the {modality} encoder {what}", metadata={"request_id": request_id()})
