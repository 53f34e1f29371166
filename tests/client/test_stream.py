"""`embed_stream`, of both clients: order, bounded windows, failed chunks, broken streams, early ends."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest

import embedmesh
from embedmesh import errors
from embedmesh.v1 import embedding_pb2, gateway_pb2


def numbers(results: list[embedmesh.EmbedResult]) -> list[float]:
    return [float(result.vector[0]) for result in results]


def texts(stop: int) -> Iterator[str]:
    return (str(i) for i in range(stop))


def test_results_come_in_the_order_of_the_inputs(connect: Any, gateway: Any) -> None:
    held: list[gateway_pb2.EmbedStreamRequest] = []

    def answer_backwards(chunk: gateway_pb2.EmbedStreamRequest, context: Any) -> Any:
        # Each pair of chunks is answered in reverse.
        if chunk.sequence % 2 == 0:
            held.append(chunk)
            return None
        gateway.later = held.pop()
        return gateway.answer_chunk(chunk)

    def stream(requests: Any, context: Any) -> Iterator[Any]:
        for chunk in requests:
            response = answer_backwards(chunk, context)
            if response is not None:
                yield response
                yield gateway.answer_chunk(gateway.later)

    gateway.EmbedStream = stream
    gateway.restart()
    results = connect(gateway.address).stream(texts(80), chunk_inputs=10)
    assert numbers(results) == list(range(80))
    assert [result.index for result in results] == list(range(80))


def test_unordered_results_come_as_chunks_finish(connect: Any, gateway: Any) -> None:
    def stream(requests: Any, context: Any) -> Iterator[Any]:
        chunks = [next(requests), next(requests)]
        for chunk in reversed(chunks):
            yield gateway.answer_chunk(chunk)

    gateway.EmbedStream = stream
    gateway.restart()
    results = connect(gateway.address).stream(texts(4), chunk_inputs=2, ordered=False)
    assert [result.index for result in results] == [2, 3, 0, 1]
    assert numbers(results) == [2, 3, 0, 1]


def test_bulk_goes_behind_interactive_work_by_default(connect: Any, gateway: Any) -> None:
    connect(gateway.address).stream(["1"], role="query")
    assert gateway.requests[0].priority == embedding_pb2.PRIORITY_BULK
    assert gateway.requests[0].inputs[0].text.role == 1


def test_an_empty_source_is_no_call(connect: Any, gateway: Any) -> None:
    assert connect(gateway.address).stream([]) == []
    assert gateway.streams == 0


def test_inputs_that_cannot_be_sent_are_answered_in_their_place(connect: Any, gateway: Any) -> None:
    inputs = ["0", "\ud800", "2", *["\ud800"] * 20, "23"]
    results = connect(gateway.address).stream(inputs, chunk_inputs=2, window=2)
    assert [result.index for result in results] == list(range(24))
    assert [result.index for result in results if not result.error] == [0, 2, 23]
    assert len(connect(gateway.address).stream(["\ud800"] * 9, chunk_inputs=1, window=2)) == 9


def test_a_window_of_chunks_is_read_ahead_and_no_more(gateway: Any) -> None:
    gateway.on_chunk = lambda *_: None
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        for i in itertools.count():
            read += 1
            yield str(i)

    with embedmesh.Client(gateway.address) as client:
        stream = client.embed_stream(endless(), chunk_inputs=5, window=3, timeout=1)
        with pytest.raises(embedmesh.DeadlineExceeded):
            next(stream)
    assert read == 15
    assert len(gateway.chunks) == 3


async def test_a_window_of_chunks_is_read_ahead_and_no_more_async(gateway: Any) -> None:
    gateway.on_chunk = lambda *_: None
    read = 0

    async def endless() -> AsyncIterator[str]:
        nonlocal read
        for i in itertools.count():
            read += 1
            yield str(i)

    async with embedmesh.AsyncClient(gateway.address) as client:
        stream = client.embed_stream(endless(), chunk_inputs=5, window=3, timeout=1)
        with pytest.raises(embedmesh.DeadlineExceeded):
            await anext(stream)
    assert read == 15


def stream_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "embedmesh-stream"]


def test_an_endless_source_can_be_left_early(gateway: Any) -> None:
    closed = False

    def endless() -> Iterator[str]:
        nonlocal closed
        try:
            for i in itertools.count():
                yield str(i)
        finally:
            closed = True

    with embedmesh.Client(gateway.address) as client:
        source = endless()
        stream = client.embed_stream(source, chunk_inputs=2)
        assert numbers(list(itertools.islice(stream, 5))) == [0, 1, 2, 3, 4]
        assert repr(client).endswith("calls=1>")
        assert len(stream_threads()) == 1
        stream.close()
        assert stream_threads() == []
        assert gateway.cancelled.wait(30)
        assert repr(client).endswith("calls=0>")
        # The source is the caller's: still open, and nobody reads it behind the caller's back.
        assert not closed
        assert next(source).isdigit()


async def test_an_endless_source_can_be_left_early_async(gateway: Any) -> None:
    async def endless() -> AsyncIterator[str]:
        for i in itertools.count():
            yield str(i)
            await asyncio.sleep(0)

    async with embedmesh.AsyncClient(gateway.address) as client:
        async with contextlib.aclosing(client.embed_stream(endless(), chunk_inputs=2)) as stream:
            async for result in stream:
                if result.index == 4:
                    break
        assert await asyncio.to_thread(gateway.cancelled.wait, 30)
        assert repr(client).endswith("calls=0>")


async def test_a_slow_source_does_not_hold_up_results(gateway: Any) -> None:
    more = asyncio.Event()

    async def slow() -> AsyncIterator[str]:
        yield "0"
        yield "1"
        await more.wait()
        yield "2"

    async with embedmesh.AsyncClient(gateway.address) as client:
        stream = client.embed_stream(slow(), chunk_inputs=2)
        assert numbers([await anext(stream), await anext(stream)]) == [0, 1]
        more.set()
        assert numbers([result async for result in stream]) == [2]


async def test_a_stream_ends_at_its_deadline_while_the_source_hangs(gateway: Any) -> None:
    async def hangs() -> AsyncIterator[str]:
        await asyncio.Event().wait()
        yield "never"

    async with embedmesh.AsyncClient(gateway.address) as client:
        with pytest.raises(embedmesh.DeadlineExceeded):
            await anext(client.embed_stream(hangs(), timeout=0.2))


def test_results_are_yielded_while_the_source_is_read(gateway: Any) -> None:
    seen: list[int] = []

    def source() -> Iterator[str]:
        for i in range(100):
            # From the third chunk on, the source waits for the answer to the first.
            if i == 30:
                gateway.wait_for(lambda: len(gateway.chunks) > 0)
            yield str(i)

    with embedmesh.Client(gateway.address) as client:
        for result in client.embed_stream(source(), chunk_inputs=10, window=100):
            seen.append(result.index)
    assert seen == list(range(100))


class SourceError(Exception):
    """What the caller's own iterable raises."""


def test_what_the_source_raises_comes_after_the_results_before_it(gateway: Any) -> None:
    def source() -> Iterator[str]:
        yield from texts(7)
        raise SourceError

    with embedmesh.Client(gateway.address) as client:
        stream = client.embed_stream(source(), chunk_inputs=3)
        assert numbers([next(stream) for _ in range(7)]) == list(range(7))
        with pytest.raises(SourceError):
            next(stream)
    assert stream_threads() == []


async def test_what_the_source_raises_comes_after_the_results_before_it_async(gateway: Any) -> None:
    async def source() -> AsyncIterator[str]:
        for text in texts(7):
            yield text
        raise SourceError

    async with embedmesh.AsyncClient(gateway.address) as client:
        stream = client.embed_stream(source(), chunk_inputs=3)
        assert numbers([await anext(stream) for _ in range(7)]) == list(range(7))
        with pytest.raises(SourceError):
            await anext(stream)


def test_a_source_that_raises_at_once(connect: Any, gateway: Any) -> None:
    def source() -> Iterator[str]:
        raise SourceError
        yield ""

    with pytest.raises(SourceError):
        connect(gateway.address).stream(source())


@pytest.mark.parametrize("inputs", ["text", b"bytes", 7])
def test_a_single_input_is_refused(connect: Any, gateway: Any, inputs: Any) -> None:
    with pytest.raises(TypeError):
        connect(gateway.address).stream(inputs)


def test_something_that_is_no_input_ends_the_stream_after_the_results_before_it(gateway: Any) -> None:
    inputs: Any = ["0", "1", 2, "3"]
    with embedmesh.Client(gateway.address) as client:
        stream = client.embed_stream(inputs)
        assert numbers([next(stream), next(stream)]) == [0, 1]
        with pytest.raises(TypeError, match=r"inputs\[2\]"):
            next(stream)


@pytest.mark.parametrize("options", [{"window": 0}, {"chunk_inputs": 0}])
def test_a_window_needs_room(connect: Any, gateway: Any, options: dict[str, int]) -> None:
    with pytest.raises(embedmesh.InvalidRequest, match=next(iter(options))):
        connect(gateway.address).stream(["1"], **options)


def chunk_error(chunk: gateway_pb2.EmbedStreamRequest, error: embedmesh.EmbedMeshError) -> Any:
    return gateway_pb2.EmbedStreamResponse(sequence=chunk.sequence, error=errors.to_status(error))


def test_a_chunk_that_fails_does_not_end_the_stream(connect: Any, gateway: Any) -> None:
    def answer(chunk: gateway_pb2.EmbedStreamRequest, context: Any) -> Any:
        if chunk.sequence == 0:
            return chunk_error(chunk, embedmesh.InvalidRequest("bad chunk", field="inputs[1].text"))
        return gateway.answer_chunk(chunk)

    gateway.on_chunk = answer
    results = connect(gateway.address).stream(texts(9), chunk_inputs=3, window=1)
    assert [type(result.error) for result in results[:3]] == [embedmesh.InvalidRequest] * 3
    assert numbers(results[3:]) == [3, 4, 5, 6, 7, 8]


def test_a_chunk_whose_error_may_pass_is_sent_again(connect: Any, gateway: Any) -> None:
    def answer(chunk: gateway_pb2.EmbedStreamRequest, context: Any) -> Any:
        if gateway.chunks.count(chunk.sequence) < 3:
            return chunk_error(chunk, embedmesh.Overloaded("full", retry_after=0.01))
        return gateway.answer_chunk(chunk)

    gateway.on_chunk = answer
    results = connect(gateway.address).stream(texts(9), chunk_inputs=3)
    assert numbers(results) == list(range(9))
    assert sorted(gateway.chunks) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert gateway.streams == 1


def test_retries_can_be_switched_off(connect: Any, gateway: Any) -> None:
    gateway.on_chunk = lambda chunk, _: chunk_error(chunk, embedmesh.Overloaded("full", retry_after=0.01))
    results = connect(gateway.address, retries=0).stream(texts(2), chunk_inputs=2)
    assert [type(result.error) for result in results] == [embedmesh.Overloaded] * 2
    assert gateway.chunks == [0]


def test_inputs_of_a_chunk_are_asked_again_alone(connect: Any, gateway: Any) -> None:
    def answer(chunk: gateway_pb2.EmbedStreamRequest, context: Any) -> Any:
        answered = gateway.answer_chunk(chunk)
        if len(chunk.request.inputs) > 1:
            error = embedmesh.EncoderUnreachable("gone", retry_after=0.01)
            answered.response.results[1].CopyFrom(gateway.error_result(error))
        return answered

    gateway.on_chunk = answer
    assert numbers(connect(gateway.address).stream(texts(9), chunk_inputs=3)) == list(range(9))
    assert sorted(len(request.inputs) for request in gateway.requests) == [1, 1, 1, 3, 3, 3]


@pytest.mark.parametrize("end", ["unavailable", "ended", "reset behind a proxy"])
def test_a_broken_stream_is_resumed_with_the_chunks_not_yet_answered(connect: Any, gateway: Any, end: str) -> None:
    def stream(requests: Any, context: Any) -> Iterator[Any]:
        gateway.streams += 1
        for answered, chunk in enumerate(requests):
            if answered == 2 and gateway.streams < 4:
                if end == "unavailable":
                    gateway.fail(context, embedmesh.NotReady("draining", retry_after=0.01))
                if end == "reset behind a proxy":
                    context.abort(grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2")
                return
            gateway.chunks.append(chunk.sequence)
            yield gateway.answer_chunk(chunk)

    gateway.EmbedStream = stream
    gateway.restart()
    results = connect(gateway.address, retries=2).stream(texts(30), chunk_inputs=3)
    assert numbers(results) == list(range(30))
    assert sorted(gateway.chunks) == list(range(10))
    assert gateway.streams == 4


def test_a_stream_survives_the_restart_of_its_gateway(connect: Any, gateway: Any, serve: Any) -> None:
    def restart() -> None:
        gateway.stop()
        serve(gateway.address, gateway=gateway)

    restarting = threading.Thread(target=restart)

    def answer(chunk: gateway_pb2.EmbedStreamRequest, context: Any) -> Any:
        if chunk.sequence == 4 and not restarting.ident:
            restarting.start()
            gateway.hold(context)
        return gateway.answer_chunk(chunk)

    gateway.on_chunk = answer
    assert numbers(connect(gateway.address).stream(texts(40), chunk_inputs=5)) == list(range(40))
    restarting.join()
    assert gateway.streams == 2


@pytest.mark.parametrize(("retries", "streams"), [(0, 1), (1, 2)])
def test_a_stream_that_breaks_without_progress_fails(connect: Any, gateway: Any, retries: int, streams: int) -> None:
    gateway.on_chunk = lambda _, context: gateway.fail(context, embedmesh.NotReady("draining", retry_after=0.01))
    with pytest.raises(embedmesh.NotReady, match="draining"):
        connect(gateway.address, retries=retries).stream(["1"])
    assert gateway.streams == streams


def test_a_stream_that_is_refused_fails_at_once(connect: Any, gateway: Any) -> None:
    gateway.on_chunk = lambda _, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")
    with pytest.raises(embedmesh.EmbedMeshError, match="who are you") as caught:
        connect(gateway.address).stream(["1"])
    assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
    assert gateway.streams == 1


def test_an_answer_to_no_question_fails_the_stream(connect: Any, gateway: Any) -> None:
    gateway.on_chunk = lambda *_: gateway_pb2.EmbedStreamResponse(sequence=77)
    with pytest.raises(embedmesh.InternalError, match="77"):
        connect(gateway.address).stream(["1"])


def test_a_message_without_outcome_fails_its_chunk(connect: Any, gateway: Any) -> None:
    gateway.on_chunk = lambda chunk, _: gateway_pb2.EmbedStreamResponse(sequence=chunk.sequence)
    (result,) = connect(gateway.address).stream(["1"])
    assert isinstance(result.error, embedmesh.EmbedMeshError)


def test_closing_the_client_ends_its_streams(gateway: Any) -> None:
    client = embedmesh.Client(gateway.address)
    stream = client.embed_stream(texts(1000), chunk_inputs=1, window=1)
    next(stream)
    gateway.on_chunk = lambda *_: client.close()
    with pytest.raises(embedmesh.EmbedMeshError, match="closed") as caught:
        next(stream)
    assert caught.value.code is grpc.StatusCode.CANCELLED


async def test_closing_the_client_ends_its_streams_async(gateway: Any) -> None:
    client = embedmesh.AsyncClient(gateway.address)
    loop = asyncio.get_running_loop()
    stream = client.embed_stream(texts(1000), chunk_inputs=1, window=1)
    await anext(stream)
    gateway.on_chunk = lambda *_: asyncio.run_coroutine_threadsafe(client.close(), loop).result(30)
    with pytest.raises(embedmesh.EmbedMeshError, match="closed") as caught:
        await anext(stream)
    assert caught.value.code is grpc.StatusCode.CANCELLED
