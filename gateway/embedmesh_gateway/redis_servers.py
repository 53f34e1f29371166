"""The servers of Redis that hold the vectors, each with its own queues, connections and breaker.

One server, or the master that Sentinels name, holds every key. In a Cluster each master holds the keys of its slots;
one that is slow or gone costs its own keys only, since nobody shares a queue or a connection with it.

What Redis holds under a key is one byte of format version, the CRC-32 of key and payload
(little-endian), and the payload. Garbage, other formats and values that belong to another
key are misses of kind "corrupt".
"""

from __future__ import annotations

import asyncio
import logging
import random
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import redis.asyncio as redis
from redis import exceptions as redis_errors
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from embedmesh_gateway.redis_url import RedisUrl
from embedmesh_server.metrics import GatewayMetrics

__all__ = ["PIECE_KEYS", "Breaker", "Limits", "Server", "Servers", "connect", "seal", "unseal"]

_log = logging.getLogger(__name__)

_FORMAT: Final = 1
_HEADER_BYTES: Final = 5
# Connections for reading. Look-ups that find all of them busy share the next MGET.
_LANES: Final = 4
# Most keys of one MGET.
PIECE_KEYS: Final = 256
_WRITE_KEYS: Final = 256
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


@dataclass(frozen=True, slots=True)
class Limits:
    """What holds for every server.

    Attributes:
        ttl: Seconds after which Redis forgets a payload; shortened by up to 5 % at random.
        timeout: The most seconds that a look-up is waited for.
        breaker_failures: See `Breaker`.
        breaker_pause: See `Breaker`; in a Cluster also the least time between two looks at who holds what.
    """

    ttl: float
    timeout: float
    breaker_failures: int
    breaker_pause: float

    @property
    def patience(self) -> float:
        """Seconds after which an operation is given up."""
        return self.timeout * _PATIENCE


class Server:
    """Reads and writes the keys of one server, without ever raising.

    Args:
        client: Of the server.
        limits: See there.
        metrics: Counts errors.
        remember: Called with every key and payload found.
        on_trouble: Called when the server failed or no longer holds what it is asked for.
        in_cluster: Whether one command must not name keys of several slots.
    """

    def __init__(
        self,
        client: redis.Redis,
        limits: Limits,
        metrics: GatewayMetrics,
        remember: Callable[[bytes, bytes], None],
        *,
        on_trouble: Callable[[], None] = lambda: None,
        in_cluster: bool = False,
    ) -> None:
        self._client = client
        self._limits = limits
        self._metrics = metrics
        self._remember = remember
        self._on_trouble = on_trouble
        self._in_cluster = in_cluster
        self._breaker = Breaker(
            limits.breaker_failures,
            # A probe that is still being waited for must not be joined by a second one.
            max(limits.breaker_pause, limits.timeout),
            asyncio.get_running_loop().time,
        )
        self._lookups: deque[tuple[Sequence[bytes], asyncio.Future[list[bytes | None]]]] = deque()
        self._lanes: set[asyncio.Task[None]] = set()
        self._unwritten: deque[tuple[bytes, bytes]] = deque()
        self.unwritten_bytes = 0
        self._writer: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Server {self._breaker!r} lanes={len(self._lanes)}/{_LANES} unwritten={len(self._unwritten)}>"

    @property
    def is_left_alone(self) -> bool:
        """Whether it failed so often that only one try a pause is made."""
        return self._breaker.is_open

    async def aclose(self, flush_seconds: float = 0.0) -> None:
        """Write what is queued, within a bound, and close the connections."""
        if self._writer is not None and not self._writer.done():
            await asyncio.wait({self._writer}, timeout=flush_seconds)
        left = [task for task in (*self._lanes, self._writer) if task is not None and not task.done()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        for _, future in self._lookups:
            future.cancel()
        self._drop_unwritten()
        try:
            await self._client.aclose()
        except (redis_errors.RedisError, OSError):
            _log.debug("closing the connections to Redis failed", exc_info=True)

    # Reading.

    def look_up(self, keys: Sequence[bytes]) -> list[asyncio.Future[list[bytes | None]]]:
        """Give a future for each `PIECE_KEYS` keys, whose entry i answers key i; none while the server is left alone.

        Whoever no longer waits cancels the future; `was_late` tells the server of it.
        """
        if not self._breaker.allow():
            return []
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[list[bytes | None]]] = []
        # In pieces, so that of a large request those that came in time count.
        for start in range(0, len(keys), PIECE_KEYS):
            futures.append(loop.create_future())
            self._lookups.append((keys[start : start + PIECE_KEYS], futures[-1]))
            if len(self._lanes) < _LANES:
                self._start_lane()
        return futures

    def was_late(self, *, wholly: bool) -> None:
        """A caller gave up waiting; `wholly` when nothing at all had come."""
        self._failed("get", "timeout", breaker=wholly)

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
            while self._lookups and (not batch or len(wanted) + len(self._lookups[0][0]) <= PIECE_KEYS):
                keys, future = self._lookups.popleft()
                if not future.done():
                    batch.append((keys, future))
                    wanted += keys
            if not batch:
                return
            found = await self._get(wanted)
            start = 0
            for keys, future in batch:
                if not future.done():
                    future.set_result(found[start : start + len(keys)])
                start += len(keys)

    async def _get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        nothing: list[bytes | None] = [None] * len(keys)
        if self._in_cluster:
            pipeline = self._client.pipeline(transaction=False)
            for key in keys:
                pipeline.get(key)
            values = await self._try("get", pipeline.execute(raise_on_error=False))
        else:
            values = await self._try("get", self._client.mget(keys))
        if values is _FAILED:
            return nothing
        if not isinstance(values, list) or len(values) != len(keys):
            self._failed("get", "corrupt")
            await self._reconnect()
            return nothing
        self._breaker.succeeded()
        values = self._without_refusals("get", values)
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

    # Writing.

    def write(self, key: bytes, payload: bytes) -> None:
        """Queue a payload; `flush` starts writing."""
        self._unwritten.append((key, payload))
        self.unwritten_bytes += len(key) + len(payload)

    def flush(self) -> None:
        """Write what is queued. Does not wait."""
        if self._unwritten and (self._writer is None or self._writer.done()):
            self._writer = asyncio.get_running_loop().create_task(self._write())

    async def _write(self) -> None:
        while self._unwritten:
            if not self._breaker.allow():
                self._drop_unwritten()
                return
            pipeline = self._client.pipeline(transaction=False)
            for _ in range(min(_WRITE_KEYS, len(self._unwritten))):
                key, payload = self._unwritten.popleft()
                self.unwritten_bytes -= len(key) + len(payload)
                ttl = self._limits.ttl * (1 - _TTL_JITTER * random.random())  # noqa: S311  (spreads expiry, no secret)
                pipeline.set(key, seal(key, payload), px=max(1, round(ttl * 1000)))
            replies = await self._try("set", pipeline.execute(raise_on_error=False))
            if replies is _FAILED:
                continue
            # Full (OOM), a replica (READONLY) or forbidden: reading may still work, so the breaker stays out of it.
            if None not in self._without_refusals("set", replies):
                self._breaker.succeeded()

    def _drop_unwritten(self) -> None:
        if self._unwritten:
            self._metrics.cache_errors.labels("set", "dropped").inc(len(self._unwritten))
        self._unwritten.clear()
        self.unwritten_bytes = 0

    # Failing.

    def _without_refusals(self, operation: str, replies: list[Any]) -> list[Any]:
        """Put None in the place of replies that are errors, after counting them."""
        refused = [reply for reply in replies if isinstance(reply, Exception)]
        if not refused:
            return replies
        self._metrics.cache_errors.labels(operation, "response").inc(len(refused))
        _log.debug("Redis refused: %s", refused[0])
        # MOVED and ASK, CLUSTERDOWN, READONLY: its part in the cluster is another one now.
        if any(isinstance(r, redis_errors.AskError | redis_errors.ClusterError | redis_errors.ReadOnlyError)
               for r in refused):  # fmt: skip
            self._on_trouble()
        return [None if isinstance(reply, Exception) else reply for reply in replies]

    async def _try(self, operation: str, command: Awaitable[Any]) -> Any:
        """Run one command; `_FAILED` when it failed, which has then been counted."""
        try:
            async with asyncio.timeout(self._limits.patience):
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
        self._on_trouble()

    async def _reconnect(self) -> None:
        try:
            await self._client.connection_pool.disconnect(inuse_connections=False)
        except (redis_errors.RedisError, OSError):
            _log.debug("closing connections to Redis failed", exc_info=True)


class Servers(Protocol):
    """Which server holds a key."""

    @property
    def all(self) -> Collection[Server]:
        """Those that are known now."""

    @property
    def are_left_alone(self) -> bool:
        """Whether one of them, or all as far as nobody knows which they are, is not asked."""

    async def start(self) -> None:
        """Find out who they are, within the time of one operation."""

    def split(self, keys: Sequence[bytes]) -> Iterable[tuple[Server, Sequence[int]]]:
        """Give, for each server, the places in `keys` of what it holds; keys that none holds are left out."""

    async def aclose(self, flush_seconds: float) -> None:
        """Write what is queued, within a bound, and close the connections."""


def connect(
    url: RedisUrl, limits: Limits, metrics: GatewayMetrics, remember: Callable[[bytes, bytes], None]
) -> Servers:
    """Make the servers of an URL. Nothing is connected to yet."""
    if url.kind == "cluster":
        return _Cluster(url, limits, metrics, remember)
    options = _options(limits)
    if url.kind == "single":
        client = redis.Redis.from_url(url.url, **options, max_connections=2 * (_LANES + 1))
        return _OneServer(Server(client, limits, metrics, remember))
    # One that hangs must leave time to ask the others, and to connect to the master.
    share = limits.patience / (len(url.hosts) + 1)
    asking = options | {"socket_connect_timeout": share, "socket_timeout": share} | url.sentinel_options
    sentinel = Sentinel(url.hosts, sentinel_kwargs=asking, **(options | url.options))  # type: ignore[no-untyped-call]
    client = sentinel.master_for(url.master, max_connections=2 * (_LANES + 1))
    return _OneServer(Server(client, limits, metrics, remember), sentinel.sentinels)


def _options(limits: Limits) -> dict[str, Any]:
    return {
        # RESP2: everything needed here, and no HELLO round trip before the first command.
        "protocol": 2,
        # Retries belong to the breaker: an operation fails at once, not three times.
        "retry": Retry(NoBackoff(), 0),
        "socket_connect_timeout": limits.patience,
        "socket_timeout": limits.patience,
    }


class _OneServer:
    """One server for all keys, perhaps found by asking Sentinels before each connection."""

    def __init__(self, server: Server, sentinels: Sequence[redis.Redis] = ()) -> None:
        self._server = server
        self._sentinels = sentinels
        self.all = (server,)

    def __repr__(self) -> str:
        return repr(self._server)

    @property
    def are_left_alone(self) -> bool:
        return self._server.is_left_alone

    async def start(self) -> None:
        """There is nothing to find out."""

    def split(self, keys: Sequence[bytes]) -> Iterable[tuple[Server, Sequence[int]]]:
        return ((self._server, range(len(keys))),)

    async def aclose(self, flush_seconds: float) -> None:
        await self._server.aclose(flush_seconds)
        for sentinel in self._sentinels:
            await sentinel.aclose()


class _Cluster:
    """The masters of a Redis Cluster.

    redis-py's cluster client knows who holds which slot, and no more: its own commands fail as a whole with one
    node, and disconnect the others meanwhile.
    """

    def __init__(
        self, url: RedisUrl, limits: Limits, metrics: GatewayMetrics, remember: Callable[[bytes, bytes], None]
    ) -> None:
        self._url, self._limits, self._metrics, self._remember = url, limits, metrics, remember
        self._servers: dict[str, Server] = {}
        self._clock = asyncio.get_running_loop().time
        self._map = self._new_map()
        self._is_known: bool | None = None
        self._next_look = 0.0
        self._look: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Cluster {self._servers}>"

    @property
    def all(self) -> Collection[Server]:
        return self._servers.values()

    @property
    def are_left_alone(self) -> bool:
        return not self._is_known or any(server.is_left_alone for server in self._servers.values())

    async def start(self) -> None:
        self._look_again()
        if self._look is not None:
            await asyncio.wait({self._look}, timeout=self._limits.patience)

    def split(self, keys: Sequence[bytes]) -> Iterable[tuple[Server, Sequence[int]]]:
        placed: dict[Server, list[int]] = {}
        for place, key in enumerate(keys):
            try:
                node = self._map.get_node_from_key(key)  # type: ignore[arg-type]  # takes bytes as well
            except redis_errors.SlotNotCoveredError:
                self._look_again()
                continue
            if node is not None:
                placed.setdefault(self._server(node), []).append(place)
        return placed.items()

    def _server(self, node: ClusterNode) -> Server:
        server = self._servers.get(node.name)
        if server is None:
            options = _options(self._limits) | self._url.options
            kind = redis.SSLConnection if options.pop("ssl", False) else redis.Connection
            pool = redis.ConnectionPool(
                kind, max_connections=2 * (_LANES + 1), host=node.host, port=node.port, **options
            )
            client = redis.Redis.from_pool(pool)
            server = Server(
                client, self._limits, self._metrics, self._remember, on_trouble=self._look_again, in_cluster=True
            )
            self._servers[node.name] = server
        return server

    def _look_again(self) -> None:
        """Find out who holds what now, at most once a pause. Does not wait."""
        if (self._look is None or self._look.done()) and self._clock() >= self._next_look:
            self._next_look = self._clock() + self._limits.breaker_pause
            self._look = asyncio.get_running_loop().create_task(self._find_out())

    async def _find_out(self) -> None:
        try:
            await self._map.nodes_manager.initialize()
        except Exception as error:  # noqa: BLE001  (as for a server)
            if self._is_known is not False:
                _log.warning("no node of the Redis Cluster says who holds what", extra={"error": str(error)})
            self._metrics.cache_errors.labels("topology", _kind(error.__cause__ or error)).inc()
            # The nodes that were known may all have new addresses: next time the names in the URL are asked.
            await self._forget_map()
            self._map = self._new_map()
            self._is_known = False
            return
        self._is_known = True
        masters = {node.name for node in self._map.get_primaries()}
        for name in self._servers.keys() - masters:
            await self._servers.pop(name).aclose()

    def _new_map(self) -> RedisCluster:
        return RedisCluster(
            startup_nodes=[ClusterNode(host, port) for host, port in self._url.hosts],
            # Slots without a master are misses; the others still help.
            require_full_coverage=False,
            **(_options(self._limits) | self._url.options),
        )

    async def _forget_map(self) -> None:
        for nodes in ("nodes_cache", "startup_nodes"):
            try:
                await self._map.nodes_manager.aclose(nodes)
            except (redis_errors.RedisError, OSError):
                _log.debug("closing the connections to Redis failed", exc_info=True)

    async def aclose(self, flush_seconds: float) -> None:
        if self._look is not None:
            self._look.cancel()
            await asyncio.wait({self._look})
        await asyncio.gather(*(server.aclose(flush_seconds) for server in self._servers.values()))
        await self._forget_map()


def _kind(error: BaseException) -> str:
    if isinstance(error, TimeoutError | redis_errors.TimeoutError):
        return "timeout"
    # NOAUTH and LOADING are connection errors to redis-py, or wrapped in one, but the server did answer.
    if isinstance(error.__cause__, redis_errors.RedisError):
        error = error.__cause__
    answers = redis_errors.ResponseError | redis_errors.AuthenticationError | redis_errors.BusyLoadingError
    if isinstance(error, answers | redis_errors.RedisClusterException):
        return "response"
    if isinstance(error, redis_errors.ConnectionError | OSError):
        return "connection"
    return "corrupt"
