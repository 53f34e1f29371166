"""Vectors by content: a bounded memory, then Redis. It may only help.

Nothing here raises, and nobody waits longer than the time limit: whatever Redis does, the
worst outcome is a miss. Keys and payloads are opaque bytes; see `router.py` for their meaning.

What Redis holds under a key is one byte of format version, the CRC-32 of key and payload
(little-endian), and the payload. Garbage, other formats and values that belong to another
key are misses of kind "corrupt".
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import zlib
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, Self

import redis.asyncio as redis
from redis import exceptions as redis_errors
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from embedmesh_gateway.settings import redacted
from embedmesh_server.metrics import GatewayMetrics

__all__ = ["Breaker", "MemoryCache", "VectorCache", "seal", "unseal"]

_log = logging.getLogger(__name__)

_FORMAT: Final = 1
_HEADER_BYTES: Final = 5
# What a dictionary entry, a linked-list node and the allocator take besides key and value: up to
# 145 bytes measured as resident memory, rounded up; see gateway/README.md.
_ENTRY_BYTES: Final = 176
# Connections for reading. Look-ups that find all of them busy share the next MGET.
_LANES: Final = 4
_MGET_KEYS: Final = 256
_WRITE_KEYS: Final = 256
_QUEUE_BYTES: Final = 32 * 1024 * 1024
# An operation is given up, and its connection closed, after this many times the limit that
# callers wait: late answers still fill the memory, and connections survive a slow moment.
_PATIENCE: Final = 10
# Vectors written together should not expire together.
_TTL_JITTER: Final = 0.05
_FAILED: Final = object()


def seal(key: bytes, payload: bytes) -> bytes:
    """Give the value that Redis stores for `payload` under `key`."""
    return bytes((_FORMAT,)) + zlib.crc32(payload, zlib.crc32(key)).to_bytes(4, "little") + payload


def unseal(key: bytes, value: object) -> bytes | None:
    """Give back the payload, or None when `value` is not what `seal` made for this key."""
    if not isinstance(value, bytes) or len(value) < _HEADER_BYTES or value[0] != _FORMAT:
        return None
    payload = value[_HEADER_BYTES:]
    return payload if zlib.crc32(payload, zlib.crc32(key)) == int.from_bytes(value[1:5], "little") else None


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


class Breaker:
    """Leaves a failing service alone: after `failures` in a row, one try every `pause` seconds.

    A try that never reports back (its task was cancelled) blocks nothing: the next is due a pause later.
    """

    def __init__(self, failures: int, pause: float, clock: Callable[[], float]) -> None:
        self._limit, self._pause, self._clock = failures, pause, clock
        self._failures = 0
        self._next_try = 0.0

    def __repr__(self) -> str:
        return f"<Breaker {'open' if self.is_open else 'closed'} failures={self._failures}/{self._limit}>"

    @property
    def is_open(self) -> bool:
        """Whether the service is being left alone."""
        return self._failures >= self._limit

    def allow(self) -> bool:
        """Whether to try now. While open, a yes is given once a pause."""
        if not self.is_open:
            return True
        now = self._clock()
        if now < self._next_try:
            return False
        self._next_try = now + self._pause
        return True

    def succeeded(self) -> None:
        """The service answered."""
        self._failures = 0

    def failed(self) -> None:
        """The service did not answer, or not with sense."""
        self._failures += 1
        self._next_try = self._clock() + self._pause


class VectorCache:
    """Payloads in memory and, when there is an URL, in Redis.

    Args:
        url: redis://, rediss:// or unix://; "" for memory only.
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
        self._ttl, self._timeout, self._flush_seconds = ttl, timeout, flush_seconds
        self._metrics = metrics
        self._memory = MemoryCache(memory_bytes)
        # A probe that is still being waited for must not be joined by a second one.
        self._breaker = Breaker(breaker_failures, max(breaker_pause, timeout), asyncio.get_running_loop().time)
        self._hits, self._misses = (
            {tier: metrics.cache_lookups.labels(tier, outcome) for tier in ("memory", "redis")}
            for outcome in ("hit", "miss")
        )
        metrics.cache_memory_bytes.set_function(lambda: self._memory.used)
        metrics.cache_memory_entries.set_function(lambda: len(self._memory))
        metrics.cache_breaker_open.set_function(lambda: self._breaker.is_open)
        self._lookups: deque[tuple[Sequence[bytes], asyncio.Future[list[bytes | None]]]] = deque()
        self._lanes: set[asyncio.Task[None]] = set()
        self._unwritten: deque[tuple[bytes, bytes]] = deque()
        self._unwritten_bytes = 0
        self._queue_bytes = queue_bytes
        self._writer: asyncio.Task[None] | None = None
        self._redis: redis.Redis | None = None
        if url:
            self._redis = redis.Redis.from_url(
                url,
                # RESP2: everything needed here, and no HELLO round trip before the first command.
                protocol=2,
                # Retries belong to the breaker: an operation fails at once, not three times.
                retry=Retry(NoBackoff(), 0),
                socket_connect_timeout=timeout * _PATIENCE,
                socket_timeout=timeout * _PATIENCE,
                max_connections=2 * (_LANES + 1),
            )

    def __repr__(self) -> str:
        return (
            f"<VectorCache {self._shown_url or 'memory only'} {self._memory!r} {self._breaker!r} "
            f"lanes={len(self._lanes)}/{_LANES} unwritten={len(self._unwritten)}>"
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Write what is queued, within a bound, and close the connections."""
        if self._writer is not None and not self._writer.done():
            await asyncio.wait({self._writer}, timeout=self._flush_seconds)
        left = [task for task in (*self._lanes, self._writer) if task is not None and not task.done()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        self._drop_unwritten()
        if self._redis is not None:
            try:
                await self._redis.aclose()
            except (redis_errors.RedisError, OSError):
                _log.debug("closing the connections to Redis failed", exc_info=True)

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

    # Reading Redis.

    async def from_redis(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Look keys up in Redis, waiting at most the time limit. Hits are kept in memory.

        Entry i answers keys[i]; None is a miss, also when Redis failed or is being left alone.
        """
        if self._redis is None or not keys or not self._breaker.allow():
            return [None] * len(keys)
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[list[bytes | None]]] = []
        # In pieces, so that of a large request those that came in time count.
        for start in range(0, len(keys), _MGET_KEYS):
            futures.append(loop.create_future())
            self._lookups.append((keys[start : start + _MGET_KEYS], futures[-1]))
            if len(self._lanes) < _LANES:
                self._start_lane()
        found: list[bytes | None] = []
        try:
            # Not asyncio.timeout: that would also discard an answer which came in the same turn of a busy loop.
            done, late = await asyncio.wait(futures, timeout=self._timeout)
            if late:
                self._failed("get", "timeout", breaker=not done)
            for start, future in zip(range(0, len(keys), _MGET_KEYS), futures, strict=True):
                piece = keys[start : start + _MGET_KEYS]
                found += future.result() if future.done() else [None] * len(piece)
        finally:
            for future in futures:
                future.cancel()  # a lane passes over look-ups that nobody waits for
        hits = len(found) - found.count(None)
        self._hits["redis"].inc(hits)
        self._misses["redis"].inc(len(found) - hits)
        return found

    def _start_lane(self) -> None:
        lane = asyncio.get_running_loop().create_task(self._lane())
        self._lanes.add(lane)
        lane.add_done_callback(self._lanes.discard)

    async def _lane(self) -> None:
        """Answer look-ups until none is left; those that piled up meanwhile share one MGET.

        The operation belongs to the lane and not to a caller, so a caller that leaves or runs
        out of time never cancels a half-read reply.
        """
        while self._lookups:
            batch: list[tuple[Sequence[bytes], asyncio.Future[list[bytes | None]]]] = []
            wanted: list[bytes] = []
            while self._lookups and (not batch or len(wanted) + len(self._lookups[0][0]) <= _MGET_KEYS):
                keys, future = self._lookups.popleft()
                if not future.done():
                    batch.append((keys, future))
                    wanted += keys
            if not batch:
                return
            found = await self._mget(wanted)
            start = 0
            for keys, future in batch:
                if not future.done():
                    future.set_result(found[start : start + len(keys)])
                start += len(keys)

    async def _mget(self, keys: Sequence[bytes]) -> list[bytes | None]:
        nothing: list[bytes | None] = [None] * len(keys)
        assert self._redis is not None  # noqa: S101  (lanes run only with a client)
        values = await self._try("get", self._redis.mget(keys))
        if values is _FAILED:
            return nothing
        if not isinstance(values, list) or len(values) != len(keys):
            self._failed("get", "corrupt")
            await self._reconnect()
            return nothing
        self._breaker.succeeded()
        found = [None if value is None else unseal(key, value) for key, value in zip(keys, values, strict=True)]
        wrong = sum(value is not None and payload is None for value, payload in zip(values, found, strict=True))
        if wrong:
            self._metrics.cache_errors.labels("get", "corrupt").inc(wrong)
            # Values of other keys may mean a connection out of step with its replies: begin anew.
            await self._reconnect()
        for key, payload in zip(keys, found, strict=True):
            if payload is not None:
                self._remember(key, payload)
        return found

    # Writing Redis.

    def set_many(self, items: Iterable[tuple[bytes, bytes]]) -> None:
        """Keep payloads in memory now and in Redis soon. Does not wait.

        When more is queued than Redis takes, the rest is not written (kind "dropped").
        """
        dropped = 0
        for key, payload in items:
            self._remember(key, payload)
            if self._redis is None:
                continue
            size = len(key) + len(payload)
            if self._unwritten_bytes + size > self._queue_bytes:
                dropped += 1
                continue
            self._unwritten.append((key, payload))
            self._unwritten_bytes += size
        if dropped:
            self._metrics.cache_errors.labels("set", "dropped").inc(dropped)
        if self._unwritten and (self._writer is None or self._writer.done()):
            self._writer = asyncio.get_running_loop().create_task(self._write())

    async def _write(self) -> None:
        assert self._redis is not None  # noqa: S101  (the writer runs only with a client)
        while self._unwritten:
            if not self._breaker.allow():
                self._drop_unwritten()
                return
            pipeline = self._redis.pipeline(transaction=False)
            for _ in range(min(_WRITE_KEYS, len(self._unwritten))):
                key, payload = self._unwritten.popleft()
                self._unwritten_bytes -= len(key) + len(payload)
                ttl = self._ttl * (1 - _TTL_JITTER * random.random())  # noqa: S311  (spreads expiry, no secret)
                pipeline.set(key, seal(key, payload), px=max(1, round(ttl * 1000)))
            replies = await self._try("set", pipeline.execute(raise_on_error=False))
            if replies is _FAILED:
                continue
            refused = [reply for reply in replies if isinstance(reply, Exception)]
            if refused:
                # Full (OOM), a replica (READONLY) or forbidden: reading may still work, so the breaker stays out of it.
                self._metrics.cache_errors.labels("set", "response").inc(len(refused))
                _log.debug("Redis refused a write: %s", refused[0])
            else:
                self._breaker.succeeded()

    def _drop_unwritten(self) -> None:
        if self._unwritten:
            self._metrics.cache_errors.labels("set", "dropped").inc(len(self._unwritten))
        self._unwritten.clear()
        self._unwritten_bytes = 0

    # Failing.

    async def _try(self, operation: str, command: Awaitable[Any]) -> Any:
        """Run one command; `_FAILED` when it failed, which has then been counted."""
        try:
            async with asyncio.timeout(self._timeout * _PATIENCE):
                return await command
        except Exception as error:  # noqa: BLE001  (a server that answers garbage can raise anything in the client)
            _log.debug("Redis failed: %s", error)
            self._failed(operation, _kind(error))
            return _FAILED

    def _failed(self, operation: str, kind: str, *, breaker: bool = True) -> None:
        self._metrics.cache_errors.labels(operation, kind).inc()
        if not breaker:
            return
        before = self._breaker.is_open
        self._breaker.failed()
        if self._breaker.is_open and not before:
            _log.warning("Redis is left alone after failures, vectors are computed", extra={"kind": kind})

    async def _reconnect(self) -> None:
        assert self._redis is not None  # noqa: S101  (only reached after a reply)
        try:
            await self._redis.connection_pool.disconnect(inuse_connections=False)
        except (redis_errors.RedisError, OSError):
            _log.debug("closing connections to Redis failed", exc_info=True)


def _kind(error: Exception) -> str:
    if isinstance(error, TimeoutError | redis_errors.TimeoutError):
        return "timeout"
    # NOAUTH and LOADING are connection errors to redis-py, or wrapped in one, but the server did answer.
    if isinstance(error.__cause__, redis_errors.RedisError):
        error = error.__cause__
    if isinstance(error, redis_errors.ResponseError | redis_errors.AuthenticationError | redis_errors.BusyLoadingError):
        return "response"
    if isinstance(error, redis_errors.ConnectionError | OSError):
        return "connection"
    return "corrupt"
