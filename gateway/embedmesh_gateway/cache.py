"""Vectors by content: a bounded memory, then Redis. It may only help.

Nothing here raises, and nobody waits longer than the time limit: whatever Redis does, the
worst outcome is a miss. Keys and payloads are opaque bytes; see `router.py` for their meaning.
"""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, Self

from embedmesh_gateway.redis_servers import PIECE_KEYS, Limits, Server, Servers, connect
from embedmesh_gateway.redis_url import parse_redis_url, redacted
from embedmesh_server.metrics import GatewayMetrics

__all__ = ["MemoryCache", "VectorCache"]

# What a dictionary entry, a linked-list node and the allocator take besides key and value: up to
# 145 bytes measured as resident memory, rounded up; see gateway/README.md.
_ENTRY_BYTES: Final = 176
# Of all servers together.
_QUEUE_BYTES: Final = 32 * 1024 * 1024


class MemoryCache:
    """Least recently used payloads are dropped once `limit` bytes are held, overhead included."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.evictions = 0
        self._entries: OrderedDict[bytes, bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<MemoryCache entries={len(self)} bytes={self.used}/{self.limit}>"

    def get(self, key: bytes) -> bytes | None:
        """Give the payload and mark it as used."""
        payload = self._entries.get(key)
        if payload is not None:
            self._entries.move_to_end(key)
        return payload

    def set(self, key: bytes, payload: bytes) -> None:
        """Keep the payload; one larger than the whole cache is not kept."""
        old = self._entries.pop(key, None)
        if old is not None:
            self.used -= _cost(key, old)
        cost = _cost(key, payload)
        if cost > self.limit:
            return
        self._entries[key] = payload
        self.used += cost
        while self.used > self.limit:
            self.used -= _cost(*self._entries.popitem(last=False))
            self.evictions += 1

    def drop(self, key: bytes) -> None:
        """Forget the payload, if it is held."""
        old = self._entries.pop(key, None)
        if old is not None:
            self.used -= _cost(key, old)


def _cost(key: bytes, payload: bytes) -> int:
    return sys.getsizeof(key) + sys.getsizeof(payload) + _ENTRY_BYTES


class VectorCache:
    """Payloads in memory and, when there is an URL, in Redis.

    Args:
        url: See `redis_url.py`; "" for memory only.
        memory_bytes: Bound of the in-process part.
        ttl: Seconds after which Redis forgets a payload; shortened by up to 5 % at random.
        timeout: The most seconds that a look-up waits for Redis.
        breaker_failures: See `Breaker`.
        breaker_pause: See `Breaker`.
        metrics: Counts look-ups, errors and evictions.

    Use as an async context manager: leaving it writes what is still queued, for at most `flush_seconds`.
    """

    def __init__(
        self,
        url: str,
        *,
        memory_bytes: int,
        ttl: float,
        timeout: float,
        metrics: GatewayMetrics,
        breaker_failures: int = 5,
        breaker_pause: float = 1.0,
        queue_bytes: int = _QUEUE_BYTES,
        flush_seconds: float = 2.0,
    ) -> None:
        self._shown_url = redacted(url)
        self._limits = Limits(ttl, timeout, breaker_failures, breaker_pause)
        self._flush_seconds = flush_seconds
        self._queue_bytes = queue_bytes
        self._metrics = metrics
        self._memory = MemoryCache(memory_bytes)
        self._servers: Servers | None = None
        if url:
            self._servers = connect(parse_redis_url(url), self._limits, metrics, self._remember)
        self._hits, self._misses = (
            {tier: metrics.cache_lookups.labels(tier, outcome) for tier in ("memory", "redis")}
            for outcome in ("hit", "miss")
        )
        metrics.cache_memory_bytes.set_function(lambda: self._memory.used)
        metrics.cache_memory_entries.set_function(lambda: len(self._memory))
        metrics.cache_breaker_open.set_function(lambda: self._servers is not None and self._servers.are_left_alone)

    def __repr__(self) -> str:
        return f"<VectorCache {self._shown_url or 'memory only'} {self._memory!r} {self._servers!r}>"

    async def __aenter__(self) -> Self:
        if self._servers is not None:
            await self._servers.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Write what is queued, within a bound, and close the connections."""
        if self._servers is not None:
            await self._servers.aclose(self._flush_seconds)

    # Memory.

    def from_memory(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Look keys up in this process. Does not wait; entry i answers keys[i], None is a miss."""
        found = [self._memory.get(key) for key in keys]
        hits = len(found) - found.count(None)
        self._hits["memory"].inc(hits)
        self._misses["memory"].inc(len(found) - hits)
        return found

    def _remember(self, key: bytes, payload: bytes) -> None:
        before = self._memory.evictions
        self._memory.set(key, payload)
        self._metrics.cache_evictions.inc(self._memory.evictions - before)

    def discard(self, key: bytes) -> None:
        """Forget a payload that turned out to be of no use; Redis's copy is overwritten by the next `set_many`."""
        self._memory.drop(key)
        self._metrics.cache_errors.labels("get", "corrupt").inc()

    # Redis.

    async def from_redis(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Look keys up in Redis, waiting at most the time limit. Hits are kept in memory.

        Entry i answers keys[i]; None is a miss, also when Redis failed or is being left alone.
        """
        found: list[bytes | None] = [None] * len(keys)
        if self._servers is None or not keys:
            return found
        asked = [
            _Asked(server, places, server.look_up([keys[place] for place in places]))
            for server, places in self._servers.split(keys)
        ]
        every = [future for one in asked for future in one.futures]
        if not every:
            return found
        try:
            # Not asyncio.timeout: that would also discard an answer which came in the same turn of a busy loop.
            await asyncio.wait(every, timeout=self._limits.timeout)
            for one in asked:
                one.take(found)
        finally:
            for future in every:
                future.cancel()  # a lane passes over look-ups that nobody waits for
        hits = len(found) - found.count(None)
        self._hits["redis"].inc(hits)
        self._misses["redis"].inc(sum(len(one.places) for one in asked if one.futures) - hits)
        return found

    def set_many(self, items: Iterable[tuple[bytes, bytes]]) -> None:
        """Keep payloads in memory now and in Redis soon. Does not wait.

        When more is queued than Redis takes, the rest is not written (kind "dropped").
        """
        items = list(items)
        for key, payload in items:
            self._remember(key, payload)
        if self._servers is None:
            return
        written = 0
        room = self._queue_bytes - sum(server.unwritten_bytes for server in self._servers.all)
        for server, places in self._servers.split([key for key, _ in items]):
            for place in places:
                key, payload = items[place]
                size = len(key) + len(payload)
                if size <= room:
                    room -= size
                    written += 1
                    server.write(key, payload)
            server.flush()
        if dropped := len(items) - written:
            self._metrics.cache_errors.labels("set", "dropped").inc(dropped)


class _Asked(NamedTuple):
    """What one server was asked: its futures answer the keys at `places`, in pieces."""

    server: Server
    places: Sequence[int]
    futures: list[asyncio.Future[list[bytes | None]]]

    def take(self, found: list[bytes | None]) -> None:
        """Put what came in time into its places, and tell the server of what did not."""
        late = 0
        for start, future in zip(range(0, len(self.places), PIECE_KEYS), self.futures, strict=False):
            if not future.done():
                late += 1
            elif not future.cancelled():
                for place, payload in zip(self.places[start : start + PIECE_KEYS], future.result(), strict=True):
                    found[place] = payload
        if late:
            self.server.was_late(wholly=late == len(self.futures))
