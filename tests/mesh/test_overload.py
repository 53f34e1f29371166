"""Several times more work than the mesh can do: refused at once, with a number; nothing hangs, nothing grows."""

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import psutil

from embedmesh.errors import Overloaded, from_rpc_error
from embedmesh.v1 import embedding_pb2, gateway_pb2, gateway_pb2_grpc
from embedmesh_encoder.backend.fake import write_model

MS_PER_TOKEN = 1.0
QUEUE_TOKENS = 400


async def test_excess_is_refused_at_once(start_mesh: Any, tmp_path: Path, scrape: Any, total: Any) -> None:
    write_model(tmp_path / "slow", dimensions=16, ms_per_unit=MS_PER_TOKEN)
    text = {"max_queue_cost": QUEUE_TOKENS}
    accepted: list[float] = []
    refused: list[float] = []
    errors: list[Overloaded] = []

    async with (
        start_mesh(text_models=(tmp_path / "slow",), text=text, redis="none") as mesh,
        grpc.aio.insecure_channel(mesh.address, options=[("grpc.enable_retries", 0)]) as channel,
    ):
        stub: Any = gateway_pb2_grpc.GatewayStub(channel)

        async def call(number: int) -> None:
            request = gateway_pb2.EmbedRequest(priority=embedding_pb2.PRIORITY_INTERACTIVE)
            for i in range(4):
                request.inputs.add().text.text = f"text {number} {i} " + "word " * 5
            start = time.perf_counter()
            try:
                response = await stub.Embed(request, timeout=30)
            except grpc.aio.AioRpcError as failure:
                refused.append(time.perf_counter() - start)
                error = from_rpc_error(failure)
                assert isinstance(error, Overloaded), failure
                assert "grpc-retry-pushback-ms" in dict(failure.trailing_metadata() or ())
                errors.append(error)
            else:
                accepted.append(time.perf_counter() - start)
                assert all(result.HasField("embedding") for result in response.results)

        await call(-1)
        processes = {name: psutil.Process(pid) for name, pid in mesh.pids.items()}
        before = {name: process.memory_info().rss for name, process in processes.items()}
        # About four times what it can do, as an open loop: nobody waits for answers.
        start = time.perf_counter()
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for number in range(300):
                group.create_task(call(number))
                await asyncio.sleep(0.01)
        elapsed = time.perf_counter() - start
        grown = {name: process.memory_info().rss - before[name] for name, process in processes.items()}
        gauges = await scrape(mesh.role("text").http)
        gateway = await scrape(mesh.role("gateway").http)

    assert len(accepted) + len(refused) == 301
    assert len(refused) > 50
    assert len(accepted) > 20
    # Refusals do not wait for the queue, whose length alone is 400 ms.
    assert sorted(refused)[len(refused) // 2] < 0.1
    assert all(error.retry_after is not None and 0 < error.retry_after <= 30 for error in errors)
    # Accepted calls wait for at most a full queue and what runs.
    assert max(accepted) < (QUEUE_TOKENS + 512) * MS_PER_TOKEN / 1000 + 2
    assert elapsed < 20
    assert all(growth < 64 * 2**20 for growth in grown.values()), grown
    assert total(gauges, "embedmesh_queue_inputs") == 0
    # What the encoder had to refuse, and what the gateway then did for it.
    by_encoder = total(gauges, "embedmesh_refused_inputs_total")
    assert 0 < by_encoder < 4 * len(refused)
    assert by_encoder + total(gateway, "embedmesh_gateway_refused_inputs_total") == 4 * len(refused)
