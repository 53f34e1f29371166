"""From single inputs to batches: a pure planner and a thin asyncio shell around it.

`take_batch` decides, `Batcher` does. There is no timer: a batch is formed at the last moment,
when a lane to the backend is free; while all are busy the next batch grows.

Decision (November 2026): how bulk work ages. Interactive inputs go first. Once the oldest bulk
input has waited `aging_seconds`, every fourth batch is led by bulk work, so bulk keeps at least
one input in four batches (and a quarter of the backend when it fills its batches), however much
interactive work there is. The plain rule,
"an aged bulk input counts as an interactive one that arrived then", was tried first and lets a
bulk backlog older than `aging_seconds` go before every new interactive input. Simulated with a
backlog of 1,200 bulk batches of 33 ms, aging 5 s and an interactive input every 100 ms, those
waited 7.0 s in the median and 36 s at most under the plain rule, 16 ms and 33 ms under this one
(`test_a_bulk_flood_does_not_starve_interactive_work`).

Decision (November 2026): bulk work may join a batch that interactive work leads, but fill it to a quarter only.
Who waits for one text would else wait for a whole batch of others: MiniLM, batches of 46 ms, a text now and then
beside a bulk stream: p50 89 ms and p99 125 ms without the limit (texts of 14 tokens), 45 and 100 ms with it (of 40);
bulk kept 84 and 91 % of its rate alone.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Final, Generic, TypeVar

from embedmesh.errors import DeadlineExceeded, EmbedMeshError, InferenceFailed, NotReady, Overloaded
from embedmesh_server.metrics import EncoderMetrics
from embedmesh_server.tracing import NO_TRACING, Ride, Tracing

__all__ = ["BatchPolicy", "Batcher", "Pending", "PendingQueue", "Priority", "Taken", "take_batch"]

_log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

# Of so many batches one is led by bulk work that is older than `aging_seconds`.
_BULK_TURN: Final = 4
# Of a batch that interactive inputs lead, bulk ones fill up one part in so many.
_BULK_SHARE: Final = 4
# Like lengths: in a padded batch no input is padded to more than this times its own length, so less
# than half of what is computed is padding. (A tiny batch on its own costs less than such a neighbour.)
_ALIKE: Final = 2
# Weight of the newest batch in the moving average of the throughput.
_NEWEST: Final = 0.2
_RETRY_MIN, _RETRY_MAX, _RETRY_UNKNOWN = 0.01, 30.0, 1.0
# Fewer entries of callers that left than this are not worth sweeping out of the queue.
_SWEEP_MIN: Final = 256


class Priority(enum.Enum):
    """Who waits: somebody, or a job."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """What a batch may be.

    Attributes:
        max_cost: Most units (tokens, patches, frames) the model computes in one batch. An input
            over it rides alone.
        max_items: Most inputs in one batch.
        padded: Cost of n inputs is longest * n (every one is padded to the longest) instead
            of the sum.
        lookahead: How many waiting inputs, beside those taken, may be looked at for one batch. Padded
            over real units for 4,000 log-normal lengths (median 27) and max_cost 1024: 4.4 in batches
            of 32 by arrival, 1.30 with a lookahead of 16, 1.26 with 64, 1.16 with 128.
        aging_seconds: Age from which bulk work is owed its share, see the module's decision.
    """

    max_cost: int = 256
    max_items: int = 128
    padded: bool = False
    lookahead: int = 128
    aging_seconds: float = 5.0

    def __post_init__(self) -> None:
        if min(self.max_cost, self.max_items) < 1 or self.lookahead < 0 or not self.aging_seconds >= 0:
            raise ValueError(f"max_cost and max_items must be at least 1, the rest not negative: {self}")

    def limit(self, oldest: Priority, joining: Priority) -> int:
        """Most units of a batch that an input of one priority leads, when one of another joins it."""
        if oldest is Priority.INTERACTIVE and joining is Priority.BULK:
            return self.max_cost // _BULK_SHARE
        return self.max_cost


@dataclass(eq=False, slots=True)
class Pending(Generic[T, R]):
    """One input that waits. Its future is the request: there is no other record of it.

    `arrival` and `deadline` are seconds of the event loop's clock, `deadline` inf for none. Only entries
    of equal `group` share a batch. `request` is what `Ride` names it by, None where it is not traced.
    """

    item: T
    cost: int
    priority: Priority
    arrival: float
    deadline: float
    future: asyncio.Future[R]
    group: Hashable = None
    request: Hashable = None
    waiting: bool = True


@dataclass(slots=True)
class Taken(Generic[T, R]):
    """What `take_batch` took out of the queue: each entry in exactly one of the lists."""

    batch: list[Pending[T, R]] = field(default_factory=list)
    expired: list[Pending[T, R]] = field(default_factory=list)
    gone: list[Pending[T, R]] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Lane(Generic[T, R]):
    """A batch at work: what of it is still to be run, part by part, and since when."""

    batch: list[Pending[T, R]]
    parts: list[list[Pending[T, R]]]
    since: float
    alone: bool = False


class PendingQueue(Generic[T, R]):
    """Inputs that wait, in order of arrival within their priority.

    `cost` and `count` are of those whose callers still wait; `forget` keeps them right when one
    leaves, whose entry then stays behind, unseen, until it is reached or swept.
    """

    def __init__(self) -> None:
        self.lines: dict[Priority, deque[Pending[T, R]]] = {priority: deque() for priority in Priority}
        self.cost: dict[Priority, int] = dict.fromkeys(Priority, 0)
        self.count: dict[Priority, int] = dict.fromkeys(Priority, 0)
        # Batches in a row in which aged bulk work had to let interactive work lead.
        self.bulk_waived = 0

    def __len__(self) -> int:
        return sum(self.count.values())

    def append(self, entry: Pending[T, R]) -> None:
        """Add an entry that arrived after all others of its priority."""
        self.lines[entry.priority].append(entry)
        self.cost[entry.priority] += entry.cost
        self.count[entry.priority] += 1

    def leave(self, entry: Pending[T, R]) -> None:
        """Settle the account of an entry that stops waiting."""
        entry.waiting = False
        self.cost[entry.priority] -= entry.cost
        self.count[entry.priority] -= 1

    def forget(self, entry: Pending[T, R]) -> None:
        """Like `leave`, for an entry somewhere in its line: its memory is given back in the long run."""
        self.leave(entry)
        line = self.lines[entry.priority]
        # At most half of a line is dead, and each sweep is paid for by as many departures.
        if len(line) >= _SWEEP_MIN and self.count[entry.priority] * 2 < len(line):
            self.lines[entry.priority] = deque(other for other in line if other.waiting)

    def head(self, priority: Priority) -> Pending[T, R] | None:
        """The oldest waiting entry of a priority."""
        line = self.lines[priority]
        while line and not line[0].waiting:
            line.popleft()
        return line[0] if line else None


def take_batch(queue: PendingQueue[T, R], policy: BatchPolicy, now: float) -> Taken[T, R]:
    """Take the next batch out of the queue. Pure: no await, no clock, no metrics.

    The oldest input always rides: the interactive ones go before the bulk ones, except when it is
    the turn of aged bulk work. Then follow those of its group that fit, in order (packed), or those of
    like length first (padded), among the next `policy.lookahead`. An input that is passed over moves up,
    and rides at the latest as the oldest. An input over `max_cost` rides alone. On the way, inputs whose
    future is done (`gone`) or whose deadline is not after `now` (`expired`) are taken out; they are
    never in a batch. Time grows with what is taken and with the lookahead, not with the queue.
    """
    taken: Taken[T, R] = Taken()
    live = _live(queue, _order(queue, policy, now), now, taken)
    oldest = next(live, None)
    if oldest is None:
        return taken
    taken.batch.append(oldest)
    passed = (_fill_padded if policy.padded else _fill_packed)(taken.batch, live, policy)
    for entry in reversed(passed):
        queue.lines[entry.priority].appendleft(entry)
    for entry in taken.batch:
        queue.leave(entry)
    return taken


def _order(queue: PendingQueue[T, R], policy: BatchPolicy, now: float) -> tuple[Priority, Priority]:
    bulk = queue.head(Priority.BULK)
    if bulk is None or now - bulk.arrival < policy.aging_seconds or queue.head(Priority.INTERACTIVE) is None:
        queue.bulk_waived = 0
    elif queue.bulk_waived == _BULK_TURN - 1:
        queue.bulk_waived = 0
        return Priority.BULK, Priority.INTERACTIVE
    else:
        queue.bulk_waived += 1
    return Priority.INTERACTIVE, Priority.BULK


def _live(
    queue: PendingQueue[T, R], order: tuple[Priority, ...], now: float, taken: Taken[T, R]
) -> Iterator[Pending[T, R]]:
    """Pop entry by entry, sorting out those that must not be computed."""
    for priority in order:
        line = queue.lines[priority]
        while line:
            entry = line.popleft()
            if not entry.waiting:
                continue
            if entry.future.done():
                queue.leave(entry)
                taken.gone.append(entry)
            elif entry.deadline <= now:
                queue.leave(entry)
                taken.expired.append(entry)
            else:
                yield entry


def _fill_packed(batch: list[Pending[T, R]], live: Iterator[Pending[T, R]], policy: BatchPolicy) -> list[Pending[T, R]]:
    """Add the first that fit; give those passed over, in order."""
    passed: list[Pending[T, R]] = []
    oldest = batch[0]
    cost = oldest.cost
    while cost < policy.max_cost and len(batch) < policy.max_items and len(passed) < policy.lookahead:
        entry = next(live, None)
        if entry is None:
            break
        limit = policy.limit(oldest.priority, entry.priority)
        if cost + entry.cost <= limit and entry.group == oldest.group:
            batch.append(entry)
            cost += entry.cost
        else:
            passed.append(entry)
            if cost >= limit:
                break
    return passed


def _fill_padded(batch: list[Pending[T, R]], live: Iterator[Pending[T, R]], policy: BatchPolicy) -> list[Pending[T, R]]:
    """Add those nearest in length to the oldest; give those passed over, in order."""
    oldest = batch[0]
    if oldest.cost * 2 > policy.max_cost or policy.max_items == 1:
        return []
    window = list(islice(live, policy.lookahead))
    alike = [entry for entry in window if entry.group == oldest.group]
    shortest = longest = oldest.cost
    # The sort is stable, so equals keep their order; the priority that leads fills first.
    for entry in sorted(alike, key=lambda e: (e.priority is not oldest.priority, abs(e.cost - oldest.cost))):
        low, high = min(shortest, entry.cost), max(longest, entry.cost)
        limit = policy.limit(oldest.priority, entry.priority)
        if high * (len(batch) + 1) <= limit and high <= _ALIKE * low:
            batch.append(entry)
            shortest, longest = low, high
            if len(batch) == policy.max_items:
                break
    riding = set(map(id, batch))
    return [entry for entry in window if id(entry) not in riding]


class Batcher(Generic[T, R]):
    """Runs inputs in batches, each batch in a worker thread.

    `run_batch` answers each item of a batch in its place, with a result or an error; it may also
    raise. Either way only the guilty fail: what failed in company runs again by halves, down to
    alone, in the same lane. The futures hold the outcome, and a caller leaves by cancelling them.

    With `run_alone`, a batch that leaves nothing behind in the queue runs by that, with nothing beside it; as soon as
    more waits than one batch takes, all lanes are at work.

    Each priority has a queue of `max_queue_cost` units of its own, so neither can keep the other
    out at the door. Use it from one event loop; `close` it at the end.

    Attributes:
        batch_seconds: What the batch that ended last took; 0 before there was one.
    """

    def __init__(
        self,
        run_batch: Callable[[Sequence[T]], Sequence[R | EmbedMeshError]],
        *,
        policy: BatchPolicy,
        lanes: int,
        run_alone: Callable[[Sequence[T]], Sequence[R | EmbedMeshError]] | None = None,
        max_queue_cost: int,
        metrics: EncoderMetrics,
        model: str,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self._run_batch = run_batch
        self._policy = policy
        self._lanes = lanes
        self._run_alone = run_alone
        self._max_queue_cost = max_queue_cost
        self._model = model
        self._tracing = tracing
        self._executor = ThreadPoolExecutor(lanes, thread_name_prefix=f"infer-{model}")
        self._queue: PendingQueue[T, R] = PendingQueue()
        self._running: set[_Lane[T, R]] = set()
        self._pump_due = False
        self._closing = False
        self._idle = asyncio.Event()
        self._idle.set()
        # Units per second and lane; None until a batch has run.
        self._rate: float | None = None
        self.batch_seconds = 0.0
        # Units of an input, a moving average.
        self._mean_cost = 1.0
        self._shown = [
            *(
                metrics.show(
                    metrics.queue_inputs, (model, priority.value), partial(self._queue.count.__getitem__, priority)
                )
                for priority in Priority
            ),
            metrics.show(metrics.queue_cost_units, (model,), partial(_total, self._queue.cost)),
        ]
        # Labelled once: finding a label costs more than counting.
        self._cancelled = metrics.dropped_inputs.labels(model, "cancelled")
        self._expired = metrics.dropped_inputs.labels(model, "expired")
        self._refused = metrics.refused_inputs.labels(model)
        self._batch_inputs = metrics.batch_inputs.labels(model)
        self._batch_cost = metrics.batch_cost_units.labels(model)
        self._units_real = metrics.batch_units.labels(model, "real")
        self._units_padding = metrics.batch_units.labels(model, "padding")
        self._queue_seconds = metrics.stage_seconds.labels(model, "queue")
        self._infer_seconds = metrics.stage_seconds.labels(model, "infer")

    def __repr__(self) -> str:
        closed = " closed" if self._closing else ""
        return f"<Batcher queued={len(self._queue)} running={len(self._running)}/{self._lanes}{closed}>"

    @property
    def stalled_seconds(self) -> float:
        """How long no lane has been free for new work; 0 while one is."""
        if not self._full:
            return 0.0
        return asyncio.get_running_loop().time() - max(lane.since for lane in self._running)

    @property
    def _full(self) -> bool:
        return len(self._running) >= self._lanes or any(lane.alone for lane in self._running)

    def submit(
        self,
        items: Sequence[T],
        costs: Sequence[int],
        groups: Sequence[Hashable] | None = None,
        *,
        priority: Priority = Priority.INTERACTIVE,
        deadline: float = math.inf,
        request: Hashable = None,
    ) -> list[asyncio.Future[R]]:
        """Queue the inputs of one request, all or none, and give their futures in order.

        Args:
            items: What `run_batch` will get.
            costs: Units of each item alone, at least 1.
            groups: What each item may share a batch with: those of equal group. By default all share.
            priority: Who waits.
            deadline: Absolute seconds of the event loop's clock.
            request: See `Pending`.

        A future gives the result, or raises InferenceFailed, DeadlineExceeded (its deadline came
        before its batch) or NotReady (the batcher closed first). Cancel it to leave.

        Raises:
            NotReady: The batcher closes.
            Overloaded: The queue of this priority has no room for all of them. A request over
                the limit by itself is let in when the queue is empty.
        """
        groups = [None] * len(items) if groups is None else groups
        if not len(items) == len(costs) == len(groups) or min(costs, default=1) < 1:
            raise ValueError("every item needs a cost of at least 1, and a group where there are any")
        self.require_room(len(items), priority, sum(costs))
        loop = asyncio.get_running_loop()
        now = loop.time()
        futures: list[asyncio.Future[R]] = []
        for item, cost, group in zip(items, costs, groups, strict=True):
            entry = Pending(item, cost, priority, now, deadline, loop.create_future(), group, request)
            entry.future.add_done_callback(partial(self._on_done, entry))
            self._queue.append(entry)
            futures.append(entry.future)
        if costs:
            self._mean_cost += _NEWEST * (sum(costs) / len(costs) - self._mean_cost)
        self._schedule_pump()
        return futures

    def require_room(self, inputs: int, priority: Priority, cost: int | None = None) -> None:
        """See that so many inputs, of so many units in all, could be queued now.

        Before they are prepared their cost is not known; they are then taken for as many of the mean cost.

        Raises:
            NotReady: See `submit`.
            Overloaded: See `submit`.
        """
        if self._closing:
            raise NotReady("the node is shutting down", retry_after=_RETRY_UNKNOWN)
        waiting = self._queue.cost[priority]
        if cost is None:
            cost = max(inputs, round(inputs * self._mean_cost))
        if waiting and waiting + cost > self._max_queue_cost:
            self._refused.inc(inputs)
            raise Overloaded(
                f"the {priority.value} queue is full: {waiting} units wait, {cost} more are over the limit of "
                f"{self._max_queue_cost}",
                retry_after=self._retry_after(min(waiting, waiting + cost - self._max_queue_cost)),
            )

    async def close(self, within: float = 0.0) -> bool:
        """Refuse new work, finish what is queued within so many seconds, fail the rest with NotReady.

        Returns:
            False when a batch is still stuck in its thread, which then cannot be ended.
        """
        self._closing = True
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._idle.wait()
        for line in self._queue.lines.values():
            for entry in line:
                if entry.waiting:
                    self._queue.leave(entry)
                    _fail(entry, NotReady("the node shut down first", retry_after=_RETRY_UNKNOWN))
            line.clear()
        # No future may ever be left undone.
        for lane in self._running:
            for entry in lane.batch:
                _fail(entry, NotReady("the node shut down first", retry_after=_RETRY_UNKNOWN))
        stopped = not self._running
        self._executor.shutdown(wait=stopped, cancel_futures=True)
        for end in self._shown:
            end()
        return stopped

    def _retry_after(self, missing: int) -> float:
        """Seconds until there is room for the units that are too many, and at least until half of the queue is done.

        Half, because if all callers came back to an empty queue the backend would have idled.
        """
        if self._rate is None:
            return _RETRY_UNKNOWN
        wait = max(missing, sum(self._queue.cost.values()) / 2) / (self._rate * self._lanes)
        return min(max(wait, _RETRY_MIN), _RETRY_MAX)

    def _on_done(self, entry: Pending[T, R], future: asyncio.Future[R]) -> None:
        if not future.cancelled():
            future.exception()  # marks it as seen: the caller may have left in this very moment
        if entry.waiting:
            self._queue.forget(entry)
            self._count_dropped(entry)
            # Nothing may be left to wait for.
            self._schedule_pump()

    def _count_dropped(self, entry: Pending[T, R]) -> None:
        # A caller that left because its time was up cancels its futures like any other.
        late = entry.deadline <= asyncio.get_running_loop().time()
        (self._expired if late else self._cancelled).inc()

    def _schedule_pump(self) -> None:
        # Not at once: requests that arrive in the same turn of the loop share the batch.
        self._idle.clear()
        if not self._pump_due:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Give every free lane a batch."""
        self._pump_due = False
        loop = asyncio.get_running_loop()
        while not self._full:
            now = loop.time()
            taken = take_batch(self._queue, self._policy, now)
            for entry in taken.gone:
                self._count_dropped(entry)
            for entry in taken.expired:
                self._count_dropped(entry)
                _fail(entry, DeadlineExceeded("the deadline passed while the input waited for a batch"))
            if not taken.batch:
                break
            alone = self._run_alone is not None and not self._running and not self._queue
            lane = _Lane(taken.batch, [taken.batch], now, alone)
            self._running.add(lane)
            self._run_next_part(lane)
            for entry in taken.batch:
                self._queue_seconds.observe(now - entry.arrival)
        if not self._running and not self._queue:
            self._idle.set()

    def _run_next_part(self, lane: _Lane[T, R]) -> None:
        """Give the next part of the batch to a thread; when none is left, the lane to the next batch."""
        while lane.parts:
            part = [entry for entry in lane.parts.pop() if not entry.future.done()]
            if part:
                self._executor.submit(self._attempt, asyncio.get_running_loop(), lane, part)
                return
        self._running.discard(lane)
        self._pump()
        if self._tracing.on:  # when the lane is at work again
            self._trace(lane)

    def _attempt(self, loop: asyncio.AbstractEventLoop, lane: _Lane[T, R], part: list[Pending[T, R]]) -> None:
        """Run once, in a thread of its own."""
        started = time.perf_counter()
        outcomes: Sequence[R | EmbedMeshError] | Exception
        try:
            run = self._run_alone if lane.alone and self._run_alone else self._run_batch
            outcomes = run([entry.item for entry in part])
            if len(outcomes) != len(part):
                raise RuntimeError(f"{len(part)} items went in, {len(outcomes)} outcomes came out")  # noqa: TRY301  (is handled like any failure)
        except Exception as error:  # noqa: BLE001  (whatever a model raises, its neighbours go on)
            outcomes = error
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(self._on_attempt, lane, part, outcomes, time.perf_counter() - started)

    def _on_attempt(
        self,
        lane: _Lane[T, R],
        part: list[Pending[T, R]],
        outcomes: Sequence[R | EmbedMeshError] | Exception,
        seconds: float,
    ) -> None:
        """Deliver what is good; what failed in company runs again by halves."""
        self.batch_seconds = seconds
        if isinstance(outcomes, Exception):
            if len(part) > 1:
                _log.warning(
                    "a batch failed, running it by halves", extra={"inputs": len(part), "error": repr(outcomes)}
                )
            failure = InferenceFailed("the model failed on this input")
            failure.__cause__ = outcomes
            outcomes = [failure] * len(part)
        failed: list[Pending[T, R]] = []
        for entry, outcome in zip(part, outcomes, strict=True):
            if not isinstance(outcome, EmbedMeshError):
                if not entry.future.done():
                    entry.future.set_result(outcome)
            elif len(part) > 1:
                failed.append(entry)
            else:
                _fail(entry, outcome)
        middle = (len(failed) + 1) // 2
        lane.parts += [half for half in (failed[middle:], failed[:middle]) if half]
        self._run_next_part(lane)
        self._measure([entry.cost for entry in part], seconds)

    def _trace(self, lane: _Lane[T, R]) -> None:
        """Record a batch in which a traced request rode."""
        parts: dict[Hashable, list[Pending[T, R]]] = {}
        for entry in lane.batch:
            if entry.request is not None:
                parts.setdefault(entry.request, []).append(entry)
        if not parts:
            return
        costs = [entry.cost for entry in lane.batch]
        self._tracing.batch(
            [
                Ride(request, len(part), sum(entry.cost for entry in part), lane.since - part[0].arrival)
                for request, part in parts.items()
            ],
            seconds=asyncio.get_running_loop().time() - lane.since,
            failed=sum(_has_failed(entry.future) for entry in lane.batch),
            model=self._model,
            batch_inputs=len(costs),
            batch_units=sum(costs),
            padding_units=self._cost(costs) - sum(costs),
        )

    def _cost(self, costs: Sequence[int]) -> int:
        return max(costs) * len(costs) if self._policy.padded else sum(costs)

    def _measure(self, costs: Sequence[int], seconds: float) -> None:
        real = sum(costs)
        cost = self._cost(costs)
        self._batch_inputs.observe(len(costs))
        self._batch_cost.observe(cost)
        self._units_real.inc(real)
        self._units_padding.inc(cost - real)
        self._infer_seconds.observe(seconds)
        rate = real / max(seconds, 1e-6)
        self._rate = rate if self._rate is None else self._rate + _NEWEST * (rate - self._rate)


def _has_failed(future: asyncio.Future[R]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is not None


def _total(costs: Mapping[Priority, int]) -> int:
    return sum(costs.values())


def _fail(entry: Pending[T, R], error: EmbedMeshError) -> None:
    if not entry.future.done():
        entry.future.set_exception(error)
