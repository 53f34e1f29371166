# ruff: noqa: N818  (errors are named for what happened, as gRPC's codes are)
"""The one error catalogue of embedmesh, used by servers and clients alike.

    EmbedMeshError                    anything that embedmesh answers instead of a vector
    ├── InvalidArgument               the caller must change something; never retry
    │   ├── InvalidRequest            the request or this input breaks the contract
    │   ├── UndecodableInput          the bytes are not an image or a sound
    │   ├── InputTooLarge             over a limit (metadata: limit, actual, unit)
    │   └── UnsupportedOutput         kind, width or dtype not offered (metadata: option)
    ├── ModelNotFound                 no such model or family (metadata: model)
    ├── Unauthenticated               the mesh knows no such key; never retry
    ├── Retryable                     try again, after `retry_after` seconds when given
    │   ├── Overloaded                the queue is full
    │   ├── QuotaExceeded             the key has used up what it may use (metadata: quota, limit)
    │   ├── NotReady                  the node loads or drains
    │   └── EncoderUnreachable        no encoder answers the gateway (metadata: modality)
    ├── DeadlineExceeded              the caller's deadline passed
    ├── EmbedErrors                   some inputs of an answer failed (client only)
    └── ServerFault                   not the caller's doing (metadata: request_id)
        ├── InferenceFailed           the model failed on this input
        └── InternalError             a defect of embedmesh

On the wire every error, of a call or of one input, is a `google.rpc.Status` with one
`google.rpc.ErrorInfo` (AIP-193), plus `RetryInfo` and `BadRequest` where they apply. Codes
and reasons are listed in `embedmesh/v1/errors.proto`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

__all__ = [
    "DeadlineExceeded",
    "EmbedErrors",
    "EmbedMeshError",
    "EncoderUnreachable",
    "InferenceFailed",
    "InputTooLarge",
    "InternalError",
    "InvalidArgument",
    "InvalidRequest",
    "ModelNotFound",
    "NotReady",
    "Overloaded",
    "QuotaExceeded",
    "Retryable",
    "ServerFault",
    "Unauthenticated",
    "UndecodableInput",
    "UnsupportedOutput",
    "from_rpc_error",
    "from_status",
    "to_status",
    "trailing_metadata",
]

DOMAIN = "embedmesh"
# Names fixed by gRPC: the packed Status (as grpcio-status writes it) and the pause that
# gRPC's own retry obeys (proposal A6, "server pushback").
STATUS_TRAILER = "grpc-status-details-bin"
PUSHBACK_TRAILER = "grpc-retry-pushback-ms"

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


class EmbedMeshError(Exception):
    """Anything that embedmesh answers instead of a vector.

    Attributes:
        code: The gRPC status code.
        reason: Name of the `ErrorReason` without prefix, "" when there is none.
        message: A sentence for people.
        retry_after: Seconds to wait before trying again; None when the server named none.
        field: Path of the offending field, for example `inputs[3].text`; "" when unknown.
        metadata: Machine-readable details, see `errors.proto`.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    reason: str = ""

    def __init__(
        self,
        message: str,
        *,
        retry_after: float | None = None,
        field: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        self.field = field
        self.metadata: dict[str, str] = dict(metadata or {})

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later: UNAVAILABLE, or RESOURCE_EXHAUSTED with a pause."""
        return self.code is grpc.StatusCode.UNAVAILABLE or (
            self.code is grpc.StatusCode.RESOURCE_EXHAUSTED and self.retry_after is not None
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.code.name}{f'/{self.reason}' if self.reason else ''}: {self.message}>"


class InvalidArgument(EmbedMeshError):
    """The caller must change something before trying again."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class InvalidRequest(InvalidArgument):
    """The request or this input breaks the contract."""

    reason = "INVALID_REQUEST"


class UndecodableInput(InvalidArgument):
    """The bytes are not an image or a sound that can be read."""

    reason = "UNDECODABLE_INPUT"


class InputTooLarge(InvalidArgument):
    """This input is over a limit."""

    reason = "INPUT_TOO_LARGE"

    @classmethod
    def over(cls, what: str, actual: int, limit: int, unit: str, field: str = "") -> InputTooLarge:
        """Build the error for `what` of `actual` `unit` over `limit`."""
        return cls(
            f"{what} has {actual} {unit}, the limit is {limit}",
            field=field,
            metadata={"limit": str(limit), "actual": str(actual), "unit": unit},
        )


class UnsupportedOutput(InvalidArgument):
    """The model does not offer this kind, width or dtype."""

    reason = "UNSUPPORTED_OUTPUT"


class ModelNotFound(EmbedMeshError):
    """No such model or family."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "MODEL_NOT_FOUND"


class Unauthenticated(EmbedMeshError):
    """The call brings no key that the mesh knows."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class Retryable(EmbedMeshError):
    """The same call may succeed later."""

    code = grpc.StatusCode.UNAVAILABLE


class Overloaded(Retryable):
    """The queue is full; come back after `retry_after` seconds."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "OVERLOADED"


class QuotaExceeded(Retryable):
    """The caller's key has used up what it may use; come back after `retry_after` seconds."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUOTA_EXCEEDED"


class NotReady(Retryable):
    """The node loads or drains."""

    reason = "NOT_READY"


class EncoderUnreachable(Retryable):
    """No encoder of this modality answers the gateway."""

    reason = "ENCODER_UNREACHABLE"


class DeadlineExceeded(EmbedMeshError):
    """The caller's deadline passed before the vector was there."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class EmbedErrors(EmbedMeshError):
    """Some inputs of one answer failed, so there is no whole matrix of vectors.

    Attributes:
        errors: What went wrong, by index of the input, in ascending order.

    The code is the one that all inputs failed with, UNKNOWN where they differ.
    """

    def __init__(self, errors: Mapping[int, EmbedMeshError], total: int) -> None:
        self.errors: dict[int, EmbedMeshError] = dict(sorted(errors.items()))
        shown = "; ".join(f"inputs[{i}]: {error.message}" for i, error in list(self.errors.items())[:3])
        more = f"; and {len(self.errors) - 3} more" if len(self.errors) > 3 else ""
        super().__init__(f"{len(self.errors)} of {total} inputs failed: {shown}{more}")
        codes = {error.code for error in self.errors.values()}
        self.code = codes.pop() if len(codes) == 1 else grpc.StatusCode.UNKNOWN


class ServerFault(EmbedMeshError):
    """Not the caller's doing; `metadata["request_id"]` finds it in the node's log."""

    code = grpc.StatusCode.INTERNAL


class InferenceFailed(ServerFault):
    """The model failed on this input, or gave a vector that is not finite."""

    reason = "INFERENCE_FAILED"


class InternalError(ServerFault):
    """A defect of embedmesh."""

    reason = "INTERNAL"


_BY_REASON: dict[str, type[EmbedMeshError]] = {
    cls.reason: cls
    for cls in (
        InvalidRequest,
        UndecodableInput,
        InputTooLarge,
        UnsupportedOutput,
        ModelNotFound,
        Unauthenticated,
        Overloaded,
        QuotaExceeded,
        NotReady,
        EncoderUnreachable,
        InferenceFailed,
        InternalError,
    )
}
# Errors that gRPC itself raises carry no ErrorInfo: the code decides.
_BY_CODE: dict[grpc.StatusCode, type[EmbedMeshError]] = {
    cls.code: cls for cls in (InvalidArgument, ModelNotFound, Unauthenticated, Retryable, DeadlineExceeded, ServerFault)
}


def to_status(error: EmbedMeshError) -> status_pb2.Status:
    """Write an error as `google.rpc.Status`, for one input or for a call."""
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    if error.reason:
        info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
        status.details.add().Pack(info)
    if error.retry_after is not None:
        pause = duration_pb2.Duration()
        pause.FromMilliseconds(round(error.retry_after * 1000))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=pause))
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    return status


def from_status(status: status_pb2.Status) -> EmbedMeshError:
    """Read a `google.rpc.Status`; unknown reasons and unreadable details fall back to the code."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    bad = error_details_pb2.BadRequest()
    retry_after: float | None = None
    field = ""
    for detail in status.details:
        try:
            if detail.Unpack(info) or detail.Unpack(bad):
                continue
            if detail.Unpack(retry):
                retry_after = max(0.0, retry.retry_delay.ToMilliseconds() / 1000)
        except DecodeError:  # any peer may write details; the code still tells
            continue
    if bad.field_violations:
        field = bad.field_violations[0].field
    if info.domain != DOMAIN:  # somebody else's reasons (a proxy's, say) mean nothing here
        info.Clear()
    kind = _BY_REASON.get(info.reason)
    if kind is None or kind.code is not code:
        kind = _BY_CODE.get(code, EmbedMeshError)
    error = kind(status.message, retry_after=retry_after, field=field, metadata=info.metadata)
    error.code, error.reason = code, info.reason
    return error


class _RpcError(Protocol):
    """What `grpc.RpcError` of a call and `grpc.aio.AioRpcError` have in common."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Any: ...


def from_rpc_error(error: _RpcError) -> EmbedMeshError:
    """Turn a failed gRPC call, sync or asyncio, into the exception of this catalogue."""
    for key, value in error.trailing_metadata() or ():
        if key == STATUS_TRAILER:
            status = status_pb2.Status()
            try:
                status.ParseFromString(value)
            except DecodeError:
                break
            if status.code == error.code().value[0]:
                return from_status(status)
    return from_status(status_pb2.Status(code=error.code().value[0], message=error.details() or ""))


def trailing_metadata(status: status_pb2.Status) -> tuple[tuple[str, str | bytes], ...]:
    """Give the trailers with which a server ends a call that fails with `status`."""
    trailers: list[tuple[str, str | bytes]] = [(STATUS_TRAILER, status.SerializeToString())]
    retry_after = from_status(status).retry_after
    if retry_after is not None:
        trailers.append((PUSHBACK_TRAILER, str(round(retry_after * 1000))))
    return tuple(trailers)
