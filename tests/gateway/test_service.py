from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest

from embedmesh import vectors
from embedmesh.errors import (
    DeadlineExceeded,
    EncoderUnreachable,
    InternalError,
    InvalidRequest,
    Overloaded,
    from_status,
)
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh.v1 import gateway_pb2


def chunk(mesh: Any, sequence: int, texts: list[str], **options: Any) -> gateway_pb2.EmbedStreamRequest:
    return gateway_pb2.EmbedStreamRequest(sequence=sequence, request=mesh.request(texts, **options))


async def collect(stream: Any) -> dict[int, gateway_pb2.EmbedStreamResponse]:
    answers: dict[int, gateway_pb2.EmbedStreamResponse] = {}
    async for answer in stream:
        assert answer.sequence not in answers
        answers[answer.sequence] = answer
    return answers


def right(mesh: Any, answer: gateway_pb2.EmbedStreamResponse, texts: list[str]) -> bool:
    assert answer.HasField("response"), answer
    got = [vectors.decode(result.embedding.dense) for result in answer.response.results]
    return np.array_equal(got, [mesh.expected(text) for text in texts])


async def test_every_chunk_is_answered_under_its_number(mesh: Any) -> None:
    texts = {number * 7: [f"{number} {i}" for i in range(5)] for number in reversed(range(60))}
    stream = mesh.gateway.EmbedStream((chunk(mesh, n, t) for n, t in texts.items()), timeout=20)
    answers = await collect(stream)
    assert answers.keys() == texts.keys()
    assert all(right(mesh, answers[number], texts[number]) for number in texts)
    assert {call.priority for call in mesh.text.calls} == {pb.PRIORITY_BULK}


async def test_an_empty_stream_ends(mesh: Any) -> None:
    assert await collect(mesh.gateway.EmbedStream(iter(()), timeout=20)) == {}


async def test_the_caller_may_ask_for_interactive_priority(mesh: Any) -> None:
    requests = [chunk(mesh, 1, ["a"], priority=pb.PRIORITY_INTERACTIVE)]
    await collect(mesh.gateway.EmbedStream(iter(requests), timeout=20))
    assert mesh.text.calls[0].priority == pb.PRIORITY_INTERACTIVE


async def test_a_chunk_that_fails_fails_alone(mesh: Any) -> None:
    requests = [
        chunk(mesh, 1, ["a"]),
        gateway_pb2.EmbedStreamRequest(sequence=2),
        chunk(mesh, 3, ["x"] * 2000),
        chunk(mesh, 4, ["b"], model="other"),
        chunk(mesh, 5, ["c", "[[bad]]"]),
        chunk(mesh, 6, ["d"]),
    ]
    answers = await collect(mesh.gateway.EmbedStream(iter(requests), timeout=20))
    assert {n for n, answer in answers.items() if answer.HasField("error")} == {2, 3, 4}
    assert isinstance(from_status(answers[2].error), InvalidRequest)
    assert from_status(answers[4].error).reason == "MODEL_NOT_FOUND"
    assert answers[5].response.usage.failed_inputs == 1
    assert right(mesh, answers[1], ["a"])
    assert right(mesh, answers[6], ["d"])


async def test_answers_come_as_they_finish(mesh: Any) -> None:
    release = asyncio.Event()

    async def first_is_slow(request: Any) -> None:
        if request.inputs[0].text == "slow":
            await release.wait()

    mesh.text.before = first_is_slow
    stream = mesh.gateway.EmbedStream(timeout=20)
    await stream.write(chunk(mesh, 1, ["slow"]))
    await stream.write(chunk(mesh, 2, ["quick"]))
    assert (await stream.read()).sequence == 2
    release.set()
    assert (await stream.read()).sequence == 1
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF


async def test_no_more_than_the_window_is_in_service_or_read(open_mesh: Any, settle: Any) -> None:
    async with open_mesh(stream_window=3) as mesh:
        taken = 0
        most = 0
        release = asyncio.Event()

        async def count(request: Any) -> None:
            nonlocal most
            most = max(most, mesh.text.running)
            await release.wait()

        async def endless() -> Any:
            nonlocal taken
            while not release.is_set() or taken < 100:
                taken += 1
                # gRPC's own buffers hold some of these: up to 16 MB where the link is fast.
                yield chunk(mesh, taken, [f"{taken} " + "x" * 300_000])

        mesh.text.before = count
        answers = asyncio.create_task(collect(mesh.gateway.EmbedStream(endless(), timeout=20)))
        await settle(lambda: mesh.text.running == 3)
        while True:  # until the sender stands still
            before = taken
            await asyncio.sleep(0.2)
            if taken == before:
                break
        assert len(mesh.text.calls) == 3
        assert taken < 100
        release.set()
        assert len(await answers) == taken >= 100
        assert most == 3


async def test_a_caller_that_does_not_read_is_not_served_on(open_mesh: Any, settle: Any) -> None:
    """Answers that nobody takes stay in the window, so memory is bounded."""
    async with open_mesh(stream_window=2) as mesh:
        stream = mesh.gateway.EmbedStream(timeout=20)
        written = 0

        async def write() -> None:
            nonlocal written
            for number in range(100):
                await stream.write(chunk(mesh, number, [str(number)] * 1000))
                written += 1
            await stream.done_writing()

        writer = asyncio.create_task(write())
        await settle(lambda: written > 2)
        while True:
            before = len(mesh.text.calls)
            await asyncio.sleep(0.3)
            if len(mesh.text.calls) == before:
                break
        assert len(mesh.text.calls) < 80  # of 100; what was answered lies in gRPC's own buffers
        answers = await collect(stream)
        await writer
        assert len(answers) == 100


async def test_overload_of_the_encoder_is_waited_out(mesh: Any) -> None:
    refusals = 0

    async def full(request: Any) -> None:
        nonlocal refusals
        if refusals < 6:
            refusals += 1
            raise Overloaded("queue full", retry_after=0.02)

    mesh.text.before = full
    requests = [chunk(mesh, n, [f"t{n}"]) for n in range(5)]
    answers = await collect(mesh.gateway.EmbedStream(iter(requests), timeout=20))
    assert all(right(mesh, answers[n], [f"t{n}"]) for n in range(5))
    assert refusals == 6


async def test_overload_that_lasts_is_told_in_the_end(mesh: Any) -> None:
    async def full(request: Any) -> None:
        raise Overloaded("queue full", retry_after=100)

    mesh.text.before = full
    answers = await collect(mesh.gateway.EmbedStream(iter([chunk(mesh, 1, ["a"])]), timeout=20))
    error = from_status(answers[1].error)
    assert isinstance(error, Overloaded)
    assert error.retry_after == 100


async def test_nobody_in_a_hurry_waits_for_a_stream_that_sits_overload_out(mesh: Any) -> None:
    refused = asyncio.Event()

    async def full(request: Any) -> None:
        if not refused.is_set():
            refused.set()
            raise Overloaded("queue full", retry_after=2)

    mesh.text.before = full
    stream = asyncio.create_task(collect(mesh.gateway.EmbedStream(iter([chunk(mesh, 1, ["a"])]), timeout=20)))
    await refused.wait()
    await asyncio.sleep(0.1)  # as long as the refusal speaks for others, and longer
    response = await mesh.embed(["a"], priority=pb.PRIORITY_BULK)
    assert not response.results[0].cached
    assert not stream.done()
    assert right(mesh, (await stream)[1], ["a"])


async def test_a_stream_sits_out_the_overload_of_a_leader_that_does_not(mesh: Any, settle: Any) -> None:
    release = asyncio.Event()

    async def full(request: Any) -> None:
        if not release.is_set():
            await release.wait()
            raise Overloaded("queue full", retry_after=0.01)

    mesh.text.before = full
    leader = asyncio.create_task(mesh.embed(["a"]))
    await mesh.text.arrived.wait()
    stream = asyncio.create_task(collect(mesh.gateway.EmbedStream(iter([chunk(mesh, 1, ["a"])]), timeout=20)))
    await settle(lambda: mesh.metric("embedmesh_cache_lookups_total", tier="inflight", outcome="hit") == 1)
    release.set()
    with pytest.raises(grpc.aio.AioRpcError):
        await leader
    assert right(mesh, (await stream)[1], ["a"])


async def test_a_full_gateway_is_waited_for(open_mesh: Any) -> None:
    async with open_mesh(max_inflight_inputs=8, stream_window=8) as mesh:
        most = 0

        async def count(request: Any) -> None:
            nonlocal most
            most = max(most, mesh.text.running)
            await asyncio.sleep(0.005)

        mesh.text.before = count
        requests = [chunk(mesh, n, [f"{n} {i}" for i in range(3)]) for n in range(20)]
        answers = await collect(mesh.gateway.EmbedStream(iter(requests), timeout=20))
        assert all(answers[n].HasField("response") for n in range(20))
        assert most == 1  # bulk work gets half of the places: one chunk of three
        assert mesh.metric("embedmesh_gateway_refused_inputs_total") == 0


async def test_chunks_that_wait_for_room_end_with_the_stream(open_mesh: Any, settle: Any) -> None:
    async with open_mesh(max_inflight_inputs=8, stream_window=8) as mesh:
        release = asyncio.Event()

        async def wait(request: Any) -> None:
            await release.wait()

        mesh.text.before = wait
        requests = [chunk(mesh, n, [f"{n} {i}" for i in range(3)]) for n in range(6)]
        stream = mesh.gateway.EmbedStream(iter(requests), timeout=20)
        reading = asyncio.create_task(collect(stream))
        await settle(lambda: mesh.text.running == 1)
        stream.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await settle(lambda: mesh.text.running == 0)
        mesh.text.calls.clear()
        release.set()
        # All places are free again: a request that needs every one of them gets in.
        answers = await collect(mesh.gateway.EmbedStream(iter([chunk(mesh, 1, ["a", "b", "c", "d"])]), timeout=20))
        assert answers[1].HasField("response")
        response = await mesh.embed([str(i) for i in range(8)])
        assert len(response.results) == 8
        assert len(mesh.text.calls) == 2


async def test_cancelling_a_stream_cancels_its_chunks(mesh: Any, settle: Any) -> None:
    async def wait(request: Any) -> None:
        await asyncio.Event().wait()

    mesh.text.before = wait
    stream = mesh.gateway.EmbedStream(timeout=20)
    for number in range(3):
        await stream.write(chunk(mesh, number, [f"t{number}"]))
    await settle(lambda: mesh.text.running == 3)
    stream.cancel()
    await settle(lambda: mesh.text.running == 0 and mesh.text.cancelled == 3)


async def test_the_deadline_of_the_stream_is_that_of_each_chunk(mesh: Any) -> None:
    async def note(request: Any) -> None:
        await asyncio.sleep(0)

    mesh.text.before = note
    requests = [chunk(mesh, n, [f"t{n}"]) for n in range(3)]
    await collect(mesh.gateway.EmbedStream(iter(requests), timeout=9))
    assert all(5 < seconds < 9.5 for seconds in mesh.text.timeouts)


async def test_without_a_deadline_a_hanging_chunk_still_ends(open_mesh: Any) -> None:
    async with open_mesh(default_timeout_seconds=0.3) as mesh:

        async def hang(request: Any) -> None:
            if request.inputs[0].text == "hang":
                await asyncio.Event().wait()

        mesh.text.before = hang
        requests = [chunk(mesh, 1, ["hang"]), chunk(mesh, 2, ["a"])]
        answers = await collect(mesh.gateway.EmbedStream(iter(requests)))
        assert isinstance(from_status(answers[1].error), DeadlineExceeded)
        assert right(mesh, answers[2], ["a"])


async def test_an_encoder_that_is_gone_fails_the_chunk_and_not_the_stream(mesh: Any) -> None:
    await mesh.embed(["a"])
    await mesh.text.stop()
    requests = [chunk(mesh, 1, ["a"]), chunk(mesh, 2, ["b"])]
    answers = await collect(mesh.gateway.EmbedStream(iter(requests), timeout=20))
    assert right(mesh, answers[1], ["a"])
    assert isinstance(from_status(answers[2].error), EncoderUnreachable)


async def test_a_defect_is_hidden_and_hurts_one_chunk(
    mesh: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def defect(*args: Any) -> bytes:
        if args[1].text == "defect":
            raise RuntimeError("secret text")
        return b"em1:" + str(args[1].text).encode()

    monkeypatch.setattr("embedmesh_gateway.keys._key", defect)
    requests = [chunk(mesh, 1, ["defect"]), chunk(mesh, 2, ["a"])]
    answers = await collect(mesh.gateway.EmbedStream(iter(requests), timeout=20))
    error = from_status(answers[1].error)
    assert isinstance(error, InternalError)
    assert "secret" not in str(answers[1])
    assert error.metadata["request_id"]
    assert "secret text" in caplog.text
    assert right(mesh, answers[2], ["a"])
