import asyncio
import concurrent.futures
import math
import random
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from embedmesh.errors import DeadlineExceeded, InferenceFailed, NotReady, Overloaded
from embedmesh_encoder.batcher import Batcher, BatchPolicy, Pending, PendingQueue, Priority, Taken, take_batch
from embedmesh_server.metrics import EncoderMetrics

INTERACTIVE, BULK = Priority.INTERACTIVE, Priority.BULK
Entry = Pending[Any, Any]
Queue = PendingQueue[Any, Any]


def entry(
    cost: int = 1,
    priority: Priority = INTERACTIVE,
    arrival: float = 0.0,
    deadline: float = math.inf,
    item: Any = None,
    group: Hashable = None,
) -> Entry:
    # The planner only asks a future whether it is done: one without an event loop will do.
    future: Any = concurrent.futures.Future()
    return Pending(item, cost, priority, arrival, deadline, future, group)


def queue_of(*entries: Entry) -> Queue:
    queue: Queue = PendingQueue()
    for each in entries:
        queue.append(each)
    return queue


def costs(taken: Taken[Any, Any]) -> list[int]:
    return [each.cost for each in taken.batch]


def left(queue: Queue) -> list[int]:
    return [each.cost for priority in Priority for each in queue.lines[priority] if each.waiting]


# --- take_batch: tables ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("waiting", "policy", "batch", "rest"),
    [
        pytest.param([], BatchPolicy(), [], [], id="empty"),
        pytest.param([3, 3, 3], BatchPolicy(max_cost=9), [3, 3, 3], [], id="all fit"),
        pytest.param([3, 3, 3, 1], BatchPolicy(max_cost=9), [3, 3, 3], [1], id="full"),
        pytest.param([6, 5, 4, 3, 1], BatchPolicy(max_cost=10), [6, 4], [5, 3, 1], id="next that fit"),
        pytest.param([11, 1], BatchPolicy(max_cost=10), [11], [1], id="oversized goes alone"),
        pytest.param([1, 11, 1], BatchPolicy(max_cost=10), [1, 1], [11], id="oversized is passed over"),
        pytest.param([1, 1, 1], BatchPolicy(max_items=2), [1, 1], [1], id="max items"),
        pytest.param([6, 5, 5, 4], BatchPolicy(max_cost=10, lookahead=2), [6], [5, 5, 4], id="lookahead"),
        pytest.param([6, 4], BatchPolicy(max_cost=10, lookahead=0), [6], [4], id="lookahead 0: nothing is passed"),
        pytest.param(
            [4, 9, 3, 5], BatchPolicy(max_cost=12, padded=True), [4, 3], [9, 5], id="padded costs longest times n"
        ),
        pytest.param(
            [8, 1, 2, 9, 8], BatchPolicy(max_cost=24, padded=True), [8, 8], [1, 2, 9], id="padded takes like lengths"
        ),
        pytest.param([4, 1, 9], BatchPolicy(max_cost=99, padded=True), [4], [1, 9], id="padded leaves unlike lengths"),
        pytest.param([4, 4, 4], BatchPolicy(max_cost=99, max_items=2, padded=True), [4, 4], [4], id="padded max items"),
        pytest.param([4, 4], BatchPolicy(max_cost=99, max_items=1, padded=True), [4], [4], id="padded one by one"),
        pytest.param([11, 1], BatchPolicy(max_cost=10, padded=True), [11], [1], id="padded oversized goes alone"),
    ],
)
def test_take(waiting: list[int], policy: BatchPolicy, batch: list[int], rest: list[int]) -> None:
    queue = queue_of(*map(entry, waiting))
    assert costs(take_batch(queue, policy, 0.0)) == batch
    assert left(queue) == rest
    assert queue.cost[INTERACTIVE] == sum(rest)
    assert len(queue) == len(rest)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("waiting", "policy", "batch"),
    [
        pytest.param("aabab", {}, [0, 1, 3], id="only the group of the oldest"),
        pytest.param("baaaa", {}, [0], id="the oldest rides, alone of its group"),
        pytest.param("abcda", {"lookahead": 3}, [0], id="those passed over count as looked at"),
        pytest.param("abcda", {"lookahead": 4}, [0, 4], id="lookahead reaches"),
        pytest.param("abaaa", {"max_items": 3}, [0, 2, 3], id="max items"),
        pytest.param("abaaa", {"max_cost": 2}, [0, 2], id="max cost"),
    ],
)
def test_groups_do_not_mix(waiting: str, policy: dict[str, Any], batch: list[int], padded: bool) -> None:
    entries = [entry(group=group) for group in waiting]
    queue = queue_of(*entries)
    taken = take_batch(queue, BatchPolicy(padded=padded, **policy), 0.0)
    assert taken.batch == [entries[i] for i in batch]
    assert list(queue.lines[INTERACTIVE]) == [each for i, each in enumerate(entries) if i not in batch]


@pytest.mark.parametrize("padded", [False, True])
def test_interactive_goes_before_bulk_that_fills_up(padded: bool) -> None:
    # To a quarter: who waits for one text is not to wait for a whole batch of bulk work.
    room = 18 if padded else 15
    for max_cost, batch in ((4 * room, [5, 6, 4]), (4 * room - 1, [5, 6])):
        queue = queue_of(entry(4, BULK, 0.0), entry(5, INTERACTIVE, 1.0), entry(6, INTERACTIVE, 2.0))
        assert costs(take_batch(queue, BatchPolicy(max_cost=max_cost, padded=padded), 2.0)) == batch


@pytest.mark.parametrize("padded", [False, True])
def test_bulk_that_leads_fills_up_with_whatever_waits(padded: bool) -> None:
    queue = queue_of(entry(4, BULK, 0.0), entry(4, BULK, 0.0), entry(4, INTERACTIVE, 9.0))
    queue.bulk_waived = 3  # it is its turn
    assert costs(take_batch(queue, BatchPolicy(max_cost=12, padded=padded, aging_seconds=0.0), 9.0)) == [4, 4, 4]


def test_aged_bulk_leads_every_fourth_batch() -> None:
    queue = queue_of(*(entry(10, BULK) for _ in range(3)), *(entry(10, INTERACTIVE, 5.0) for _ in range(9)))
    policy = BatchPolicy(max_cost=10, aging_seconds=5.0)
    leads = [take_batch(queue, policy, 5.0).batch[0].priority for _ in range(12)]
    assert leads == [INTERACTIVE, INTERACTIVE, INTERACTIVE, BULK] * 3


def test_bulk_that_is_not_aged_waits() -> None:
    queue = queue_of(entry(10, BULK), *(entry(10, INTERACTIVE) for _ in range(9)))
    policy = BatchPolicy(max_cost=10, aging_seconds=5.0)
    assert all(take_batch(queue, policy, 4.9).batch[0].priority is INTERACTIVE for _ in range(9))


def test_gone_and_expired_are_sorted_out() -> None:
    gone, expired, good = entry(1), entry(2, deadline=5.0), entry(4, deadline=5.1)
    gone.future.cancel()
    queue = queue_of(gone, expired, good)
    taken = take_batch(queue, BatchPolicy(), 5.0)
    assert (taken.gone, taken.expired, taken.batch) == ([gone], [expired], [good])
    assert len(queue) == sum(queue.cost.values()) == 0


def test_forgotten_entries_are_settled_at_once_and_swept_in_the_long_run() -> None:
    entries = [entry(3) for _ in range(1000)]
    queue = queue_of(*entries)
    for each in entries[:300]:
        queue.forget(each)
    assert len(queue) == 700
    assert queue.cost[INTERACTIVE] == 2100
    assert queue.head(INTERACTIVE) is entries[300]
    for each in entries[301:990]:
        queue.forget(each)
    assert len(queue.lines[INTERACTIVE]) < 300
    taken = take_batch(queue, BatchPolicy(), 0.0)
    assert taken.gone == taken.expired == []
    assert taken.batch == [entries[300], *entries[990:]]


@pytest.mark.parametrize("wrong", [{"max_cost": 0}, {"max_items": 0}, {"lookahead": -1}, {"aging_seconds": math.nan}])
def test_policy_refuses_nonsense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BatchPolicy(**wrong)


# --- take_batch: properties ---------------------------------------------------------------------

entries_strategy = st.lists(
    st.builds(
        lambda cost, bulk, dt, deadline, gone, group: (cost, BULK if bulk else INTERACTIVE, dt, deadline, gone, group),
        st.integers(1, 40),
        st.booleans(),
        st.floats(0, 3),
        st.sampled_from([math.inf, math.inf, 0.5, 5.0]),
        st.sampled_from([False, False, False, True]),
        st.sampled_from([None, None, (3, 8, 8), (3, 8, 9)]),
    ),
    max_size=60,
)
policies = st.builds(
    BatchPolicy,
    max_cost=st.integers(1, 100),
    max_items=st.integers(1, 12),
    padded=st.booleans(),
    lookahead=st.integers(0, 12),
    aging_seconds=st.sampled_from([0.0, 1.0, 10.0, math.inf]),
)


@given(entries_strategy, policies, st.data())
def test_properties(
    raw: list[tuple[int, Priority, float, float, bool, Hashable]], policy: BatchPolicy, data: st.DataObject
) -> None:
    queue: Queue = PendingQueue()
    everything: list[Entry] = []
    now = 0.0
    for cost, priority, dt, deadline, gone, group in raw:
        now += dt
        each = entry(cost, priority, now, now + deadline, item=len(everything), group=group)
        queue.append(each)
        everything.append(each)
        if gone and data.draw(st.booleans()):
            each.future.cancel()
            queue.forget(each)
        elif gone:
            each.future.cancel()
    seen: list[Entry] = [each for each in everything if not each.waiting]
    while True:
        waiting = [each for each in everything if each.waiting]
        assert len(queue) == len(waiting)
        assert sum(queue.cost.values()) == sum(each.cost for each in waiting)
        fit_to_run = [each for each in waiting if not each.future.done() and each.deadline > now]
        taken = take_batch(queue, policy, now)
        assert all(each.future.done() for each in taken.gone)
        assert all(each.deadline <= now and not each.future.done() for each in taken.expired)
        assert all(not each.future.done() and each.deadline > now for each in taken.batch)
        seen += [*taken.gone, *taken.expired, *taken.batch]
        assert len({id(each) for each in seen}) == len(seen), "taken twice"
        if not taken.batch:
            assert not fit_to_run, "lost"
            break
        # The oldest of one of the priorities rides, and bulk leads only when it is old or alone.
        lead = taken.batch[0]
        assert lead is next(each for each in fit_to_run if each.priority is lead.priority)
        if lead.priority is BULK and any(each.priority is INTERACTIVE for each in waiting):
            oldest_bulk = next(each for each in waiting if each.priority is BULK)
            others = any(each.priority is INTERACTIVE for each in fit_to_run)
            assert not others or now - oldest_bulk.arrival >= policy.aging_seconds
        assert len({each.group for each in taken.batch}) == 1
        # Within the limits, unless alone.
        sizes = costs(taken)
        assert len(sizes) <= policy.max_items
        total = max(sizes) * len(sizes) if policy.padded else sum(sizes)
        assert total <= policy.max_cost or len(sizes) == 1
        if lead.priority is INTERACTIVE and any(each.priority is BULK for each in taken.batch):
            assert total <= policy.max_cost / 4
        if policy.padded:
            assert max(sizes) <= 2 * min(sizes)
        # Order is kept within equals: whoever rides, no older one of same priority, group and cost stays.
        for rider in taken.batch:
            stayed = [each for each in fit_to_run if each.waiting and each.arrival < rider.arrival]
            equals = (rider.cost, rider.priority, rider.group)
            assert not any((each.cost, each.priority, each.group) == equals for each in stayed)
        now += data.draw(st.floats(0, 2), label="time of the batch")
    assert len(seen) == len(everything), "lost"
    assert len(queue) == sum(queue.cost.values()) == 0


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 3)), min_size=1, max_size=80), policies)
def test_nobody_waits_longer_than_its_place_in_the_queue(waiting: list[tuple[int, int]], policy: BatchPolicy) -> None:
    entries = [entry(cost, group=group) for cost, group in waiting]
    queue = queue_of(*entries)
    for place, each in enumerate(entries):
        if each.waiting:
            # Every batch takes the oldest: whoever is at this place is taken within place + 1 batches.
            taken = take_batch(queue, policy, 0.0)
            assert taken.batch[0] is each or place > 0
    while queue:
        take_batch(queue, policy, 0.0)
    assert all(not each.waiting for each in entries)


# --- take_batch: starvation, cost ------------------------------------------------------------


def simulate(
    *, interactive_every: float, interactive_cost: int, bulk_backlog: int, seconds: float
) -> dict[Priority, list[float]]:
    """Batches of up to 256 units take 33 ms; gives how long each input waited, by priority."""
    queue: Queue = PendingQueue()
    for _ in range(bulk_backlog):
        queue.append(entry(256, BULK, 0.0))
    policy = BatchPolicy(max_cost=256, aging_seconds=5.0)
    waited: dict[Priority, list[float]] = {INTERACTIVE: [], BULK: []}
    now, next_arrival = 0.0, 0.0
    while now < seconds:
        while next_arrival <= now:
            queue.append(entry(interactive_cost, INTERACTIVE, next_arrival))
            next_arrival += interactive_every
        for each in take_batch(queue, policy, now).batch:
            waited[each.priority].append(now - each.arrival)
        now += 0.033
    return waited


def test_a_bulk_flood_does_not_starve_interactive_work() -> None:
    waited = simulate(interactive_every=0.1, interactive_cost=20, bulk_backlog=1200, seconds=60)
    assert statistics.median(waited[INTERACTIVE]) <= 0.033
    assert max(waited[INTERACTIVE]) <= 2 * 0.033


def test_endless_interactive_work_does_not_starve_bulk_work() -> None:
    # More interactive work than the backend can do.
    waited = simulate(interactive_every=0.02, interactive_cost=256, bulk_backlog=200, seconds=30)
    in_share = (30 - 5) / 0.033 / 4
    assert len(waited[BULK]) >= 0.9 * min(in_share, 200)
    assert len(waited[INTERACTIVE]) >= 0.7 * 30 / 0.033


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("groups", [1, 10**9])
def test_time_does_not_grow_with_the_queue(groups: int, padded: bool) -> None:
    def visits(length: int) -> int:
        """Count how often a batch asks futures of a queue so long."""
        asked = 0

        class Asked:
            def done(self) -> bool:
                nonlocal asked
                asked += 1
                return False

        queue: Queue = PendingQueue()
        for number in range(length):
            future: Any = Asked()
            queue.append(Pending(None, 100, INTERACTIVE, 0.0, math.inf, future, number % groups))
        for _ in range(10):
            batch = take_batch(queue, BatchPolicy(max_cost=256, padded=padded), 0.0).batch
            assert len(batch) == (2 if groups == 1 else 1)
        return asked

    assert visits(100_000) == visits(1_000)


# --- Batcher -----------------------------------------------------------------------------------


class Model:
    """Answers an item with itself; stops at a gate on request; fails as items say."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.lone_batches: list[list[Any]] = []
        self.gate = threading.Event()
        self.gate.set()

    def run_alone(self, items: Sequence[Any]) -> list[Any]:
        self.lone_batches.append(list(items))
        return self(items)

    def __call__(self, items: Sequence[Any]) -> list[Any]:
        self.batches.append(list(items))
        assert self.gate.wait(30)
        if "short" in items:
            return []
        if "fail" in items:
            raise RuntimeError("secret text")
        return [InferenceFailed("not finite") if item == "nan" else item for item in items]


Make = Callable[..., Batcher[Any, Any]]


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
async def make(model: Model, registry: CollectorRegistry) -> AsyncIterator[Make]:
    metrics = EncoderMetrics(registry)
    made: list[Batcher[Any, Any]] = []

    def make(*, lanes: int = 1, widens: bool = False, max_queue_cost: int = 1000, **policy: Any) -> Batcher[Any, Any]:
        batcher: Batcher[Any, Any] = Batcher(
            model,
            policy=BatchPolicy(**policy),
            lanes=lanes,
            run_alone=model.run_alone if widens else None,
            max_queue_cost=max_queue_cost,
            metrics=metrics,
            model="m",
        )
        made.append(batcher)
        return batcher

    yield make
    model.gate.set()
    for batcher in made:
        await batcher.close(10)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def blocked(make: Make, model: Model, **options: Any) -> tuple[Batcher[Any, Any], asyncio.Future[Any]]:
    """Give a batcher whose only lane is busy until the gate opens."""
    model.gate.clear()
    batcher = make(**options)
    [busy] = batcher.submit(["busy"], [1])
    await until(lambda: model.batches == [["busy"]])
    return batcher, busy


def sample(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(f"embedmesh_{name}", {"model": "m", **labels}) or 0.0


async def test_answers_in_place(make: Make, registry: CollectorRegistry) -> None:
    batcher = make(max_cost=10)
    futures = batcher.submit([1, 2, 3, 4], [5, 5, 5, 5])
    assert repr(batcher) == "<Batcher queued=4 running=0/1>"
    assert sample(registry, "queue_inputs", priority="interactive") == 4
    assert sample(registry, "queue_cost_units") == 20
    assert await asyncio.gather(*futures) == [1, 2, 3, 4]
    assert sample(registry, "queue_cost_units") == sample(registry, "queue_inputs", priority="interactive") == 0
    assert sample(registry, "batch_inputs_count") == 2
    assert sample(registry, "batch_cost_units_sum") == sample(registry, "batch_units_total", kind="real") == 20
    assert sample(registry, "encoder_stage_seconds_count", stage="queue") == 4
    assert sample(registry, "encoder_stage_seconds_count", stage="infer") == 2


async def test_the_time_of_the_batch_that_ended_last_is_told(make: Make, model: Model) -> None:
    batcher, busy = await blocked(make, model)
    assert batcher.batch_seconds == 0
    await asyncio.sleep(0.1)
    assert batcher.batch_seconds == 0  # none has ended yet
    model.gate.set()
    await busy
    slow = batcher.batch_seconds
    assert slow >= 0.1
    await asyncio.gather(*batcher.submit(["fail"], [1]), return_exceptions=True)
    assert 0 < batcher.batch_seconds != slow


async def test_groups_run_apart(make: Make, model: Model) -> None:
    batcher = make()
    assert await asyncio.gather(*batcher.submit([1, 2, 3, 4], [1] * 4, ["a", "b", "a", None])) == [1, 2, 3, 4]
    assert model.batches == [[1, 3], [2], [4]]


async def test_padding_is_counted(make: Make, registry: CollectorRegistry) -> None:
    await asyncio.gather(*make(padded=True).submit([1, 2], [6, 10]))
    assert sample(registry, "batch_units_total", kind="real") == 16
    assert sample(registry, "batch_units_total", kind="padding") == 4
    assert sample(registry, "batch_cost_units_sum") == 20


async def test_requests_of_one_turn_share_a_batch(make: Make, model: Model) -> None:
    batcher = make()
    await asyncio.gather(*batcher.submit([1], [1]), *batcher.submit([2], [1]))
    assert model.batches == [[1, 2]]


async def test_a_batch_grows_while_the_lane_is_busy(make: Make, model: Model) -> None:
    batcher, busy = await blocked(make, model)
    futures = []
    for item in range(5):
        futures += batcher.submit([item], [1])
        await asyncio.sleep(0)
    assert repr(batcher) == "<Batcher queued=5 running=1/1>"
    model.gate.set()
    assert list(await asyncio.gather(busy, *futures)) == ["busy", 0, 1, 2, 3, 4]
    assert model.batches == [["busy"], [0, 1, 2, 3, 4]]


async def test_lanes_run_side_by_side_without_blocking_the_loop(make: Make, model: Model) -> None:
    model.gate.clear()
    batcher = make(lanes=2, max_cost=1)
    futures = batcher.submit([1, 2, 3], [1, 1, 1])
    await until(lambda: len(model.batches) == 2)
    assert repr(batcher) == "<Batcher queued=1 running=2/2>"
    model.gate.set()
    assert await asyncio.gather(*futures) == [1, 2, 3]


async def test_a_batch_that_leaves_nothing_behind_has_all_lanes(make: Make, model: Model) -> None:
    batcher, busy = await blocked(make, model, lanes=2, widens=True, max_cost=1)
    assert batcher.batch_seconds == 0
    futures = batcher.submit([1, 2, 3], [1, 1, 1])
    await asyncio.sleep(0.01)
    assert repr(batcher) == "<Batcher queued=3 running=1/2>"
    assert batcher.stalled_seconds > 0
    model.batches.clear()
    model.gate.set()
    assert [await busy, *await asyncio.gather(*futures)] == ["busy", 1, 2, 3]
    assert 0 < batcher.batch_seconds < 30
    assert model.lone_batches[0] == ["busy"]
    assert [1] not in model.lone_batches


async def test_more_than_a_batch_takes_all_lanes(make: Make, model: Model) -> None:
    model.gate.clear()
    batcher = make(lanes=2, widens=True, max_cost=1)
    futures = batcher.submit([1, 2], [1, 1])
    await until(lambda: len(model.batches) == 2)
    assert batcher.stalled_seconds > 0
    model.gate.set()
    assert await asyncio.gather(*futures) == [1, 2]
    assert not model.lone_batches


async def test_what_fails_alone_runs_again_alone(make: Make, model: Model) -> None:
    outcomes = await asyncio.gather(*make(lanes=2, widens=True).submit([1, "fail"], [1, 1]), return_exceptions=True)
    assert outcomes[0] == 1
    assert isinstance(outcomes[1], InferenceFailed)
    assert model.lone_batches == model.batches == [[1, "fail"], [1], ["fail"]]


async def test_interactive_work_overtakes(make: Make, model: Model) -> None:
    batcher, _ = await blocked(make, model, max_items=1)
    futures = batcher.submit(["bulk"], [1], priority=BULK) + batcher.submit(["interactive"], [1])
    model.gate.set()
    await asyncio.gather(*futures)
    assert model.batches == [["busy"], ["interactive"], ["bulk"]]


@pytest.mark.parametrize("poison", ["fail", "nan", "short"])
@pytest.mark.parametrize("where", [{0}, {7}, {12}, {3, 4}, set(range(13)), set(range(2, 11))])
async def test_only_the_guilty_fail(make: Make, model: Model, poison: str, where: set[int]) -> None:
    items = [poison if i in where else i for i in range(13)]
    outcomes = await asyncio.gather(*make().submit(items, [1] * 13), return_exceptions=True)
    for i, outcome in enumerate(outcomes):
        if i in where:
            assert isinstance(outcome, InferenceFailed)
            assert "secret" not in str(outcome)
        else:
            assert outcome == i
    assert len(model.batches) <= 2 * 13 + 1


async def test_the_cause_is_kept_for_the_log(make: Make) -> None:
    [future] = make().submit(["fail"], [1])
    with pytest.raises(InferenceFailed) as caught:
        await future
    assert isinstance(caught.value.__cause__, RuntimeError)


async def test_the_good_ones_do_not_wait_for_the_search_for_the_guilty(make: Make, model: Model) -> None:
    batcher, _ = await blocked(make, model)
    good, *bad = batcher.submit(["good", "nan", "nan"], [1, 1, 1])
    again = threading.Event()
    run = model.__call__

    def stop_at_second(items: Sequence[Any]) -> list[Any]:
        if "good" not in items:
            assert again.wait(30)
        return run(items)

    batcher._run_batch = stop_at_second
    model.gate.set()
    assert await good == "good"
    assert not any(future.done() for future in bad)
    bad[0].cancel()  # left in the middle: is not run again
    again.set()
    with pytest.raises(InferenceFailed):
        await bad[1]
    # Only those that are still wanted ran alone.
    assert model.batches[2:] in ([["nan"]], [["nan"], ["nan"]])


async def test_the_next_batch_works_after_a_failure(make: Make) -> None:
    batcher = make()
    with pytest.raises(InferenceFailed):
        await batcher.submit(["fail"], [1])[0]
    assert await batcher.submit([1], [1])[0] == 1


async def test_cancelled_callers_are_dropped_and_their_cost_released_at_once(
    make: Make, model: Model, registry: CollectorRegistry
) -> None:
    batcher, busy = await blocked(make, model, max_queue_cost=10)
    futures = batcher.submit([1, 2, 3], [3, 3, 4])
    with pytest.raises(Overloaded):
        batcher.submit([4], [1])
    futures[0].cancel()
    futures[2].cancel()
    await asyncio.sleep(0)
    assert repr(batcher) == "<Batcher queued=1 running=1/1>"
    assert sample(registry, "queue_cost_units") == 3
    [fourth] = batcher.submit([4], [7])
    model.gate.set()
    assert list(await asyncio.gather(busy, futures[1], fourth)) == ["busy", 2, 4]
    assert model.batches == [["busy"], [2, 4]]
    assert sample(registry, "dropped_inputs_total", reason="cancelled") == 2


async def test_cancelled_in_the_turn_of_its_batch(make: Make, model: Model, registry: CollectorRegistry) -> None:
    batcher = make()
    first, second = batcher.submit([1, 2], [1, 1])
    # The pump was called for before the cancellation's callback, so the planner meets it first.
    first.cancel()
    assert await second == 2
    assert model.batches == [[2]]
    assert sample(registry, "dropped_inputs_total", reason="cancelled") == 1


async def test_cancelled_while_running(make: Make, model: Model, registry: CollectorRegistry) -> None:
    batcher, busy = await blocked(make, model)
    busy.cancel()
    [after] = batcher.submit([1], [1])
    model.gate.set()
    assert await after == 1
    assert sample(registry, "dropped_inputs_total", reason="cancelled") == 0


async def test_everybody_left(make: Make, model: Model) -> None:
    batcher, busy = await blocked(make, model)
    for future in batcher.submit([1, 2], [1, 1]):
        future.cancel()
    model.gate.set()
    await busy
    assert await batcher.close(10)
    assert model.batches == [["busy"]]


async def test_expired_fail_before_inference(make: Make, model: Model, registry: CollectorRegistry) -> None:
    batcher, busy = await blocked(make, model)
    now = asyncio.get_running_loop().time()
    [late] = batcher.submit(["late"], [1], deadline=now + 0.001)
    [good] = batcher.submit(["good"], [1], deadline=now + 60)
    await until(lambda: asyncio.get_running_loop().time() > now + 0.001)
    model.gate.set()
    with pytest.raises(DeadlineExceeded):
        await late
    assert list(await asyncio.gather(busy, good)) == ["busy", "good"]
    assert model.batches == [["busy"], ["good"]]
    assert sample(registry, "dropped_inputs_total", reason="expired") == 1


async def test_a_caller_whose_time_is_up_counts_as_expired(
    make: Make, model: Model, registry: CollectorRegistry
) -> None:
    batcher, _ = await blocked(make, model)
    [future] = batcher.submit([1], [1], deadline=asyncio.get_running_loop().time() - 1)
    future.cancel()
    await until(lambda: repr(batcher) == "<Batcher queued=0 running=1/1>")
    assert sample(registry, "dropped_inputs_total", reason="expired") == 1


async def test_overload_is_refused_whole_with_a_number(make: Make, model: Model, registry: CollectorRegistry) -> None:
    batcher, busy = await blocked(make, model, max_queue_cost=10)
    accepted = batcher.submit([1], [8])
    with pytest.raises(Overloaded) as first:
        batcher.submit([2, 3], [1, 2])
    assert first.value.retry_after == 1.0  # nothing has been measured yet
    assert repr(batcher) == "<Batcher queued=1 running=1/1>"
    assert sample(registry, "refused_inputs_total") == 2
    bulk = batcher.submit([4], [8], priority=BULK)  # has a queue of its own
    model.gate.set()
    assert await asyncio.gather(busy, *accepted, *bulk) == ["busy", 1, 4]


async def test_retry_after_follows_the_throughput(make: Make, model: Model) -> None:
    batcher, busy = await blocked(make, model, max_queue_cost=100)
    batcher._rate = 20.0
    batcher.submit([1], [80])
    for wanted, pause in ((21, 2.0), (80, 3.0), (1000, 4.0)):
        with pytest.raises(Overloaded) as refused:
            batcher.submit([2], [wanted])
        assert refused.value.retry_after == pytest.approx(pause)
    for rate, pause in ((1e-9, 30.0), (1e9, 0.01)):
        batcher._rate = rate
        with pytest.raises(Overloaded) as refused:
            batcher.submit([2], [50])
        assert refused.value.retry_after == pause
    model.gate.set()
    await busy
    assert batcher._rate > 0


async def test_a_request_over_the_whole_limit_is_let_in_when_the_queue_is_empty(make: Make, model: Model) -> None:
    batcher, busy = await blocked(make, model, max_queue_cost=10)
    huge = batcher.submit([1, 2], [50, 50])
    with pytest.raises(Overloaded):
        batcher.submit([3], [1])
    model.gate.set()
    assert await asyncio.gather(busy, *huge) == ["busy", 1, 2]


@pytest.mark.parametrize(
    ("items", "item_costs", "groups"), [([1], [], None), ([1], [0], None), ([1, 2], [1, -1], None), ([1], [1], [])]
)
async def test_costs_and_groups_must_make_sense(
    make: Make, items: list[int], item_costs: list[int], groups: list[Hashable] | None
) -> None:
    with pytest.raises(ValueError, match="cost"):
        make().submit(items, item_costs, groups)


async def test_nothing_is_a_request_too(make: Make) -> None:
    batcher = make()
    assert batcher.submit([], []) == []
    assert await batcher.close(10)


async def test_close_finishes_what_is_queued(make: Make, model: Model) -> None:
    batcher, busy = await blocked(make, model)
    futures = batcher.submit([1, 2], [1, 1])
    closing = asyncio.create_task(batcher.close(10))
    await asyncio.sleep(0)
    with pytest.raises(NotReady):
        batcher.submit([3], [1])
    model.gate.set()
    assert await closing
    assert await asyncio.gather(busy, *futures) == ["busy", 1, 2]
    assert repr(batcher) == "<Batcher queued=0 running=0/1 closed>"


async def test_close_fails_what_is_left_when_its_time_is_up(
    make: Make, model: Model, registry: CollectorRegistry
) -> None:
    batcher, busy = await blocked(make, model)
    gone, waiting = batcher.submit([1, 2], [1, 1])
    gone.cancel()
    await asyncio.sleep(0)
    assert not await batcher.close(0.01)
    for future in (busy, waiting):
        with pytest.raises(NotReady):
            await future
    assert sample(registry, "queue_inputs", priority="interactive") == 0
    assert sample(registry, "dropped_inputs_total", reason="cancelled") == 1
    model.gate.set()
    assert await batcher.close(10)  # the thread came back


async def test_many_callers_that_come_and_go(make: Make, model: Model, registry: CollectorRegistry) -> None:
    rng = random.Random(7)
    batcher = make(lanes=2, max_cost=50, max_queue_cost=5000)
    outcomes: list[str] = []

    async def caller(number: int) -> None:
        futures = batcher.submit([number] * 3, [rng.randint(1, 30) for _ in range(3)], priority=rng.choice([*Priority]))
        if number % 5 == 0:
            await asyncio.sleep(0)
            for future in futures:
                future.cancel()
        results = await asyncio.gather(*futures, return_exceptions=True)
        outcomes.extend(
            "cancelled" if isinstance(result, asyncio.CancelledError) else "ok"
            for result in results
            if isinstance(result, asyncio.CancelledError) or result == number
        )

    async with asyncio.TaskGroup() as group:
        for number in range(100):
            group.create_task(caller(number))
            if number % 10 == 0:
                await asyncio.sleep(0)
    assert len(outcomes) == 300
    assert outcomes.count("cancelled") <= 60
    assert await batcher.close(10)
    assert sample(registry, "queue_cost_units") == 0


async def test_errors_are_never_reported_as_unseen(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    import gc

    batcher = make()
    futures = batcher.submit(["fail"], [1])
    await asyncio.wait(futures)
    await asyncio.sleep(0)
    del futures
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_a_slow_backend_does_not_slow_the_loop(make: Make, model: Model) -> None:
    await blocked(make, model)
    started = time.perf_counter()
    for _ in range(100):
        await asyncio.sleep(0)
    assert time.perf_counter() - started < 5
