from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest

from embedmesh.v1 import gateway_pb2, gateway_pb2_grpc


def start(*flags: str) -> subprocess.Popen[str]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("EMBEDMESH_")}
    return subprocess.Popen(
        [sys.executable, "-m", "embedmesh_gateway", *flags], stderr=subprocess.PIPE, text=True, env=environ
    )


async def test_the_process_serves_drains_and_flushes(
    make_encoder: Any, valkey: Any, tmp_path: Path, settle: Any
) -> None:
    encoder = make_encoder("text")
    await encoder.start()
    ready = tmp_path / "ready.json"
    process = start(
        *("--text-target", encoder.address, "--redis-url", valkey.url, "--port", "0", "--http-port", "0"),
        *("--ready-file", str(ready)),
    )
    try:
        await settle(lambda: ready.exists() or process.poll() is not None)
        addresses = json.loads(ready.read_text())
        release = asyncio.Event()

        async def wait(request: Any) -> None:
            await release.wait()

        encoder.before = wait
        async with grpc.aio.insecure_channel(addresses["grpc"]) as channel:
            stub: Any = gateway_pb2_grpc.GatewayStub(channel)
            request = gateway_pb2.EmbedRequest()
            request.inputs.add().text.text = "a"
            call = asyncio.ensure_future(stub.Embed(request, timeout=20))
            await encoder.arrived.wait()
            process.send_signal(signal.SIGTERM)  # with a call in flight
            release.set()
            assert (await call).results[0].HasField("embedding")
        await settle(lambda: process.poll() is not None)
        assert process.returncode == 0, process.communicate()[1]
        with valkey.client() as client:
            assert client.dbsize() == 1
    finally:
        process.kill()
        process.communicate()
        await encoder.stop()


async def test_metrics_are_served(make_encoder: Any, open_mesh: Any) -> None:
    async with open_mesh() as mesh:
        await mesh.embed(["a"])
        url = f"http://{mesh.node.http_address}/metrics"
        page = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=20).read().decode())
        for stage in ("upstream", "finish", "cache_get", "cache_set"):
            assert f'embedmesh_gateway_stage_seconds_count{{stage="{stage}"}} 1.0' in page
        assert 'embedmesh_gateway_inputs_total{modality="text",outcome="ok"} 1.0' in page


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ((), 2, "--text-target"),
        (("--text-target", "x:1", "--redis-url", "ftp://:secret@host", "--prot", "1"), 2, "--redis-url"),
        (("--text-target", "x:1", "--port", "{taken}", "--http-port", "0"), 1, "--port"),
        (("--text-target", "x:1", "--keys-file", "/none"), 1, "/none cannot be read: No such file or directory"),
        (("--text-target", "x:1", "--upstream-tls-ca", "/none"), 1, "/none cannot be read"),
        (
            ("--text-target", "x:1", "--tls-cert", "/none", "--tls-key", "/none", "--port", "0"),
            1,
            "/none cannot be read",
        ),
    ],
)
def test_what_is_wrong_is_said_on_stderr(flags: tuple[str, ...], code: int, words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = start(*(flag.replace("{taken}", port) for flag in flags))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert words in errors
    assert "Traceback" not in errors
    assert "secret" not in errors
