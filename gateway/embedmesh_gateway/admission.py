"""How many inputs the gateway serves at a time."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from embedmesh.errors import DeadlineExceeded, EmbedMeshError

__all__ = ["Admission"]


class Admission:
    """Inputs in service, bounded; bulk work gets at most half, so that interactive work always finds room.

    Args:
        limit: The most inputs in service. A single request always fits when nothing else is in service.
        refusal: Gives the error for `n` inputs that do not fit, from the time in which a request is usually served.
    """

    def __init__(self, limit: int, refusal: Callable[[int, Admission, float], EmbedMeshError]) -> None:
        self._refusal = refusal
        self._used = {True: 0, False: 0}  # by "is bulk"
        self._seconds = 0.1  # moving average of a request's time in service
        self._waiting: deque[tuple[int, bool, asyncio.Future[None]]] = deque()
        self.resize(limit)

    def __repr__(self) -> str:
        return f"<Admission inputs={self.inputs}/{self.limit} waiting={len(self._waiting)}>"

    def resize(self, limit: int) -> None:
        """Go by another limit from now on."""
        self.limit = limit
        self._limits = {True: max(1, limit // 2), False: limit}
        self._admit_waiting()

    @property
    def inputs(self) -> int:
        """Inputs in service now."""
        return self._used[True] + self._used[False]

    def _fits(self, n: int, bulk: bool) -> bool:
        if bulk and self._used[True] and self._used[True] + n > self._limits[True]:
            return False
        return not self.inputs or self.inputs + n <= self._limits[False]

    @asynccontextmanager
    async def hold(self, n: int, *, bulk: bool, patient: bool, deadline: float) -> AsyncIterator[None]:
        """Keep room for `n` inputs; when there is none, refuse, or wait until `deadline` when `patient`.

        Raises:
            EmbedMeshError: Of `refusal`.
            DeadlineExceeded: No room came free in time.
        """
        if self._fits(n, bulk) and not (patient and self._waiting):
            self._used[bulk] += n
        elif patient:
            await self._wait(n, bulk, deadline)
        else:
            raise self._refusal(n, self, min(max(self._seconds, 0.05), 5.0))
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds += 0.1 * (time.monotonic() - start - self._seconds)
            self._used[bulk] -= n
            self._admit_waiting()

    async def _wait(self, n: int, bulk: bool, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append((n, bulk, turn))
        try:
            async with asyncio.timeout_at(deadline):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # the turn came together with the end
                self._used[bulk] -= n
            turn.cancel()
            self._admit_waiting()
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded("the deadline passed while waiting for room") from None
            raise

    def _admit_waiting(self) -> None:
        while self._waiting:
            n, bulk, turn = self._waiting[0]
            if not turn.done():
                if not self._fits(n, bulk):
                    return
                self._used[bulk] += n
                turn.set_result(None)
            self._waiting.popleft()
