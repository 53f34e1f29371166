"""Builds a gateway out of its parts and runs it, alone in its process or as one of several workers.

Apart from `__main__`, because a new process finds a function in a module by name, and that one has none.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from multiprocessing.connection import Connection

from prometheus_client import CollectorRegistry

from embedmesh.v1 import catalog_pb2, catalog_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from embedmesh_gateway.cache import VectorCache
from embedmesh_gateway.catalog import Catalog
from embedmesh_gateway.router import Router
from embedmesh_gateway.service import CatalogServicer, GatewayServicer
from embedmesh_gateway.settings import GatewaySettings
from embedmesh_gateway.tenants import Tenants, read_keys
from embedmesh_gateway.upstream import Upstream
from embedmesh_gateway.workers import stop_with_parent
from embedmesh_server import logs, tls, tracing
from embedmesh_server.files import FileError, Files, Followed
from embedmesh_server.metrics import FileMetrics, GatewayMetrics
from embedmesh_server.node import BindError, Node, stop_on_signal
from embedmesh_server.tracing import TracingError

__all__ = ["running", "work"]

_GATEWAY = gateway_pb2.DESCRIPTOR.services_by_name["Gateway"].full_name
_CATALOG = catalog_pb2.DESCRIPTOR.services_by_name["ModelCatalog"].full_name


@asynccontextmanager
async def running(
    settings: GatewaySettings, registry: CollectorRegistry, *, share_port: bool = False
) -> AsyncIterator[Node]:
    """Run a gateway; leaving drains it, then writes what the cache still holds back.

    It becomes ready with the first ready model, and stays so while encoders come and go: what is cached
    can be answered without them, and the rest gets an error that says which encoder is missing.

    Raises:
        BindError: A port is taken or not allowed.
        FileError: A file cannot be used.
        TracingError: Tracing is asked for and cannot be had.
    """
    metrics = GatewayMetrics(registry)
    spans = tracing.start(settings, "gateway")
    if spans.on:
        logs.stamp(spans.ids)
    files = Files(FileMetrics(registry))
    tenants: Tenants | None = None
    if settings.keys_file is not None:
        path = settings.keys_file
        tenants = Tenants(files.follow("keys", [path], lambda: read_keys(path)), metrics)
    upstream_tls: Followed[tls.Identity] | None = None
    if settings.upstream_tls_ca is not None:
        paths = tls.TlsFiles(settings.upstream_tls_cert, settings.upstream_tls_key, settings.upstream_tls_ca)
        upstream_tls = tls.follow(files, "upstream_tls", paths)
    async with AsyncExitStack() as stack:
        cache = await stack.enter_async_context(
            VectorCache(
                settings.redis_url,
                memory_bytes=settings.cache_memory_bytes,
                ttl=settings.cache_ttl_seconds,
                timeout=settings.cache_timeout_ms / 1000,
                breaker_failures=settings.cache_breaker_failures,
                breaker_pause=settings.cache_breaker_seconds,
                metrics=metrics,
            )
        )
        upstreams = {
            modality: await stack.enter_async_context(
                Upstream(
                    modality,
                    target,
                    max_message_bytes=settings.max_message_bytes,
                    longest_call=settings.default_timeout_seconds,
                    metrics=metrics,
                    tls=upstream_tls,
                    tls_name=settings.upstream_tls_name,
                    tracing=spans,
                )
            )
            for modality, target in settings.targets.items()
        }
        node = Node(
            settings,
            role="gateway",
            registry=registry,
            services=(_GATEWAY, _CATALOG),
            authenticate=tenants.authenticate if tenants else None,
            files=files,
            share_port=share_port,
            tracing=spans,
        )
        catalog = Catalog(
            upstreams,
            refresh_seconds=settings.catalog_refresh_seconds,
            metrics=metrics,
            on_ready=lambda: node.set_ready(_GATEWAY, True),
        )
        router = Router(
            catalog,
            upstreams,
            cache,
            metrics,
            max_inputs=settings.max_inputs,
            max_inflight_inputs=settings.max_inflight_inputs,
            max_message_bytes=settings.max_message_bytes,
            longest_hold=settings.hold_ms / 1000,
            tracing=spans,
        )
        gateway_pb2_grpc.add_GatewayServicer_to_server(
            GatewayServicer(
                router,
                default_timeout=settings.default_timeout_seconds,
                stream_window=settings.stream_window,
                caller=tenants.caller if tenants else lambda: None,
                tracing=spans,
            ),
            node.server,
        )
        catalog_pb2_grpc.add_ModelCatalogServicer_to_server(CatalogServicer(catalog), node.server)
        # Closed in the reverse order: the node drains while catalog, channels and cache still work.
        stack.push_async_callback(catalog.aclose)
        await stack.enter_async_context(node)
        node.set_ready(_CATALOG, True)
        catalog.start()
        yield node


def work(settings: GatewaySettings, listening: Connection) -> None:
    """Run one of several workers, in a process of its own."""

    async def serve() -> None:
        stop = stop_on_signal()
        stop_with_parent(stop)
        async with running(settings, CollectorRegistry(), share_port=True) as node:
            listening.send(node.http_address)
            await node.run(stop)

    logs.configure(settings.log_level, settings.log_format, "gateway")
    try:
        asyncio.run(serve())
    except (BindError, FileError, TracingError) as error:
        sys.exit(f"embedmesh-gateway: {error}")
