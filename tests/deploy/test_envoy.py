"""deploy/envoy/envoy.yaml in front of two real gateways, one of which is killed under load."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import embedmesh
from embedmesh_cli.mesh import Mesh, MeshOptions
from embedmesh_encoder.backend.fake import write_model

CONFIG = Path(__file__).resolve().parents[2] / "deploy/envoy/envoy.yaml"
BOUND = 30.0  # seconds

pytestmark = pytest.mark.deploy


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.asynccontextmanager
async def envoy_before(gateways: list[str], binary: str, folder: Path) -> AsyncIterator[tuple[str, str]]:
    """Run the shipped file with other addresses; gives the door's and the admin's."""
    config: Any = yaml.safe_load(CONFIG.read_text())
    door, admin = free_port(), free_port()
    resources = config["static_resources"]
    config["admin"]["address"]["socket_address"]["port_value"] = admin
    resources["listeners"][0]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": door}
    ends = resources["clusters"][0]["load_assignment"]["endpoints"][0]["lb_endpoints"]
    ends[:] = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}}
        for host, port in (address.split(":") for address in gateways)
    ]
    file = folder / "envoy.yaml"
    file.write_text(yaml.safe_dump(config))
    with (folder / "envoy.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: ASYNC220  (starting it takes no time)
            [binary, "--config-path", file, "--use-dynamic-base-id", "--concurrency", "1"], stdout=log, stderr=log
        )
    try:
        async with asyncio.timeout(BOUND):
            while await healthy(f"127.0.0.1:{admin}") < len(gateways):
                assert process.poll() is None, (folder / "envoy.log").read_text()[-2000:]
                await asyncio.sleep(0.1)
        yield f"127.0.0.1:{door}", f"127.0.0.1:{admin}"
    finally:
        process.terminate()
        process.wait(BOUND)


async def healthy(admin: str) -> int:
    """How many gateways get calls."""

    def ask() -> int:
        try:
            with urllib.request.urlopen(f"http://{admin}/stats?filter=membership_healthy", timeout=BOUND) as answer:
                return int(re.findall(r"cluster.gateways.membership_healthy: (\d+)", answer.read().decode())[0])
        except (urllib.error.URLError, IndexError):
            return 0

    return await asyncio.to_thread(ask)


async def test_a_gateway_dies_behind_envoy_and_no_call_fails(tool: Callable[[str], str], tmp_path: Path) -> None:
    write_model(tmp_path / "fake", dimensions=16, base_ms=1.0, ms_per_unit=0.05)
    options = MeshOptions(text_models=(tmp_path / "fake",), redis="none")
    async with (
        Mesh(options) as first,
        Mesh(options) as second,
        envoy_before([first.address, second.address], tool("envoy"), tmp_path) as (door, admin),
        embedmesh.AsyncClient(door, retries=0) as client,  # what Envoy cannot hide counts
        embedmesh.AsyncClient(door) as resuming,  # streams are the client's to resume
    ):
        answered = 0
        stop = asyncio.Event()

        async def call(number: int) -> None:
            nonlocal answered
            while not stop.is_set():
                answer = await client.embed([f"text {number} {answered}"])
                assert answer.results[0].error is None
                answered += 1

        async def stream() -> int:
            chunks = 0
            texts = (f"streamed {i}" for i in range(5_000))
            async for result in resuming.embed_stream(texts):
                assert result.error is None
                chunks += 1
            return chunks

        async with asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(call(number))
            streaming = group.create_task(stream())
            await asyncio.sleep(1)
            before = answered
            os.kill(first.pids["gateway"], signal.SIGKILL)
            await asyncio.sleep(4)
            during = answered - before
            await streaming
            stop.set()
        assert before > 100
        assert during > 100
        assert streaming.result() == 5_000
        async with asyncio.timeout(BOUND):
            while await healthy(admin) < 2:  # its mesh has started it again, on the same port
                await asyncio.sleep(0.1)
