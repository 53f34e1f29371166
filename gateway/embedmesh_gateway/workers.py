"""Several gateways on one port: `--workers`.

Each worker is a whole gateway in a process of its own that listens on the same port with SO_REUSEPORT; the kernel
shares *connections* out among them, by a hash of their addresses. The process that was started keeps them running
and answers /metrics, /healthz and /readyz for all of them; a worker's samples carry the label `worker`, so that
a counter which begins again with its process is seen to do so.
See gateway/README.md.
"""

from __future__ import annotations

import asyncio
import logging
import math
import multiprocessing
import socket
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Final

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from embedmesh_gateway.settings import GatewaySettings
from embedmesh_server.metrics import WorkersMetrics
from embedmesh_server.node import BindError, HttpEndpoint, taken, write_ready_file

__all__ = ["Work", "WorkerError", "Workers", "stop_with_parent"]

_log = logging.getLogger(__name__)

# Runs a worker: its settings, and where it tells the address of its HTTP endpoint once it listens.
Work = Callable[[GatewaySettings, Connection], None]

_spawn: Final = multiprocessing.get_context("spawn")
# A worker that dies is started again after a pause, which doubles while it keeps dying young.
_FIRST_PAUSE, _LONGEST_PAUSE, _YOUNG = 0.1, 5.0, 30.0
_SCRAPE_SECONDS: Final = 2.0
_POLL_SECONDS: Final = 0.1
# Beyond the time that a worker has to drain.
_KILL_SECONDS: Final = 5.0


class WorkerError(RuntimeError):
    """Workers cannot start; each has said why."""


def stop_with_parent(stop: asyncio.Event) -> None:
    """Have a worker stop when the process that started it is gone, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        loop = asyncio.get_running_loop()

        def gone() -> None:
            loop.remove_reader(parent.sentinel)
            stop.set()

        loop.add_reader(parent.sentinel, gone)


class Workers:
    """Runs so many workers as the settings say.

    Args:
        settings: Of all workers together.
        work: Runs one; a function of a module, for it is called in a new process.
    """

    def __init__(self, settings: GatewaySettings, work: Work) -> None:
        self._settings = settings
        self._work = work
        # By number: where a worker answers HTTP, None while it does not.
        self._http: dict[int, str | None] = dict.fromkeys(range(settings.workers))
        # Whether one ever listened: what keeps the first from it would keep every other.
        self._listened = False
        self._failed = False
        self._registry = CollectorRegistry()
        self._registry.register(_Merged(self._http))
        self._metrics = WorkersMetrics(self._registry)

    def __repr__(self) -> str:
        return f"<Workers up={sum(map(bool, self._http.values()))}/{len(self._http)}>"

    async def run(self, stop: asyncio.Event) -> None:
        """Keep them running until `stop` is set, then have them drain.

        Raises:
            BindError: A port is taken or not allowed.
            WorkerError: They cannot start.
        """
        settings = self._settings
        with _reserved(settings.host, settings.port) as reserved:
            port = reserved.getsockname()[1]
            http_host = settings.http_host or settings.host
            http = HttpEndpoint(
                http_host,
                settings.http_port,
                self._registry,
                is_alive=lambda: self._all("/healthz"),
                is_ready=lambda: self._all("/readyz"),
            )
            http.start()
            grpc_address, http_address = f"{settings.host}:{port}", f"{http_host}:{http.port}"
            _log.info("listening", extra={"grpc": grpc_address, "http": http_address, "workers": settings.workers})
            own = settings.model_copy(
                update={
                    "workers": 1,
                    "port": port,
                    "http_host": "127.0.0.1",
                    "http_port": 0,
                    "ready_file": None,
                    "cache_memory_bytes": settings.cache_memory_bytes // settings.workers,
                    "max_inflight_inputs": math.ceil(settings.max_inflight_inputs / settings.workers),
                }
            )
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._announce(stop, grpc_address, http_address))
                    for number in self._http:
                        group.create_task(self._keep(number, own, stop))
            finally:
                await asyncio.to_thread(http.stop)
            if self._failed:
                raise WorkerError("no worker could start, the reason is above")

    async def _announce(self, stop: asyncio.Event, grpc_address: str, http_address: str) -> None:
        """Say once that all are ready."""
        while not stop.is_set():
            if await asyncio.to_thread(self._all, "/readyz"):
                _log.info("ready", extra={"grpc": grpc_address})
                write_ready_file(self._settings.ready_file, grpc=grpc_address, http=http_address)
                return
            await _until(stop, _POLL_SECONDS)

    async def _keep(self, number: int, settings: GatewaySettings, stop: asyncio.Event) -> None:
        """Run one worker, again and again until `stop`."""
        loop = asyncio.get_running_loop()
        pause = _FIRST_PAUSE
        while not stop.is_set():
            inlet, outlet = _spawn.Pipe(duplex=False)
            process = _spawn.Process(target=self._work, args=(settings, outlet), name=f"gateway-{number}", daemon=True)
            started = loop.time()
            await asyncio.to_thread(process.start)
            outlet.close()
            with closing(inlet):
                loop.add_reader(inlet.fileno(), self._on_address, number, inlet)
                await _ended_or(stop, process)
                loop.remove_reader(inlet.fileno())
            if stop.is_set():
                await self._stop(process)
            self._http[number] = None
            if stop.is_set():
                return
            if not self._listened:
                self._failed = True
                stop.set()
                return
            _log.error("a worker ended and is started again", extra={"worker": number, "status": process.exitcode})
            self._metrics.restarts.inc()
            pause = _FIRST_PAUSE if loop.time() - started > _YOUNG else min(2 * pause, _LONGEST_PAUSE)
            await _until(stop, pause)

    def _on_address(self, number: int, inlet: Connection) -> None:
        try:
            self._http[number] = inlet.recv()
            self._listened = True
        except (EOFError, OSError):  # it ended before, which is noticed elsewhere
            asyncio.get_running_loop().remove_reader(inlet.fileno())

    async def _stop(self, process: SpawnProcess) -> None:
        process.terminate()
        await asyncio.to_thread(process.join, self._settings.drain_seconds + _KILL_SECONDS)
        if process.exitcode is None:
            process.kill()
            await asyncio.to_thread(process.join)

    def _all(self, path: str) -> bool:
        """Whether every worker answers that it is well. Blocking."""
        return all(address is not None and _fetch(address, path) is not None for address in self._http.values())


class _Merged(Collector):
    """The metrics of all workers, each sample with the number of its worker."""

    def __init__(self, http: dict[int, str | None]) -> None:
        self._http = http
        # One that hangs must not add its time to that of the others.
        self._pool = ThreadPoolExecutor(len(http), thread_name_prefix="scrape")

    def collect(self) -> Iterator[Metric]:
        """Ask all workers."""
        families: dict[str, Metric] = {}
        asked = {
            number: self._pool.submit(_fetch, address, "/metrics") for number, address in self._http.items() if address
        }
        for number, answer in asked.items():
            for family in text_string_to_metric_families(answer.result() or ""):
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                merged.samples += [
                    sample._replace(labels={**sample.labels, "worker": str(number)}) for sample in family.samples
                ]
        yield from families.values()

    def describe(self) -> Iterator[Metric]:
        """Nothing is known before the first worker runs."""
        return iter(())


# Workers are asked on loopback, whatever http_proxy says.
_opener: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _fetch(address: str, path: str) -> str | None:
    """Give what a worker answers; None when it does not, or says that it is not well."""
    with suppress(OSError), _opener.open(f"http://{address}{path}", timeout=_SCRAPE_SECONDS) as answer:
        return str(answer.read().decode())
    return None


def _reserved(host: str, port: int) -> Any:
    """Take the port without listening on it, so that workers can share it and nobody else can.

    Raises:
        BindError: It is taken or not allowed.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]

    def bound(address: Any, *, shared: bool) -> socket.socket:
        own = socket.socket(family, socket.SOCK_STREAM)
        try:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
            own.bind(address)
        except OSError as error:
            own.close()
            raise BindError(taken(host, port, "--port")) from error
        return own

    # Alone first: others that share their port, too, would let us in.
    with bound(address, shared=False) as alone:
        address = alone.getsockname()
    return closing(bound(address, shared=True))


async def _until(stop: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stop.wait()


async def _ended_or(stop: asyncio.Event, process: SpawnProcess) -> None:
    """Wait until the process has ended or `stop` is set."""
    loop = asyncio.get_running_loop()
    ended = loop.create_task(stop.wait())
    loop.add_reader(process.sentinel, ended.cancel)
    try:
        await asyncio.wait({ended})
    finally:
        loop.remove_reader(process.sentinel)
        ended.cancel()
    if not stop.is_set():
        await asyncio.to_thread(process.join)
