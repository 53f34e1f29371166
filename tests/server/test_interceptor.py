import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from embedmesh.errors import InternalError, Overloaded, Unauthenticated, from_rpc_error
from embedmesh.v1 import gateway_pb2, gateway_pb2_grpc, text_pb2, text_pb2_grpc
from embedmesh_server import logs

Served = tuple[Any, Any]
LABELS = {"service": "embedmesh.v1.TextEncoder", "method": "EmbedText"}


def stub(channel: grpc.aio.Channel) -> Any:
    return text_pb2_grpc.TextEncoderStub(channel)


async def test_overload_carries_pause_and_pushback(channel: grpc.aio.Channel, registry: CollectorRegistry) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub(channel).EmbedText(text_pb2.EmbedTextRequest(model="overload"))
    error = from_rpc_error(caught.value)
    assert isinstance(error, Overloaded)
    assert error.retry_after == 0.25
    assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "250"
    assert registry.get_sample_value("embedmesh_requests_total", LABELS | {"code": "RESOURCE_EXHAUSTED"}) == 1


async def test_unknown_exception_tells_only_a_request_id(
    channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub(channel).EmbedText(text_pb2.EmbedTextRequest(model="bug"), metadata=(("x-request-id", "abc-1"),))
    error = from_rpc_error(caught.value)
    assert isinstance(error, InternalError)
    assert error.metadata["request_id"] == "abc-1"
    assert "secret" not in str(caught.value)
    assert any(record.exc_info and record.__dict__["request_id"] == "abc-1" for record in caplog.records)


@pytest.mark.parametrize("given", ["", "x" * 129])
async def test_request_id_is_made_when_none_or_unfit_is_given(channel: grpc.aio.Channel, given: str) -> None:
    call = stub(channel).EmbedText(text_pb2.EmbedTextRequest(), metadata=(("x-request-id", given),))
    response = await call
    sent_back = dict(await call.trailing_metadata())["x-request-id"]
    assert response.models[0].name == sent_back != given
    assert len(sent_back) == 32


async def test_given_request_id_is_kept(channel: grpc.aio.Channel) -> None:
    call = stub(channel).EmbedText(text_pb2.EmbedTextRequest(), metadata=(("x-request-id", "order-7"),))
    assert (await call).models[0].name == "order-7"
    assert dict(await call.trailing_metadata())["x-request-id"] == "order-7"


async def test_cancelled_call_is_counted_and_reaches_the_handler(
    served: Served, channel: grpc.aio.Channel, registry: CollectorRegistry
) -> None:
    call = stub(channel).EmbedText(text_pb2.EmbedTextRequest(model="wait"))
    await asyncio.wait_for(served[1].entered.wait(), 5)
    assert registry.get_sample_value("embedmesh_requests_in_flight", LABELS) == 1
    call.cancel()
    await asyncio.wait_for(served[1].cancelled.wait(), 5)
    await asyncio.sleep(0)
    assert registry.get_sample_value("embedmesh_requests_total", LABELS | {"code": "CANCELLED"}) == 1
    assert registry.get_sample_value("embedmesh_requests_in_flight", LABELS) == 0


async def test_expired_call_is_counted_as_such(
    served: Served, channel: grpc.aio.Channel, registry: CollectorRegistry
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub(channel).EmbedText(text_pb2.EmbedTextRequest(model="wait"), timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(served[1].cancelled.wait(), 5)
    await asyncio.sleep(0)
    assert registry.get_sample_value("embedmesh_requests_total", LABELS | {"code": "DEADLINE_EXCEEDED"}) == 1


async def test_deadline_of_call_and_default(served: Served, channel: grpc.aio.Channel) -> None:
    await stub(channel).EmbedText(text_pb2.EmbedTextRequest(), timeout=7)
    assert 5 < served[1].seconds_left < 7.5
    await stub(channel).EmbedText(text_pb2.EmbedTextRequest())
    assert 55 < served[1].seconds_left < 60.5


async def test_stream_works_and_its_failure_leaks_nothing(
    channel: grpc.aio.Channel, registry: CollectorRegistry
) -> None:
    async def requests() -> AsyncIterator[gateway_pb2.EmbedStreamRequest]:
        for sequence in (1, 2, 13):
            yield gateway_pb2.EmbedStreamRequest(sequence=sequence)

    answered = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for response in gateway_pb2_grpc.GatewayStub(channel).EmbedStream(requests()):
            answered.append(response.sequence)
    assert answered == [1, 2]
    assert "secret" not in str(caught.value)
    assert isinstance(from_rpc_error(caught.value), InternalError)
    labels = {"service": "embedmesh.v1.Gateway", "method": "EmbedStream", "code": "INTERNAL"}
    assert registry.get_sample_value("embedmesh_requests_total", labels) == 1


def test_json_log_lines(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        logs.configure("info", "json", "gateway")
        logging.getLogger("x").info("call", extra={"code": "OK", "seconds": 0.1})
        try:
            raise ValueError("boom")
        except ValueError:
            logging.getLogger("x").exception("failed")
        logs.configure("info", "text", "gateway")
        logging.getLogger("x").info("call", extra={"code": "OK"})
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    first, second, third = capsys.readouterr().err.splitlines()[:3]
    assert {"role": "gateway", "message": "call", "code": "OK", "seconds": 0.1}.items() <= json.loads(first).items()
    assert json.loads(first)["time"].endswith("+00:00")
    assert "ValueError: boom" in json.loads(second)["exception"]
    assert third.endswith("gateway call code=OK")


def only_ann(metadata: Any) -> str:
    if metadata.get("name") != "ann":
        raise Unauthenticated("who are you?")
    return "ann"


async def test_whoever_is_not_known_gets_nothing_but_health(
    make_node: Any, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "embedmesh_server.interceptor")
    node, _ = make_node(authenticate=only_ann, drain_seconds=0)
    async with node, grpc.aio.insecure_channel(node.grpc_address) as channel:
        # As large as may be: refused before it is read, let alone parsed.
        request = text_pb2.EmbedTextRequest(inputs=[text_pb2.TextInput(text="x" * 60 * 2**20)])
        text: Any = text_pb2_grpc.TextEncoderStub(channel)
        gateway: Any = gateway_pb2_grpc.GatewayStub(channel)
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        listing = [reflection_pb2.ServerReflectionRequest(list_services="")]
        for call in (
            text.EmbedText(request),
            gateway.EmbedStream([gateway_pb2.EmbedStreamRequest(sequence=1)]).read(),
            reflection.ServerReflectionInfo(listing).read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert isinstance(from_rpc_error(caught.value), Unauthenticated)
            assert caught.value.details() == "who are you?"
        health: Any = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status
        assert registry.get_sample_value("embedmesh_requests_total", LABELS | {"code": "UNAUTHENTICATED"}) == 1
        # Whoever tries keys cannot fill the log.
        assert {record.levelno for record in caplog.records if record.getMessage() == "call"} == {logging.DEBUG}
        caplog.clear()
        known = (("name", "ann"),)
        await text.EmbedText(text_pb2.EmbedTextRequest(), metadata=known)
        assert (await reflection.ServerReflectionInfo(listing, metadata=known).read()).list_services_response
        (line,) = [record.__dict__ for record in caplog.records if record.getMessage() == "call"]
        assert (line["key"], line["code"]) == ("ann", "OK")
