"""Spans of OpenTelemetry: where a call spent its time, from its caller over gateway and cache to the batch it rode in.

Off, and that is the default, everything here does nothing and OpenTelemetry is not even imported; what it costs
stands in services/README.md. On, `otel.py` does the work.

A span says how much and how long, never what: no contents, no keys, no text of an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import grpc

from embedmesh_server.settings import NodeSettings

__all__ = ["NO_TRACING", "Attribute", "Ride", "Span", "Tracing", "TracingError", "start"]

Attribute: TypeAlias = str | bool | int | float | Sequence[str]


class TracingError(RuntimeError):
    """Tracing is asked for and cannot be had; the text says why and what to do."""


class Span:
    """A piece of work, recorded while its `with` block runs. This one is not recorded.

    Attributes:
        metadata: What carries the trace on to whoever is called in the block.
    """

    __slots__ = ()
    metadata: tuple[tuple[str, str], ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def set(self, **attributes: Attribute) -> None:
        """Say more about the work; the prefix `embedmesh.` is put before each name."""

    def answer(self, code: grpc.StatusCode) -> None:
        """Say how the call ended that the work is."""


@dataclass(frozen=True, slots=True)
class Ride:
    """What of one request rode in a batch.

    Attributes:
        request: What `Tracing.current` gave while the request was served.
        inputs: How many of its inputs.
        units: Their units.
        queue_seconds: How long they waited.
    """

    request: Any
    inputs: int
    units: int
    queue_seconds: float


class Tracing:
    """Records nothing. What does is `otel.OtelTracing`.

    Attributes:
        on: Whether spans are recorded at all; to be asked before work is done for one.
    """

    on = False

    def serve(self, service: str, method: str, metadata: Mapping[str, str | bytes]) -> Span:
        """Begin the span of a call that came in with `metadata`.

        It is the current one of the asyncio task from now on, and ends with its `answer`: no `with` block.
        """
        del service, method, metadata
        return _NO_SPAN

    def call(self, path: str) -> Span:
        """Give the span of a call to another node, of the gRPC method at `path`."""
        del path
        return _NO_SPAN

    def span(self, name: str) -> Span:
        """Give the span of a piece of work within the current one."""
        del name
        return _NO_SPAN

    def note(self, **attributes: Attribute) -> None:
        """Say more about the current span, see `Span.set`."""

    def current(self) -> Any:
        """Give what `Ride` names the request by that is being served; None when it is not recorded."""
        return None

    def batch(self, rides: Sequence[Ride], *, seconds: float, failed: int, **attributes: Attribute) -> None:
        """Record a batch that ended just now: the batch, and for each request what its inputs waited and took.

        Args:
            rides: Of the requests that are recorded, at least one, the oldest first.
            seconds: What it took.
            failed: How many inputs of the batch failed.
            attributes: See `Span.set`.
        """

    def ids(self) -> Mapping[str, str]:
        """Give what a log line says of the current span."""
        return {}

    async def close(self, within: float) -> None:
        """Send what is recorded, for so many seconds at most, then record no more."""


_NO_SPAN: Final = Span()
NO_TRACING: Final = Tracing()


def start(settings: NodeSettings, role: str) -> Tracing:
    """Record spans from now on, if the settings say so.

    Raises:
        TracingError: They cannot be recorded.
    """
    if not settings.tracing:
        return NO_TRACING
    try:
        from embedmesh_server.otel import OtelTracing  # noqa: PLC0415  (half a second, and an extra)
    except ModuleNotFoundError as error:
        raise TracingError(
            f"--tracing needs OpenTelemetry, and {error.name} is not installed: pip install 'embedmesh[tracing]', "
            "or go without --tracing"
        ) from None
    except ValueError as error:  # OTEL_PROPAGATORS is read by the import
        raise TracingError(f"--tracing cannot start: {error}") from None
    return OtelTracing(role, settings.trace_ratio)
