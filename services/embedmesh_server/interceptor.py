"""The one boundary between gRPC and our code: who calls, errors, metrics, request id, one log line a call."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, NoReturn, TypeAlias

import grpc

from embedmesh.errors import EmbedMeshError, InternalError, to_status, trailing_metadata
from embedmesh_server.metrics import ServerMetrics
from embedmesh_server.tracing import NO_TRACING, Span, Tracing

__all__ = ["REQUEST_ID_KEY", "Authenticate", "Boundary", "deadline_of", "new_request_id", "request_id"]

REQUEST_ID_KEY = "x-request-id"
_LONGEST_REQUEST_ID = 128
# Not ours to count: probes and reflection would drown the calls that matter.
_HEALTH = "grpc.health.v1.Health"
_QUIET = (_HEALTH, "grpc.reflection.v1alpha.ServerReflection")
# A node that refuses most of what comes must not be busy with saying so; the metrics count it.
_REFUSALS = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAUTHENTICATED)

# Takes the metadata of a call and gives the name of who calls, for the log; raises EmbedMeshError for whom it does not
# know. Runs in the context of the call, before its first message is read.
Authenticate: TypeAlias = Callable[[Mapping[str, str | bytes]], str]

_request_id: contextvars.ContextVar[str] = contextvars.ContextVar("embedmesh_request_id", default="")
_log = logging.getLogger(__name__)


def request_id() -> str:
    """Id of the call being served; "" outside of one."""
    return _request_id.get()


def new_request_id() -> None:
    """Give what the running task does an id of its own: for work that is not of one call alone."""
    _request_id.set(uuid.uuid4().hex)


def deadline_of(context: grpc.aio.ServicerContext[Any, Any], default_seconds: float) -> float:
    """When the caller stops waiting, in seconds of the running loop's clock.

    A call without a deadline gets `default_seconds` (`math.inf` for none at all).
    """
    left = context.time_remaining()
    if left is None or left > 365 * 86400:  # gRPC says "never" with a very large number
        left = default_seconds
    return asyncio.get_running_loop().time() + left if math.isfinite(left) else math.inf


class _Method:
    """What all calls of one method have in common. Labelled once: finding a label costs more than counting."""

    def __init__(self, metrics: ServerMetrics, path: str) -> None:
        self.path = path
        self.service, _, self.name = path.partition("/")
        self.in_flight = metrics.in_flight.labels(self.service, self.name)
        self.seconds = metrics.request_seconds.labels(self.service, self.name)
        self.ended = functools.cache(partial(metrics.requests.labels, self.service, self.name))


class Boundary(grpc.aio.ServerInterceptor):
    """Wraps every unary-unary and stream-stream method of our services.

    An `EmbedMeshError` ends the call with its status and trailers. Any other exception ends
    it with INTERNAL and a request id: its text goes to the log and never to the caller.

    Args:
        metrics: Counts and times calls.
        authenticate: Says who calls, health apart, which anybody may ask for; None lets everybody in.
        tracing: Records calls.
    """

    def __init__(
        self, metrics: ServerMetrics, authenticate: Authenticate | None = None, tracing: Tracing = NO_TRACING
    ) -> None:
        self._method = functools.cache(partial(_Method, metrics))
        self._authenticate = authenticate
        self._tracing = tracing

    async def intercept_service(  # noqa: D102  (described by the base class)
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        path = handler_call_details.method.lstrip("/")
        service = path.partition("/")[0]
        if handler is None or service == _HEALTH or (service in _QUIET and self._authenticate is None):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        given = str(metadata.get(REQUEST_ID_KEY, ""))
        call_id = given if 0 < len(given) <= _LONGEST_REQUEST_ID and given.isprintable() else uuid.uuid4().hex

        caller = ""
        if self._authenticate is not None:
            try:
                caller = self._authenticate(metadata)
            except EmbedMeshError as error:
                return self._refusal(self._method(path), call_id, error)
            if service in _QUIET:
                return handler

        method = self._method(path)
        begin = partial(self._tracing.serve, method.service, method.name, metadata) if self._tracing.on else None
        if handler.unary_unary is not None:
            unary: Callable[..., Any] = handler.unary_unary

            async def serve_unary(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
                async with _Call(method, call_id, context, begin=begin, caller=caller):
                    return await unary(request, context)

            return grpc.unary_unary_rpc_method_handler(
                serve_unary, handler.request_deserializer, handler.response_serializer
            )
        if handler.stream_stream is not None:
            stream: Callable[..., Any] = handler.stream_stream

            async def serve_stream(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
                # Closed here and not by the garbage collector, so that a stream that is left cleans up at once.
                async with (
                    _Call(method, call_id, context, begin=begin, caller=caller),
                    aclosing(stream(requests, context)) as responses,
                ):
                    async for response in responses:
                        yield response

            return grpc.stream_stream_rpc_method_handler(
                serve_stream, handler.request_deserializer, handler.response_serializer
            )
        return handler

    def _refusal(self, method: _Method, call_id: str, error: EmbedMeshError) -> grpc.RpcMethodHandler[Any, Any]:
        """End a call with `error`. On the wire a stream of no messages can answer any kind of method."""
        # Without the metadata: who may not call does not decide what is recorded either.
        begin = partial(self._tracing.serve, method.service, method.name, {}) if self._tracing.on else None

        async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            async with _Call(method, call_id, context, begin=begin):
                raise error

        return grpc.stream_stream_rpc_method_handler(refuse)


class _Call:
    """Counts, times, logs, traces and ends one call."""

    def __init__(
        self,
        method: _Method,
        call_id: str,
        context: grpc.aio.ServicerContext[Any, Any],
        *,
        begin: Callable[[], Span] | None,
        caller: str = "",
    ) -> None:
        self._method = method
        self._begin = begin
        self._span: Span | None = None
        self._id, self._context, self._caller = call_id, context, caller
        self._start = 0.0
        # Asked now: a stream's generator may be closed after gRPC has freed the call, when asking its
        # context for peer or deadline crashes the process.
        self._peer = context.peer()
        left = context.time_remaining()
        self._expires = math.inf if left is None else time.monotonic() + left

    async def __aenter__(self) -> None:
        self._start = time.perf_counter()
        self._method.in_flight.inc()
        _request_id.set(self._id)
        if self._begin is not None:
            self._span = self._begin()
        self._context.set_trailing_metadata(((REQUEST_ID_KEY, self._id),))

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            self._finish(grpc.StatusCode.OK)
        elif isinstance(error, EmbedMeshError):
            self._finish(error.code, error)
            await self._abort(error)
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
            expired = time.monotonic() >= self._expires
            self._finish(grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED)
        elif isinstance(error, Exception):
            _log.error("unexpected exception", exc_info=error, extra={"request_id": self._id})
            hidden = InternalError("internal error", metadata={"request_id": self._id})
            self._finish(hidden.code, hidden)
            await self._abort(hidden)

    async def _abort(self, error: EmbedMeshError) -> NoReturn:
        status = to_status(error)
        await self._context.abort(error.code, error.message, (*trailing_metadata(status), (REQUEST_ID_KEY, self._id)))
        raise AssertionError("unreachable: abort raises")

    def _finish(self, code: grpc.StatusCode, error: EmbedMeshError | None = None) -> None:
        seconds = time.perf_counter() - self._start
        if self._span is not None:
            self._span.answer(code)
        self._method.in_flight.dec()
        self._method.ended(code.name).inc()
        self._method.seconds.observe(seconds)
        quiet = code is grpc.StatusCode.OK or code in _REFUSALS
        level = logging.ERROR if code is grpc.StatusCode.INTERNAL else logging.DEBUG if quiet else logging.INFO
        if not _log.isEnabledFor(level):
            return
        extra: dict[str, Any] = {
            "request_id": self._id,
            "method": self._method.path,
            "code": code.name,
            "seconds": round(seconds, 6),
            "peer": self._peer,
        }
        if self._caller:
            extra["key"] = self._caller
        if error is not None:
            extra |= {"reason": error.reason, "detail": error.message}
        _log.log(level, "call", extra=extra)
