"""A small real service on the kit: EmbedText echoes, fails and waits as its input text says."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from embedmesh.errors import Overloaded
from embedmesh.v1 import gateway_pb2, gateway_pb2_grpc, text_pb2, text_pb2_grpc
from embedmesh_server.interceptor import deadline_of, request_id
from embedmesh_server.node import Node
from embedmesh_server.settings import NodeSettings

TEXT = "embedmesh.v1.TextEncoder"
GATEWAY = "embedmesh.v1.Gateway"


class Echo(text_pb2_grpc.TextEncoderServicer):
    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.release = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.seconds_left = 0.0

    async def EmbedText(self, request: text_pb2.EmbedTextRequest, context: Any) -> text_pb2.EmbedTextResponse:
        self.seconds_left = deadline_of(context, 60.0) - asyncio.get_running_loop().time()
        match request.model:
            case "overload":
                raise Overloaded("the queue is full", retry_after=0.25)
            case "bug":
                raise RuntimeError("secret text")
            case "wait":
                self.entered.set()
                try:
                    await self.release.wait()
                except asyncio.CancelledError:
                    self.cancelled.set()
                    raise
        response = text_pb2.EmbedTextResponse()
        response.models.add(name=request_id())
        return response


class Stream(gateway_pb2_grpc.GatewayServicer):
    async def Embed(self, request: gateway_pb2.EmbedRequest, context: Any) -> gateway_pb2.EmbedResponse:
        raise Overloaded("not this one")

    async def EmbedStream(self, request_iterator: Any, context: Any) -> AsyncIterator[gateway_pb2.EmbedStreamResponse]:
        async for request in request_iterator:
            if request.sequence == 13:
                raise RuntimeError("secret text")
            yield gateway_pb2.EmbedStreamResponse(sequence=request.sequence)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def make_node(registry: CollectorRegistry) -> Callable[..., tuple[Node, Echo]]:
    def make(authenticate: Any = None, **settings: Any) -> tuple[Node, Echo]:
        node = Node(
            NodeSettings(**settings),
            role="test",
            registry=registry,
            services=[TEXT, GATEWAY],
            authenticate=authenticate,
        )
        echo = Echo()
        text_pb2_grpc.add_TextEncoderServicer_to_server(echo, node.server)
        gateway_pb2_grpc.add_GatewayServicer_to_server(Stream(), node.server)
        return node, echo

    return make


@pytest.fixture
async def served(make_node: Callable[..., tuple[Node, Echo]]) -> AsyncIterator[tuple[Node, Echo]]:
    node, echo = make_node(drain_seconds=5)
    async with node:
        yield node, echo


@pytest.fixture
async def channel(served: tuple[Node, Echo]) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(served[0].grpc_address) as channel:
        yield channel
