"""The spans of `tracing.py`, by OpenTelemetry's SDK. Only imported where tracing is on.

Endpoint, headers, limits and the like are the standard's OTEL_ variables, which the SDK reads. Whether a call is
recorded is decided once, where its trace begins; every node behind goes along.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from types import TracebackType
from typing import Any, Final, Self

import grpc
from opentelemetry import context as contexts
from opentelemetry import propagate, trace
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace import Link, SpanKind, Status, StatusCode

from embedmesh_server.tracing import Attribute, Ride, Span, Tracing, TracingError

__all__ = ["OtelTracing"]

_log = logging.getLogger(__name__)

# What the exporters say of every single attempt is said once by `_Exporter`; the others quote the headers of calls,
# in which a caller may write what it likes.
_SILENT: Final = ("opentelemetry.exporter", "opentelemetry.baggage", "opentelemetry.trace")
_DEFAULT_RATIO: Final = 0.01
_SAMPLERS: Final = ("always_on", "always_off", "traceidratio")
# Of a server these are failures; the others are the caller's doing (OpenTelemetry's conventions for gRPC).
_SERVER_FAULTS: Final = frozenset(
    {
        *(grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNIMPLEMENTED),
        *(grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DATA_LOSS),
    }
)


class OtelTracing(Tracing):
    """Records spans and sends them by OTLP.

    Args:
        role: What the node is.
        ratio: Part of the traces that begin here to record; None leaves it to OTEL_TRACES_SAMPLER.

    Raises:
        TracingError: An OTEL_ variable makes no sense.
    """

    on = True

    def __init__(self, role: str, ratio: float | None) -> None:
        for name in _SILENT:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        sampler = _sampler(ratio)
        self._exporter = _Exporter(_otlp())
        own = Resource(
            {
                "service.name": "embedmesh-gateway" if role == "gateway" else f"embedmesh-encoder-{role}",
                "service.version": version("embedmesh"),
                "host.name": socket.gethostname(),
                "process.pid": os.getpid(),
            }
        )
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win.
        resource = Resource.create(own.merge(OTELResourceDetector().detect()).attributes)
        self._provider = TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("embedmesh", version("embedmesh"))

    def serve(self, service: str, method: str, metadata: Mapping[str, str | bytes]) -> Span:
        carrier = {key: value for key, value in metadata.items() if isinstance(value, str)}
        span = self._tracer.start_span(
            f"{service}/{method}",
            propagate.extract(carrier, contexts.Context()),
            SpanKind.SERVER,
            _rpc(service, method),
        )
        # Never detached: gRPC serves each call in a task of its own, with a context of its own.
        contexts.attach(trace.set_span_in_context(span))
        return _ServerSpan(span)

    def call(self, path: str) -> Span:
        current = trace.get_current_span()
        if not current.is_recording():
            # Whoever is called is told so, lest a trace begin there; also of what a node asks by itself.
            if not current.get_span_context().is_valid:
                ids = self._provider.id_generator
                current = trace.NonRecordingSpan(
                    trace.SpanContext(ids.generate_trace_id(), ids.generate_span_id(), is_remote=False)
                )
            return _Unrecorded(_carried(trace.set_span_in_context(current)))
        service, _, method = path.lstrip("/").partition("/")
        span = self._tracer.start_span(f"{service}/{method}", None, SpanKind.CLIENT, _rpc(service, method))
        return _Recorded(span, _carried(trace.set_span_in_context(span)))

    def span(self, name: str) -> Span:
        if not trace.get_current_span().is_recording():
            return super().span(name)
        return _Recorded(self._tracer.start_span(name))

    def note(self, **attributes: Attribute) -> None:
        _set(trace.get_current_span(), attributes)

    def current(self) -> Any:
        span = trace.get_current_span()
        return span if span.is_recording() else None

    def batch(self, rides: Sequence[Ride], *, seconds: float, failed: int, **attributes: Attribute) -> None:
        end = time.time_ns()
        start = end - _ns(seconds)
        # It belongs to the trace of the oldest, of which it is sampled; the others find it by their links.
        batch = self._tracer.start_span(
            "batch",
            trace.set_span_in_context(rides[0].request),
            links=[Link(ride.request.get_span_context()) for ride in rides],
            start_time=start,
        )
        _set(batch, {**attributes, "failed": failed})
        if failed:
            batch.set_status(Status(StatusCode.ERROR))
        for ride in rides:
            request = trace.set_span_in_context(ride.request)
            queue = self._tracer.start_span("queue", request, start_time=start - _ns(ride.queue_seconds))
            _set(queue, {"inputs": ride.inputs, "units": ride.units, "queue_seconds": ride.queue_seconds})
            queue.end(start)
            infer = self._tracer.start_span("infer", request, links=[Link(batch.get_span_context())], start_time=start)
            _set(infer, {"inputs": ride.inputs, "units": ride.units})
            infer.end(end)
        batch.end(end)

    def ids(self) -> Mapping[str, str]:
        found = trace.get_current_span().get_span_context()
        if not found.is_valid:
            return {}
        return {"trace_id": trace.format_trace_id(found.trace_id), "span_id": trace.format_span_id(found.span_id)}

    async def close(self, within: float) -> None:
        ending = asyncio.get_running_loop().run_in_executor(None, self._provider.shutdown)
        _, late = await asyncio.wait({ending}, timeout=within)
        if late:
            self._exporter.shutdown()
        await ending


class _Recorded(Span):
    __slots__ = ("_span", "_token", "metadata")

    def __init__(self, span: trace.Span, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        self._span = span
        self.metadata = metadata

    def __enter__(self) -> Self:
        self._token = contexts.attach(trace.set_span_in_context(self._span))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        contexts.detach(self._token)
        if kind is not None:
            # Its name alone: the text of an exception may repeat what somebody sent.
            self._span.set_attribute("error.type", kind.__name__)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()

    def set(self, **attributes: Attribute) -> None:
        _set(self._span, attributes)

    def answer(self, code: grpc.StatusCode) -> None:
        _answer(self._span, code, failed=code is not grpc.StatusCode.OK)


class _ServerSpan(Span):
    __slots__ = ("_span",)

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def set(self, **attributes: Attribute) -> None:
        _set(self._span, attributes)

    def answer(self, code: grpc.StatusCode) -> None:
        _answer(self._span, code, failed=code in _SERVER_FAULTS)
        self._span.end()


class _Unrecorded(Span):
    __slots__ = ("metadata",)

    def __init__(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self.metadata = metadata


class _Exporter(SpanExporter):
    """Sends spans, and tells once when that begins to fail and once when it works again."""

    def __init__(self, inner: SpanExporter) -> None:
        self._inner = inner
        self._lost = 0
        self._closed = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        if not self._closed:
            try:
                result = self._inner.export(spans)
            except Exception:  # noqa: BLE001  (one failed batch must not end the thread that sends all of them)
                _log.debug("sending spans failed", exc_info=True)
        if result is SpanExportResult.FAILURE:
            if not self._lost:
                _log.warning("spans cannot be sent and are dropped; is the OTLP receiver reachable?")
            self._lost += len(spans)
        elif self._lost:
            _log.info("spans are sent again", extra={"lost": self._lost})
            self._lost = 0
        return result

    def shutdown(self) -> None:
        """Give up what is being sent."""
        if not self._closed:
            self._closed = True
            self._inner.shutdown()
            if self._lost:
                _log.warning("spans were lost", extra={"lost": self._lost})


def _otlp() -> SpanExporter:
    """Make the exporter that the environment asks for.

    Raises:
        TracingError: There is none such, or it makes no sense of its variables.
    """
    endpoint = _variable("ENDPOINT")
    if endpoint and not endpoint.startswith(("http://", "https://")):
        # The SDK would take it for a TLS address, and fail at every span.
        raise TracingError(f"OTEL_EXPORTER_OTLP_ENDPOINT is {endpoint!r}: put http:// (no TLS) or https:// before it")
    protocol = _variable("PROTOCOL") or "grpc"
    try:
        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415  (only the one used)
                OTLPSpanExporter,
            )

            return OTLPSpanExporter()
        if protocol == "http/protobuf":
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415  (not in our extra)
                OTLPSpanExporter as HttpSpanExporter,
            )

            return HttpSpanExporter()
    except ModuleNotFoundError as error:
        package = f"opentelemetry-exporter-otlp-proto-{protocol.partition('/')[0]}"
        raise TracingError(f"OTLP by {protocol} needs {error.name}: pip install {package}") from None
    except ValueError as error:
        raise TracingError(f"an OTEL_EXPORTER_OTLP_ variable makes no sense: {error}") from None
    raise TracingError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}: say grpc or http/protobuf")


def _variable(name: str) -> str:
    environ = os.environ
    return environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or environ.get(f"OTEL_EXPORTER_OTLP_{name}", "")


def _sampler(ratio: float | None) -> Sampler | None:
    """Give the sampler, None for the one that OTEL_TRACES_SAMPLER names.

    Raises:
        TracingError: It names none. The SDK would record every trace then.
    """
    name = os.environ.get("OTEL_TRACES_SAMPLER", "").lower()
    if ratio is not None or not name:
        return ParentBased(TraceIdRatioBased(_DEFAULT_RATIO if ratio is None else ratio))
    kind = name.removeprefix("parentbased_")
    if kind not in _SAMPLERS:
        raise TracingError(
            f"OTEL_TRACES_SAMPLER is {name!r}: say {', '.join(_SAMPLERS)}, or one of them with parentbased_ before it"
        )
    given = os.environ.get("OTEL_TRACES_SAMPLER_ARG", "")
    try:
        sound = kind != "traceidratio" or 0 <= float(given) <= 1
    except ValueError:
        sound = False
    if not sound:
        raise TracingError(f"OTEL_TRACES_SAMPLER is {name}, and OTEL_TRACES_SAMPLER_ARG {given!r}: say 0 to 1")
    return None


def _rpc(service: str, method: str) -> dict[str, str]:
    return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}


def _answer(span: trace.Span, code: grpc.StatusCode, *, failed: bool) -> None:
    span.set_attribute("rpc.grpc.status_code", code.value[0])
    if failed:
        span.set_status(Status(StatusCode.ERROR))


def _set(span: trace.Span, attributes: Mapping[str, Attribute]) -> None:
    span.set_attributes({f"embedmesh.{name}": value for name, value in attributes.items()})


def _carried(context: contexts.Context) -> tuple[tuple[str, str], ...]:
    carrier: dict[str, str] = {}
    propagate.inject(carrier, context)
    return tuple((key.lower(), value) for key, value in carrier.items())


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
