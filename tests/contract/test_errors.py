"""The error catalogue: classes, reasons and codes belong together, and whatever a peer sends can be read."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from embedmesh import errors
from embedmesh.errors import EmbedMeshError, from_rpc_error, from_status, to_status, trailing_metadata
from embedmesh.v1 import errors_pb2

REASONS = [name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.keys()[1:]]


def all_classes(root: type[EmbedMeshError] = EmbedMeshError) -> list[type[EmbedMeshError]]:
    # Servers derive their own, private ones, which other tests of this run may have imported.
    children = [child for child in root.__subclasses__() if child.__module__ == errors.__name__]
    return [root, *(found for child in children for found in all_classes(child))]


CLASSES = {cls.reason: cls for cls in all_classes() if cls.reason}


class RpcError(grpc.RpcError):
    """What a failed call looks like."""

    def __init__(self, code: grpc.StatusCode, details: str | None, trailers: Any) -> None:
        self._parts = code, details, trailers

    def code(self) -> grpc.StatusCode:
        return self._parts[0]

    def details(self) -> str | None:
        return self._parts[1]

    def trailing_metadata(self) -> Any:
        return self._parts[2]


def test_every_reason_of_the_contract_has_one_class_and_every_class_its_reason() -> None:
    assert sorted(CLASSES) == sorted(REASONS)
    assert all(cls.code is not grpc.StatusCode.UNKNOWN for cls in CLASSES.values())


def test_every_class_is_public() -> None:
    assert {cls.__name__ for cls in all_classes()} <= set(errors.__all__)
    assert errors.__all__ == sorted(errors.__all__)


@pytest.mark.parametrize("kind", all_classes()[1:], ids=lambda kind: kind.__name__)
def test_the_tree_in_the_docstring_names_every_class(kind: type[EmbedMeshError]) -> None:
    assert f"── {kind.__name__} " in (errors.__doc__ or "")


@given(
    kind=st.sampled_from(sorted(CLASSES.values(), key=lambda cls: cls.reason)),
    message=st.text(),
    retry_after=st.none() | st.integers(0, 10**7).map(lambda ms: ms / 1000),
    field=st.text(),
    metadata=st.dictionaries(st.text(), st.text(), max_size=3),
)
def test_an_error_survives_the_wire(
    *, kind: type[EmbedMeshError], message: str, retry_after: float | None, field: str, metadata: dict[str, str]
) -> None:
    sent = kind(message, retry_after=retry_after, field=field, metadata=metadata)
    status = to_status(sent)
    call = RpcError(sent.code, "shortened", trailing_metadata(status))
    for got in (from_status(status_pb2.Status.FromString(status.SerializeToString())), from_rpc_error(call)):
        assert type(got) is kind
        assert (got.code, got.reason, got.message) == (kind.code, kind.reason, message)
        assert (got.retry_after, got.field, got.metadata) == (retry_after, field, metadata)
        assert got.retryable is sent.retryable
        assert str(got) == message


def test_what_may_be_retried_is_read_from_the_code() -> None:
    retryable = {reason for reason, kind in CLASSES.items() if kind("", retry_after=1).retryable}
    assert retryable == {"OVERLOADED", "QUOTA_EXCEEDED", "NOT_READY", "ENCODER_UNREACHABLE"}
    assert not errors.Overloaded("no pause named").retryable
    assert errors.NotReady("no pause named").retryable


def test_overload_ends_a_call_with_the_pause_that_grpc_obeys() -> None:
    trailers = dict(trailing_metadata(to_status(errors.Overloaded("full", retry_after=0.25))))
    assert trailers["grpc-retry-pushback-ms"] == "250"
    assert set(dict(trailing_metadata(to_status(errors.NotReady("loading"))))) == {"grpc-status-details-bin"}


def info(reason: str, domain: str = "embedmesh") -> status_pb2.Status:
    status = status_pb2.Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="m")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata={"k": "v"}))
    return status


def test_a_reason_of_a_newer_server_falls_back_to_the_code() -> None:
    error = from_status(info("INVENTED_LATER"))
    assert type(error) is errors.Retryable
    assert (error.reason, error.metadata, error.retryable) == ("INVENTED_LATER", {"k": "v"}, True)


def test_a_reason_that_does_not_fit_the_code_falls_back_to_the_code() -> None:
    assert type(from_status(info("MODEL_NOT_FOUND"))) is errors.Retryable


def test_the_reasons_of_others_mean_nothing_here() -> None:
    error = from_status(info("OVERLOADED", domain="proxy.example"))
    assert type(error) is errors.Retryable
    assert (error.reason, error.metadata) == ("", {})


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidArgument),
        (grpc.StatusCode.NOT_FOUND, errors.ModelNotFound),
        (grpc.StatusCode.UNAVAILABLE, errors.Retryable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.INTERNAL, errors.ServerFault),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, EmbedMeshError),
        (grpc.StatusCode.UNAUTHENTICATED, errors.Unauthenticated),
        (grpc.StatusCode.CANCELLED, EmbedMeshError),
    ],
)
def test_errors_of_grpc_itself_go_by_their_code(code: grpc.StatusCode, kind: type[EmbedMeshError]) -> None:
    for trailers in ((), None, (("x-other", "1"),)):
        error = from_rpc_error(RpcError(code, None, trailers))
        assert type(error) is kind
        assert (error.code, error.reason, error.message) == (code, "", "")
        assert not to_status(error).details


def test_a_code_that_does_not_exist_is_unknown() -> None:
    assert from_status(status_pb2.Status(code=99)).code is grpc.StatusCode.UNKNOWN


def test_a_trailer_that_cannot_be_read_leaves_the_code() -> None:
    for value in (b"\xff\xff\xff", to_status(errors.ModelNotFound("another code")).SerializeToString()):
        error = from_rpc_error(RpcError(grpc.StatusCode.UNAVAILABLE, "gone", (("grpc-status-details-bin", value),)))
        assert (type(error), error.message) == (errors.Retryable, "gone")


@given(st.binary(max_size=60), st.sampled_from(["google.rpc.ErrorInfo", "google.rpc.RetryInfo", "google.rpc.Help"]))
def test_details_that_cannot_be_read_leave_the_code(value: bytes, name: str) -> None:
    status = info("NOT_READY")
    status.details.append(any_pb2.Any(type_url=f"type.googleapis.com/{name}", value=value))
    assert from_status(status).code is grpc.StatusCode.UNAVAILABLE


def test_a_pause_is_never_negative() -> None:
    status = status_pb2.Status(code=grpc.StatusCode.UNAVAILABLE.value[0])
    pause = error_details_pb2.RetryInfo()
    pause.retry_delay.FromMilliseconds(-5)
    status.details.add().Pack(pause)
    status.details.add().Pack(error_details_pb2.BadRequest())
    error = from_status(status)
    assert (error.retry_after, error.field) == (0, "")


def test_repr_tells_code_and_reason() -> None:
    assert repr(errors.NotReady("loading")) == "<NotReady UNAVAILABLE/NOT_READY: loading>"
    assert repr(errors.DeadlineExceeded("late")) == "<DeadlineExceeded DEADLINE_EXCEEDED: late>"


def test_the_size_of_what_is_too_large_is_machine_readable() -> None:
    error = errors.InputTooLarge.over("inputs[2]", 5, 3, "bytes", field="inputs[2].text")
    assert error.message == "inputs[2] has 5 bytes, the limit is 3"
    assert (error.field, error.metadata) == ("inputs[2].text", {"limit": "3", "actual": "5", "unit": "bytes"})


def test_failed_inputs_are_listed_and_share_a_code_where_they_have_one() -> None:
    full = errors.Overloaded("full")
    error = errors.EmbedErrors({7: full, 2: errors.Overloaded("full")}, total=9)
    assert str(error) == "2 of 9 inputs failed: inputs[2]: full; inputs[7]: full"
    assert list(error.errors) == [2, 7]
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    mixed = errors.EmbedErrors({1: full, 2: full, 3: full, 4: errors.InternalError("defect"), 5: full}, total=5)
    assert str(mixed).endswith("inputs[3]: full; and 2 more")
    assert mixed.code is grpc.StatusCode.UNKNOWN
