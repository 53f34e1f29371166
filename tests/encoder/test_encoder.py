import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from embedmesh.errors import (
    DeadlineExceeded,
    InferenceFailed,
    InputTooLarge,
    InternalError,
    NotReady,
    Overloaded,
)
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_encoder.backend.fake import FAIL, NAN
from embedmesh_encoder.batcher import Priority
from embedmesh_encoder.encoder import Encoded
from embedmesh_encoder.model import ModelError
from embedmesh_encoder.text import TextItem

Make = Callable[..., Any]


def items(*texts: str) -> list[TextItem]:
    return [TextItem(text) for text in texts]


class Wrapped:
    """A preparer in front of the real one."""

    def __init__(self, preparer: Any, prepare: Callable[[Any], None]) -> None:
        self._preparer, self._prepare = preparer, prepare
        self.limits, self.padded = preparer.limits, preparer.padded
        self.collate, self.split = preparer.collate, preparer.split
        self.is_quick = lambda items: False

    def prepare(self, item: Any, truncation: Any) -> Any:
        self._prepare(item)
        return self._preparer.prepare(item, truncation)


async def test_vectors_are_normalised_as_the_model_says(make_encoder: Make) -> None:
    normalised, _, _ = make_encoder()
    pooled, _, _ = make_encoder(model={"normalized": False})
    [a] = await normalised.embed(items("a text"))
    [b] = await pooled.embed(items("a text"))
    assert a.vector.dtype == b.vector.dtype == np.float32
    assert np.linalg.norm(a.vector) == pytest.approx(1, abs=1e-6)
    assert a.norm == b.norm == pytest.approx(np.linalg.norm(b.vector), rel=1e-6)
    np.testing.assert_allclose(a.vector * a.norm, b.vector, rtol=1e-6)
    assert (a.units, a.original_units, a.truncated) == (8, 8, False)


async def test_a_vector_does_not_depend_on_its_company(make_encoder: Make) -> None:
    encoder, gate, _ = make_encoder()
    texts = [f"text number {i}" * (i % 5) for i in range(40)]
    together = await encoder.embed(items(*texts))
    assert max(gate.batches) > 1
    for text, one in zip(texts, together, strict=True):
        [alone] = await encoder.embed(items(text))
        np.testing.assert_array_equal(alone.vector, one.vector)


async def test_only_a_batch_that_is_alone_takes_all_threads(make_encoder: Make) -> None:
    encoder, gate, _ = make_encoder(lanes_apart=True, lanes=2, batch_items=2)
    await encoder.warm_up(items("warm"))
    assert (gate.batches, gate.beside) == ([1, 1, 1, 1], [1, 1])  # by itself and as two of one, each way
    await encoder.embed(items("alone"))
    assert gate.beside == [1, 1]
    await encoder.embed(items("in", "two", "batches"))
    assert sorted(gate.beside) == [1, 1, 1, 2]


async def test_outcomes_are_in_order_and_alone(make_encoder: Make, caplog: pytest.LogCaptureFixture) -> None:
    encoder, _, registry = make_encoder(model={"max_input_units": 32})
    given = InputTooLarge("refused before it came here")
    outcomes = await encoder.embed(
        [*items("good", f"a {FAIL}", "x" * 99, f"a {NAN}", "also good"), given], truncation=pb.TRUNCATION_REFUSE
    )
    assert [type(outcome).__name__ for outcome in outcomes] == [
        "Encoded",
        "InferenceFailed",
        "InputTooLarge",
        "_NotFinite",
        "Encoded",
        "InputTooLarge",
    ]
    assert outcomes[5] is given
    for bad in (outcomes[1], outcomes[3]):
        assert isinstance(bad, InferenceFailed)
        assert "request_id" in bad.metadata
        assert "fake model" not in bad.message
    assert "the fake model fails" in caplog.text

    def sample(name: str, **labels: str) -> Any:
        return registry.get_sample_value(f"embedmesh_{name}", {"model": "fake-text", **labels})

    assert sample("encoder_inputs_total", outcome="ok") == 2
    assert sample("encoder_inputs_total", outcome="INFERENCE_FAILED") == 2
    assert sample("encoder_inputs_total", outcome="INPUT_TOO_LARGE") == 2
    assert sample("nonfinite_vectors_total") == 1
    assert sample("truncated_inputs_total") == 0


async def test_truncated_inputs_say_so_and_are_counted(make_encoder: Make) -> None:
    encoder, _, registry = make_encoder(model={"max_input_units": 32})
    [end] = await encoder.embed(items("a" + "b" * 99), truncation=pb.TRUNCATION_END)
    [start] = await encoder.embed(items("a" + "b" * 99), truncation=pb.TRUNCATION_START)
    for each in (end, start):
        assert (each.units, each.original_units, each.truncated) == (32, 102, True)
    assert not np.array_equal(end.vector, start.vector)
    assert registry.get_sample_value("embedmesh_truncated_inputs_total", {"model": "fake-text"}) == 2


async def test_nothing_in_nothing_out(make_encoder: Make) -> None:
    encoder, gate, _ = make_encoder()
    assert await encoder.embed([]) == []
    assert [type(outcome) for outcome in await encoder.embed([NotReadyish()])] == [InternalError]
    assert gate.batches == []


class NotReadyish:
    """Nothing that a text preparer knows."""


async def test_unknown_exceptions_of_preparation_do_not_leak(
    make_encoder: Make, caplog: pytest.LogCaptureFixture
) -> None:
    def prepare(item: TextItem) -> None:
        if item.text == "bad":
            raise KeyError("secret text")

    encoder, _, _ = make_encoder(wrap=lambda preparer: Wrapped(preparer, prepare))
    good, bad = await encoder.embed(items("good", "bad"))
    assert isinstance(good, Encoded)
    assert isinstance(bad, InternalError)
    assert "secret" not in bad.message
    assert "secret" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_a_long_request_is_prepared_in_turns_with_others(make_encoder: Make) -> None:
    order: list[str] = []
    first_slice = threading.Event()

    def prepare(item: TextItem) -> None:
        order.append(item.text)
        if item.text.startswith("long"):
            # One slice of time is over with each of these.
            threading.Event().wait(0.006)
            if len(order) == 1:
                assert first_slice.wait(10)

    encoder, _, _ = make_encoder(wrap=lambda preparer: Wrapped(preparer, prepare), prepare_threads=1)
    long = asyncio.create_task(encoder.embed(items(*(f"long {i}" for i in range(5)))))
    await asyncio.sleep(0)
    short = asyncio.create_task(encoder.embed(items("short")))
    await asyncio.sleep(0)
    first_slice.set()
    await asyncio.gather(long, short)
    assert order.index("short") <= 2
    assert order[-1] == "long 4"


async def test_inputs_of_a_long_request_are_prepared_side_by_side(make_encoder: Make) -> None:
    both = threading.Barrier(2)

    def prepare(item: TextItem) -> None:
        if item.text == "first":
            threading.Event().wait(0.006)  # a slice of time
        else:
            both.wait(10)

    encoder, _, _ = make_encoder(wrap=lambda preparer: Wrapped(preparer, prepare), prepare_threads=2)
    texts = ["first", "second", "the third", "one more", "the fifth and last"]
    outcomes = await encoder.embed(items(*texts))
    assert [outcome.units for outcome in outcomes] == [len(text) + 2 for text in texts]


async def test_cancelling_takes_the_inputs_out_of_the_queue(make_encoder: Make) -> None:
    encoder, gate, registry = make_encoder()
    gate.shut()
    running = asyncio.create_task(encoder.embed(items("running")))
    await gate.entered(1)
    leaving = asyncio.create_task(encoder.embed(items("a", "b", "c")))
    while "queued=3" not in repr(encoder):
        await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await asyncio.sleep(0)
    assert "queued=0" in repr(encoder)
    gate.open()
    await running
    assert gate.batches == [1]
    labels = {"model": "fake-text", "reason": "cancelled"}
    assert registry.get_sample_value("embedmesh_dropped_inputs_total", labels) == 3


async def test_a_deadline_ends_the_wait_while_a_batch_runs(make_encoder: Make) -> None:
    encoder, gate, registry = make_encoder(batch_items=1)
    gate.shut()
    now = asyncio.get_running_loop().time()
    with pytest.raises(DeadlineExceeded):
        await encoder.embed(items("running", "waiting"), deadline=now + 0.05)
    gate.open()
    await encoder.embed(items("next"))
    assert len(gate.batches) == 2  # the one that waited never ran
    labels = {"model": "fake-text", "reason": "expired"}
    assert registry.get_sample_value("embedmesh_dropped_inputs_total", labels) == 1
    labels = {"model": "fake-text", "outcome": "DEADLINE_EXCEEDED"}
    assert registry.get_sample_value("embedmesh_encoder_inputs_total", labels) == 2


async def test_what_was_made_before_the_deadline_is_given(make_encoder: Make) -> None:
    encoder, gate, _ = make_encoder(batch_items=1)
    run = gate.run
    gate.run = lambda feeds: (gate.shut() if len(gate.batches) == 1 else None, run(feeds))[1]
    now = asyncio.get_running_loop().time()
    first, second = await encoder.embed(items("first", "second"), deadline=now + 0.5)
    assert isinstance(first, Encoded)
    assert isinstance(second, DeadlineExceeded)


async def test_a_deadline_that_passed_prepares_nothing(make_encoder: Make) -> None:
    encoder, gate, _ = make_encoder()
    with pytest.raises(DeadlineExceeded):
        await encoder.embed(items("late"), deadline=asyncio.get_running_loop().time())
    assert gate.batches == []


async def test_overload_is_refused_and_counted(make_encoder: Make) -> None:
    encoder, gate, registry = make_encoder(max_queue_cost=20)
    preparer = encoder._preparer
    gate.shut()
    running = asyncio.create_task(encoder.embed(items("running")))
    await gate.entered(1)
    waiting = asyncio.create_task(encoder.embed(items("x" * 18)))
    while "queued=1" not in repr(encoder):
        await asyncio.sleep(0)
    with pytest.raises(Overloaded) as refused:
        await encoder.embed(items("a", "b"))
    assert refused.value.retry_after is not None
    # Nothing is prepared where the queue is full for as many inputs of any size.
    encoder._preparer = None
    with pytest.raises(Overloaded):
        await encoder.embed(items("a"))
    encoder._preparer = preparer
    bulk = asyncio.create_task(encoder.embed(items("b"), priority=Priority.BULK))
    gate.open()
    await asyncio.gather(running, waiting, bulk)
    labels = {"model": "fake-text", "outcome": "OVERLOADED"}
    assert registry.get_sample_value("embedmesh_encoder_inputs_total", labels) == 3


async def test_drain_waits_for_calls_whose_inputs_are_being_prepared(make_encoder: Make) -> None:
    goes_on = threading.Event()

    def prepare(item: TextItem) -> None:
        del item
        assert goes_on.wait(10)

    encoder, _, _ = make_encoder(wrap=lambda preparer: Wrapped(preparer, prepare))
    call = asyncio.create_task(encoder.embed(items("long " * 1000)))
    await asyncio.sleep(0)
    drained = asyncio.create_task(encoder.drain())
    await asyncio.sleep(0.01)
    assert not drained.done()
    goes_on.set()
    await drained
    assert await encoder.close(10)
    (outcome,) = await call
    assert isinstance(outcome, Encoded)


async def test_close_ends_everything(make_encoder: Make) -> None:
    encoder, gate, registry = make_encoder()
    await encoder.warm_up(items("warm"))
    assert encoder.ready
    ready = {"model": "fake-text"}
    assert registry.get_sample_value("embedmesh_model_ready", ready) == 1
    assert await encoder.close(10)
    assert gate.closed
    assert not encoder.ready
    # No line of it is left, of whatever metric.
    assert not [s.name for metric in registry.collect() for s in metric.samples if s.labels.get("model") == "fake-text"]
    with pytest.raises(NotReady):
        await encoder.embed(items("late"))


async def test_a_hanging_backend_is_left_behind(make_encoder: Make) -> None:
    encoder, gate, _ = make_encoder()
    gate.shut()
    running = asyncio.create_task(encoder.embed(items("hangs")))
    await gate.entered(1)
    assert not await encoder.close(0.01)
    assert not gate.closed
    with pytest.raises(NotReady):
        await running


async def test_warm_up_shows_a_broken_model(make_encoder: Make) -> None:
    encoder, gate, registry = make_encoder()
    with pytest.raises(ModelError, match="not finite"):
        await encoder.warm_up(items(NAN))
    with pytest.raises(ModelError, match="fake model fails"):
        await encoder.warm_up(items(FAIL))
    run = gate.run
    gate.run = lambda feeds: {name: rows[:, :3] for name, rows in run(feeds).items()}
    with pytest.raises(ModelError, match=r"shape \(1, 3\), expected \(1, 16\)"):
        await encoder.warm_up(items("a"))
    assert not encoder.ready
    # It is no call: nothing is counted.
    labels = {"model": "fake-text", "stage": "infer"}
    assert registry.get_sample_value("embedmesh_encoder_stage_seconds_count", labels) == 0


async def test_zero_vectors_are_finite(make_encoder: Make) -> None:
    encoder, gate, _ = make_encoder()
    gate.run = lambda feeds: {"sentence_embedding": np.zeros((1, 16), np.float32)}
    [zero] = await encoder.embed(items("a"))
    assert zero.norm == 0
    assert not zero.vector.any()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
async def test_no_vector_that_is_not_finite_leaves(make_encoder: Make, bad: float) -> None:
    encoder, gate, _ = make_encoder(model={"normalized": False})
    row = np.ones((1, 16), np.float32)
    row[0, 3] = bad
    gate.run = lambda feeds: {"sentence_embedding": row}
    [outcome] = await encoder.embed(items("a"))
    assert isinstance(outcome, InferenceFailed)


async def test_info(make_encoder: Make) -> None:
    encoder, _, registry = make_encoder()
    labels = {
        "model": "fake-text",
        "revision": encoder.spec.revision,
        "space": "fake-text",
        "modality": "text",
        "backend": "fake",
        "precision": "float32",
    }
    assert registry.get_sample_value("embedmesh_model_info", labels) == 1
    assert repr(encoder).startswith(f"<Encoder fake-text@{encoder.spec.revision} ready=False <Batcher")
