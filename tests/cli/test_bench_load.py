"""The load generator: when it calls, and what a stall looks like. Time is simulated: no machine is too slow for it."""

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
import pytest

from embedmesh_cli.bench.load import Answer, Calls, Closed, Load, Open, drive, merge, split
from embedmesh_cli.bench.measure import Latencies, Measured, Seen

T = TypeVar("T")


class Timeless(selectors.SelectSelector):
    """Where others would wait, it moves the clock."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if not events:
            assert timeout is not None, "everybody waits for nothing"
            self.now += timeout
        return events


class SimulatedLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.clock = Timeless()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now


def simulate(work: Callable[[], Awaitable[T]]) -> T:
    async def run() -> T:
        return await work()

    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(run())


def load(pace: Closed | Open, **changes: Any) -> Load:
    given: dict[str, Any] = {
        "wire": "gateway",
        "address": "",
        "payloads": [b""],
        "seconds": 1.0,
        "warm_seconds": 0.0,
    } | changes
    return Load(pace=pace, **given)


def test_constant_arrivals() -> None:
    np.testing.assert_allclose(Open(4, poisson=False).times(1.1), [0, 0.25, 0.5, 0.75, 1.0])
    assert len(Open(100, poisson=False).times(3)) == 300


def test_poisson_arrivals() -> None:
    times = Open(200, seed=3).times(50)
    gaps = np.diff(times)
    assert abs(len(times) - 10_000) < 4 * 100  # its standard deviation is the root of its mean
    assert (gaps >= 0).all()
    assert times[-1] < 50
    # Exponential gaps: the standard deviation is the mean, and e^-1 of them are longer than it.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert (gaps > gaps.mean()).mean() == pytest.approx(np.exp(-1), abs=0.02)
    np.testing.assert_array_equal(times, Open(200, seed=3).times(50))
    assert not np.array_equal(times[:5], Open(200, seed=4).times(50)[:5])


def test_a_load_cut_into_parts_is_the_same_load() -> None:
    payloads = [bytes([i]) for i in range(7)]
    parts = split(load(Closed(5), payloads=payloads, units=range(7)), 3)
    assert [part.pace for part in parts] == [Closed(2), Closed(2), Closed(1)]
    assert sorted(b"".join(b"".join(part.payloads) for part in parts)) == list(range(7))
    assert [list(part.units) for part in parts] == [[0, 3, 6], [1, 4], [2, 5]]
    assert len(split(load(Closed(2)), 3)) == 2  # nobody without a caller
    opens = split(load(Open(90, seed=1)), 3)
    times = np.concatenate([part.pace.times(20) for part in opens if isinstance(part.pace, Open)])
    assert len(times) == pytest.approx(90 * 20, rel=0.1)
    assert len(set(times)) == len(times)


class Stalling:
    """A server that takes a millisecond, and once stands still until a moment of the loop's clock."""

    def __init__(self, begin: float, end: float) -> None:
        self.begin, self.end = begin, end

    async def __call__(self, _: bytes) -> Answer:
        now = asyncio.get_running_loop().time()
        await asyncio.sleep(self.end - now if self.begin <= now < self.end else 0.001)
        return Answer("OK", 1)


def stalled(pace: Closed | Open) -> Measured:
    return Measured.of(simulate(lambda: drive(Stalling(0.51, 1.01), load(pace, seconds=2.0), 0.01)), Seen())


def test_a_stall_counts_for_every_call_that_was_due_in_it() -> None:
    """No coordinated omission: of the calls of 2 s, those due in a stall of 0.5 s waited for what was left of it."""
    measured, closed = stalled(Open(200, poisson=False)), stalled(Closed(1))
    assert measured.offered == pytest.approx(200)
    # A quarter of the calls, spread evenly over 0 to 500 ms.
    assert measured.latency.at(50) == pytest.approx(0.001, rel=0.01)
    assert measured.latency.at(87.5) == pytest.approx(0.25, abs=0.01)
    assert measured.latency.at(99) == pytest.approx(0.48, abs=0.01)
    assert measured.lag.most < 1e-5
    assert not measured.generator_late
    # The closed loop saw it once in 1,500 calls, and its percentiles do not know.
    assert closed.latency.most == pytest.approx(0.5, abs=0.002)
    assert closed.latency.at(99.9) == pytest.approx(0.001, rel=0.01)


def test_calls_go_on_before_and_after_the_window() -> None:
    seen = []

    async def call(payload: bytes) -> Answer:
        seen.append(payload)
        await asyncio.sleep(0.005)
        return Answer("OK", 2, cached=1, units=7)

    plan = load(Closed(2), seconds=0.2, warm_seconds=0.2, cool_seconds=0.1, payloads=[b"a", b"b", b"c"])
    calls = simulate(lambda: drive(call, plan, 1.0))
    measured = Measured.of(calls, Seen())
    assert (calls.start, calls.end) == pytest.approx((1.2, 1.4))
    assert calls.sent.min() == pytest.approx(1.0)
    assert calls.done.max() == pytest.approx(1.5, abs=0.006)
    assert seen[:4] == [b"a", b"b", b"c", b"a"]
    assert len(calls.done) == len(seen) == pytest.approx(200, abs=4)
    assert measured.vectors == pytest.approx(2 * measured.answered) == pytest.approx(800)
    assert measured.cached == pytest.approx(0.5)
    assert measured.units == pytest.approx(2800)
    assert np.isnan(measured.offered)
    assert measured.reused


def test_failed_calls_are_counted_by_their_end() -> None:
    codes = iter(["OK", "RESOURCE_EXHAUSTED", "UNAVAILABLE"] * 1000)

    async def call(_: bytes) -> Answer:
        return Answer(next(codes), 1)

    calls = simulate(lambda: drive(call, load(Open(300, poisson=False), seconds=0.3), 0.01))
    measured = Measured.of(merge([calls, calls]), Seen())
    assert measured.codes == {"RESOURCE_EXHAUSTED": 60, "UNAVAILABLE": 60}
    assert len(measured.latency) == len(measured.refusal) == 60
    assert measured.answered == pytest.approx(200)


def test_a_caller_that_was_refused_pauses() -> None:
    async def call(_: bytes) -> Answer:
        return Answer("RESOURCE_EXHAUSTED")

    assert len(simulate(lambda: drive(call, load(Closed(1), seconds=1.0), 0.0)).codes) == pytest.approx(20, abs=1)


def test_few_large_calls_count_with_their_part_in_the_window() -> None:
    """Ten seconds; calls of three seconds one after the other, from a second before it: ten thirds of a call."""
    sent = np.arange(-1.0, 10.0, 3.0)
    columns = {name: np.full(4, 30) for name in ("vectors", "units", "cached", "failed")}
    calls = Calls(
        intended=sent,
        sent=sent,
        done=sent + 3,
        codes=np.full(4, "OK"),
        start=0.0,
        end=10.0,
        cores=[0.0],
        rounds=0.1,
        closed=True,
        **columns,
    )
    assert Measured.of(calls, Seen()).vectors == pytest.approx(10.0)


def test_histograms_merge() -> None:
    first, second = Latencies([0.001] * 99), Latencies([1.0])
    whole = Latencies.merged([first, second, Latencies()])
    assert len(whole) == 100
    assert whole.at(50) == pytest.approx(0.001, rel=2e-3)
    assert whole.most == pytest.approx(1.0, rel=2e-3)
    assert np.isnan(Latencies().at(99))
    assert whole.as_dict()["p50"] == pytest.approx(1.0, rel=2e-3)
    assert "p50" not in Latencies().as_dict()
