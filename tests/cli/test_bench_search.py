"""The search for the highest rate, on a queue that is simulated."""

from dataclasses import dataclass

import numpy as np
import pytest

from embedmesh_cli.bench.load import Open
from embedmesh_cli.bench.search import highest_rate


@dataclass
class Tried:
    kept: bool
    generator_late: bool = False


def p99(rate: float, service: float) -> float:
    """Seconds that 99 % of the calls take at a server of one lane and a fixed service time."""
    free, waits = 0.0, []
    for due in Open(rate, seed=1).times(200.0):
        free = max(free, due) + service
        waits.append(free - due)
    return float(np.percentile(waits, 99))


async def test_finds_the_rate_of_a_queue() -> None:
    tried: list[float] = []

    async def probe(rate: float) -> Tried:
        tried.append(rate)
        return Tried(p99(rate, service=0.01) <= 0.05)

    found = await highest_rate(probe, start=5.0)
    # Waits of more than four services in one of a hundred calls: a load of about 0.6.
    assert 50 < found.rate < 75
    assert found.broken is not None
    assert found.rate < found.broken <= found.rate * 1.05
    assert not found.generator_late
    assert len(set(tried)) < 14
    assert p99(found.rate, 0.01) <= 0.05 < p99(found.broken, 0.01)
    down = await highest_rate(probe, start=1000.0)
    assert down.rate == pytest.approx(found.rate, rel=0.06)


async def test_one_bad_moment_is_no_limit() -> None:
    tried: list[float] = []

    async def probe(rate: float) -> Tried:
        tried.append(rate)
        return Tried(kept=rate <= 100 and tried.count(rate) + (rate == 40) != 1)

    assert (await highest_rate(probe, start=40.0)).rate == pytest.approx(100, rel=0.05)


async def test_ends_where_nothing_is_kept_or_broken() -> None:
    async def never(_: float) -> Tried:
        return Tried(kept=False, generator_late=True)

    found = await highest_rate(never, start=64.0, most_probes=12)
    assert found.rate == 0
    assert found.broken == 64 / 2**5
    assert found.generator_late

    async def always(_: float) -> Tried:
        return Tried(kept=True)

    found = await highest_rate(always, start=1.0, most_probes=5)
    assert (found.rate, found.broken) == (16.0, None)
