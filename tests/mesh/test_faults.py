"""Parts of the mesh are killed, hung, filled and emptied while calls run: none may fail."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import redis.asyncio

from embedmesh_cli.mesh import Mesh

# Generous for two shared cores; a call that waited for a dead Redis or encoder would take the
# 20 s of its deadline.
SLOWEST_SECONDS = 5.0
LOOKUPS = "embedmesh_cache_lookups_total"


def new_texts(number: int) -> list[str]:
    """Half never seen before, half common to all calls."""
    return [f"new text {number} {i}" for i in range(4)] + [f"common text {i}" for i in range(4)]


async def kill_redis(mesh: Mesh, _: Any) -> None:
    os.kill(mesh.pids["redis"], signal.SIGKILL)
    await asyncio.sleep(2)


async def hang_redis(mesh: Mesh, _: Any) -> None:
    pid = mesh.pids["redis"]
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(3)
    finally:
        os.kill(pid, signal.SIGCONT)


async def fill_redis(_: Mesh, client: Any) -> None:
    await client.config_set("maxmemory-policy", "noeviction")
    await client.config_set("maxmemory", "1mb")
    await asyncio.sleep(2)


async def flush_redis(_: Mesh, client: Any) -> None:
    for _step in range(10):
        await client.flushall()
        await asyncio.sleep(0.2)


async def spoil_redis(_: Mesh, client: Any) -> None:
    """Replace every value by rubbish, by another key's value, or by another type."""
    for step in range(10):
        keys = [key async for key in client.scan_iter("em1:*", count=1000)]
        pipeline = client.pipeline(transaction=False)
        for i, key in enumerate(keys):
            match (i + step) % 3:
                case 0:
                    pipeline.set(key, b"\x01rubbish" * 20)
                case 1:
                    pipeline.copy(keys[i - 1], key, replace=True)
                case _:
                    pipeline.delete(key)
                    pipeline.rpush(key, "a list")
        await pipeline.execute(raise_on_error=False)
        await asyncio.sleep(0.1)


@pytest.mark.parametrize(
    ("fault", "felt_as"),
    [
        (kill_redis, {"kind": "connection"}),
        (hang_redis, {"kind": "timeout"}),
        (fill_redis, {"operation": "set", "kind": "response"}),
        (flush_redis, None),
        (spoil_redis, {"operation": "get", "kind": "corrupt"}),
    ],
)
async def test_redis_may_only_help(
    start_mesh: Any,
    make_load: Any,
    running: Any,
    scrape: Any,
    total: Any,
    fault: Callable[[Mesh, Any], Awaitable[None]],
    felt_as: dict[str, str] | None,
) -> None:
    # A tiny in-process cache, so that every call needs Redis.
    async with (
        start_mesh(gateway={"cache_memory_bytes": 0}) as mesh,
        make_load(mesh, new_texts) as load,
        redis.asyncio.Redis.from_url(mesh.role("redis").url) as client,
    ):
        async with running(load, workers=8):
            await asyncio.sleep(1)
            before = load.calls
            await fault(mesh, client)
            during = load.calls - before
            after_fault = await scrape(mesh.http_address)
            await asyncio.sleep(2)
            at_end = await scrape(mesh.http_address)
        load.raise_if_any_failed()
        assert during > 10
        assert max(load.seconds) < SLOWEST_SECONDS
        # The fault was a real one, and the cache helps again when it is over.
        if felt_as is not None:
            assert total(after_fault, "embedmesh_cache_errors_total", **felt_as) > 0
        hits = {"tier": "redis", "outcome": "hit"}
        assert total(at_end, LOOKUPS, **hits) > total(after_fault, LOOKUPS, **hits) > 0
        assert total(at_end, "embedmesh_cache_breaker_open") == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_one_of_two_encoders_goes(start_mesh: Any, make_load: Any, running: Any, number: signal.Signals) -> None:
    async with start_mesh(replicas={"text": 2}, redis="none") as mesh, make_load(mesh, new_texts) as load:
        async with running(load, workers=8):
            await asyncio.sleep(1)
            for name in ("text-1", "text-2"):
                process = mesh.role(name).process
                deaths, before = process.deaths, load.calls
                os.kill(mesh.pids[name], number)
                async with asyncio.timeout(30):
                    while process.deaths == deaths or process.state != "serving":
                        await asyncio.sleep(0.05)
                assert load.calls > before
                # The other may only go once the gateway has found this one again.
                await asyncio.sleep(2)
        load.raise_if_any_failed()
        assert max(load.seconds) < SLOWEST_SECONDS


async def test_all_encoders_gone_is_said_precisely_and_cached_texts_still_come(start_mesh: Any, make_load: Any) -> None:
    def texts(number: int) -> list[str]:
        return ["known"] if number == 0 else ["unknown"]

    async with start_mesh(redis="none") as mesh, make_load(mesh, texts) as load:
        await load.call(0)
        os.kill(mesh.pids["text"], signal.SIGSTOP)  # hung, which no restart will mend
        try:
            await load.call(0)
            load.raise_if_any_failed()
        finally:
            os.kill(mesh.role("text").process.pid, signal.SIGKILL)
        await load.call(1)  # dead: refused, or answered by the restarted one
        assert all(failure.startswith("UNAVAILABLE") for failure in load.failures), load.failures
