from __future__ import annotations

import asyncio
import random
import signal
import time
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh_gateway.cache import MemoryCache
from embedmesh_gateway.redis_servers import Breaker, seal, unseal

GENEROUS = 5.0  # seconds; far above any limit set here, far below a hang


def pairs(n: int, size: int = 200, start: int = 0) -> list[tuple[bytes, bytes]]:
    return [(b"key %d" % i, bytes([i % 251]) * size) for i in range(start, start + n)]


# The envelope.


@given(st.binary(max_size=40), st.binary(max_size=200))
def test_a_sealed_payload_opens_under_its_key_only(key: bytes, payload: bytes) -> None:
    value = seal(key, payload)
    assert unseal(key, value) == payload
    assert unseal(key + b"x", value) is None


@given(st.binary(max_size=60))
def test_garbage_does_not_open(value: bytes) -> None:
    assert unseal(b"key", value) is None


def test_a_damaged_truncated_or_foreign_value_does_not_open() -> None:
    value = seal(b"key", b"payload")
    for spoilt in (
        value[:-1],
        value[:4],
        b"",
        value[:7] + bytes([value[7] ^ 1]) + value[8:],
        bytes([2]) + value[1:],
        "text",
        None,
        7,
    ):
        assert unseal(b"key", spoilt) is None


# Memory.


@given(
    st.integers(500, 3000),
    st.lists(st.tuples(st.sampled_from(["get", "set", "drop"]), st.integers(0, 9), st.integers(0, 900)), max_size=60),
)
def test_memory_is_an_lru_within_its_bound(limit: int, steps: list[tuple[str, int, int]]) -> None:
    memory = MemoryCache(limit)
    last: dict[bytes, bytes] = {}
    for step, number, size in steps:
        key = b"%d" % number
        if step == "set":
            memory.set(key, b"x" * size)
            last[key] = b"x" * size
        elif step == "drop":
            memory.drop(key)
            last.pop(key, None)
        else:
            assert memory.get(key) in (None, last.get(key))
        assert memory.used <= limit
        assert (memory.used == 0) == (len(memory) == 0)


def test_the_least_recently_used_goes_first() -> None:
    memory = MemoryCache(1)
    memory.set(b"a", b"x")
    assert memory.get(b"a") is None  # larger than the whole
    one = MemoryCache(10**6)
    one.set(b"a", b"x" * 100)
    memory = MemoryCache(3 * one.used)
    for key in (b"a", b"b", b"c"):
        memory.set(key, b"x" * 100)
    memory.get(b"a")
    memory.set(b"d", b"x" * 100)
    assert [memory.get(key) is not None for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    assert memory.evictions == 1


@pytest.mark.parametrize("size", [60, 1600, 6000])
def test_the_bytes_counted_are_the_bytes_taken(size: int) -> None:
    memory = MemoryCache(10**9)
    tracemalloc.start()
    try:
        for i in range(5000):
            memory.set(b"em1:" + i.to_bytes(16, "big"), bytes(size))
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 0.95 * taken <= memory.used <= 1.5 * taken


# The breaker.


def test_the_breaker_opens_after_failures_in_a_row_and_tries_once_a_pause() -> None:
    now = [100.0]
    breaker = Breaker(3, 10.0, lambda: now[0])
    for _ in range(2):
        breaker.failed()
    breaker.succeeded()
    for _ in range(3):
        assert breaker.allow()
        breaker.failed()
    assert breaker.is_open
    assert not breaker.allow()
    now[0] += 10
    assert breaker.allow()  # one probe
    assert not breaker.allow()  # and no second beside it
    breaker.failed()
    now[0] += 9
    assert not breaker.allow()
    now[0] += 1
    assert breaker.allow()
    now[0] += 10  # the probe never reported
    assert breaker.allow()
    breaker.succeeded()
    assert not breaker.is_open
    assert breaker.allow()
    assert breaker.allow()
    assert repr(breaker) == "<Breaker closed failures=0/3>"


# Without Redis.


async def test_without_an_url_there_is_only_memory(open_cache: Callable[..., Any]) -> None:
    async with open_cache(memory_bytes=10_000) as (cache, metric):
        assert await cache.from_redis([b"key 0"]) == [None]
        cache.set_many(pairs(1))
        assert cache.from_memory([b"key 0", b"key 1"]) == [bytes(200), None]
        assert metric("embedmesh_cache_memory_entries") == 1
        assert 200 < metric("embedmesh_cache_memory_bytes") < 1000
        assert metric("embedmesh_cache_lookups_total", tier="memory", outcome="hit") == 1
        assert metric("embedmesh_cache_lookups_total", tier="memory", outcome="miss") == 1
        assert "memory only" in repr(cache)


async def test_evictions_are_counted(open_cache: Callable[..., Any]) -> None:
    async with open_cache(memory_bytes=2000) as (cache, metric):
        cache.set_many(pairs(100))
        assert metric("embedmesh_cache_evictions_total") == 100 - metric("embedmesh_cache_memory_entries")


# With the real server.


async def test_what_was_written_is_found_in_order_with_gaps(open_cache: Callable[..., Any], valkey: Any) -> None:
    async with open_cache(valkey.url) as (cache, _):
        cache.set_many(pairs(10))
    async with open_cache(valkey.url) as (cache, metric):
        keys = [b"key 3", b"no", b"key 1", b"key 9", b"nor this"]
        assert await cache.from_redis(keys) == [b"\3" * 200, None, b"\1" * 200, b"\x09" * 200, None]
        assert metric("embedmesh_cache_lookups_total", tier="redis", outcome="hit") == 3
        assert metric("embedmesh_cache_lookups_total", tier="redis", outcome="miss") == 2


async def test_leaving_flushes_what_is_queued_and_every_key_expires(
    open_cache: Callable[..., Any], valkey: Any
) -> None:
    async with open_cache(valkey.url, ttl=1000.0) as (cache, _):
        cache.set_many(pairs(1000))
    with valkey.client() as client:
        assert client.dbsize() == 1000
        lives = [client.ttl(key) for key in client.scan_iter()]
    assert all(940 <= life <= 1000 for life in lives)
    assert len(set(lives)) > 10  # they do not expire together


async def test_a_redis_hit_is_a_memory_hit_afterwards(open_cache: Callable[..., Any], valkey: Any) -> None:
    async with open_cache(valkey.url) as (cache, _):
        cache.set_many(pairs(1))
    async with open_cache(valkey.url, memory_bytes=10_000) as (cache, _):
        await cache.from_redis([b"key 0"])
        valkey.kill()
        assert cache.from_memory([b"key 0"]) == [bytes(200)]


async def test_concurrent_lookups_each_get_their_own(open_cache: Callable[..., Any], valkey: Any) -> None:
    async with open_cache(valkey.url) as (cache, _):
        cache.set_many(pairs(2000))
        await cache.aclose()
    async with open_cache(valkey.url) as (cache, _):

        async def look(rng: random.Random) -> None:
            numbers = [rng.randrange(2500) for _ in range(rng.randrange(1, 60))]
            found = await cache.from_redis([b"key %d" % n for n in numbers])
            assert found == [bytes([n % 251]) * 200 if n < 2000 else None for n in numbers]

        await asyncio.gather(*(look(random.Random(i)) for i in range(400)))
        with valkey.client() as client:
            # Look-ups that met busy lanes shared their MGETs.
            assert client.info("commandstats")["cmdstat_mget"]["calls"] < 300


async def test_callers_that_leave_never_disturb_the_others(open_cache: Callable[..., Any], valkey: Any) -> None:
    async with open_cache(valkey.url) as (cache, _):
        cache.set_many(pairs(500))
        await cache.aclose()
    async with open_cache(valkey.url) as (cache, metric):
        rng = random.Random(7)

        async def look(i: int) -> None:
            assert await cache.from_redis([b"key %d" % i]) == [bytes([i % 251]) * 200]

        for _ in range(20):
            tasks = [asyncio.create_task(look(rng.randrange(500))) for _ in range(40)]
            await asyncio.sleep(rng.random() * 0.002)
            gone = rng.sample(tasks, 15)
            for task in gone:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                assert outcome is None or isinstance(outcome, asyncio.CancelledError)
        assert metric("embedmesh_cache_errors_total", operation="get", kind="corrupt") == 0
        assert metric("embedmesh_cache_errors_total", operation="get", kind="connection") == 0


async def test_values_corrupted_or_swapped_in_redis_are_misses(open_cache: Callable[..., Any], valkey: Any) -> None:
    async with open_cache(valkey.url) as (cache, _):
        cache.set_many(pairs(4))
    with valkey.client() as client:
        first, second = client.get(b"key 0"), client.get(b"key 1")
        client.set(b"key 0", second)
        client.set(b"key 1", first)
        client.setrange(b"key 2", 50, b"?")
        client.delete(b"key 3")
        client.lpush(b"key 3", b"of another type")
        client.set(b"key 4", b"")
    async with open_cache(valkey.url) as (cache, metric):
        keys = [b"key %d" % i for i in range(5)]
        assert await cache.from_redis(keys) == [None] * 5
        assert metric("embedmesh_cache_errors_total", operation="get", kind="corrupt") == 4
        # It heals: what is computed anew replaces it.
        cache.set_many(pairs(4))
        await cache.aclose()
    async with open_cache(valkey.url) as (cache, _):
        assert await cache.from_redis(keys[:4]) == [payload for _, payload in pairs(4)]


async def test_a_full_server_is_read_but_not_written(
    open_cache: Callable[..., Any], start_valkey: Callable[..., Any]
) -> None:
    valkey = start_valkey("--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    async with open_cache(valkey.url) as (cache, metric):
        cache.set_many(pairs(3))
        await cache.from_redis([b"key 0"])
        cache.set_many(pairs(4000, size=4000, start=10))
        await cache.aclose()
        assert metric("embedmesh_cache_errors_total", operation="set", kind="response") > 0
        assert metric("embedmesh_cache_breaker_open") == 0
    async with open_cache(valkey.url) as (cache, _):
        assert await cache.from_redis([b"key 1"]) == [b"\1" * 200]


async def test_a_flushed_server_is_empty_and_nothing_more(open_cache: Callable[..., Any], valkey: Any) -> None:
    async with open_cache(valkey.url) as (cache, metric):
        cache.set_many(pairs(3))
        with valkey.client() as client:
            client.flushall()
        await cache.from_redis([b"key 0"])
        assert metric("embedmesh_cache_errors_total", operation="get", kind="response") == 0


async def test_a_wrong_password_is_a_miss(open_cache: Callable[..., Any], start_valkey: Callable[..., Any]) -> None:
    valkey = start_valkey("--requirepass", "right")
    for url in (valkey.url, f"{valkey.url}?password=wrong"):
        async with open_cache(url) as (cache, metric):
            assert await cache.from_redis([b"key 0"]) == [None]
            cache.set_many(pairs(1))
            await cache.aclose()
            assert metric("embedmesh_cache_errors_total", operation="get", kind="response") == 1
    async with open_cache(f"{valkey.url}?password=right") as (cache, metric):
        assert await cache.from_redis([b"key 0"]) == [None]
        assert metric("embedmesh_cache_errors_total", operation="get", kind="response") == 0


async def test_a_read_only_replica_is_read(open_cache: Callable[..., Any], valkey: Any) -> None:
    async with open_cache(valkey.url) as (cache, _):
        cache.set_many(pairs(1))
    with valkey.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
    async with open_cache(valkey.url) as (cache, metric):
        assert await cache.from_redis([b"key 0"]) == [bytes(200)]
        cache.set_many(pairs(1))
        await cache.aclose()
        assert metric("embedmesh_cache_errors_total", operation="set", kind="response") == 1


async def test_a_server_that_is_gone_opens_the_breaker_and_is_found_again(
    open_cache: Callable[..., Any], valkey: Any, settle: Callable[..., Any]
) -> None:
    async with open_cache(valkey.url) as (cache, metric):
        assert await cache.from_redis([b"key 0"]) == [None]
        valkey.kill()
        for _ in range(5):
            assert await cache.from_redis([b"key 0"]) == [None]
        assert metric("embedmesh_cache_breaker_open") == 1
        assert metric("embedmesh_cache_errors_total", operation="get", kind="connection") == 5
        for _ in range(50):
            await cache.from_redis([b"key 0"])
        assert metric("embedmesh_cache_errors_total", operation="get", kind="connection") <= 7
        cache.set_many(pairs(10))
        await settle(lambda: metric("embedmesh_cache_errors_total", operation="set", kind="dropped") >= 1)
        valkey.start()
        while metric("embedmesh_cache_breaker_open"):
            await cache.from_redis([b"key 0"])
            await asyncio.sleep(0.01)
        cache.set_many(pairs(1))
        await cache.aclose()
    async with open_cache(valkey.url) as (cache, _):
        assert await cache.from_redis([b"key 0"]) == [bytes(200)]


async def test_a_hung_server_costs_the_time_limit_and_is_found_again(
    open_cache: Callable[..., Any], valkey: Any
) -> None:
    async with open_cache(valkey.url, timeout=0.05) as (cache, metric):
        cache.set_many(pairs(1))
        await cache.from_redis([b"key 0"])
        valkey.signal(signal.SIGSTOP)
        start = time.monotonic()
        found = await asyncio.gather(*(cache.from_redis([b"key 0"]) for _ in range(200)))
        assert found == [[None]] * 200
        assert time.monotonic() - start < GENEROUS
        assert metric("embedmesh_cache_breaker_open") == 1
        valkey.signal(signal.SIGCONT)
        end = time.monotonic() + 20
        while await cache.from_redis([b"key 0"]) != [bytes(200)]:
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
        assert metric("embedmesh_cache_breaker_open") == 0


async def test_a_late_answer_still_fills_the_memory(
    open_cache: Callable[..., Any], valkey: Any, settle: Callable[..., Any]
) -> None:
    async with open_cache(valkey.url) as (cache, _):
        cache.set_many(pairs(1))
    async with open_cache(valkey.url, timeout=0.3, memory_bytes=10_000) as (cache, metric):
        await cache.from_redis([b"other"])
        valkey.signal(signal.SIGSTOP)
        assert await cache.from_redis([b"key 0"]) == [None]
        assert metric("embedmesh_cache_errors_total", operation="get", kind="timeout") == 1
        valkey.signal(signal.SIGCONT)
        await settle(lambda: cache.from_memory([b"key 0"]) == [bytes(200)])


async def test_an_operation_that_hangs_is_given_up(
    open_cache: Callable[..., Any], valkey: Any, settle: Callable[..., Any]
) -> None:
    async with open_cache(valkey.url, timeout=0.02) as (cache, metric):
        await cache.from_redis([b"key 0"])
        valkey.signal(signal.SIGSTOP)
        await cache.from_redis([b"key 0"])
        cache.set_many(pairs(1))
        await settle(lambda: metric("embedmesh_cache_errors_total", operation="set", kind="timeout") == 1)
        await settle(lambda: "lanes=0/" in repr(cache))
        assert metric("embedmesh_cache_errors_total", operation="get", kind="timeout") == 2  # the caller, the lane
        valkey.signal(signal.SIGCONT)


async def test_more_than_the_queue_holds_is_dropped_and_counted(open_cache: Callable[..., Any], valkey: Any) -> None:
    async with open_cache(valkey.url, queue_bytes=3000) as (cache, metric):
        cache.set_many(pairs(100))
        assert metric("embedmesh_cache_errors_total", operation="set", kind="dropped") > 80
    with valkey.client() as client:
        assert 0 < client.dbsize() < 20


async def test_leaving_is_bounded_when_the_server_hangs(open_cache: Callable[..., Any], valkey: Any) -> None:
    start = time.monotonic()
    async with open_cache(valkey.url, flush_seconds=0.2) as (cache, metric):
        valkey.signal(signal.SIGSTOP)
        cache.set_many(pairs(1000))
    assert time.monotonic() - start < GENEROUS
    assert metric("embedmesh_cache_errors_total", operation="set", kind="dropped") > 0
    valkey.signal(signal.SIGCONT)


@asynccontextmanager
async def talking(reply: Callable[[bytes], bytes]) -> AsyncIterator[str]:
    """A server that answers every packet with `reply(packet)`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while packet := await reader.read(65536):
                writer.write(reply(packet))
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


GARBAGE: dict[str, Callable[[bytes], bytes]] = {
    "random": lambda packet: random.Random(zlib.crc32(packet)).randbytes(200),
    "ok": lambda packet: b"+OK\r\n",
    "nil": lambda packet: b"$-1\r\n",
    "number": lambda packet: b":7\r\n",
    "short list": lambda packet: b"*1\r\n$-1\r\n",
    "list of lists": lambda packet: b"*2\r\n*0\r\n:1\r\n",
    "two replies": lambda packet: b"*2\r\n$1\r\na\r\n$-1\r\n" * 2,
    "half a reply": lambda packet: b"*2\r\n$100\r\nabc",
    "http": lambda packet: b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "loading": lambda packet: b"-LOADING Redis is loading the dataset in memory\r\n",
    "error": lambda packet: b"-ERR no idea\r\n",
    "silence": lambda packet: b"",
}


@pytest.mark.parametrize("kind", GARBAGE)
async def test_garbage_is_a_miss_and_never_more(kind: str, open_cache: Callable[..., Any]) -> None:
    async with talking(GARBAGE[kind]) as url, open_cache(url, timeout=0.05, flush_seconds=0.1) as (cache, metric):
        start = time.monotonic()
        found = await asyncio.gather(*(cache.from_redis([b"key 0", b"key 1"]) for _ in range(50)))
        assert found == [[None, None]] * 50
        for _ in range(10):
            assert await cache.from_redis([b"key 0", b"key 1"]) == [None, None]
        cache.set_many(pairs(10))
        assert time.monotonic() - start < GENEROUS
        errors = sum(
            metric("embedmesh_cache_errors_total", operation="get", kind=kind)
            for kind in ("timeout", "connection", "corrupt", "response")
        )
        assert errors > 0


async def test_of_a_large_lookup_what_came_in_time_counts(open_cache: Callable[..., Any]) -> None:
    answered = 0

    def once(packet: bytes) -> bytes:
        nonlocal answered
        if b"MGET" not in packet:
            return b"+OK\r\n" * packet.count(b"SETINFO")
        answered += 1
        if answered > 1:
            return b""
        values = [seal(key, payload) for key, payload in pairs(256, size=10)]
        return b"*256\r\n" + b"".join(b"$%d\r\n%b\r\n" % (len(value), value) for value in values)

    async with talking(once) as url, open_cache(url, timeout=0.3) as (cache, metric):
        found = await cache.from_redis([key for key, _ in pairs(256)] + [b"late %d" % i for i in range(256)])
        assert found == [payload for _, payload in pairs(256, size=10)] + [None] * 256
        assert metric("embedmesh_cache_errors_total", operation="get", kind="timeout") == 1
        assert "<Breaker closed failures=0/5>" in repr(cache)


async def test_what_nobody_can_use_is_forgotten(open_cache: Callable[..., Any]) -> None:
    async with open_cache(memory_bytes=10_000) as (cache, metric):
        cache.set_many(pairs(1))
        cache.discard(b"key 0")
        assert cache.from_memory([b"key 0"]) == [None]
        assert metric("embedmesh_cache_errors_total", operation="get", kind="corrupt") == 1


async def test_the_password_is_not_in_the_repr(open_cache: Callable[..., Any]) -> None:
    async with open_cache("redis://:secret@127.0.0.1:1") as (cache, _):
        assert "secret" not in repr(cache)
