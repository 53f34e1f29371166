"""What a load showed: latencies, rates, and what the processes behind it did meanwhile."""

from __future__ import annotations

import asyncio
import statistics
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
import psutil
from hdrh.histogram import HdrHistogram
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from embedmesh_cli.bench.load import OK, Calls

__all__ = ["NOBODY", "Latencies", "Measured", "Observer", "Seen", "Spread", "family", "scrape"]

PERCENTILES: Final = (50.0, 95.0, 99.0, 99.9)
REFUSED: Final = "RESOURCE_EXHAUSTED"
# A generator is late when its own delay is a tenth of what it reports, and more than a timer's imprecision.
_LATE_SHARE, _LATE_SECONDS = 0.1, 0.001
# Above this many cores one Python process has nothing left.
_SATURATED_CORES: Final = 0.9


class Latencies:
    """An HDR histogram of seconds: 1 microsecond to an hour, three significant digits, any number of values."""

    _MICRO: Final = 1_000_000

    def __init__(self, seconds: NDArray[np.float64] | Sequence[float] = ()) -> None:
        self.histogram = HdrHistogram(1, 3600 * self._MICRO, 3)
        micros = np.clip(np.rint(np.asarray(seconds, np.float64) * self._MICRO), 1, 3600 * self._MICRO)
        for value, number in zip(*np.unique(micros.astype(np.int64), return_counts=True), strict=True):
            self.histogram.record_value(int(value), int(number))

    def __len__(self) -> int:
        return int(self.histogram.get_total_count())

    def __repr__(self) -> str:
        return f"<Latencies n={len(self)} p50={self.at(50) * 1e3:.2f} ms p99={self.at(99) * 1e3:.2f} ms>"

    @classmethod
    def merged(cls, parts: Iterable[Latencies]) -> Self:
        """All values of several, as if recorded in one."""
        whole = cls()
        for part in parts:
            whole.histogram.add(part.histogram)
        return whole

    def at(self, percentile: float) -> float:
        """Seconds that so many percent of the values do not exceed; NaN without values."""
        if not len(self):
            return float("nan")
        return float(self.histogram.get_value_at_percentile(percentile)) / self._MICRO

    def knows(self, percentile: float) -> bool:
        """Whether there are so many values that at least one lies beyond the percentile."""
        return len(self) * (100 - percentile) >= 100 * (1 - 1e-9)

    @property
    def most(self) -> float:
        """The largest, in seconds; NaN without values."""
        return self.at(100)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: milliseconds, and the histogram in HdrHistogram's own encoding (V2, microseconds)."""
        milliseconds = {f"p{percentile:g}": self.at(percentile) * 1e3 for percentile in PERCENTILES}
        return {
            "count": len(self),
            **({**milliseconds, "max": self.most * 1e3} if len(self) else {}),
            "unit": "ms",
            "hdr": self.histogram.encode().decode(),
        }


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure over several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Of one value a round."""
        rounds = list(values)
        return cls(statistics.median(rounds), min(rounds), max(rounds))


@dataclass(frozen=True, slots=True)
class Use:
    """What a process took in a window: CPU seconds, and its resident bytes at the end."""

    cpu_seconds: float
    rss_bytes: int


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass(frozen=True, slots=True)
class Seen:
    """What the mesh's processes and metrics did in a window.

    Attributes:
        use: By role; empty where the processes are not ours.
        counted: Growth of every metric, by role.
    """

    use: Mapping[str, Use] = field(default_factory=dict)
    counted: Mapping[str, Samples] = field(default_factory=dict)

    def total(self, name: str, **labels: str) -> float:
        """Growth of the samples of `name` that carry `labels`, over all roles."""
        wanted = set(labels.items())
        return sum(
            value
            for samples in self.counted.values()
            for (sample, has), value in samples.items()
            if sample == name and wanted <= has
        )

    @property
    def cpu_seconds(self) -> float:
        """Of all roles."""
        return sum(use.cpu_seconds for use in self.use.values())

    @property
    def padding(self) -> float:
        """Share of the computed units that were padding; NaN where no batch ran."""
        padding = self.total("embedmesh_batch_units_total", kind="padding")
        return _ratio(padding, padding + self.total("embedmesh_batch_units_total", kind="real"))

    @property
    def batch_inputs(self) -> float:
        """Mean inputs of a batch; NaN where none ran."""
        return _ratio(self.total("embedmesh_batch_inputs_sum"), self.total("embedmesh_batch_inputs_count"))

    @property
    def batch_cost(self) -> float:
        """Mean units that a batch made the model compute; NaN where none ran."""
        return _ratio(self.total("embedmesh_batch_cost_units_sum"), self.total("embedmesh_batch_cost_units_count"))

    @property
    def batch_seconds(self) -> float:
        """Mean seconds of a batch in the backend; NaN where none ran."""
        name = "embedmesh_encoder_stage_seconds"
        return _ratio(self.total(f"{name}_sum", stage="infer"), self.total(f"{name}_count", stage="infer"))


class Observer:
    """Watches the processes and metrics of a mesh.

    Args:
        pids: Process by role, read anew at each window; what it started counts as part of it.
        http: host:port of /metrics by role.
    """

    def __init__(self, pids: Callable[[], Mapping[str, int]], http: Mapping[str, str]) -> None:
        self._pids = pids
        self._http = http

    async def over(self, start: float, end: float) -> Seen:
        """See what happens between two moments of the loop's clock."""
        loop = asyncio.get_running_loop()
        # Reading the metrics costs the roles a few milliseconds of CPU: done outside the window.
        before = await self._samples()
        await asyncio.sleep(start - loop.time())
        families = {role: family(pid) for role, pid in self._pids().items()}
        begun = {role: _cpu(processes) for role, processes in families.items()}
        await asyncio.sleep(end - loop.time())
        use = {
            role: Use(_cpu(processes) - begun[role], sum(process.memory_info().rss for process in processes))
            for role, processes in families.items()
        }
        after = await self._samples()
        counted = {
            role: {key: value - before[role].get(key, 0.0) for key, value in samples.items()}
            for role, samples in after.items()
        }
        return Seen(use, counted)

    async def _samples(self) -> dict[str, Samples]:
        found = await asyncio.gather(*(asyncio.to_thread(scrape, address) for address in self._http.values()))
        return dict(zip(self._http, found, strict=True))


# For a mesh whose processes are not ours, or do not matter.
NOBODY: Final = Observer(dict, {})


def family(pid: int) -> list[psutil.Process]:
    """Give a process and all that it started, and these, such as workers."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def _cpu(processes: Sequence[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(each.user + each.system for each in times))


def scrape(http_address: str) -> Samples:
    """Read /metrics: value by (name, labels)."""
    with urllib.request.urlopen(f"http://{http_address}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One window of one load.

    Attributes:
        seconds: Its length.
        offered: Calls a second that were due; NaN for a closed loop.
        answered: Calls a second that were answered with vectors.
        vectors: Vectors a second.
        units: Tokens, patches or frames a second of these, cached ones included.
        cached: Share of the vectors that came from a cache.
        codes: How often calls ended how, "OK" aside.
        failed_inputs: Inputs that failed alone, in answered calls.
        latency: Of answered calls.
        refusal: Of refused calls, from when they were sent.
        lag: From when a call was due to when the generator sent it.
        generator_cores: CPU that each process of the generator took.
        reused: Whether payloads that were to be used once were used again.
        seen: What the mesh did meanwhile.
        alone: Whether this load was the only one.
    """

    seconds: float
    offered: float
    answered: float
    vectors: float
    units: float
    cached: float
    codes: Mapping[str, int]
    failed_inputs: int
    latency: Latencies
    refusal: Latencies
    lag: Latencies
    generator_cores: Sequence[float]
    reused: bool
    seen: Seen
    alone: bool

    @classmethod
    def of(cls, calls: Calls, seen: Seen, *, alone: bool = True) -> Self:
        """Reduce the calls of a load to what is reported.

        Latencies are of the calls that were due in the window; rates of those that ended in it. In a closed loop of
        few, large calls their number is too coarse for that: there a call counts with the part of its time that lies
        in the window.
        """
        seconds = calls.end - calls.start
        due = (calls.start <= calls.intended) & (calls.intended < calls.end)
        share = ((calls.start <= calls.done) & (calls.done < calls.end)).astype(np.float64)
        if calls.closed:
            inside = np.minimum(calls.done, calls.end) - np.maximum(calls.sent, calls.start)
            share = np.clip(inside / np.maximum(calls.done - calls.sent, 1e-9), 0, 1)
        share *= calls.codes == OK
        waited = calls.done - calls.intended
        bad = calls.codes[due & (calls.codes != OK)]
        vectors = float((calls.vectors * share).sum())
        return cls(
            seconds=seconds,
            offered=float("nan") if calls.closed else int(due.sum()) / seconds,
            answered=float(share.sum()) / seconds,
            vectors=vectors / seconds,
            units=float((calls.units * share).sum()) / seconds,
            cached=_ratio(float((calls.cached * share).sum()), vectors),
            codes={str(code): int(number) for code, number in zip(*np.unique(bad, return_counts=True), strict=True)},
            failed_inputs=int(calls.failed[due].sum()),
            latency=Latencies(waited[due & (calls.codes == OK)]),
            refusal=Latencies((calls.done - calls.sent)[due & (calls.codes == REFUSED)]),
            lag=Latencies((calls.sent - calls.intended)[due]),
            generator_cores=calls.cores,
            reused=calls.rounds > 1,
            seen=seen,
            alone=alone,
        )

    @property
    def generator_late(self) -> bool:
        """Whether the generator, rather than the server, made a noticeable part of the latency, or was at its end."""
        lag = self.lag.at(99)
        latency = self.latency.at(99) if len(self.latency) else self.refusal.at(99)
        late = lag > _LATE_SECONDS and lag > _LATE_SHARE * latency
        return late or max(self.generator_cores) > _SATURATED_CORES

    @property
    def cpu_ms_per_vector(self) -> float:
        """CPU milliseconds of all roles for each vector; NaN where they are not ours, or worked for others, too."""
        known = self.alone and self.seen.use
        return _ratio(self.seen.cpu_seconds * 1e3, self.vectors * self.seconds) if known else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "seconds": self.seconds,
            "offered_calls_per_second": self.offered,
            "answered_calls_per_second": self.answered,
            "vectors_per_second": self.vectors,
            "cached_share": self.cached,
            "failed_calls": dict(self.codes),
            "failed_inputs": self.failed_inputs,
            "latency": self.latency.as_dict(),
            "refusal": self.refusal.as_dict(),
            "schedule_lag": self.lag.as_dict(),
            "generator": {"cores": list(self.generator_cores), "late": self.generator_late},
            "cpu_ms_per_vector": self.cpu_ms_per_vector,
            "units_per_second": self.units,
            "padding_share": self.seen.padding,
            "batch_inputs": self.seen.batch_inputs,
            "batch_cost_units": self.seen.batch_cost,
            "batch_seconds": self.seen.batch_seconds,
            "roles": {
                role: {"cores": use.cpu_seconds / self.seconds, "rss_mib": use.rss_bytes / 2**20}
                for role, use in self.seen.use.items()
            },
        }
