from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from embedmesh import vectors
from embedmesh.errors import (
    DeadlineExceeded,
    EmbedMeshError,
    InferenceFailed,
    NotReady,
    Overloaded,
    from_rpc_error,
    from_status,
)
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh.v1 import gateway_pb2, text_pb2
from embedmesh_gateway import calls as module
from embedmesh_gateway.calls import EncoderCalls
from embedmesh_gateway.upstream import Answer, Terms, Upstream
from embedmesh_server import tracing
from embedmesh_server.metrics import GatewayMetrics
from embedmesh_server.settings import NodeSettings

BOUND = 20.0
AGES = 1e6  # seconds; what is held for so long goes only when something else makes it go
DENSE, SPARSE = pb.EMBEDDING_KIND_DENSE, pb.EMBEDDING_KIND_SPARSE
TERMS = Terms("", (DENSE,), pb.TRUNCATION_END, pb.PRIORITY_INTERACTIVE)


class Line:
    """Calls to one encoder, and whether those calls must wait there."""

    def __init__(self, encoder: Any, *, longest_hold: float = AGES, **options: Any) -> None:
        self.encoder = encoder
        self.registry = CollectorRegistry()
        metrics = GatewayMetrics(self.registry)
        self.upstream = Upstream("text", encoder.address, max_message_bytes=8 << 20, longest_call=20.0, metrics=metrics)
        self.calls = EncoderCalls(self.upstream, metrics, longest_hold=longest_hold, **options)
        self.gates: dict[str, asyncio.Event] = {}
        self.first: asyncio.Task[None]  # of `busy_line`
        encoder.before = self._wait

    async def _wait(self, request: Any) -> None:
        for item in request.inputs:
            if item.text in self.gates:
                await self.gates[item.text].wait()

    def hold(self, seconds: float, terms: Terms = TERMS) -> None:
        """Let calls be held for so long from now on."""
        self.upstream.waiting[terms.queue] = seconds * 8

    async def embed(self, *texts: str, seconds: float = math.inf, most: int = 64, terms: Terms = TERMS) -> list[Answer]:
        return await self.calls.embed(
            [text_pb2.TextInput(text=text) for text in texts],
            terms,
            most=most,
            deadline=asyncio.get_running_loop().time() + seconds,
        )

    async def right(self, *texts: str, **options: Any) -> None:
        """Embed texts, and see that each gets its own vector."""
        answers = await self.embed(*texts, **options)
        got = [vectors.dequantize(answer.result.embedding.dense) for answer in answers]
        assert np.array_equal(got, [self.expected(text) for text in texts])

    def expected(self, text: str) -> Any:
        response = text_pb2.EmbedTextResponse()
        request = text_pb2.EmbedTextRequest(truncation=pb.TRUNCATION_END)
        self.encoder._one(0, text_pb2.TextInput(text=text), request, response.results.add())
        return vectors.dequantize(response.results[0].embedding.dense)

    async def fly(self, text: str, terms: Terms = TERMS) -> asyncio.Task[None]:
        """Start a call that stays at the encoder until `release`; calls after it may be held."""
        self.gates[text] = asyncio.Event()
        task = asyncio.create_task(self.right(text, terms=terms))
        async with asyncio.timeout(BOUND):
            while [text] not in self.sent:
                await asyncio.sleep(0.001)
        return task

    def release(self) -> None:
        for gate in self.gates.values():
            gate.set()

    @property
    def sent(self) -> list[list[str]]:
        """The texts of each call that came to the encoder."""
        return [[item.text for item in call.inputs] for call in self.encoder.calls]

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


OpenLine = Callable[..., Line]


@pytest.fixture
async def open_line(encoder: Any) -> AsyncIterator[OpenLine]:
    """Calls to the encoder; in the end nothing may be left over that nobody looked at."""
    unseen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
    opened: list[Line] = []

    def open_one(**options: Any) -> Line:
        opened.append(Line(encoder, **options))
        return opened[-1]

    yield open_one
    for line in opened:
        line.release()
        await line.upstream.__aexit__()
    await asyncio.sleep(0)
    gc.collect()
    assert unseen == []


BusyLine = Callable[..., Awaitable[Line]]


@pytest.fixture
async def busy_line(open_line: OpenLine) -> AsyncIterator[BusyLine]:
    """A call flies, and is answered in the end; others are held for so many seconds."""
    opened: list[Line] = []

    async def open_one(seconds: float, **options: Any) -> Line:
        line = open_line(**options)
        line.first = await line.fly("first")
        line.hold(seconds)
        opened.append(line)
        return line

    yield open_one
    for line in opened:
        line.release()
        if not line.first.done():
            assert await ended(line.first) == [None]


async def turns(number: int = 5) -> None:
    """Let all that is ready run, so many times."""
    for _ in range(number):
        await asyncio.sleep(0)


async def start(*coroutines: Coroutine[Any, Any, Any]) -> list[asyncio.Task[Any]]:
    """Begin all, and wait until each has come as far as it gets at once."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    await turns()
    return tasks


async def ended(*tasks: asyncio.Task[Any]) -> list[Any]:
    """Wait for all; give what each returned or raised."""
    async with asyncio.timeout(BOUND):
        return await asyncio.gather(*tasks, return_exceptions=True)


async def leave(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in await ended(*tasks))


# Callers that leave.


async def test_who_leaves_while_held_is_not_sent(busy_line: BusyLine) -> None:
    line = await busy_line(AGES)
    a, b, c = await start(line.right("a", most=3), line.right("b", most=3), line.right("c", most=3))
    await leave(b)
    (d,) = await start(line.right("d", most=3))  # has no room, so that the others go
    assert await ended(a, c) == [None, None]
    assert line.sent == [["first"], ["a", "c"]]
    await leave(d)


async def test_nothing_is_sent_when_all_left_and_the_next_call_is_not_lost(busy_line: BusyLine) -> None:
    line = await busy_line(AGES)
    await leave(*await start(line.right("a"), line.right("b")))
    line.hold(0.01)
    assert await ended(*await start(line.right("c"))) == [None]
    assert line.sent == [["first"], ["c"]]


async def test_a_call_that_joins_while_all_others_leave_is_not_lost(busy_line: BusyLine) -> None:
    line = await busy_line(AGES)
    a, b = await start(line.right("a", most=3), line.right("b", most=3))
    c = asyncio.create_task(line.right("c", most=3))
    a.cancel()  # both are cancelled at once, but run only after c
    b.cancel()
    await ended(a, b)
    (d,) = await start(line.right("d", most=3))  # has no room, so that the others go
    assert await ended(c) == [None]
    assert line.sent == [["first"], ["c"]]
    await leave(d)


@pytest.mark.parametrize("after", range(8))
async def test_no_empty_call_is_made_when_all_leave_as_it_goes(busy_line: BusyLine, after: int) -> None:
    line = await busy_line(AGES)
    a, b = await start(line.right("a", most=2), line.right("b", most=2))
    c = asyncio.create_task(line.right("c", most=2))
    await turns(after)  # c finds it full; sooner or later it is on its way
    a.cancel()
    b.cancel()
    await ended(a, b)
    await turns(10)
    inputs = line.metric("embedmesh_upstream_inputs_total", modality="text")
    left = line.metric("embedmesh_upstream_requests_total", modality="text", code="CANCELLED")
    assert (inputs, left) in ((1, 0), (3, 1))
    assert [] not in line.sent
    await leave(c)


async def test_who_leaves_later_does_not_disturb_the_others(busy_line: BusyLine) -> None:
    line = await busy_line(0.01)
    line.gates["b"] = asyncio.Event()
    a, b, c = await start(line.right("a"), line.right("b"), line.right("c"))
    async with asyncio.timeout(BOUND):
        while line.encoder.running < 2:
            await asyncio.sleep(0.001)
    await leave(a)
    await leave(b)
    line.release()
    assert await ended(line.first, c) == [None, None]
    assert line.sent == [["first"], ["a", "b", "c"]]
    assert line.encoder.cancelled == 0


async def test_the_encoder_is_told_when_all_have_left(busy_line: BusyLine, settle: Any) -> None:
    line = await busy_line(0.01)
    line.gates["b"] = asyncio.Event()
    tasks = await start(line.right("a"), line.right("b"))
    await settle(lambda: line.encoder.running == 2)
    await leave(tasks[0])
    await turns(10)
    assert line.encoder.cancelled == 0
    await leave(tasks[1])
    await settle(lambda: line.encoder.cancelled == 1)
    line.release()
    assert await ended(line.first) == [None]
    assert repr(line.calls).startswith("<EncoderCalls flying=0 <Upstream text ")


# Deadlines.


async def test_who_is_out_of_time_fails_alone(busy_line: BusyLine, settle: Any) -> None:
    line = await busy_line(0.01)
    line.gates["b"] = asyncio.Event()
    hasty, other = await start(line.right("a", seconds=2.1), line.right("b", seconds=3.9))
    await settle(lambda: line.encoder.running == 2)
    (error,) = await ended(hasty)
    assert isinstance(error, DeadlineExceeded)
    assert not other.done()
    assert line.encoder.timeouts[1] > 2.1  # as the latest may wait
    line.release()
    assert await ended(line.first, other) == [None, None]
    assert line.sent == [["first"], ["a", "b"]]


async def test_a_deadline_ends_the_hold_too(busy_line: BusyLine) -> None:
    line = await busy_line(AGES)
    errors = await ended(*await start(line.right("a", seconds=0.05), line.right("b", seconds=-1)))
    assert all(isinstance(error, DeadlineExceeded) for error in errors)
    line.release()
    await ended(line.first)
    assert line.sent == [["first"]]


async def test_calls_of_unlike_deadlines_do_not_share_one(busy_line: BusyLine) -> None:
    line = await busy_line(0.01)
    seconds = {"a": 17, "b": 31, "c": 65, "d": 127, "e": math.inf, "f": math.inf, "g": 15}
    await ended(*await start(*(line.right(text, seconds=left) for text, left in seconds.items())))
    assert sorted(line.sent) == [["a", "b"], ["c", "d"], ["e", "f"], ["first"], ["g"]]
    # Without a deadline a call ends all the same; see `longest_call`.
    (without,) = (left for texts, left in zip(line.sent, line.encoder.timeouts, strict=True) if texts == ["e", "f"])
    assert 0 < without < 30


# Failures.


@pytest.mark.parametrize(
    "error",
    [
        NotReady("loading", retry_after=0.01),
        InferenceFailed("the model failed", metadata={"request_id": "x"}),
        Overloaded("the queue is full", retry_after=0.25),
    ],
    ids=lambda error: error.code.name,
)
async def test_a_joint_call_that_fails_fails_each_of_its_callers_alike(
    busy_line: BusyLine, encoder: Any, error: EmbedMeshError
) -> None:
    line = await busy_line(0.01)

    async def fail(request: Any) -> None:
        raise error

    encoder.before = fail
    errors = await ended(*await start(*(line.right(text) for text in "abc")))
    assert {type(each) for each in errors} == {type(error)}
    assert {(each.code, each.reason, each.message, each.retry_after) for each in errors} == {
        (error.code, error.reason, error.message, error.retry_after)
    }
    assert all(texts == list("abc") for texts in line.sent[1:])


async def test_who_leaves_as_the_call_fails_leaves_no_trace(busy_line: BusyLine, encoder: Any) -> None:
    line = await busy_line(0.01)

    go = asyncio.Event()

    async def fail(request: Any) -> None:
        await go.wait()
        raise InferenceFailed("the model failed", metadata={"request_id": "x"})

    async def take_along() -> None:
        with pytest.raises(InferenceFailed):
            await line.embed("a")
        leaving.cancel()  # its answer is there, but it has not run yet

    encoder.before = fail
    taking, leaving, staying, left = await start(take_along(), *(line.right(text) for text in "bcd"))
    async with asyncio.timeout(BOUND):
        while len(line.sent) < 2:
            await asyncio.sleep(0.001)
    await leave(left)
    go.set()
    outcomes = await ended(taking, leaving, staying)
    assert [type(outcome) for outcome in outcomes] == [type(None), asyncio.CancelledError, InferenceFailed]


async def test_who_leaves_as_the_call_is_answered_leaves_no_trace(busy_line: BusyLine) -> None:
    line = await busy_line(0.01)

    async def take_along() -> None:
        await line.right("a")
        leaving.cancel()

    taking, leaving, staying = await start(take_along(), line.right("b"), line.right("c"))
    outcomes = await ended(taking, leaving, staying)
    assert [type(outcome) for outcome in outcomes] == [type(None), asyncio.CancelledError, type(None)]


async def test_nobody_hangs_when_the_channel_closes(busy_line: BusyLine, settle: Any) -> None:
    line = await busy_line(0.01)
    line.gates["b"] = asyncio.Event()
    flying = await start(line.right("a"), line.right("b"))
    await settle(lambda: line.encoder.running == 2)
    held = await start(line.right("c"), line.right("d"))
    await line.upstream.__aexit__()
    outcomes = await ended(line.first, *flying, *held)
    assert all(isinstance(outcome, BaseException) for outcome in outcomes)


async def test_nobody_hangs_when_the_encoder_dies(busy_line: BusyLine, settle: Any) -> None:
    line = await busy_line(0.01)
    line.gates["b"] = asyncio.Event()
    flying = await start(line.right("a"), line.right("b"))
    await settle(lambda: line.encoder.running == 2)
    await line.encoder.stop()
    outcomes = await ended(line.first, *flying)
    assert {(type(outcome), outcome.reason) for outcome in outcomes[1:]} == {(type(outcomes[0]), outcomes[0].reason)}
    assert outcomes[0].code is grpc.StatusCode.UNAVAILABLE


# What shares a call.


async def test_small_calls_share_one_and_each_gets_its_own_answers(busy_line: BusyLine) -> None:
    line = await busy_line(0.01)
    parts = [["a"], ["b", "c"], ["a", "d", "e", "f"], ["g"]]
    assert await ended(*await start(*(line.right(*part) for part in parts))) == [None] * 4
    assert line.sent == [["first"], ["a", "b", "c", "a", "d", "e", "f", "g"]]
    assert line.metric("embedmesh_upstream_inputs_total", modality="text") == 9


@pytest.mark.parametrize(
    "other",
    [
        Terms("another", (DENSE,), pb.TRUNCATION_END, pb.PRIORITY_INTERACTIVE),
        Terms("", (DENSE, SPARSE), pb.TRUNCATION_END, pb.PRIORITY_INTERACTIVE),
        Terms("", (DENSE,), pb.TRUNCATION_REFUSE, pb.PRIORITY_INTERACTIVE),
        Terms("", (DENSE,), pb.TRUNCATION_END, pb.PRIORITY_BULK),
        Terms("", (DENSE,), pb.TRUNCATION_END, pb.PRIORITY_INTERACTIVE, (64, 8)),
    ],
    ids=["model", "kinds", "truncation", "priority", "chunking"],
)
async def test_calls_of_unlike_terms_share_none(open_line: OpenLine, other: Terms) -> None:
    line = open_line()
    flying: list[asyncio.Task[Any]] = [await line.fly("first")]
    if other.queue != TERMS.queue:
        flying.append(asyncio.create_task(line.embed("first", terms=other)))
        await turns()
    line.hold(0.01)
    line.hold(0.01, other)
    tasks = await start(*(line.embed(text, terms=terms) for text in "ab" for terms in (TERMS, other)))
    assert [len(answers) for answers in await ended(*tasks)] == [1] * 4
    joint = [call for call in line.encoder.calls if len(call.inputs) > 1]
    assert [[item.text for item in call.inputs] for call in joint] == [["a", "b"], ["a", "b"]]
    options = [(call.model, tuple(call.output.kinds), call.truncation, call.priority) for call in joint]
    assert options == [(terms.model, terms.kinds, terms.truncation, terms.priority) for terms in (TERMS, other)]
    line.release()
    await ended(*flying)


async def test_calls_that_may_carry_unlike_numbers_share_none(busy_line: BusyLine) -> None:
    line = await busy_line(0.01)
    await ended(*await start(*(line.right(text, most=most) for text in "ab" for most in (8, 9))))
    assert line.sent == [["first"], ["a", "b"], ["a", "b"]]


@pytest.mark.parametrize(("most", "expected"), [(3, 3), (32, 32), (64, 32)])
async def test_a_joint_call_is_bounded_and_a_full_one_goes_before_its_time(
    busy_line: BusyLine, most: int, expected: int
) -> None:
    line = await busy_line(AGES)
    texts = [f"text {i}" for i in range(expected)]
    tasks = await start(*(line.right(text, most=most) for text in texts))
    assert line.sent == [["first"]]
    (more,) = await start(line.right("one more", most=most))
    assert await ended(*tasks) == [None] * expected
    assert line.sent == [["first"], texts]
    assert not more.done()
    # That one is the first of the next, which others may join as well.
    texts = [f"text {i} of the next" for i in range(expected)]
    *tasks, last = await start(*(line.right(text, most=most) for text in texts))
    assert await ended(more, *tasks) == [None] * expected
    assert line.sent[2:] == [["one more", *texts[:-1]]]
    await leave(last)


async def test_a_call_that_does_not_fit_into_the_rest_goes_with_the_next(busy_line: BusyLine) -> None:
    line = await busy_line(AGES)
    a, b, c, d = await start(
        line.right("a", "b", "c", most=4),
        line.right("d", "e", most=4),
        line.right("f", "g", most=4),
        line.right("h", most=4),
    )
    assert await ended(a, b, c) == [None] * 3
    assert line.sent == [["first"], ["a", "b", "c"], ["d", "e", "f", "g"]]
    await leave(d)


# What goes at once.


@pytest.mark.parametrize(
    "texts", [list("abcde"), ["x" * 8190], ["x" * 4096, "y" * 4096]], ids=["inputs", "bytes", "bytes of several"]
)
async def test_a_large_call_goes_at_once(busy_line: BusyLine, texts: list[str]) -> None:
    line = await busy_line(AGES)
    assert await ended(*await start(line.right(*texts))) == [None]
    assert not line.first.done()
    (held,) = await start(line.right(*(text[:4000] for text in texts[:2]), "z"))
    await asyncio.sleep(0.05)
    assert line.sent == [["first"], texts]  # the smaller one is held
    await leave(held)


async def test_a_call_goes_at_once_where_no_other_flies(open_line: OpenLine) -> None:
    line = open_line()
    line.hold(AGES)
    assert await ended(*await start(line.right("a"))) == [None]
    assert await ended(*await start(line.right("b"))) == [None]
    assert line.sent == [["a"], ["b"]]


@pytest.mark.parametrize(("longest", "waiting"), [(0.0, AGES), (AGES, 0.0), (AGES, 0.0039), (0.0004, AGES), (AGES, -1)])
async def test_a_hold_that_is_not_worth_it_is_none(open_line: OpenLine, longest: float, waiting: float) -> None:
    line = open_line(longest_hold=longest)
    first = await line.fly("first")
    line.upstream.waiting[TERMS.queue] = waiting
    assert await ended(*await start(line.right("a"), line.right("b"))) == [None, None]
    assert sorted(line.sent) == [["a"], ["b"], ["first"]]
    line.release()
    await ended(first)


async def test_the_hold_is_a_part_of_what_a_call_waits(busy_line: BusyLine) -> None:
    line = await busy_line(AGES, longest_hold=0.01)  # but no longer than it may
    assert await ended(*await start(line.right("a"), line.right("b"))) == [None, None]
    assert line.sent == [["first"], ["a", "b"]]


async def test_an_encoder_that_does_not_tell_of_its_model_gets_no_joint_call(open_line: OpenLine, encoder: Any) -> None:
    line = open_line()

    async def slow(request: Any) -> None:
        await asyncio.sleep(0.1)

    encoder.before = slow
    await line.right("warm")
    assert line.upstream.waiting == {}
    await ended(*await start(*(line.right(text) for text in "abc")))
    assert sorted(line.sent) == [["a"], ["b"], ["c"], ["warm"]]
    # One that tells does: this is how the signal comes about.
    encoder.model_seconds = 0.001
    await line.right("warm")
    assert line.upstream.waiting[TERMS.queue] > 0.09
    del encoder.calls[:]
    await ended(*await start(*(line.right(text) for text in "abc")))
    assert line.sent == [["a"], ["b", "c"]]


async def test_a_call_that_is_recorded_goes_by_itself(busy_line: BusyLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    spans = tracing.start(NodeSettings.model_validate({"tracing": True, "trace_ratio": 1.0}), "gateway")

    async def recorded(text: str) -> None:
        spans.serve("service", "method", {})
        await line.right(text)

    line = await busy_line(0.01, tracing=spans)
    tasks = await start(recorded("a"), recorded("b"), line.right("c"), line.right("d"))
    assert await ended(*tasks) == [None] * 4
    assert sorted(line.sent) == [["a"], ["b"], ["c", "d"], ["first"]]
    await spans.close(0)


# A refusal speaks for those that follow.


def full(encoder: Any, inputs: int = 1, retry_after: float | None = AGES) -> None:
    """Let the encoder refuse calls of so many inputs."""

    async def refuse(request: Any) -> None:
        if len(request.inputs) >= inputs:
            raise Overloaded("the queue is full", retry_after=retry_after)

    encoder.before = refuse


@pytest.fixture
def long_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a refusal speak for so long that no busy machine takes longer, and from the first one on."""
    monkeypatch.setattr(module, "_REFUSED_SECONDS", AGES)
    monkeypatch.setattr(module, "_REFUSED_SHARE", 0.0)


async def test_refusals_speak_where_most_calls_are_refused(open_line: OpenLine, encoder: Any) -> None:
    line = open_line()
    full(encoder)
    for _ in range(40):
        with pytest.raises(Overloaded):
            await line.embed("a")
    tried = len(line.sent)
    assert 10 < tried < 40
    assert line.metric("embedmesh_gateway_refused_inputs_total") == 40 - tried


async def test_refusals_do_not_speak_where_half_of_the_calls_are_answered(open_line: OpenLine, encoder: Any) -> None:
    line = open_line()
    for turn in range(80):  # as by two encoders in turn, of which one is full
        encoder.before = None
        if turn % 2:
            full(encoder)
            with pytest.raises(Overloaded):
                await line.embed("a")
        else:
            await line.right("a")
    assert len(line.sent) == 80
    assert line.metric("embedmesh_gateway_refused_inputs_total") == 0


@pytest.mark.usefixtures("long_refusal")
async def test_a_refusal_speaks_for_calls_of_as_many_inputs(open_line: OpenLine, encoder: Any) -> None:
    line = open_line()
    full(encoder, 3)
    errors = await ended(*[asyncio.create_task(line.embed("a", "b", "c"))])
    assert line.metric("embedmesh_gateway_refused_inputs_total") == 0  # that was the encoder
    errors += await ended(*await start(line.embed("a", "b", "c"), line.embed("a", "b", "c", "d")))
    assert len(line.sent) == 1
    assert {(type(error), error.message, error.retry_after) for error in errors} == {
        (Overloaded, "the queue is full", AGES)
    }
    assert len({id(error) for error in errors}) == 3
    assert line.metric("embedmesh_gateway_refused_inputs_total") == 7
    # A smaller one is tried; its answer says that there is room again.
    await line.right("a", "b")
    errors = await ended(*await start(line.embed("a", "b", "c")))
    assert isinstance(errors[0], Overloaded)
    assert line.sent == [["a", "b", "c"], ["a", "b"], ["a", "b", "c"]]
    assert line.metric("embedmesh_gateway_refused_inputs_total") == 7


@pytest.mark.usefixtures("long_refusal")
async def test_an_answer_of_an_earlier_call_ends_a_refusal(open_line: OpenLine, encoder: Any) -> None:
    line = open_line()
    first = await line.fly("first")
    full(encoder)
    for _ in range(3):
        with pytest.raises(Overloaded):
            await line.embed("a")
    assert line.sent == [["first"], ["a"]]
    encoder.before = None
    line.release()
    assert await ended(first) == [None]
    await line.right("b")


@pytest.mark.usefixtures("long_refusal")
@pytest.mark.parametrize(
    "other",
    [
        Terms("another", (DENSE,), pb.TRUNCATION_END, pb.PRIORITY_INTERACTIVE),
        Terms("", (DENSE,), pb.TRUNCATION_END, pb.PRIORITY_BULK),
    ],
    ids=["model", "priority"],
)
async def test_a_refusal_says_nothing_of_another_queue(open_line: OpenLine, encoder: Any, other: Terms) -> None:
    line = open_line()
    full(encoder)
    with pytest.raises(Overloaded):
        await line.embed("a")
    encoder.before = None
    await line.right("b", terms=other)
    with pytest.raises(Overloaded):  # nor does the answer say anything of this one
        await line.embed("a", terms=Terms("", (DENSE, SPARSE), pb.TRUNCATION_REFUSE, pb.PRIORITY_INTERACTIVE))
    assert line.sent == [["a"], ["b"]]


@pytest.mark.parametrize(("retry_after", "speaks"), [(AGES, None), (None, None), (0.001, AGES)])
async def test_a_refusal_passes(
    open_line: OpenLine,
    encoder: Any,
    monkeypatch: pytest.MonkeyPatch,
    retry_after: float | None,
    speaks: float | None,
) -> None:
    monkeypatch.setattr(module, "_REFUSED_SHARE", 0.0)
    if speaks:
        monkeypatch.setattr(module, "_REFUSED_SECONDS", speaks)
    line = open_line()
    full(encoder, retry_after=retry_after)
    with pytest.raises(Overloaded):
        await line.embed("a")
    encoder.before = None
    async with asyncio.timeout(BOUND):
        while True:
            try:
                await line.right("a")
                break
            except Overloaded as error:
                assert error.retry_after == retry_after
                await asyncio.sleep(0.01)
    assert line.sent == [["a"], ["a"]]


async def test_a_joint_call_that_is_refused_speaks_for_as_many_inputs(
    busy_line: BusyLine, encoder: Any, long_refusal: None
) -> None:
    line = await busy_line(0.01)
    full(encoder, 2)
    errors = await ended(*await start(line.embed("a"), line.embed("b"), line.embed("c")))
    assert [type(error) for error in errors] == [Overloaded] * 3
    with pytest.raises(Overloaded):
        await line.embed("a", "b", "c")
    await line.right("a")
    assert line.sent == [["first"], ["a", "b", "c"], ["a"]]


@pytest.mark.parametrize("hurry", [0.0, AGES])
async def test_nothing_is_held_for_a_while_after_a_refusal(
    open_line: OpenLine, encoder: Any, monkeypatch: pytest.MonkeyPatch, hurry: float
) -> None:
    monkeypatch.setattr(module, "_HURRY_SECONDS", hurry)
    line = open_line()
    full(encoder)
    with pytest.raises(Overloaded):
        await line.embed("a", "b")
    encoder.before = line._wait
    await line.right("c")  # there is room again
    first = await line.fly("first")
    line.hold(0.01)
    await ended(*await start(line.right("d"), line.right("e")))
    assert sorted(line.sent[3:]) == ([["d"], ["e"]] if hurry else [["d", "e"]])
    line.release()
    await ended(first)


# By the whole gateway.


async def failure(call: Any) -> EmbedMeshError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


@pytest.fixture
async def busy_mesh(open_mesh: Any, make_encoder: Any, settle: Any) -> AsyncIterator[Any]:
    """A gateway with a call at its encoder, where others are held until there are four inputs, and one more."""
    encoder = make_encoder("text", max_inputs=4)
    release = asyncio.Event()

    async def wait(request: Any) -> None:
        if request.inputs[0].text == "first":
            await release.wait()

    async with open_mesh({"text": [encoder]}, hold_ms=AGES * 1000) as mesh:
        encoder.model_seconds = -8 * AGES  # so that a call of no time has waited for ages
        await mesh.embed(["warm"])
        encoder.before = wait
        first = asyncio.create_task(mesh.embed(["first"]))
        await settle(lambda: encoder.running == 1)
        mesh.release = release
        del encoder.calls[:], encoder.metadata[:]
        yield mesh
        release.set()
        await first


def looked_up(mesh: Any) -> float:
    """How many inputs were on no other's way, and so went on theirs."""
    return float(mesh.metric("embedmesh_cache_lookups_total", tier="inflight", outcome="miss"))


async def begin(mesh: Any, settle: Any, *requests: list[str]) -> list[Any]:
    """Send requests, each when the one before is in the gateway; give the calls."""
    calls = []
    for texts in requests:
        goal = looked_up(mesh) + len(texts)
        call = mesh.gateway.Embed(mesh.request(texts), timeout=BOUND, metadata=(("x-request-id", f"id of {texts[0]}"),))
        calls.append(call)
        await settle(lambda goal=goal: looked_up(mesh) == goal)
    return calls


def rows(response: gateway_pb2.EmbedResponse) -> Any:
    return [vectors.dequantize(each.embedding.dense) for each in response.results if each.HasField("embedding")]


async def test_an_input_that_fails_in_a_joint_call_fails_alone_in_its_own_request(busy_mesh: Any, settle: Any) -> None:
    a, b, more = await begin(busy_mesh, settle, ["a", "b"], ["c", "[[bad]]"], ["d"])
    good, bad = await asyncio.gather(a, b)
    assert [[item.text for item in call.inputs] for call in busy_mesh.text.calls] == [["a", "b", "c", "[[bad]]"]]
    assert np.array_equal(rows(good), [busy_mesh.expected("a"), busy_mesh.expected("b")])
    assert good.usage.failed_inputs == 0
    assert np.array_equal(rows(bad), [busy_mesh.expected("c")])
    error = from_status(bad.results[1].error)
    assert (error.reason, error.field) == ("INVALID_REQUEST", "inputs[1].text")
    assert bad.usage.failed_inputs == 1
    # What an encoder tells of itself is not passed on.
    assert (good.usage.model_seconds, bad.usage.model_seconds) == (0, 0)
    more.cancel()


async def test_the_only_input_of_a_request_fails_in_a_joint_call(busy_mesh: Any, settle: Any) -> None:
    a, b, c, more = await begin(busy_mesh, settle, ["a"], ["[[bad]]"], ["b", "c"], ["d"])
    good, bad, others = await asyncio.gather(a, b, c)
    assert [[item.text for item in call.inputs] for call in busy_mesh.text.calls] == [["a", "[[bad]]", "b", "c"]]
    error = from_status(bad.results[0].error)
    assert (error.reason, error.field) == ("INVALID_REQUEST", "inputs[0].text")
    assert np.array_equal(rows(good), [busy_mesh.expected("a")])
    assert np.array_equal(rows(others), [busy_mesh.expected("b"), busy_mesh.expected("c")])
    more.cancel()


async def test_a_joint_call_goes_by_an_id_of_its_own(busy_mesh: Any, settle: Any) -> None:
    *joint, more = await begin(busy_mesh, settle, ["a"], ["b"], ["c"], ["d"], ["e"])
    await asyncio.gather(*joint)
    (metadata,) = busy_mesh.text.metadata
    assert len(metadata["x-request-id"]) == 32
    # Each caller keeps its own.
    for text, call in zip("abcd", joint, strict=True):
        assert ("x-request-id", f"id of {text}") in tuple(await call.trailing_metadata())
    more.cancel()


async def test_a_joint_call_that_fails_fails_each_request(busy_mesh: Any, settle: Any) -> None:
    async def fail(request: Any) -> None:
        raise Overloaded("the queue is full", retry_after=0.25)

    busy_mesh.text.before = fail
    *joint, more = await begin(busy_mesh, settle, ["a", "b"], ["c"], ["d"], ["e"])
    errors = [await failure(task) for task in joint]
    assert [(type(error), error.message, error.retry_after) for error in errors] == [
        (Overloaded, "the queue is full", 0.25)
    ] * 3
    assert len(busy_mesh.text.calls) == 1
    more.cancel()


async def test_streams_sit_refusals_out(open_mesh: Any) -> None:
    async with open_mesh(stream_window=8) as mesh:
        refusals = iter(range(5))

        async def full_for_some_time(request: Any) -> None:
            if next(refusals, None) is not None:
                raise Overloaded("the queue is full", retry_after=0.02)

        mesh.text.before = full_for_some_time
        requests = [
            gateway_pb2.EmbedStreamRequest(sequence=n, request=mesh.request([f"{n} {i}" for i in range(n)]))
            for n in range(1, 21)
        ]
        answers = {}
        async for answer in mesh.gateway.EmbedStream(iter(requests), timeout=BOUND):
            answers[answer.sequence] = answer
        assert answers.keys() == set(range(1, 21))
        for n, answer in answers.items():
            assert np.array_equal(rows(answer.response), [mesh.expected(f"{n} {i}") for i in range(n)])


async def test_a_full_replica_keeps_nobody_from_the_other(open_mesh: Any, make_encoder: Any) -> None:
    # In the end: whoever comes back when he was told to is answered.
    one, other = make_encoder("text"), make_encoder("text")
    full(one, retry_after=0.05)
    async with open_mesh({"text": [one, other]}) as mesh:

        async def caller(name: int) -> None:
            for i in range(5):
                text = f"{name} {i}"
                while True:
                    try:
                        response = await mesh.embed([text])
                    except grpc.aio.AioRpcError as caught:
                        error = from_rpc_error(caught)
                        assert isinstance(error, Overloaded)
                        await asyncio.sleep(error.retry_after or 0)
                    else:
                        break
                assert np.array_equal(rows(response), [mesh.expected(text)])

        async with asyncio.timeout(BOUND):
            await asyncio.gather(*(caller(name) for name in range(6)))
        assert len(other.inputs) == 30
