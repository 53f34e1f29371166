from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from embedmesh.v1 import gateway_pb2, gateway_pb2_grpc

Start = Callable[..., "Gateway"]


class Gateway:
    def __init__(self, folder: Path, *flags: str) -> None:
        self.log = folder / "log"
        self.ready = folder / "ready.json"
        environ = {key: value for key, value in os.environ.items() if not key.startswith("EMBEDMESH_")}
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "embedmesh_gateway", *flags, "--http-port", "0", "--ready-file", self.ready],
                stderr=log,
                env=environ,
            )

    @property
    def workers(self) -> list[int]:
        """The processes it started that hold its port; not the one with which Python watches over semaphores."""
        found: list[int] = []
        for child in psutil.Process(self.popen.pid).children():
            with suppress(psutil.Error):  # one that is no more
                if any("spawn_main" in word for word in child.cmdline()):
                    found.append(child.pid)
        return found

    async def address(self, settle: Any) -> dict[str, Any]:
        await settle(lambda: self.ready.exists() or self.popen.poll() is not None)
        assert self.ready.exists(), self.log.read_text()
        return dict(json.loads(self.ready.read_text()))


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Start]:
    started: list[Gateway] = []

    def start(*flags: str) -> Gateway:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Gateway(folder, *flags))
        return started[-1]

    yield start
    for each in started:
        each.popen.kill()
        each.popen.wait()


async def embed(address: str, text: str) -> gateway_pb2.EmbedResponse:
    """Call over a connection of its own."""
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub: Any = gateway_pb2_grpc.GatewayStub(channel)
        request = gateway_pb2.EmbedRequest()
        request.inputs.add().text.text = text
        response: gateway_pb2.EmbedResponse = await stub.Embed(request, timeout=20, wait_for_ready=True)
        return response


def samples(http: str, name: str) -> Counter[str]:
    """A metric by worker."""
    with urllib.request.urlopen(f"http://{http}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name:
                found[sample.labels.get("worker", "")] += int(sample.value)
    return found


def status(http: str, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://{http}{path}", timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


async def test_connections_are_shared_out_and_seen_in_one_place(encoder: Any, gateway: Start, settle: Any) -> None:
    node = gateway("--text-target", encoder.address, "--port", "0", "--workers", "3")
    at = await node.address(settle)
    assert at["pid"] == node.popen.pid
    assert len(node.workers) == 3
    for i in range(24):
        assert (await embed(at["grpc"], f"text {i}")).results[0].HasField("embedding")
    answered = await asyncio.to_thread(samples, at["http"], "embedmesh_gateway_inputs_total")
    assert sum(answered.values()) == 24
    # By a hash: that all of 24 connections go to one of three happens once in 3 ** 23 times.
    assert len(answered) > 1
    node.popen.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(node.popen.wait, 20) == 0
    assert "Traceback" not in node.log.read_text()


async def test_a_worker_that_dies_is_started_again(encoder: Any, gateway: Start, settle: Any) -> None:
    node = gateway("--text-target", encoder.address, "--port", "0", "--workers", "2")
    at = await node.address(settle)
    victim = node.workers[0]
    os.kill(victim, signal.SIGKILL)
    await settle(lambda: victim not in node.workers and len(node.workers) == 2)
    async with asyncio.timeout(20):
        while await asyncio.to_thread(status, at["http"], "/readyz") != 200:
            await asyncio.sleep(0.05)
    assert (await embed(at["grpc"], "a")).results[0].HasField("embedding")
    restarts = await asyncio.to_thread(samples, at["http"], "embedmesh_gateway_worker_restarts_total")
    assert restarts == {"": 1}
    assert "a worker ended" in node.log.read_text()


async def test_calls_in_flight_are_finished(encoder: Any, gateway: Start, settle: Any) -> None:
    node = gateway("--text-target", encoder.address, "--port", "0", "--workers", "2")
    at = await node.address(settle)
    release = asyncio.Event()

    async def wait(_: Any) -> None:
        await release.wait()

    encoder.before = wait
    call = asyncio.ensure_future(embed(at["grpc"], "a"))
    await encoder.arrived.wait()
    node.popen.send_signal(signal.SIGTERM)
    await settle(lambda: "draining" in node.log.read_text())
    release.set()
    assert (await call).results[0].HasField("embedding")
    assert await asyncio.to_thread(node.popen.wait, 20) == 0


async def test_no_worker_outlives_its_parent(encoder: Any, gateway: Start, settle: Any) -> None:
    node = gateway("--text-target", encoder.address, "--port", "0", "--workers", "2")
    await node.address(settle)
    workers = node.workers
    assert len(workers) == 2
    node.popen.kill()
    node.popen.wait()

    await settle(lambda: not any(map(psutil.pid_exists, workers)))


async def test_a_port_that_somebody_has_is_not_shared(encoder: Any, gateway: Start, settle: Any) -> None:
    first = gateway("--text-target", encoder.address, "--port", "0", "--workers", "2")
    port = (await first.address(settle))["grpc"].rpartition(":")[2]
    with socket.create_server(("127.0.0.1", 0)) as other:
        for taken in (port, str(other.getsockname()[1])):
            second = gateway("--text-target", encoder.address, "--port", taken, "--workers", "2")
            assert await asyncio.to_thread(second.popen.wait, 20) == 1
            assert "the port is taken by another process" in second.log.read_text()
            assert "Traceback" not in second.log.read_text()


async def test_what_no_worker_can_start_with_ends_it(encoder: Any, gateway: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text("[keys.search]\nsha256 = 7\n")
    node = gateway("--text-target", encoder.address, "--port", "0", "--workers", "2", "--keys-file", str(keys))
    assert await asyncio.to_thread(node.popen.wait, 20) == 1
    log = node.log.read_text()
    assert "keys.toml" in log
    assert "no worker could start" in log
    assert "Traceback" not in log
