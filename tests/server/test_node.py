import asyncio
import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from embedmesh.v1 import text_pb2, text_pb2_grpc
from embedmesh_server.node import BindError

TEXT, GATEWAY = "embedmesh.v1.TextEncoder", "embedmesh.v1.Gateway"
Served = tuple[Any, Any]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(channel: grpc.aio.Channel, service: str) -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return int((await health_pb2_grpc.HealthStub(channel).Check(request)).status)


async def get(address: str, path: str) -> tuple[int, str]:
    def fetch() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return await asyncio.to_thread(fetch)


async def test_health_is_per_service_and_the_node_needs_all(served: Served, channel: grpc.aio.Channel) -> None:
    node = served[0]
    assert [await health(channel, name) for name in ("", TEXT, GATEWAY)] == [NOT_SERVING] * 3
    assert (await get(node.http_address, "/readyz"))[0] == 503
    node.set_ready(TEXT, True)
    assert [await health(channel, name) for name in ("", TEXT, GATEWAY)] == [NOT_SERVING, SERVING, NOT_SERVING]
    node.set_ready(GATEWAY, True)
    assert [await health(channel, name) for name in ("", TEXT, GATEWAY)] == [SERVING] * 3
    assert (await get(node.http_address, "/readyz"))[0] == 200
    assert "ready=2/2" in repr(node)
    node.set_ready(TEXT, False)
    assert [await health(channel, name) for name in ("", TEXT, GATEWAY)] == [NOT_SERVING, NOT_SERVING, SERVING]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health(channel, "no.such.Service")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_http_endpoint(served: Served, channel: grpc.aio.Channel) -> None:
    await text_pb2_grpc.TextEncoderStub(channel).EmbedText(text_pb2.EmbedTextRequest())
    status, text = await get(served[0].http_address, "/metrics")
    assert status == 200
    assert 'embedmesh_requests_total{code="OK",method="EmbedText",service="embedmesh.v1.TextEncoder"} 1.0' in text
    assert "process_resident_memory_bytes" in text
    assert 'role="test"' in text
    assert (await get(served[0].http_address, "/healthz"))[0] == 200
    assert (await get(served[0].http_address, "/"))[0] == 404


async def test_metrics_pass_the_openmetrics_parser(served: Served) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    _, text = await get(served[0].http_address, "/metrics")
    names = {family.name for family in text_string_to_metric_families(text)}
    assert {"embedmesh_requests", "embedmesh_request_seconds", "embedmesh_build_info"} <= names


async def test_draining_finishes_calls_in_flight_and_refuses_new_ones(make_node: Callable[..., Served]) -> None:
    node, echo = make_node(drain_seconds=5)
    await node.start()
    async with grpc.aio.insecure_channel(node.grpc_address) as channel:
        stub: Any = text_pb2_grpc.TextEncoderStub(channel)
        call = stub.EmbedText(text_pb2.EmbedTextRequest(model="wait"))
        await asyncio.wait_for(echo.entered.wait(), 5)
        stopping = asyncio.ensure_future(node.stop())
        async with asyncio.timeout(5):
            # From now on new calls are refused, in a form that our retry policies send elsewhere: grpc.aio
            # says CANCELLED to what arrives before its GOAWAY does.
            while True:
                try:
                    await stub.EmbedText(text_pb2.EmbedTextRequest(), timeout=1)
                except grpc.aio.AioRpcError as error:
                    assert error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
                    break
        assert not stopping.done()
        echo.release.set()
        await call
        await stopping


async def test_draining_is_bounded(make_node: Callable[..., Served]) -> None:
    node, echo = make_node(drain_seconds=0.2)
    await node.start()
    async with grpc.aio.insecure_channel(node.grpc_address) as channel:
        call: Any = text_pb2_grpc.TextEncoderStub(channel).EmbedText(text_pb2.EmbedTextRequest(model="wait"))
        await asyncio.wait_for(echo.entered.wait(), 5)
        await asyncio.wait_for(node.stop(), 5)
        with pytest.raises(grpc.aio.AioRpcError):
            await call


@pytest.mark.parametrize("which", ["port", "http_port"])
async def test_taken_port_says_what_to_do(make_node: Callable[..., Served], which: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        node, _ = make_node(**{which: port})
        with pytest.raises(BindError, match=f"cannot listen on 127.0.0.1:{port}.*--{which.replace('_', '-')} 0"):
            await node.start()
        await node.server.stop(0)


async def test_reflection_lists_the_services(served: Served) -> None:
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).parent / "grpcurl"), "-plaintext", served[0].grpc_address, "list",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    assert {TEXT, GATEWAY, "grpc.health.v1.Health"} <= set(output.decode().split())


PROGRAM = """
import asyncio, sys
from pathlib import Path
from embedmesh.v1 import text_pb2, text_pb2_grpc
from embedmesh_server.node import Node, stop_on_signal
from embedmesh_server.settings import NodeSettings
from prometheus_client import CollectorRegistry

class Slow(text_pb2_grpc.TextEncoderServicer):
    async def EmbedText(self, request, context):
        print("entered", flush=True)
        await asyncio.sleep(float(request.model))
        return text_pb2.EmbedTextResponse()

async def main():
    stop = stop_on_signal()
    settings = NodeSettings(ready_file=Path(sys.argv[1]), drain_seconds=30)
    node = Node(settings, role="test", registry=CollectorRegistry(), services=["embedmesh.v1.TextEncoder"])
    text_pb2_grpc.add_TextEncoderServicer_to_server(Slow(), node.server)
    await node.start()
    node.set_ready("embedmesh.v1.TextEncoder", True)
    await node.run(stop)

asyncio.run(main())
"""


async def start_program(ready: Path) -> tuple[asyncio.subprocess.Process, dict[str, Any]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, str(ready), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    async with asyncio.timeout(20):
        while not ready.exists():
            await asyncio.sleep(0.02)
    return process, json.loads(ready.read_text())


async def test_sigterm_drains_and_exits_cleanly(tmp_path: Path) -> None:
    process, ready = await start_program(tmp_path / "ready.json")
    assert ready["pid"] == process.pid
    async with grpc.aio.insecure_channel(ready["grpc"]) as channel:
        call: Any = text_pb2_grpc.TextEncoderStub(channel).EmbedText(text_pb2.EmbedTextRequest(model="0.5"))
        assert process.stdout is not None
        await asyncio.wait_for(process.stdout.readline(), 10)
        process.send_signal(signal.SIGTERM)
        assert await call == text_pb2.EmbedTextResponse()
    assert await asyncio.wait_for(process.wait(), 10) == 0


async def test_second_signal_quits_at_once(tmp_path: Path) -> None:
    process, ready = await start_program(tmp_path / "ready.json")
    async with grpc.aio.insecure_channel(ready["grpc"]) as channel:
        call: Any = text_pb2_grpc.TextEncoderStub(channel).EmbedText(text_pb2.EmbedTextRequest(model="25"))
        assert process.stdout is not None
        await asyncio.wait_for(process.stdout.readline(), 10)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(10):
            while process.returncode is None:
                process.send_signal(signal.SIGINT)
                await asyncio.sleep(0.1)
        with pytest.raises(grpc.aio.AioRpcError):
            await call
    assert process.returncode == 128 + signal.SIGINT


def test_metrics_follow_the_conventions(registry: CollectorRegistry) -> None:
    from embedmesh_server.metrics import EncoderMetrics, GatewayMetrics, ServerMetrics

    ServerMetrics(registry, "test")
    EncoderMetrics(registry)
    GatewayMetrics(registry)
    ours = [family for family in registry.collect() if family.name.startswith("embedmesh_")]
    assert len(ours) >= 25
    for family in ours:
        assert family.documentation.endswith("."), family.name
        assert not family.name.endswith(("_ms", "_count", "_milliseconds"))


async def test_the_http_port_may_have_an_address_of_its_own(make_node: Callable[..., Served]) -> None:
    node, _ = make_node(http_host="127.0.0.2", drain_seconds=0)
    async with node:
        assert node.http_address.startswith("127.0.0.2:")
        assert (await get(node.http_address, "/healthz"))[0] == 200
        with pytest.raises(urllib.error.URLError):
            await get(node.http_address.replace("127.0.0.2", "127.0.0.1"), "/healthz")
