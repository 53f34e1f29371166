"""Real texts through client, gateway, encoder and cache: the reference library's vectors, computed once."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray

import embedmesh
from embedmesh.errors import InputTooLarge, InvalidRequest

ENCODED = "embedmesh_encoder_inputs_total"


def closest(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """The worst cosine of corresponding rows."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float((np.einsum("nd,nd->n", a, b) / norms).min())


@pytest.fixture(scope="module")
def golden() -> tuple[list[str], NDArray[np.float32]]:
    """Texts cut at their end, and the vectors that sentence-transformers gave."""
    folder = Path(__file__).parents[1] / "data" / "golden_text"
    rows = [json.loads(line) for line in (folder / "texts.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = [i for i, row in enumerate(rows) if row["truncation"] == "end"]
    return [rows[i]["text"] for i in chosen], np.load(folder / "vectors.npy")[chosen]


async def test_golden_texts_through_the_mesh(
    start_mesh: Any, starter_model: Path, golden: tuple[list[str], NDArray[np.float32]], scrape: Any, total: Any
) -> None:
    golden_texts, golden_vectors = golden
    async with (
        start_mesh(text_models=(starter_model,)) as mesh,
        embedmesh.AsyncClient(mesh.address, max_inputs=100) as client,
    ):
        encoder = mesh.role("text").http
        first = await client.embed(golden_texts)
        assert closest(first.vectors, golden_vectors) >= 0.99999
        computed = total(await scrape(encoder), ENCODED)
        assert computed == len(set(golden_texts))

        # The second pass: the same numbers, no encoder call.
        second = await client.embed(golden_texts)
        assert all(result.cached for result in second.results)
        np.testing.assert_array_equal(first.vectors, second.vectors)
        assert total(await scrape(encoder), ENCODED) == computed
        assert second.usage.cached_inputs == len(golden_texts)

        # Half new: only the new half is computed, order kept.
        fresh = [f"{text} and more" for text in golden_texts[:100]]
        mixed = [text for pair in zip(golden_texts[:100], fresh, strict=True) for text in pair]
        half = await client.embed(mixed)
        np.testing.assert_array_equal(half.vectors[0::2], first.vectors[:100])
        assert total(await scrape(encoder), ENCODED) == computed + len(set(fresh) - set(golden_texts))

        # Two at once: computed once.
        computed = total(await scrape(encoder), ENCODED)
        once, twice = await asyncio.gather(client.embed(["never seen"] * 3), client.embed(["never seen"] * 3))
        np.testing.assert_array_equal(once.vectors, twice.vectors)
        assert total(await scrape(encoder), ENCODED) == computed + 1

        # Neither company, order nor cache state changes a vector.
        shuffled = np.random.default_rng(7).permutation(len(golden_texts))[:300]
        again = await client.embed([golden_texts[i] for i in shuffled], cache="bypass")
        np.testing.assert_allclose(again.vectors, first.vectors[shuffled], atol=1e-5, rtol=0)

        # What was asked for is cut from the cached vector.
        small = await client.embed(golden_texts[:10], dtype="float16", normalize=True)
        assert all(result.cached for result in small.results)
        np.testing.assert_array_equal(small.vectors, first.vectors[:10].astype(np.float16))


async def test_the_cache_survives_the_gateway(start_mesh: Any, scrape: Any, total: Any) -> None:
    """A vector comes from Redis, not only from the memory of the process that computed it."""
    texts = [f"text {i}" for i in range(50)]
    async with start_mesh() as mesh:
        async with embedmesh.AsyncClient(mesh.address) as client:
            first = await client.embed(texts)
        gateway = mesh.role("gateway").process
        gateway_pid = gateway.pid
        os.kill(mesh.pids["gateway"], signal.SIGTERM)
        async with asyncio.timeout(30):
            while gateway.pid in {None, gateway_pid} or gateway.state != "serving":
                await asyncio.sleep(0.05)
        async with embedmesh.AsyncClient(mesh.address) as client:
            second = await client.embed(texts)
        np.testing.assert_array_equal(first.vectors, second.vectors)
        assert second.usage.cached_inputs == 50
        samples = await scrape(mesh.role("gateway").http)
        assert total(samples, "embedmesh_cache_lookups_total", tier="redis", outcome="hit") == 50


async def test_five_bad_inputs_of_256_hurt_only_themselves(start_mesh: Any) -> None:
    texts = [f"text {i}" for i in range(256)]
    texts[3] = "lone \ud800 surrogate"
    texts[50] = "x" * (2**20 + 1)
    texts[100] = "poison [[fail]] here"
    texts[101] = "not a number [[nan]]"
    texts[255] = "y" * (2**21)
    async with start_mesh() as mesh, embedmesh.AsyncClient(mesh.address) as client:
        response = await client.embed(texts)
        bad = {i: result.error for i, result in enumerate(response.results) if result.error is not None}
        assert sorted(bad) == [3, 50, 100, 101, 255]
        assert isinstance(bad[3], InvalidRequest)
        assert bad[3].field == "inputs[3].text"
        assert isinstance(bad[50], InputTooLarge)
        assert bad[50].metadata == {"limit": str(2**20), "actual": str(2**20 + 1), "unit": "bytes"}
        assert {bad[i].reason for i in (100, 101)} == {"INFERENCE_FAILED"}
        assert response.usage.failed_inputs == 5
        with pytest.raises(embedmesh.EmbedErrors):
            _ = response.vectors
        good = [i for i in range(256) if i not in bad]
        alone = await client.embed([texts[i] for i in good], cache="bypass")
        np.testing.assert_array_equal(np.stack([response.results[i].vector for i in good]), alone.vectors)


async def test_reflection_and_health(start_mesh: Any) -> None:
    async with start_mesh(redis="none") as mesh:
        for address, services in (
            (mesh.address, {"embedmesh.v1.Gateway", "embedmesh.v1.ModelCatalog"}),
            (mesh.role("text").grpc, {"embedmesh.v1.TextEncoder", "embedmesh.v1.ModelCatalog"}),
        ):
            process = await asyncio.create_subprocess_exec(
                str(Path(sys.executable).parent / "grpcurl"), "-plaintext", address, "list",
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            output, _ = await asyncio.wait_for(process.communicate(), 30)
            assert services <= set(output.decode().split()), output
            async with grpc.aio.insecure_channel(address) as channel:
                for service in ("", *services):
                    answer = await health_pb2_grpc.HealthStub(channel).Check(
                        health_pb2.HealthCheckRequest(service=service)
                    )
                    assert answer.status == health_pb2.HealthCheckResponse.SERVING
