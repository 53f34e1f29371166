"""The life of one process: bind, answer probes, serve when warm, drain, stop."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Self, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, make_wsgi_app

from embedmesh_server import tls
from embedmesh_server.files import Files
from embedmesh_server.interceptor import Authenticate, Boundary
from embedmesh_server.metrics import FileMetrics, ServerMetrics
from embedmesh_server.settings import NodeSettings
from embedmesh_server.tracing import NO_TRACING, Tracing

__all__ = ["BindError", "HttpEndpoint", "Node", "stop_on_signal", "taken", "write_ready_file"]

_log = logging.getLogger(__name__)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
# A receiver of spans that is away holds up the end of a node for so long at most.
_SPANS_SECONDS = 5.0
# /healthz fails when the event loop has not run for this long: it is stuck, not merely busy.
_STUCK_SECONDS = 30.0


class BindError(OSError):
    """A port cannot be had; the text says which and what to do."""


def stop_on_signal() -> asyncio.Event:
    """Give an event of the running loop that SIGTERM and SIGINT set; a second signal ends the process at once.

    To be called before a node starts, whose log line and ports tell others that they may send a signal.
    """
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set():
            _log.warning("second signal, quitting at once")
            os._exit(128 + number)
        _log.info("draining", extra={"signal": signal.Signals(number).name})
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return stop


def write_ready_file(path: Path | None, *, grpc: str, http: str) -> None:
    """Tell whoever started this process where it answers, in one piece; without a path nobody wants to know."""
    if path is not None:
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps({"grpc": grpc, "http": http, "pid": os.getpid()}), encoding="utf-8")
        partial.replace(path)


class Node:
    """One serving process, or one of several that share a port.

    Add servicers to `server`, then `start()`; health is NOT_SERVING until `set_ready` was
    called for every service named in `services`. `run()` serves until an event, see `stop_on_signal`.

    Args:
        settings: What it was told.
        role: Its name in log and metrics.
        registry: Of its metrics.
        services: Names of the services that make it ready.
        authenticate: See `Boundary`.
        files: Files to follow while it serves, besides its certificate.
        tracing: Records calls; closed with the node.
    """

    def __init__(
        self,
        settings: NodeSettings,
        *,
        role: str,
        registry: CollectorRegistry,
        services: Sequence[str],
        share_port: bool = False,
        authenticate: Authenticate | None = None,
        files: Files | None = None,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self._settings = settings
        self._role = role
        self._registry = registry
        self._files = files or Files(FileMetrics(registry))
        self._tracing = tracing
        self._ready = dict.fromkeys(services, False)
        self._health = HealthServicer()
        self._http: HttpEndpoint | None = None
        self._last_beat = time.monotonic()
        self._has_process = False
        self._stopping = False
        self._tasks: set[asyncio.Future[None]] = set()
        self.grpc_address = ""
        self.http_address = ""
        size = settings.max_message_bytes
        age_ms = int(settings.max_connection_age_seconds * 1000)
        self.server = grpc.aio.server(
            interceptors=[Boundary(ServerMetrics(registry, role), authenticate, tracing)],
            options=[
                ("grpc.max_send_message_length", size),
                ("grpc.max_receive_message_length", size),
                # Clients resolve names again only when a connection ends: see gRPC proposal A9.
                ("grpc.max_connection_age_ms", age_ms),
                ("grpc.max_connection_age_grace_ms", int(settings.drain_seconds * 1000)),
                # Let clients ping every 10 s, also while idle, to notice a dead peer.
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                # Two processes on one port share its connections, unseen where they do not mean to.
                ("grpc.so_reuseport", int(share_port)),
            ],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        names = (*services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server, descriptor_pool.Default())  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        ready = sum(self._ready.values())
        return f"<Node {self._role} grpc={self.grpc_address or '-'} ready={ready}/{len(self._ready)}>"

    @property
    def is_ready(self) -> bool:
        """Whether every service is ready and the node is not draining."""
        return all(self._ready.values()) and not self._stopping

    async def start(self) -> None:
        """Bind both ports and answer probes.

        Raises:
            BindError: A port is taken or not allowed.
            FileError: Certificate, key or authorities cannot be used.
        """
        host, port = self._settings.host, self._settings.port
        http_host = self._settings.http_host or host
        for service in ("", *self._ready):
            await self._health.set(service, _NOT_SERVING)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        credentials = self._credentials()
        try:
            bound = (
                self.server.add_secure_port(address, credentials)
                if credentials
                else self.server.add_insecure_port(address)
            )
        except RuntimeError as error:
            raise BindError(taken(host, port, "--port")) from error
        self.grpc_address = f"{host}:{bound}"
        self._http = HttpEndpoint(
            http_host,
            self._settings.http_port,
            self._registry,
            is_alive=self._is_alive,
            is_ready=lambda: self.is_ready,
        )
        self.http_address = f"{http_host}:{self._http.port}"
        await self.server.start()
        self._http.start()
        self._spawn(self._beat())
        self._spawn(self._files.watch())
        _log.info(
            "listening",
            extra={"grpc": self.grpc_address, "http": self.http_address, "tls": credentials is not None},
        )

    def _credentials(self) -> grpc.ServerCredentials | None:
        settings = self._settings
        if settings.tls_cert is None:
            return None
        paths = tls.TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
        return tls.server_credentials(tls.follow(self._files, "tls", paths))

    def set_ready(self, service: str, ready: bool = True) -> None:
        """Say that one service can be called, or no longer can. The node is ready when all are."""
        before = self.is_ready
        self._ready[service] = ready
        for name in (service, ""):
            good = self.is_ready if name == "" else ready
            # Only takes an uncontended lock; once the node drains, later states are ignored.
            self._spawn(self._health.set(name, _SERVING if good else _NOT_SERVING))
        if self.is_ready and not before:
            if self._has_process and not gc.get_freeze_count():
                # What starting made stays. A full collection that looks at it again stops everything for 25 ms.
                gc.collect()
                gc.freeze()
            _log.info("ready", extra={"grpc": self.grpc_address})
            write_ready_file(self._settings.ready_file, grpc=self.grpc_address, http=self.http_address)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then drain; the process has no other work."""
        self._has_process = True
        await stop.wait()
        await self.stop()

    def _is_alive(self) -> bool:
        return time.monotonic() - self._last_beat < _STUCK_SECONDS

    async def _beat(self) -> None:
        while self._http is not None:
            self._last_beat = time.monotonic()
            await asyncio.sleep(_STUCK_SECONDS / 10)

    async def stop(self) -> None:
        """Say NOT_SERVING, refuse new calls, wait for those in flight up to the drain time."""
        self._stopping = True
        drained = time.monotonic() + self._settings.drain_seconds
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace=self._settings.drain_seconds)
        await self._tracing.close(min(max(drained - time.monotonic(), 0.0), _SPANS_SECONDS))
        for task in tuple(self._tasks):
            task.cancel()
        if self._http is not None:
            await asyncio.to_thread(self._http.stop)
            self._http = None
        _log.info("stopped")

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


def taken(host: str, port: int, flag: str) -> str:
    """Say what to do about a port that cannot be had."""
    return (
        f"cannot listen on {host}:{port}: the port is taken by another process, or not allowed. "
        f"Find it with `ss -ltnp 'sport = :{port}'`, or choose another with {flag} ({flag} 0 takes any free one)."
    )


class _QuietHandler(WSGIRequestHandler):
    timeout = 10  # seconds; a client that says nothing must not hold a thread

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (name given by the base class)
        _log.debug("http %s", format % args)


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        # HTTPServer's own looks the host's name up, which blocks for seconds where DNS is absent.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()


class HttpEndpoint:
    """/metrics, /healthz and /readyz on a thread of its own, so that they answer under load.

    Raises:
        BindError: The port is taken or not allowed.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        *,
        is_alive: Callable[[], bool],
        is_ready: Callable[[], bool],
    ) -> None:
        metrics = make_wsgi_app(registry)

        def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            path = environ.get("PATH_INFO")
            if path == "/metrics":
                return cast("Iterable[bytes]", metrics(environ, start_response))
            if path == "/healthz":
                good, text = is_alive(), "event loop"
            elif path == "/readyz":
                good, text = is_ready(), "services"
            else:
                start_response("404 Not Found", [("Content-Type", "text/plain")])
                return [b"try /metrics, /healthz or /readyz\n"]
            start_response("200 OK" if good else "503 Service Unavailable", [("Content-Type", "text/plain")])
            return [f"{'ok' if good else 'not ready'}: {text}\n".encode()]

        class Server(_ThreadingServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        try:
            self._server = make_server(host, port, app, Server, _QuietHandler)
        except OSError as error:
            raise BindError(taken(host, port, "--http-port")) from error
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
