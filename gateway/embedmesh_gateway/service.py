"""The gateway's gRPC services. Messages are the domain here: they go to the router as they are."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from embedmesh.errors import EmbedMeshError, InternalError, InvalidRequest, from_status, to_status
from embedmesh.v1 import catalog_pb2, catalog_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_gateway.catalog import Catalog
from embedmesh_gateway.router import Router
from embedmesh_gateway.tenants import Tenant
from embedmesh_server.interceptor import deadline_of, request_id
from embedmesh_server.tracing import NO_TRACING, Tracing

__all__ = ["CatalogServicer", "GatewayServicer"]

_log = logging.getLogger(__name__)

_Context = grpc.aio.ServicerContext[Any, Any]


class GatewayServicer(gateway_pb2_grpc.GatewayServicer):
    """Serves Embed and EmbedStream.

    Args:
        router: Answers requests.
        default_timeout: Seconds that a call without deadline, or a chunk of a stream without, may take.
        stream_window: Chunks of one stream in service at a time.
        caller: Says whose call is being served, if there are keys; may raise EmbedMeshError.
        tracing: Records chunks of streams.
    """

    def __init__(
        self,
        router: Router,
        *,
        default_timeout: float,
        stream_window: int,
        caller: Callable[[], Tenant | None] = lambda: None,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self._router = router
        self._default_timeout = default_timeout
        self._stream_window = stream_window
        self._caller = caller
        self._tracing = tracing

    async def Embed(self, request: gateway_pb2.EmbedRequest, context: _Context) -> gateway_pb2.EmbedResponse:
        """Answer one request."""
        deadline = deadline_of(context, self._default_timeout)
        return await self._router.embed(
            request, deadline=deadline, priority=pb.PRIORITY_INTERACTIVE, tenant=self._caller()
        )

    async def EmbedStream(
        self, request_iterator: AsyncIterator[gateway_pb2.EmbedStreamRequest], context: _Context
    ) -> AsyncIterator[gateway_pb2.EmbedStreamResponse]:
        """Answer chunks as they finish.

        A chunk leaves the window when its answer was taken by the caller, and nothing is read while
        the window is full: gRPC's flow control then slows the sender, and memory stays bounded.
        """
        deadline = deadline_of(context, math.inf)
        window = asyncio.Semaphore(self._stream_window)
        answers: asyncio.Queue[gateway_pb2.EmbedStreamResponse | None] = asyncio.Queue()
        chunks: set[asyncio.Task[None]] = set()

        async def serve(message: gateway_pb2.EmbedStreamRequest) -> None:
            with self._tracing.span("chunk") as span:
                answer = await self._chunk(message, deadline)
                if answer.HasField("error"):
                    span.answer(from_status(answer.error).code)
            answers.put_nowait(answer)

        async def read() -> None:
            try:
                await window.acquire()
                async for message in request_iterator:
                    chunk = asyncio.create_task(serve(message))
                    chunks.add(chunk)
                    chunk.add_done_callback(chunks.discard)
                    await window.acquire()
                await asyncio.gather(*chunks)
            finally:
                answers.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (answer := await answers.get()) is not None:
                yield answer
                window.release()
            await reader  # raises what went wrong while reading
        finally:
            for task in (reader, *chunks):
                task.cancel()

    async def _chunk(self, message: gateway_pb2.EmbedStreamRequest, deadline: float) -> gateway_pb2.EmbedStreamResponse:
        answer = gateway_pb2.EmbedStreamResponse(sequence=message.sequence)
        if not message.HasField("request"):
            answer.error.CopyFrom(to_status(InvalidRequest("the message holds no request", field="request")))
            return answer
        try:
            answer.response.CopyFrom(
                await self._router.embed(
                    message.request,
                    deadline=deadline,
                    priority=pb.PRIORITY_BULK,
                    patient=True,
                    tenant=self._caller(),
                )
            )
        except EmbedMeshError as error:
            answer.error.CopyFrom(to_status(error))
        except Exception:  # noqa: BLE001  (what the boundary does for calls; the text must not leave)
            _log.exception("unexpected exception in a chunk", extra={"request_id": request_id()})
            hidden = InternalError("internal error", metadata={"request_id": request_id()})
            answer.error.CopyFrom(to_status(hidden))
        return answer


class CatalogServicer(catalog_pb2_grpc.ModelCatalogServicer):
    """Lists the models of all encoders behind the gateway."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def ListModels(
        self, request: catalog_pb2.ListModelsRequest, context: _Context
    ) -> catalog_pb2.ListModelsResponse:
        """List all models."""
        del request, context
        return catalog_pb2.ListModelsResponse(models=self._catalog.models())
