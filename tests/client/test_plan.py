"""The planner against any order of answers, failures and pauses: nothing lost, nothing twice, all within bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import embedmesh
from embedmesh import _plan, errors
from embedmesh._plan import Plan
from embedmesh.v1 import embedding_pb2, gateway_pb2

OPTIONS = _plan.parse_options(
    model="",
    kinds=["dense"],
    dimensions=0,
    dtype="float32",
    normalize=None,
    role=None,
    instruction="",
    instructions=(),
    truncation="end",
    chunk_units=0,
    chunk_overlap=0,
    cache="read_write",
    priority="bulk",
)
MODEL = embedding_pb2.ModelRef(name="m")


def plan(**changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "max_inputs": 3,
        "max_message_bytes": 2**16,
        "retries": 2,
        "window": 2,
        "deadline": math.inf,
        "ordered": True,
        "streaming": True,
    }
    return Plan(OPTIONS, **(settings | changes))


def answer(request: gateway_pb2.EmbedRequest, outcomes: list[str]) -> gateway_pb2.EmbedResponse:
    response = gateway_pb2.EmbedResponse(models=[MODEL])
    for item, outcome in zip(request.inputs, outcomes, strict=True):
        result = response.results.add()
        if outcome == "vector":
            dense = result.embedding.dense
            dense.dtype, dense.data = embedding_pb2.DTYPE_FLOAT32, item.text.text.zfill(4).encode()
            dense.shape.append(1)
        else:
            kind = errors.Overloaded if outcome == "full" else errors.InferenceFailed
            result.error.CopyFrom(errors.to_status(kind(item.text.text, retry_after=1)))
    return response


OUTCOMES = st.sampled_from(["vector", "vector", "full", "failed"])


class Mesh:
    """Plays gRPC and the gateway for a plan, as `data` decides."""

    def __init__(self, job: Plan, retries: int, data: st.DataObject) -> None:
        self.job = job
        self.retries = retries
        self.data = data
        self.in_flight: list[_plan.Part] = []
        self.breaks = 0

    def step(self, now: float) -> None:
        part = self.in_flight.pop(self.data.draw(st.integers(0, len(self.in_flight) - 1)))
        event = self.data.draw(st.sampled_from(["answer", "answer", "fail", "break"]))
        if event == "break" and self.breaks < self.retries:
            self.breaks += 1
            self.job.interrupt(errors.NotReady("gone"), now)
            self.in_flight.clear()
            return
        message = gateway_pb2.EmbedStreamResponse(sequence=part.number)
        if event == "fail":
            message.error.CopyFrom(errors.to_status(errors.NotReady("loading", retry_after=2)))
        else:
            request = self.job.request(part)
            message.response.CopyFrom(answer(request, [self.data.draw(OUTCOMES) for _ in request.inputs]))
        self.breaks = 0
        self.job.receive(message, now)


@given(
    count=st.integers(0, 40),
    max_inputs=st.integers(1, 5),
    window=st.integers(1, 4),
    ordered=st.booleans(),
    data=st.data(),
)
def test_every_input_gets_one_result(
    *, count: int, max_inputs: int, window: int, ordered: bool, data: st.DataObject
) -> None:
    retries = data.draw(st.integers(0, 3))
    job = plan(max_inputs=max_inputs, window=window, retries=retries, ordered=ordered)
    mesh = Mesh(job, retries, data)
    source = (str(i) if i % 7 else "\ud800" for i in range(count))
    now = 0.0
    results: list[embedmesh.EmbedResult] = []
    while not job.done:
        while job.room:
            job.read(source)
        mesh.in_flight += job.due(now)
        assert len(mesh.in_flight) <= window
        assert all(0 < len(part.waiting) <= max_inputs for part in mesh.in_flight)
        assert f"in_flight={len(mesh.in_flight)}" in repr(job)
        if mesh.in_flight:
            mesh.step(now)
        else:
            now += job.pause(now) or 0
        results += job.take()
    indexes = [result.index for result in results]
    assert sorted(indexes) == list(range(count))
    assert not ordered or indexes == sorted(indexes)
    for result in results:
        if result.error is None:
            assert result.vector.tobytes() == str(result.index).zfill(4).encode()
        elif isinstance(result.error, errors.InferenceFailed | errors.Overloaded):
            assert result.error.message == str(result.index)


def test_a_part_is_not_answered_twice() -> None:
    job = plan()
    source = iter(["1"])
    while job.room:
        job.read(source)
    (part,) = job.due(0)
    message = gateway_pb2.EmbedStreamResponse(sequence=0, response=answer(job.request(part), ["full"]))
    job.receive(message, 0)
    with pytest.raises(errors.InternalError, match="not asked"):
        job.receive(message, 0)


def test_pauses_grow_and_are_bounded() -> None:
    error = errors.NotReady("loading")
    for attempts, least, most in [(1, 0.16, 0.24), (2, 0.48, 0.72), (3, 1.44, 2.16), (4, 2.4, 3.6), (400, 2.4, 3.6)]:
        assert least <= _plan._pause(error, attempts) <= most
    assert _plan._pause(errors.NotReady("loading", retry_after=7), 1) == 7


def test_a_field_that_names_no_input_stays() -> None:
    assert _plan._reindex("model", [5]) == "model"
    assert _plan._reindex("inputs[3].text", [5]) == "inputs[3].text"
    assert _plan._reindex("inputs[0].text", [5]) == "inputs[5].text"
