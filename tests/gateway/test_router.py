from __future__ import annotations

import asyncio
import math
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from embedmesh import vectors
from embedmesh.errors import (
    DeadlineExceeded,
    EmbedMeshError,
    EncoderUnreachable,
    InputTooLarge,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    Overloaded,
    UnsupportedOutput,
    from_rpc_error,
    from_status,
)
from embedmesh.v1 import audio_pb2, catalog_pb2, gateway_pb2, image_pb2, text_pb2
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_gateway.admission import Admission
from embedmesh_gateway.catalog import Catalog
from embedmesh_gateway.keys import cache_key
from embedmesh_gateway.redis_servers import seal
from embedmesh_gateway.router import Router
from embedmesh_server.metrics import GatewayMetrics

D = 32
REFRESH, BYPASS = gateway_pb2.CACHE_POLICY_REFRESH, gateway_pb2.CACHE_POLICY_BYPASS
INTERACTIVE, BULK = pb.PRIORITY_INTERACTIVE, pb.PRIORITY_BULK


def rows(response: gateway_pb2.EmbedResponse) -> NDArray[np.float32]:
    for result in response.results:
        assert result.HasField("embedding"), result.error
    return np.stack([vectors.dequantize(result.embedding.dense) for result in response.results])


def sent(encoder: Any) -> list[str]:
    return [item.text for item in encoder.inputs]


async def failure(call: Awaitable[Any]) -> EmbedMeshError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


def holding(encoder: Any) -> asyncio.Event:
    """Make the encoder keep every call until the event is set."""
    release = asyncio.Event()

    async def wait(request: Any) -> None:
        await release.wait()

    encoder.before = wait
    encoder.arrived.clear()
    return release


# Cancellation, overload, deadline and a failing Redis come first: there the peers broke.


async def test_a_cancelled_leader_does_not_fail_its_followers(mesh: Any, settle: Any) -> None:
    release = holding(mesh.text)
    leader = asyncio.create_task(mesh.embed(["a", "b"]))
    await mesh.text.arrived.wait()
    followers = [asyncio.create_task(mesh.embed(["b", "a"])) for _ in range(5)]
    await settle(lambda: mesh.metric("embedmesh_cache_lookups_total", tier="inflight", outcome="hit") == 10)
    leader.cancel()
    await settle(lambda: mesh.text.cancelled == 1)
    release.set()
    for response in await asyncio.gather(*followers):
        assert np.array_equal(rows(response), [mesh.expected("b"), mesh.expected("a")])
    assert len(mesh.text.calls) == 2  # the leader's, and one for all followers


async def test_a_leader_out_of_time_does_not_fail_its_followers(mesh: Any, settle: Any) -> None:
    release = holding(mesh.text)
    leader = asyncio.create_task(failure(mesh.embed(["a"], seconds=0.3)))
    await mesh.text.arrived.wait()
    follower = asyncio.create_task(mesh.embed(["a"]))
    assert isinstance(await leader, DeadlineExceeded)
    await settle(lambda: len(mesh.text.calls) == 2)
    release.set()
    assert np.array_equal(rows(await follower), [mesh.expected("a")])


async def test_a_follower_out_of_time_fails_alone(mesh: Any) -> None:
    release = holding(mesh.text)
    leader = asyncio.create_task(mesh.embed(["a"]))
    await mesh.text.arrived.wait()
    assert isinstance(await failure(mesh.embed(["a"], seconds=0.1)), DeadlineExceeded)
    release.set()
    assert np.array_equal(rows(await leader), [mesh.expected("a")])
    assert len(mesh.text.calls) == 1


async def test_an_interactive_caller_never_waits_for_bulk_work(mesh: Any, settle: Any) -> None:
    bulk_released = asyncio.Event()

    async def bulk_is_slow(request: Any) -> None:
        if request.priority == BULK:
            await bulk_released.wait()

    mesh.text.before = bulk_is_slow
    leader = asyncio.create_task(mesh.embed(["a", "b"], priority=BULK))
    await mesh.text.arrived.wait()
    assert np.array_equal(rows(await mesh.embed(["a"])), [mesh.expected("a")])
    # Bulk work may wait for bulk work.
    follower = asyncio.create_task(mesh.embed(["b"], priority=BULK))
    await settle(lambda: mesh.metric("embedmesh_cache_lookups_total", tier="inflight", outcome="hit") == 1)
    bulk_released.set()
    assert np.array_equal(rows(await leader), [mesh.expected("a"), mesh.expected("b")])
    assert np.array_equal(rows(await follower), [mesh.expected("b")])
    assert len(mesh.text.calls) == 2


async def test_bulk_work_joins_interactive_work(mesh: Any, settle: Any) -> None:
    release = holding(mesh.text)
    leader = asyncio.create_task(mesh.embed(["a"]))
    await mesh.text.arrived.wait()
    follower = asyncio.create_task(mesh.embed(["a"], priority=BULK))
    await settle(lambda: mesh.metric("embedmesh_cache_lookups_total", tier="inflight", outcome="hit") == 1)
    release.set()
    await asyncio.gather(leader, follower)
    assert len(mesh.text.calls) == 1


async def test_cancelling_a_call_cancels_its_calls_to_encoders(mesh: Any, settle: Any) -> None:
    holding(mesh.text)
    call = asyncio.create_task(mesh.embed([str(i) for i in range(200)]))  # four upstream calls
    await settle(lambda: mesh.text.running == 4)
    call.cancel()
    await settle(lambda: mesh.text.cancelled == 4 and mesh.text.running == 0)


async def test_overload_of_an_encoder_is_forwarded_unchanged(mesh: Any) -> None:
    async def full(request: Any) -> None:
        raise Overloaded("queue full", retry_after=0.25)

    mesh.text.before = full
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.embed(["a", "b"])
    error = from_rpc_error(caught.value)
    assert isinstance(error, Overloaded)
    assert (error.message, error.retry_after) == ("queue full", 0.25)
    assert ("grpc-retry-pushback-ms", "250") in tuple(caught.value.trailing_metadata() or ())
    assert len(mesh.text.calls) == 1  # an overloaded encoder is not asked again


async def test_overload_of_a_part_fails_that_part_only(mesh: Any) -> None:
    async def full(request: Any) -> None:
        if any(item.text == "7" for item in request.inputs):
            raise Overloaded("queue full", retry_after=0.25)

    mesh.text.before = full
    response = await mesh.embed([str(i) for i in range(130)])
    failed = [i for i, result in enumerate(response.results) if result.HasField("error")]
    assert failed == list(range(64))  # the call that carried input 7
    assert from_status(response.results[0].error).retry_after == 0.25
    assert response.usage.failed_inputs == 64


async def test_cached_inputs_are_answered_while_the_encoder_is_overloaded(mesh: Any) -> None:
    await mesh.embed(["a"])

    async def full(request: Any) -> None:
        raise Overloaded("queue full", retry_after=0.25)

    mesh.text.before = full
    response = await mesh.embed(["a", "b"])
    assert np.array_equal(vectors.decode(response.results[0].embedding.dense), mesh.expected("a"))
    assert isinstance(from_status(response.results[1].error), Overloaded)


async def test_the_gateway_refuses_what_does_not_fit(open_mesh: Any) -> None:
    async with open_mesh(max_inflight_inputs=10, max_inputs=20) as mesh:
        release = holding(mesh.text)
        first = asyncio.create_task(mesh.embed([str(i) for i in range(8)]))
        await mesh.text.arrived.wait()
        error = await failure(mesh.embed(["x", "y", "z"]))
        assert isinstance(error, Overloaded)
        assert error.retry_after is not None
        assert 0.05 <= error.retry_after <= 5
        assert mesh.metric("embedmesh_gateway_refused_inputs_total") == 3
        second = asyncio.create_task(mesh.embed(["x", "y"]))  # this much fits
        release.set()
        await asyncio.gather(first, second)
        # Alone, a request always fits.
        assert len((await mesh.embed([str(i) for i in range(20)])).results) == 20


async def test_bulk_work_leaves_room_for_interactive_work(open_mesh: Any) -> None:
    async with open_mesh(max_inflight_inputs=10) as mesh:
        release = holding(mesh.text)
        first = asyncio.create_task(mesh.embed(["1", "2", "3", "4", "5"], priority=BULK))
        await mesh.text.arrived.wait()
        assert isinstance(await failure(mesh.embed(["6"], priority=BULK)), Overloaded)
        second = asyncio.create_task(mesh.embed(["6", "7", "8", "9", "10"]))
        release.set()
        await asyncio.gather(first, second)


async def test_what_is_left_of_the_deadline_goes_with_the_call(mesh: Any) -> None:
    await mesh.embed(["a"], seconds=7)
    assert 4 < mesh.text.timeouts[-1] < 7.5


async def test_a_call_without_deadline_gets_the_default(open_mesh: Any) -> None:
    async with open_mesh(default_timeout_seconds=9) as mesh:
        await mesh.gateway.Embed(mesh.request(["a"]))
        assert 5 < mesh.text.timeouts[-1] < 9.5


async def test_an_encoder_that_is_gone_is_named_and_cached_inputs_are_still_answered(mesh: Any) -> None:
    await mesh.embed(["a"])
    await mesh.text.stop()
    assert np.array_equal(rows(await mesh.embed(["a"])), [mesh.expected("a")])
    error = await failure(mesh.embed(["b"]))
    assert isinstance(error, EncoderUnreachable)
    assert (error.code, error.metadata) == (grpc.StatusCode.UNAVAILABLE, {"modality": "text"})
    response = await mesh.embed(["a", "b"])
    assert response.results[0].cached
    assert isinstance(from_status(response.results[1].error), EncoderUnreachable)


async def test_an_encoder_never_seen_is_named(open_mesh: Any, make_encoder: Any) -> None:
    encoder = make_encoder("text")
    encoder.address = "127.0.0.1:1"
    async with open_mesh({"text": [encoder]}, ready=False) as mesh:
        error = await failure(mesh.embed(["a"]))
        assert isinstance(error, EncoderUnreachable)
        assert error.metadata == {"modality": "text"}


async def test_an_encoder_that_loads_says_so(open_mesh: Any) -> None:
    async with open_mesh() as mesh:

        async def loading(request: Any) -> None:
            raise NotReady("loading", retry_after=0.01)

        mesh.text.before = loading
        error = await failure(mesh.embed(["a"]))
        assert isinstance(error, NotReady)
        assert error.message == "loading"


@asynccontextmanager
async def load(mesh: Any, *, callers: int = 8) -> AsyncIterator[list[float]]:
    """Callers that check every answer, half old texts and half new; gives the seconds each call took."""
    took: list[float] = []
    stop = asyncio.Event()

    async def call(number: int) -> None:
        rng = random.Random(number)
        serial = 0
        while not stop.is_set():
            texts = [f"old {rng.randrange(50)}" for _ in range(5)]
            texts += [f"new {number} {serial} {i}" for i in range(5)]
            serial += 1
            rng.shuffle(texts)
            start = time.monotonic()
            response = await mesh.embed(texts)
            took.append(time.monotonic() - start)
            assert np.array_equal(rows(response), [mesh.expected(text) for text in texts])

    async with asyncio.TaskGroup() as group:
        for number in range(callers):
            group.create_task(call(number))
        try:
            yield took
        finally:
            stop.set()


async def calls(took: list[float], n: int, settle: Any) -> None:
    """Let `n` more calls pass."""
    enough = len(took) + n
    await settle(lambda: len(took) >= enough)


@pytest.mark.parametrize("how", ["kill", "hang", "flush", "fill"])
async def test_redis_failing_under_load_fails_no_call(how: str, open_mesh: Any, start_valkey: Any, settle: Any) -> None:
    valkey = start_valkey()
    async with open_mesh(redis_url=valkey.url, cache_memory_bytes=0) as mesh, load(mesh) as took:
        await calls(took, 30, settle)
        before = len(took)
        if how == "kill":
            valkey.kill()
        elif how == "hang":
            valkey.signal(signal.SIGSTOP)
        elif how == "fill":
            with valkey.client() as client:
                client.config_set("maxmemory-policy", "noeviction")
                client.config_set("maxmemory", "1")
        else:
            with valkey.client() as client:
                client.flushall()
        await calls(took, 60, settle)
        assert max(took[before:]) < 5  # the limit is 50 ms; this machine may be busy
        if how in ("kill", "hang"):
            await settle(lambda: mesh.metric("embedmesh_cache_breaker_open") == 1)
        if how == "kill":
            valkey.start()
        valkey.signal(signal.SIGCONT)
        if how == "fill":
            assert mesh.metric("embedmesh_cache_errors_total", operation="set", kind="response") > 0
            with valkey.client() as client:
                client.config_set("maxmemory", "0")
        hits = mesh.metric("embedmesh_cache_lookups_total", tier="redis", outcome="hit")
        await settle(lambda: mesh.metric("embedmesh_cache_lookups_total", tier="redis", outcome="hit") > hits + 20)
        assert mesh.metric("embedmesh_cache_breaker_open") == 0


async def test_redis_answering_garbage_under_load_fails_no_call(open_mesh: Any, settle: Any) -> None:
    rng = random.Random(3)

    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.read(65536):
                writer.write(rng.choice([rng.randbytes(300), b"+OK\r\n", b"$5\r\nhello\r\n", b"*1\r\n$-1\r\n"]))
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with open_mesh(redis_url=url, cache_memory_bytes=0) as mesh, load(mesh) as took:
        await calls(took, 80, settle)
        assert max(took) < 5
    server.close()


async def test_values_swapped_and_damaged_in_redis_are_computed_anew(
    cached_mesh: Any, valkey: Any, settle: Any
) -> None:
    texts = [f"text {i}" for i in range(40)]
    await cached_mesh.embed(texts)
    with valkey.client() as client:
        await settle(lambda: client.dbsize() == 40)
        keys = sorted(client.scan_iter())
        values = [client.get(key) for key in keys]
        for key, value in zip(keys[:20], reversed(values[:20]), strict=True):
            client.set(key, value)
        for key, value in zip(keys[20:30], values[20:30], strict=True):
            client.set(key, value[:50] + b"??" + value[52:])
    response = await cached_mesh.embed(texts)
    assert np.array_equal(rows(response), [cached_mesh.expected(text) for text in texts])
    assert response.usage.cached_inputs == 10
    assert cached_mesh.metric("embedmesh_cache_errors_total", operation="get", kind="corrupt") == 30


async def test_what_the_gateway_cannot_use_is_computed_anew(open_mesh: Any, valkey: Any) -> None:
    """Values with a right checksum that are no vector of this model: nonsense, another width, no vector."""
    ref = pb.ModelRef(name="fake-text", revision="r1", space="shared")
    narrow = pb.EmbedResult()
    narrow.embedding.dense.CopyFrom(pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2], data=bytes(8)))
    payloads = {"a": b"\xff\xff", "b": narrow.SerializeToString(), "c": b""}
    with valkey.client() as client:
        for content, payload in payloads.items():
            key = cache_key(ref, "text", pb.TRUNCATION_END, text(content))
            client.set(key, seal(key, payload))
    async with open_mesh(redis_url=valkey.url) as mesh:
        response = await mesh.embed(list("abc"))
        assert np.array_equal(rows(response), [mesh.expected(content) for content in "abc"])
        assert response.usage.cached_inputs == 0
        assert mesh.metric("embedmesh_cache_errors_total", operation="get", kind="corrupt") == 3
        assert (await mesh.embed(list("abc"))).usage.cached_inputs == 3


# Room.


async def test_who_waits_for_room_gets_in_by_turn() -> None:
    admission = Admission(10, lambda n, full, pause: Overloaded(f"{full.inputs} and {n}", retry_after=pause))
    entered: list[int] = []

    async def work(n: int, leave: asyncio.Event, *, patient: bool = True) -> None:
        async with admission.hold(n, bulk=False, patient=patient, deadline=math.inf):
            entered.append(n)
            await leave.wait()

    first, later = asyncio.Event(), asyncio.Event()
    tasks = [asyncio.create_task(work(8, first))]
    await asyncio.sleep(0)
    tasks += [asyncio.create_task(work(n, later)) for n in (9, 1)]
    await asyncio.sleep(0)
    # One would fit, but it is not its turn.
    assert entered == [8]
    assert repr(admission) == "<Admission inputs=8/10 waiting=2>"
    tasks[1].cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert entered == [8, 1]
    first.set()
    later.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert admission.inputs == 0


async def test_who_waits_for_room_too_long_is_told() -> None:
    admission = Admission(10, lambda n, full, pause: Overloaded(f"{full.inputs} and {n}", retry_after=pause))
    now = asyncio.get_running_loop().time()
    async with admission.hold(10, bulk=False, patient=False, deadline=math.inf):
        with pytest.raises(DeadlineExceeded):
            async with admission.hold(1, bulk=True, patient=True, deadline=now + 0.05):
                pytest.fail("there is no room")
    assert (admission.inputs, repr(admission)) == (0, "<Admission inputs=0/10 waiting=0>")


async def test_who_leaves_in_the_moment_of_getting_in_leaves_the_room() -> None:
    admission = Admission(10, lambda n, full, pause: Overloaded(f"{full.inputs} and {n}", retry_after=pause))

    async def wait() -> None:
        async with admission.hold(5, bulk=False, patient=True, deadline=math.inf):
            pytest.fail("it was cancelled")

    async with admission.hold(10, bulk=False, patient=False, deadline=math.inf):
        waiter = asyncio.create_task(wait())
        await asyncio.sleep(0)
    waiter.cancel()  # its turn has come, but it has not run yet
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert admission.inputs == 0


async def test_the_repr_tells_the_state(open_cache: Any) -> None:
    async with open_cache() as (cache, _):
        metrics = GatewayMetrics(CollectorRegistry())
        catalog = Catalog({}, refresh_seconds=1, metrics=metrics)
        router = Router(catalog, {}, cache, metrics, max_inputs=1, max_inflight_inputs=7, max_message_bytes=1 << 20)
        assert repr(router).startswith("<Router flights=0 <Admission inputs=0/7 waiting=0> <VectorCache memory only")


# Hits and misses.


async def test_the_second_pass_asks_no_encoder(cached_mesh: Any, valkey: Any, settle: Any) -> None:
    texts = [f"text {i}" for i in range(300)]
    first = await cached_mesh.embed(texts)
    with valkey.client() as client:
        await settle(lambda: client.dbsize() == 300)
        assert all(0 < client.ttl(key) <= 7 * 86400 for key in client.scan_iter())
    asked = len(cached_mesh.text.calls)
    second = await cached_mesh.embed(texts)
    assert len(cached_mesh.text.calls) == asked
    assert np.array_equal(rows(first), rows(second))
    assert (first.usage.cached_inputs, second.usage.cached_inputs) == (0, 300)
    assert all(result.cached for result in second.results)
    assert first.usage.input_units == second.usage.input_units > 0
    assert list(second.models) == [cached_mesh.text.info.model]
    assert cached_mesh.metric("embedmesh_cache_lookups_total", tier="redis", outcome="hit") == 300


async def test_the_second_pass_is_served_from_memory_without_redis(open_mesh: Any, valkey: Any) -> None:
    async with open_mesh(redis_url=valkey.url) as mesh:
        await mesh.embed(["a", "b"])
        assert (await mesh.embed(["b", "a"])).usage.cached_inputs == 2
        assert mesh.metric("embedmesh_cache_lookups_total", tier="redis", outcome="hit") == 0


async def test_of_a_half_new_request_only_the_new_half_is_computed(mesh: Any) -> None:
    await mesh.embed([f"old {i}" for i in range(10)])
    mesh.text.calls.clear()
    texts = [f"{'old' if i % 2 else 'new'} {i // 2}" for i in range(20)]
    response = await mesh.embed(texts)
    assert np.array_equal(rows(response), [mesh.expected(text) for text in texts])
    assert sent(mesh.text) == [f"new {i}" for i in range(10)]
    assert [result.cached for result in response.results] == [bool(i % 2) for i in range(20)]


async def test_concurrent_identical_misses_are_computed_once(mesh: Any, settle: Any) -> None:
    release = holding(mesh.text)
    tasks = [asyncio.create_task(mesh.embed([f"t{(i + j) % 10}" for j in range(10)])) for i in range(10)]
    await settle(lambda: mesh.metric("embedmesh_cache_lookups_total", tier="inflight", outcome="hit") == 90)
    release.set()
    for i, response in enumerate(await asyncio.gather(*tasks)):
        assert np.array_equal(rows(response), [mesh.expected(f"t{(i + j) % 10}") for j in range(10)])
        assert response.usage.cached_inputs == 0
    assert sorted(sent(mesh.text)) == [f"t{i}" for i in range(10)]


async def test_equal_inputs_of_a_request_share_one_computation(mesh: Any) -> None:
    texts = ["a", "b", "a", "a", "c", "b"]
    response = await mesh.embed(texts)
    assert np.array_equal(rows(response), [mesh.expected(text) for text in texts])
    assert sent(mesh.text) == ["a", "b", "c"]
    assert not any(result.cached for result in response.results)
    assert response.usage.input_units == 6 * 4


async def test_refresh_computes_anew_and_replaces(cached_mesh: Any, valkey: Any, settle: Any) -> None:
    await cached_mesh.embed(["a"])
    with valkey.client() as client:
        await settle(lambda: client.dbsize() == 1)
        (key,) = client.keys()
        client.set(key, b"spoilt", px=1_000_000)
        response = await cached_mesh.embed(["a", "a"], cache=REFRESH)
        assert not response.results[0].cached
        assert sent(cached_mesh.text) == ["a", "a"]
        await settle(lambda: client.get(key) != b"spoilt")
    assert (await cached_mesh.embed(["a"])).results[0].cached


async def test_refresh_does_not_join_what_may_come_from_the_cache(mesh: Any, settle: Any) -> None:
    release = holding(mesh.text)
    first = asyncio.create_task(mesh.embed(["a"]))
    await mesh.text.arrived.wait()
    second = asyncio.create_task(mesh.embed(["a"], cache=REFRESH))
    await settle(lambda: len(mesh.text.calls) == 2)
    third = asyncio.create_task(mesh.embed(["a"]))  # joins the newer one
    await settle(lambda: mesh.metric("embedmesh_cache_lookups_total", tier="inflight", outcome="hit") == 1)
    release.set()
    await asyncio.gather(first, second, third)
    assert len(mesh.text.calls) == 2


async def test_bypass_neither_reads_nor_writes_nor_shares(cached_mesh: Any, valkey: Any) -> None:
    response = await cached_mesh.embed(["a", "b", "a"], cache=BYPASS)
    assert np.array_equal(rows(response), [cached_mesh.expected(text) for text in ("a", "b", "a")])
    assert sent(cached_mesh.text) == ["a", "b", "a"]
    await cached_mesh.embed(["a"], cache=BYPASS)
    assert len(cached_mesh.text.calls) == 2
    with valkey.client() as client:
        assert client.dbsize() == 0
        assert "cmdstat_mget" not in client.info("commandstats")


# The key.


def text(content: str, role: int = 0, instruction: str = "") -> text_pb2.TextInput:
    return text_pb2.TextInput(text=content, role=text_pb2.TextRole.ValueType(role), instruction=instruction)


def test_all_that_changes_a_vector_changes_its_key() -> None:
    ref = pb.ModelRef(name="m", revision="r", space="s")
    pcm = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[4], data=b"0123456789abcdef")
    square = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2, 2], data=b"0123456789abcdef")
    items: list[tuple[Any, str, Any, Any]] = [
        (ref, "text", pb.TRUNCATION_END, text("content")),
        (ref, "text", pb.TRUNCATION_END, text("other")),
        (ref, "text", pb.TRUNCATION_START, text("content")),
        (ref, "text", pb.TRUNCATION_REFUSE, text("content")),
        (ref, "text", pb.TRUNCATION_END, text("content", role=1)),
        (ref, "text", pb.TRUNCATION_END, text("content", role=2)),
        (ref, "text", pb.TRUNCATION_END, text("content", instruction="i")),
        (ref, "text", pb.TRUNCATION_END, text("", instruction="content")),
        (ref, "text", pb.TRUNCATION_END, text("ontent", instruction="c")),
        (ref, "text", pb.TRUNCATION_END, text("tent", instruction="con")),
        (pb.ModelRef(name="m", revision="r2", space="s"), "text", pb.TRUNCATION_END, text("content")),
        (pb.ModelRef(name="m", revision="r", space="s2"), "text", pb.TRUNCATION_END, text("content")),
        (pb.ModelRef(name="m", revision="rs", space=""), "text", pb.TRUNCATION_END, text("content")),
        (ref, "image", pb.TRUNCATION_END, image_pb2.ImageInput(content=b"content")),
        (ref, "image", pb.TRUNCATION_END, image_pb2.ImageInput(content=b"content", text="a")),
        (ref, "image", pb.TRUNCATION_END, image_pb2.ImageInput(content=b"content", instruction="a")),
        (ref, "image", pb.TRUNCATION_END, image_pb2.ImageInput(content=b"content", text="ab")),
        (ref, "image", pb.TRUNCATION_END, image_pb2.ImageInput(content=b"content", text="b", instruction="a")),
        (ref, "audio", pb.TRUNCATION_END, audio_pb2.AudioInput(content=b"content")),
        (ref, "audio", pb.TRUNCATION_END, audio_pb2.AudioInput(pcm=audio_pb2.PcmAudio(samples=pcm))),
        (ref, "audio", pb.TRUNCATION_END, audio_pb2.AudioInput(pcm=audio_pb2.PcmAudio(samples=square))),
        (
            ref,
            "audio",
            pb.TRUNCATION_END,
            audio_pb2.AudioInput(pcm=audio_pb2.PcmAudio(samples=pcm, sample_rate_hz=8000)),
        ),
        (ref, "audio", pb.TRUNCATION_END, audio_pb2.AudioInput(content=b"0123456789abcdef")),
    ]
    keys = [cache_key(*item) for item in items]
    assert len(set(keys)) == len(keys)
    assert keys == [cache_key(*item) for item in items]
    assert all(key.startswith(b"em1:") and len(key) == 20 for key in keys)


def test_keys_of_pictures_without_text_stay() -> None:
    ref = pb.ModelRef(name="m", revision="r", space="s")
    key = cache_key(ref, "image", pb.TRUNCATION_END, image_pb2.ImageInput(content=b"content"))
    assert key.hex() == "656d313a67d75b79e0a95ce09b409bb80f4ad6f8"


@given(st.tuples(st.text(max_size=4), st.text(max_size=4)), st.tuples(st.text(max_size=4), st.text(max_size=4)))
def test_parts_never_run_together(one: tuple[str, str], other: tuple[str, str]) -> None:
    ref = pb.ModelRef(name="m", revision="r", space="s")
    keys = [
        cache_key(ref, "text", pb.TRUNCATION_END, text(content, instruction=instruction))
        for instruction, content in (one, other)
    ]
    assert (keys[0] == keys[1]) == (one == other)


def test_keys_tell_passes_apart() -> None:
    ref = pb.ModelRef(name="m", revision="r", space="s")

    def key(truncation: Any, units: int = 0, overlap: int = 0, **given: Any) -> bytes:
        item = text_pb2.TextInput(text="x", **given)
        return cache_key(ref, "text", truncation, item, pb.Chunking(units=units, overlap=overlap))

    end, chunk = pb.TRUNCATION_END, pb.TRUNCATION_CHUNK
    keys = [
        key(end),
        key(chunk),
        key(chunk, 12),
        key(chunk, 1, 2),
        key(chunk, 0, 12),
        key(end, instruction="a"),
        key(end, instructions=["a"]),
        key(end, instructions=["a", "b"]),
        key(end, instructions=["b", "a"]),
        key(end, instructions=["ab"]),
        key(chunk, instructions=["ab"]),
    ]
    assert len(set(keys)) == len(keys)
    assert key(end, 12) == key(end)  # what is not cut has no chunks
    # A key of the first release: caches stay warm.
    assert key(end).hex() == "656d313a11382f8da77f4e7625d50e76dc609e79"


async def test_chunking_and_instructions_reach_the_encoder_and_are_cached_apart(mesh: Any) -> None:
    plain = text("x")
    several = text_pb2.TextInput(text="x", instructions=["a", "b"])
    chunking = pb.Chunking(units=12, overlap=3)
    for cached in (False, True):
        response = await mesh.embed([plain, several], truncation=pb.TRUNCATION_CHUNK, chunking=chunking)
        assert [result.cached for result in response.results] == [cached] * 2
    (call,) = mesh.encoders["text"][0].calls
    assert (call.truncation, call.chunking) == (pb.TRUNCATION_CHUNK, chunking)
    assert [list(each.instructions) for each in call.inputs] == [[], ["a", "b"]]
    other = await mesh.embed([plain], truncation=pb.TRUNCATION_CHUNK, chunking=pb.Chunking(units=12))
    assert not other.results[0].cached
    with pytest.raises(grpc.aio.AioRpcError, match="truncation CHUNK"):
        await mesh.embed([plain], chunking=chunking)


async def test_roles_and_instructions_never_share_a_vector(mesh: Any) -> None:
    inputs = [text("x"), text("x", 1), text("x", 2), text("x", 0, "i"), text("x", 1, "i"), text("ix")]
    for _ in range(2):
        response = await mesh.embed(inputs)
        assert np.array_equal(rows(response), [mesh.expected(item) for item in inputs])


async def test_unset_truncation_means_end(mesh: Any) -> None:
    await mesh.embed(["x"])
    assert (await mesh.embed(["x"], truncation=pb.TRUNCATION_END)).results[0].cached
    start = await mesh.embed(["x"], truncation=pb.TRUNCATION_START)
    assert np.array_equal(rows(start), [mesh.expected("x", truncation=pb.TRUNCATION_START)])


async def test_truncation_is_told_also_from_the_cache(mesh: Any) -> None:
    for _ in range(2):
        (result,) = (await mesh.embed(["x" * 100])).results
        assert (result.truncated, result.original_units, result.input_units) == (True, 103, 64)
    assert mesh.metric("embedmesh_gateway_truncated_inputs_total", model="fake-text") == 2


# Errors.


async def test_one_bad_input_hurts_only_itself_and_is_named_by_its_place(mesh: Any) -> None:
    texts = [f"t{i}" for i in range(150)]
    bad = (3, 70, 71, 149)
    for place in bad:
        texts[place] = "[[bad]]"
    response = await mesh.embed(texts)
    for place, result in enumerate(response.results):
        if place in bad:
            error = from_status(result.error)
            assert isinstance(error, InvalidRequest)
            assert error.field == f"inputs[{place}].text"
        else:
            assert np.array_equal(vectors.decode(result.embedding.dense), mesh.expected(texts[place]))
    assert response.usage.failed_inputs == 4
    assert mesh.metric("embedmesh_gateway_inputs_total", modality="text", outcome="INVALID_REQUEST") == 4
    assert mesh.metric("embedmesh_gateway_inputs_total", modality="text", outcome="ok") == 146


async def test_errors_are_not_cached(cached_mesh: Any, valkey: Any) -> None:
    for _ in range(2):
        response = await cached_mesh.embed(["[[bad]]", "[[failed]]"])
        assert response.usage.failed_inputs == 2
    assert sent(cached_mesh.text) == ["[[bad]]", "[[failed]]"] * 2
    with valkey.client() as client:
        assert client.dbsize() == 0


async def test_an_input_without_modality_fails_alone(mesh: Any) -> None:
    response = await mesh.embed(["a", None, "b"])
    assert [result.HasField("error") for result in response.results] == [False, True, False]
    assert from_status(response.results[1].error).field == "inputs[1]"


async def test_no_inputs_no_results(mesh: Any) -> None:
    response = await mesh.embed([])
    assert (len(response.results), len(response.models)) == (0, 0)


async def test_requests_that_break_the_contract_are_refused(mesh: Any) -> None:
    error = await failure(mesh.embed(["x"] * 1025))
    assert isinstance(error, InputTooLarge)
    assert error.metadata == {"limit": "1024", "actual": "1025", "unit": "inputs"}
    for option in ("truncation", "priority", "cache"):
        error = await failure(mesh.embed(["x"], **{option: 99}))
        assert isinstance(error, InvalidRequest)
        assert error.field == option
    assert mesh.text.calls == []


@pytest.mark.parametrize(
    ("output", "option"),
    [
        ({"dimensions": 7}, "dimensions"),
        ({"dimensions": 64}, "dimensions"),
        ({"dtype": pb.DTYPE_UINT32}, "dtype"),
        ({"dtype": 99}, "dtype"),
        ({"kinds": [pb.EMBEDDING_KIND_SPARSE]}, "kinds"),
        ({"kinds": [99]}, "kinds"),
    ],
)
async def test_what_a_model_does_not_offer_is_refused_before_any_work(
    mesh: Any, output: dict[str, Any], option: str
) -> None:
    await mesh.embed(["x"])
    error = await failure(mesh.embed(["x", "y"], output=pb.OutputOptions(**output)))
    assert isinstance(error, UnsupportedOutput)
    assert (error.field, error.metadata) == (f"output.{option}", {"option": option})
    assert len(mesh.text.calls) == 1


def spoil_number(response: Any) -> None:
    del response.results[-1]


def spoil_model(response: Any) -> None:
    response.results[0].model_index = 5


def spoil_shape(response: Any) -> None:
    response.results[0].embedding.dense.shape[0] = D + 1


def spoil_width(response: Any) -> None:
    dense = response.results[0].embedding.dense
    dense.shape[0], dense.data = D // 2, dense.data[: 2 * D]


def spoil_dtype(response: Any) -> None:
    response.results[0].embedding.dense.dtype = pb.DTYPE_FLOAT16


def spoil_outcome(response: Any) -> None:
    response.results[0].ClearField("embedding")


def spoil_kind(response: Any) -> None:
    response.results[0].embedding.ClearField("dense")


@pytest.mark.parametrize(
    "spoil", [spoil_number, spoil_model, spoil_shape, spoil_width, spoil_dtype, spoil_outcome, spoil_kind]
)
async def test_an_encoder_that_breaks_the_contract_is_not_believed(mesh: Any, spoil: Any) -> None:
    mesh.text.after = spoil
    if spoil is spoil_number:
        assert isinstance(await failure(mesh.embed(["a", "b"])), InternalError)
    else:
        response = await mesh.embed(["a", "b"])
        error = from_status(response.results[0].error)
        assert isinstance(error, InternalError)
        assert error.metadata["request_id"]
        assert np.array_equal(vectors.decode(response.results[1].embedding.dense), mesh.expected("b"))
    mesh.text.after = None
    response = await mesh.embed(["a", "b"])
    assert np.array_equal(rows(response), [mesh.expected("a"), mesh.expected("b")])
    assert not response.results[0].cached


async def test_an_input_too_large_for_any_message_fails_alone(open_mesh: Any) -> None:
    async with open_mesh(max_message_bytes=1 << 20, max_inputs=10) as mesh:
        # Larger than what is left of a message after the slack, yet the request itself still fits.
        response = await mesh.embed(["x" * ((1 << 20) - 50_000), "y"])
        error = from_status(response.results[0].error)
        assert isinstance(error, InputTooLarge)
        assert error.field == "inputs[0]"
        assert np.array_equal(vectors.decode(response.results[1].embedding.dense), mesh.expected("y"))


# Splitting.


async def test_a_request_is_split_by_the_encoders_limit_and_sent_at_once(mesh: Any, settle: Any) -> None:
    release = holding(mesh.text)
    texts = [str(i) for i in range(150)]
    call = asyncio.create_task(mesh.embed(texts))
    await settle(lambda: mesh.text.running == 3)
    release.set()
    assert np.array_equal(rows(await call), [mesh.expected(text) for text in texts])
    assert sorted(len(call.inputs) for call in mesh.text.calls) == [22, 64, 64]


async def test_a_request_is_split_by_bytes(open_mesh: Any) -> None:
    async with open_mesh(max_message_bytes=1 << 20) as mesh:
        texts = [f"{i}" * 200_000 for i in range(1, 6)]
        response = await mesh.embed(texts[:4])
        assert np.array_equal(rows(response), [mesh.expected(text) for text in texts[:4]])
        assert len(mesh.text.calls) == 1
        await mesh.embed([text[:199_999] for text in texts])
        assert len(mesh.text.calls) == 3


# Several modalities.


def wav(i: int) -> audio_pb2.AudioInput:
    return audio_pb2.AudioInput(content=b"sound %d" % i)


@pytest.fixture
def three(make_encoder: Callable[..., Any]) -> dict[str, list[Any]]:
    return {modality: [make_encoder(modality)] for modality in ("text", "image", "audio")}


def mixed(n: int) -> list[Any]:
    return [(f"text {i}", b"picture %d" % i, wav(i))[random.Random(i).randrange(3)] for i in range(n)]


def modality_of(item: Any) -> str:
    return "text" if isinstance(item, str) else "image" if isinstance(item, bytes) else "audio"


async def test_modalities_are_computed_at_once_and_merged_in_order(open_mesh: Any, three: Any) -> None:
    async with open_mesh(three) as mesh:
        barrier = asyncio.Barrier(3)

        async def meet(request: Any) -> None:
            # Passes only when an encoder of each modality is here at the same time.
            if request.inputs[0].SerializeToString() in firsts:
                await barrier.wait()

        inputs = mixed(300)
        request = mesh.request(inputs)
        firsts = set()
        for modality in three:
            first = next(getattr(i, modality) for i in request.inputs if i.WhichOneof("modality") == modality)
            firsts.add(first.SerializeToString())
        for (encoder,) in three.values():
            encoder.before = meet
        response = await mesh.gateway.Embed(request, timeout=20)
        expected = [mesh.expected(item, modality_of(item)) for item in inputs]
        assert np.array_equal(rows(response), expected)
        names = [response.models[result.model_index].name for result in response.results]
        assert names == [f"fake-{modality_of(item)}" for item in inputs]
        assert len(response.models) == 3
        again = await mesh.embed(inputs)
        assert again.usage.cached_inputs == 300
        assert np.array_equal(rows(again), expected)


async def test_a_modality_that_fails_hurts_only_its_inputs(open_mesh: Any, three: Any) -> None:
    async with open_mesh(three) as mesh:
        await three["image"][0].stop()
        response = await mesh.embed(["a", b"p", wav(1)])
        assert [result.HasField("error") for result in response.results] == [False, True, False]
        assert from_status(response.results[1].error).metadata == {"modality": "image"}


async def test_a_modality_that_is_not_offered_fails_alone(mesh: Any) -> None:
    response = await mesh.embed(["a", b"p"])
    assert response.results[0].HasField("embedding")
    assert isinstance(from_status(response.results[1].error), ModelNotFound)
    assert isinstance(await failure(mesh.embed([b"p"])), ModelNotFound)


async def test_large_pictures_are_told_apart(open_mesh: Any, three: Any) -> None:
    async with open_mesh(three) as mesh:
        pictures = [bytes([i]) * 200_000 for i in range(4)]
        for _ in range(2):
            response = await mesh.embed(pictures)
            assert np.array_equal(rows(response), [mesh.expected(picture, "image") for picture in pictures])
        assert response.usage.cached_inputs == 4


async def test_a_family_answers_each_modality_with_its_tower(open_mesh: Any, three: Any) -> None:
    async with open_mesh(three) as mesh:
        response = await mesh.embed(["a", b"p"], model="fake")
        assert [ref.name for ref in response.models] == ["fake-text", "fake-image"]
        assert mesh.text.calls[0].model == "fake-text"


async def test_one_name_for_several_spaces_is_refused(open_mesh: Any, make_encoder: Any) -> None:
    encoders = {"text": [make_encoder("text", space="one")], "image": [make_encoder("image", space="two")]}
    async with open_mesh(encoders) as mesh:
        error = await failure(mesh.embed(["a", b"p"], model="fake"))
        assert isinstance(error, InvalidRequest)
        assert error.field == "model"
        # Nobody promised one space here; the models say which is whose.
        response = await mesh.embed(["a", b"p"])
        assert [ref.space for ref in response.models] == ["one", "two"]


# Models and revisions.


async def test_models_are_found_by_name_revision_and_family(mesh: Any) -> None:
    for wanted in ("", "fake-text", "fake-text@r1", "fake"):
        assert (await mesh.embed(["x"], model=wanted)).models[0].name == "fake-text"
    assert len(mesh.text.calls) == 1
    for wanted in ("other", "fake-text@r2", "fake@r1"):
        error = await failure(mesh.embed(["x"], model=wanted))
        assert isinstance(error, ModelNotFound)
        assert error.metadata == {"model": wanted}


async def test_a_pinned_revision_is_asked_for(mesh: Any) -> None:
    await mesh.embed(["x"], model="fake-text@r1")
    assert mesh.text.calls[0].model == "fake-text@r1"

    def lie(response: Any) -> None:
        response.models[0].revision = "r2"

    mesh.text.after = lie
    (result,) = (await mesh.embed(["y"], model="fake-text@r1")).results
    assert isinstance(from_status(result.error), InternalError)


async def test_a_rolling_upgrade_neither_fails_nor_poisons_the_cache(
    open_mesh: Any, make_encoder: Any, settle: Any
) -> None:
    encoder = make_encoder("text")
    async with open_mesh({"text": [encoder]}, catalog_refresh_seconds=1000) as mesh:
        old = mesh.expected("a")
        assert np.array_equal(rows(await mesh.embed(["a"])), [old])
        encoder.info.model.revision = "r2"  # now it answers with another revision than catalogued
        response = await mesh.embed(["a", "b"])
        assert np.array_equal(rows(response), [old, mesh.expected("b")])
        assert [ref.revision for ref in response.models] == ["r1", "r2"]
        # The answer made the gateway look again; from then on the old vector is no longer given.
        labels = {"model": "fake-text", "revision": "r2", "space": "shared", "modality": "text", "family": "fake"}
        await settle(lambda: mesh.metric("embedmesh_gateway_model_info", **labels) == 1)
        response = await mesh.embed(["a", "b"])
        assert np.array_equal(rows(response), [mesh.expected("a"), mesh.expected("b")])
        assert [result.cached for result in response.results] == [False, True]
        assert [ref.revision for ref in response.models] == ["r2"]


# What goes out.


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("dtype", [pb.DTYPE_UNSPECIFIED, pb.DTYPE_FLOAT16, pb.DTYPE_INT8, pb.DTYPE_BINARY])
@pytest.mark.parametrize("normalize", [None, True, False])
async def test_width_dtype_and_norm_are_cut_from_the_cached_vector(
    open_mesh: Any, make_encoder: Any, normalized: bool, dtype: pb.Dtype.ValueType, normalize: bool | None
) -> None:
    async with open_mesh({"text": [make_encoder("text", normalized=normalized)]}) as mesh:
        texts = ["a", "b", "c"]
        first = await mesh.embed(texts)
        pooled = np.stack([vectors.decode(r.embedding.dense) for r in first.results])
        norms = np.array([r.embedding.dense_norm for r in first.results], np.float32)
        if normalized:
            pooled = pooled * norms[:, None]
        for dimensions in (0, 8, 16, D):
            options = pb.OutputOptions(dimensions=dimensions, dtype=dtype, normalize=normalize)
            cached = await mesh.embed(texts, output=options)
            direct = await mesh.embed(texts, output=options, cache=BYPASS)
            assert cached.usage.cached_inputs == 3
            assert [r.embedding for r in cached.results] == [r.embedding for r in direct.results]
            wanted = pooled[:, : dimensions or D]
            if normalize or (normalize is None and normalized):
                wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
            tensors = [pb.Tensor() for _ in texts]
            output = vectors.DenseOutput(normalize=False, dtype=dtype or pb.DTYPE_FLOAT32)
            vectors.finish_dense(wanted.astype(np.float32), None, output, tensors)
            for result, tensor in zip(cached.results, tensors, strict=True):
                assert list(result.embedding.dense.shape) == [dimensions or D]
                assert np.allclose(
                    vectors.dequantize(result.embedding.dense), vectors.dequantize(tensor), atol=2e-2, rtol=1e-3
                )
                assert result.embedding.dense_norm > 0
        untouched = await mesh.embed(texts)
        assert [r.embedding for r in untouched.results] == [r.embedding for r in first.results]


async def test_a_norm_that_was_not_told_cannot_be_undone(mesh: Any) -> None:
    def forget(response: Any) -> None:
        response.results[0].embedding.dense_norm = 0

    mesh.text.after = forget
    response = await mesh.embed(["a", "b"], output=pb.OutputOptions(normalize=False))
    assert isinstance(from_status(response.results[0].error), InternalError)
    assert response.results[1].HasField("embedding")
    assert response.usage.failed_inputs == 1


DENSE, SPARSE, MULTI = pb.EMBEDDING_KIND_DENSE, pb.EMBEDDING_KIND_SPARSE, pb.EMBEDDING_KIND_MULTI_VECTOR


@pytest.fixture
async def kinds_mesh(open_mesh: Any, make_encoder: Any, valkey: Any) -> AsyncIterator[Any]:
    """Of a model that makes all kinds of vector."""
    encoder = make_encoder("text", kinds=[DENSE, SPARSE, MULTI])
    async with open_mesh({"text": [encoder]}, redis_url=valkey.url) as mesh:
        yield mesh


async def asked(mesh: Any, *kinds: pb.EmbeddingKind.ValueType, text: str = "a", **output: Any) -> pb.EmbedResult:
    (result,) = (await mesh.embed([text], output=pb.OutputOptions(kinds=kinds, **output))).results
    made = {"dense": DENSE, "sparse": SPARSE, "multi_vector": MULTI}
    assert {made[field.name] for field, _ in result.embedding.ListFields() if field.name in made} == set(kinds)
    return cast("pb.EmbedResult", result)


def sparse_of(full: Any) -> tuple[list[int], list[float]]:
    (places,) = np.nonzero(full > 0)
    return places.tolist(), full[places].tolist()


def read_sparse(embedding: pb.Embedding) -> tuple[list[int], list[float]]:
    return vectors.decode(embedding.sparse.indices).tolist(), vectors.decode(embedding.sparse.values).tolist()


async def test_all_kinds_come_from_one_call_and_then_from_the_cache(kinds_mesh: Any) -> None:
    full = kinds_mesh.expected("a")
    for cached in (False, True):
        result = await asked(kinds_mesh, DENSE, SPARSE, MULTI)
        assert result.cached is cached
        assert np.array_equal(vectors.decode(result.embedding.dense), full)
        assert read_sparse(result.embedding) == sparse_of(full)
        assert result.embedding.sparse.dimensions == D
        assert np.array_equal(vectors.decode(result.embedding.multi_vector), full.reshape(-1, 8))
    assert len(kinds_mesh.text.calls) == 1


@pytest.mark.parametrize("first", [DENSE, SPARSE, MULTI])
async def test_kinds_are_fetched_once_known_to_be_missing_and_never_lost(
    kinds_mesh: Any, first: pb.EmbeddingKind.ValueType
) -> None:
    """Callers that want this kind and that do not make each other's vectors be computed again and again."""
    order = [first, *({DENSE, SPARSE, MULTI} - {first})]
    for kind in order:
        assert (await asked(kinds_mesh, kind)).cached is (kind == DENSE != first)
    calls = len(kinds_mesh.text.calls)
    assert calls == (3 if first == DENSE else 2)
    for kinds in ([DENSE], [SPARSE], [MULTI], [SPARSE, MULTI], [DENSE, SPARSE, MULTI]):
        assert (await asked(kinds_mesh, *kinds)).cached
    assert len(kinds_mesh.text.calls) == calls


async def test_kinds_of_two_revisions_never_meet_in_one_entry(kinds_mesh: Any, settle: Any) -> None:
    await asked(kinds_mesh, SPARSE)
    kinds_mesh.text.info.model.revision = "r2"  # now it answers with another revision than catalogued
    full = kinds_mesh.expected("a", revision="r2")
    rows_of_new = (await asked(kinds_mesh, MULTI)).embedding.multi_vector
    assert np.array_equal(vectors.decode(rows_of_new), full.reshape(-1, 8))
    labels = {"model": "fake-text", "revision": "r2", "space": "shared", "modality": "text", "family": "fake"}
    await settle(lambda: kinds_mesh.metric("embedmesh_gateway_model_info", **labels) == 1)
    assert (await asked(kinds_mesh, MULTI)).cached
    assert read_sparse((await asked(kinds_mesh, SPARSE)).embedding) == sparse_of(full)


async def test_a_kind_that_only_redis_holds_is_not_lost(open_mesh: Any, make_encoder: Any, valkey: Any) -> None:
    """Another gateway, whose memory knows nothing, asks for the other kind."""
    encoder = make_encoder("text", kinds=[DENSE, SPARSE, MULTI])
    for kinds in ([SPARSE], [MULTI]):
        async with open_mesh({"text": [encoder]}, redis_url=valkey.url) as mesh:
            await asked(mesh, *kinds)
        await encoder.start(encoder.address)
    async with open_mesh({"text": [encoder]}, redis_url=valkey.url) as mesh:
        assert (await asked(mesh, DENSE, SPARSE, MULTI)).cached
    assert len(encoder.calls) == 2


async def test_dtype_is_that_of_every_kind(kinds_mesh: Any) -> None:
    full = kinds_mesh.expected("a")
    for _ in range(2):  # computed, and from the cache
        embedding = (await asked(kinds_mesh, DENSE, SPARSE, MULTI, dtype=pb.DTYPE_FLOAT16)).embedding
        for tensor in (embedding.dense, embedding.sparse.values, embedding.multi_vector):
            assert tensor.dtype == pb.DTYPE_FLOAT16
        half = full.astype(np.float16)
        assert np.array_equal(vectors.decode(embedding.dense), half)
        assert np.array_equal(vectors.decode(embedding.multi_vector), half.reshape(-1, 8))
        assert read_sparse(embedding) == sparse_of(half)
    # What is cached stays as it was.
    assert np.array_equal(vectors.decode((await asked(kinds_mesh, MULTI)).embedding.multi_vector), full.reshape(-1, 8))


async def test_width_and_normalisation_are_those_of_the_dense_vector(kinds_mesh: Any) -> None:
    result = await asked(kinds_mesh, DENSE, MULTI, dimensions=16, normalize=False)
    assert list(result.embedding.dense.shape) == [16]
    assert list(result.embedding.multi_vector.shape) == [4, 8]


@pytest.mark.parametrize(
    ("output", "option", "words"),
    [
        ({"kinds": [SPARSE], "dimensions": 16}, "dimensions", "for vectors of kind DENSE"),
        ({"kinds": [SPARSE, MULTI], "dimensions": D}, "dimensions", "for vectors of kind DENSE"),
        ({"kinds": [MULTI], "normalize": False}, "normalize", "for vectors of kind DENSE"),
        ({"kinds": [DENSE, SPARSE], "dtype": pb.DTYPE_INT8}, "dtype", "FLOAT32 or FLOAT16"),
        ({"kinds": [MULTI], "dtype": pb.DTYPE_BINARY}, "dtype", "FLOAT32 or FLOAT16"),
        ({"kinds": [DENSE, 17]}, "kinds", "makes EMBEDDING_KIND_DENSE and EMBEDDING_KIND_SPARSE and"),
    ],
)
async def test_options_that_a_kind_does_not_have_are_refused_with_what_is_offered(
    kinds_mesh: Any, output: dict[str, Any], option: str, words: str
) -> None:
    error = await failure(kinds_mesh.embed(["x"], output=pb.OutputOptions(**output)))
    assert isinstance(error, UnsupportedOutput)
    assert (error.field, error.metadata) == (f"output.{option}", {"option": option})
    assert words in error.message
    assert kinds_mesh.text.calls == []


def spoil(path: str, **fields: Any) -> Callable[[Any], None]:
    def apply(response: Any) -> None:
        message = response.results[0].embedding
        for name in path.split("."):
            message = getattr(message, name)
        for name, value in fields.items():
            message.ClearField(name)
            if isinstance(value, list):
                getattr(message, name).extend(value)
            else:
                setattr(message, name, value)

    return apply


HOSTILE = {
    "rows of another width": spoil("multi_vector", shape=[8, 4]),
    "one axis": spoil("multi_vector", shape=[32]),
    "no axis": spoil("multi_vector", shape=[]),
    "three axes": spoil("multi_vector", shape=[1, 4, 8]),
    "more rows than data": spoil("multi_vector", shape=[2**31, 8]),
    "rows without width": spoil("multi_vector", shape=[5, 0], data=b""),
    "half a row": spoil("multi_vector", data=b"1234" * 7),
    "rows of integers": spoil("multi_vector", dtype=pb.DTYPE_UINT32),
    "indices without values": spoil("sparse.values", shape=[0], data=b""),
    "fewer indices than said": spoil("sparse.indices", data=b"\x01\0\0\0"),
    "values of no type": spoil("sparse.values", dtype=0),
    "another vocabulary": spoil("sparse", dimensions=7),
    "no vocabulary": spoil("sparse", dimensions=0),
}


def spoil_order(response: Any) -> None:
    indices = response.results[0].embedding.sparse.indices
    indices.data = vectors.decode(indices)[::-1].tobytes()


def spoil_bounds(response: Any) -> None:
    indices = response.results[0].embedding.sparse.indices
    places = vectors.decode(indices).copy()
    places[-1] = D
    indices.data = places.tobytes()


HOSTILE |= {"descending indices": spoil_order, "indices beyond the vocabulary": spoil_bounds}


@pytest.mark.parametrize("what", HOSTILE)
async def test_hostile_shapes_of_other_kinds_are_neither_believed_nor_cached(kinds_mesh: Any, what: str) -> None:
    output = pb.OutputOptions(kinds=[DENSE, SPARSE, MULTI])
    kinds_mesh.text.after = HOSTILE[what]
    bad, good = (await kinds_mesh.embed(["a", "b"], output=output)).results
    assert isinstance(from_status(bad.error), InternalError)
    assert good.HasField("embedding")
    kinds_mesh.text.after = None
    again = (await kinds_mesh.embed(["a", "b"], output=output)).results
    assert [result.cached for result in again] == [False, True]


async def test_vectors_without_entries_are_whole(kinds_mesh: Any) -> None:
    """A text of punctuation only may have neither a weight nor a row."""

    def empty(response: Any) -> None:
        embedding = response.results[0].embedding
        embedding.ClearField("sparse")
        embedding.ClearField("multi_vector")
        none = np.empty(0, np.float32)
        vectors.finish_sparse(none.astype(np.uint32), none, D, pb.DTYPE_FLOAT32, embedding.sparse)
        vectors.finish_multi_vector(none.reshape(0, 8), pb.DTYPE_FLOAT32, embedding.multi_vector)

    kinds_mesh.text.after = empty
    for _ in range(2):
        embedding = (await asked(kinds_mesh, SPARSE, MULTI)).embedding
        assert read_sparse(embedding) == ([], [])
        assert vectors.decode(embedding.multi_vector).shape == (0, 8)


async def test_calls_whose_answers_are_large_are_split(open_mesh: Any, make_encoder: Any) -> None:
    def tokens(response: Any) -> None:
        for result in response.results:
            result.embedding.multi_vector.CopyFrom(
                pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[64, D], data=bytes(64 * D * 4))
            )

    encoder = make_encoder("text", kinds=[DENSE, MULTI], multi_vector_dimensions=D, max_inputs=1024)
    encoder.after = tokens
    async with open_mesh({"text": [encoder]}, max_message_bytes=1 << 20) as mesh:
        response = await mesh.embed([str(i) for i in range(118)], output=pb.OutputOptions(kinds=[MULTI]))
        assert all(result.embedding.HasField("multi_vector") for result in response.results)
        assert len(encoder.calls) == 2


async def test_an_answer_that_no_message_holds_is_refused_input_by_input(open_mesh: Any, make_encoder: Any) -> None:
    """What does not fit is cached, and comes when it is asked for with less around it."""

    def tokens(response: Any) -> None:
        for result in response.results:
            result.embedding.multi_vector.CopyFrom(
                pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2500, D], data=bytes(2500 * D * 4))
            )

    encoder = make_encoder("text", kinds=[DENSE, MULTI], multi_vector_dimensions=D, max_inputs=2)
    encoder.after = tokens
    async with open_mesh({"text": [encoder]}, max_message_bytes=1 << 20) as mesh:
        output = pb.OutputOptions(kinds=[MULTI])
        response = await mesh.embed(["a", "b", "c", "d"], output=output)
        assert [result.HasField("embedding") for result in response.results] == [True, True, True, False]
        error = from_status(response.results[3].error)
        assert isinstance(error, InputTooLarge)
        assert (error.field, error.metadata["unit"]) == ("inputs[3]", "bytes")
        assert "ask for fewer inputs at once" in error.message
        assert (response.usage.failed_inputs, response.results[3].cached) == (1, False)
        assert (await mesh.embed(["d"], output=output)).results[0].cached


# Everything together.

_INPUT = st.tuples(st.sampled_from("abcdefgh"), st.sampled_from([0, 1, 2]), st.sampled_from(["", "i"]))
_REQUEST = st.fixed_dictionaries(
    {
        "inputs": st.lists(_INPUT, min_size=1, max_size=12),
        "truncation": st.sampled_from([0, 1, 2]),
        "cache": st.sampled_from([0, 0, 0, REFRESH, BYPASS]),
        "priority": st.sampled_from([0, INTERACTIVE, BULK]),
        "revision": st.sampled_from(["r1", "r1", "r1", "r2"]),
        "flush": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(st.lists(_REQUEST, min_size=1, max_size=5), min_size=1, max_size=5))
async def test_whatever_was_asked_before_vectors_are_those_of_the_model(
    rounds: list[list[dict[str, Any]]], small_mesh: Any, valkey: Any
) -> None:
    """Rounds of concurrent requests against a small memory and Valkey: the cache never changes an answer."""

    async def ask(wish: dict[str, Any]) -> None:
        items = [text(*item) for item in wish["inputs"]]
        options = {key: wish[key] for key in ("truncation", "cache", "priority")}
        response = await small_mesh.embed(items, **options)
        for item, result in zip(items, response.results, strict=True):
            revision = response.models[result.model_index].revision
            expected = small_mesh.expected(item, truncation=wish["truncation"], revision=revision)
            assert np.array_equal(vectors.decode(result.embedding.dense), expected)

    for wishes in rounds:
        small_mesh.text.info.model.revision = wishes[0]["revision"]  # an upgrade, or a rollback
        await asyncio.gather(*(ask(wish) for wish in wishes))
        if any(wish["flush"] for wish in wishes):
            with valkey.client() as client:
                client.flushall()


@pytest.fixture
async def small_mesh(open_mesh: Any, valkey: Any) -> AsyncIterator[Any]:
    async with open_mesh(redis_url=valkey.url, cache_memory_bytes=1500) as mesh:
        yield mesh


# Pictures with texts.


async def test_a_text_beside_a_picture_goes_along_and_is_part_of_the_key(open_mesh: Any, make_encoder: Any) -> None:
    given = [
        image_pb2.ImageInput(content=b"picture"),
        image_pb2.ImageInput(content=b"picture", text="a"),
        image_pb2.ImageInput(content=b"picture", text="a", instruction="find: "),
    ]
    async with open_mesh({"image": [make_encoder("image", reads_text_with_images=True)]}) as mesh:
        first = await mesh.embed(given)
        again = await mesh.embed(given[::-1])
        assert list(mesh.image.inputs) == given
        assert np.array_equal(rows(first), [mesh.expected(item, "image") for item in given])
        assert np.array_equal(rows(again), rows(first)[::-1])
        assert all(result.cached for result in again.results)
        assert next(
            iter((await mesh.catalog.ListModels(catalog_pb2.ListModelsRequest())).models)
        ).reads_text_with_images


@pytest.mark.parametrize("policy", gateway_pb2.CachePolicy.values())
async def test_a_text_that_nobody_would_read_fails_alone(
    open_mesh: Any, make_encoder: Any, policy: gateway_pb2.CachePolicy.ValueType
) -> None:
    # An encoder of an earlier version reads past the text, and would answer with the picture's vector.
    given = [
        image_pb2.ImageInput(content=b"a", text="x"),
        image_pb2.ImageInput(content=b"a"),
        image_pb2.ImageInput(content=b"a", instruction="x"),
    ]
    async with open_mesh({"image": [make_encoder("image")]}) as mesh:
        response = await mesh.embed(given, cache=policy)
        assert list(mesh.image.inputs) == [given[1]]
        assert np.array_equal(vectors.decode(response.results[1].embedding.dense), mesh.expected(given[1], "image"))
        for place, field in ((0, "text"), (2, "instruction")):
            error = from_status(response.results[place].error)
            assert isinstance(error, InvalidRequest)
            assert (error.field, error.message) == (
                f"inputs[{place}].{field}",
                "model 'fake-image' reads no text with pictures",
            )
