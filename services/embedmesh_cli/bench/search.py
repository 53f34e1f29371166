"""The highest rate at which a server keeps a promise, by trying rates."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Probe", "Searched", "highest_rate"]


class Probe(Protocol):
    """What one try showed.

    Attributes:
        kept: Whether the promise was kept.
        generator_late: Whether the load generator itself could not keep up.
    """

    kept: bool
    generator_late: bool


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search found.

    Attributes:
        rate: The highest rate that kept the promise, 0 when none did.
        broken: The lowest that broke it; None when none did.
        generator_late: Whether the generator was late where the promise broke: the server may be able to do more.
    """

    rate: float
    broken: float | None
    generator_late: bool


async def highest_rate(
    probe: Callable[[float], Awaitable[Probe]], *, start: float, tolerance: float = 0.05, most_probes: int = 20
) -> Searched:
    """Find the highest rate that keeps the promise: doubling or halving, then bisection.

    A rate is broken when it breaks twice: once may be the machine.

    Args:
        probe: Tries a rate.
        start: First rate to try.
        tolerance: Ends when the kept and the broken rate differ by no more than this share.
        most_probes: Ends after so many tries at the latest.
    """
    kept, broken, late = 0.0, None, False
    rate, left = start, most_probes
    while left > 0:
        left -= 1
        result = await probe(rate)
        if not result.kept and left > 0:
            left -= 1
            result = await probe(rate)
        if result.kept:
            kept = rate
        else:
            broken, late = rate, result.generator_late
        if broken is None:
            rate = kept * 2
        elif broken - kept <= tolerance * kept:
            break
        else:
            rate = (kept + broken) / 2
    return Searched(kept, broken, late)
