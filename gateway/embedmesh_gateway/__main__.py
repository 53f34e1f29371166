"""`embedmesh-gateway`: reads the settings, builds the gateway, serves until told to stop."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from embedmesh_gateway.settings import GatewaySettings
from embedmesh_gateway.wiring import running, work
from embedmesh_gateway.workers import WorkerError, Workers
from embedmesh_server import logs
from embedmesh_server.files import FileError
from embedmesh_server.node import BindError, stop_on_signal
from embedmesh_server.settings import load
from embedmesh_server.tracing import TracingError

__all__ = ["main"]


async def _serve(settings: GatewaySettings) -> None:
    stop = stop_on_signal()
    if settings.workers > 1:
        await Workers(settings, work).run(stop)
        return
    async with running(settings, CollectorRegistry()) as node:
        await node.run(stop)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    settings = load(
        GatewaySettings,
        prog="embedmesh-gateway",
        section="gateway",
        env_prefix="EMBEDMESH_GATEWAY_",
        argv=argv,
    )
    logs.configure(settings.log_level, settings.log_format, "gateway")
    try:
        asyncio.run(_serve(settings))
    except (BindError, FileError, TracingError, WorkerError) as error:
        sys.stderr.write(f"embedmesh-gateway: {error}\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
