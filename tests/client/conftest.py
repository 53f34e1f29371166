"""A real gRPC peer in this process: a small gateway that tests program, and both clients behind one face."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import grpc
import numpy as np
import pytest

import embedmesh
from embedmesh import errors, vectors
from embedmesh.v1 import catalog_pb2, catalog_pb2_grpc, embedding_pb2, gateway_pb2, gateway_pb2_grpc

MODEL = embedding_pb2.ModelRef(name="fake", revision="r1", space="fake-space")


def value_of(item: gateway_pb2.Input) -> float:
    """What the fake puts first into an input's vector: the number that a text spells, else a size."""
    match item.WhichOneof("modality"):
        case "text":
            return float(item.text.text) if item.text.text.isdigit() else len(item.text.text)
        case "image":
            return len(item.image.content)
        case "audio":
            return len(item.audio.content) or float(item.audio.pcm.samples.shape[0])
    return -1


class FakeGateway(gateway_pb2_grpc.GatewayServicer, catalog_pb2_grpc.ModelCatalogServicer):
    """Answers every input with [value, 1, 2, 3]; tests replace the `on_` functions."""

    def __init__(self) -> None:
        self.requests: list[gateway_pb2.EmbedRequest] = []
        self.chunks: list[int] = []
        self.metadata: list[dict[str, Any]] = []
        self.streams = 0
        self.cancelled = threading.Event()
        self.release = threading.Event()
        self.on_embed: Callable[[gateway_pb2.EmbedRequest, Any], gateway_pb2.EmbedResponse] = self.answer
        self.on_chunk: Callable[[gateway_pb2.EmbedStreamRequest, Any], gateway_pb2.EmbedStreamResponse | None] = (
            self.answer_chunk
        )
        self.on_list: Callable[[Any], catalog_pb2.ListModelsResponse] = lambda _: catalog_pb2.ListModelsResponse()
        self.address = ""
        self.stop: Callable[[], None] = lambda: None
        self.restart: Callable[[], None] = lambda: None
        self.changed = threading.Condition()

    def answer(self, request: gateway_pb2.EmbedRequest, context: Any = None) -> gateway_pb2.EmbedResponse:
        response = gateway_pb2.EmbedResponse(models=[MODEL])
        width = request.output.dimensions or 4
        output = vectors.DenseOutput(normalize=request.output.normalize, dtype=request.output.dtype)
        for item in request.inputs:
            result = response.results.add(input_units=3)
            row = np.array([[value_of(item), *range(1, width)]], np.float32)
            vectors.finish_dense(row, None, output, [result.embedding.dense])
        return response

    def answer_chunk(
        self, chunk: gateway_pb2.EmbedStreamRequest, context: Any = None
    ) -> gateway_pb2.EmbedStreamResponse:
        return gateway_pb2.EmbedStreamResponse(sequence=chunk.sequence, response=self.answer(chunk.request))

    @staticmethod
    def fail(context: Any, error: errors.EmbedMeshError) -> None:
        status = errors.to_status(error)
        context.set_trailing_metadata(errors.trailing_metadata(status))
        context.abort(error.code, error.message)

    @staticmethod
    def error_result(error: errors.EmbedMeshError) -> embedding_pb2.EmbedResult:
        return embedding_pb2.EmbedResult(error=errors.to_status(error))

    def hold(self, context: Any) -> None:
        """Answer nothing until the test lets go or the caller leaves."""
        for leave in (self.cancelled.set, self.release.set):
            if not context.add_callback(leave):
                leave()
        assert self.release.wait(30)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, 30)

    def _note(self, context: Any) -> None:
        self.metadata.append({item.key: item.value for item in context.invocation_metadata()})

    def Embed(self, request: gateway_pb2.EmbedRequest, context: Any) -> gateway_pb2.EmbedResponse:
        with self.changed:
            self._note(context)
            self.requests.append(request)
            self.changed.notify_all()
        return self.on_embed(request, context)

    def EmbedStream(self, request_iterator: Any, context: Any) -> Iterator[gateway_pb2.EmbedStreamResponse]:
        with self.changed:
            self._note(context)
            self.streams += 1
        context.add_callback(self.cancelled.set)
        for chunk in request_iterator:
            with self.changed:
                self.chunks.append(chunk.sequence)
                self.requests.append(chunk.request)
                self.changed.notify_all()
            response = self.on_chunk(chunk, context)
            if response is not None:
                yield response

    def ListModels(self, request: catalog_pb2.ListModelsRequest, context: Any) -> catalog_pb2.ListModelsResponse:
        with self.changed:
            self._note(context)
            self.changed.notify_all()
        return self.on_list(context)


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeGateway]]:
    """Start a gateway on a free port, or on `address`; with `credentials` over TLS."""
    with ExitStack() as stack:

        def start(
            address: str = "127.0.0.1:0", *, gateway: FakeGateway | None = None, credentials: Any = None
        ) -> FakeGateway:
            gateway = gateway or FakeGateway()
            pool = stack.enter_context(ThreadPoolExecutor(16))
            options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
            server = grpc.server(pool, options=options)
            gateway_pb2_grpc.add_GatewayServicer_to_server(gateway, server)
            catalog_pb2_grpc.add_ModelCatalogServicer_to_server(gateway, server)
            if credentials is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, credentials)
            server.start()
            # By number: of the two addresses of "localhost" one may be another server's. Certificates go by name.
            gateway.address = f"{'localhost' if credentials else '127.0.0.1'}:{port}"

            def stop() -> None:
                stopped = server.stop(0)
                gateway.release.set()
                stopped.wait()

            def restart() -> None:
                """Begin anew on a free port: servicer methods are bound when they are added."""
                stop()
                start(gateway=gateway)

            gateway.stop, gateway.restart = stop, restart
            stack.callback(stop)
            return gateway

        yield start


@pytest.fixture
def gateway(serve: Callable[..., FakeGateway]) -> FakeGateway:
    return serve()


class SyncFace:
    """`Client`, as is."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.client = embedmesh.Client(*args, **options)
        self.embed = self.client.embed
        self.list_models = self.client.list_models
        self.close = self.client.close

    def stream(self, inputs: Any, **options: Any) -> list[embedmesh.EmbedResult]:
        return list(self.client.embed_stream(inputs, **options))


class AsyncFace:
    """`AsyncClient`, each call run to its end in one event loop."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.client = embedmesh.AsyncClient(*args, **options)
        self.runner = asyncio.Runner()

    def embed(self, inputs: Any, **options: Any) -> embedmesh.EmbedResponse:
        return self.runner.run(self.client.embed(inputs, **options))

    def list_models(self, **options: Any) -> list[embedmesh.ModelInfo]:
        return self.runner.run(self.client.list_models(**options))

    def stream(self, inputs: Any, **options: Any) -> list[embedmesh.EmbedResult]:
        async def collect() -> list[embedmesh.EmbedResult]:
            return [result async for result in self.client.embed_stream(inputs, **options)]

        return self.runner.run(collect())

    def close(self) -> None:
        if self.runner is not None:
            self.runner.run(self.client.close())


@pytest.fixture(params=[SyncFace, AsyncFace], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Make a client of either kind: `connect(address, **options)`."""
    faces: list[Any] = []

    def make(*args: Any, **options: Any) -> Any:
        faces.append(request.param(*args, **options))
        return faces[-1]

    yield make
    for face in faces:
        face.close()
        if isinstance(face, AsyncFace):
            face.runner.close()
