"""Where the mesh is and how to talk to it: what both clients need to open a channel."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import sys
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Final

import grpc
import grpc.aio

from embedmesh._plan import BACKOFF_FACTOR, BACKOFF_FIRST, BACKOFF_MOST

DEFAULT_ADDRESS: Final = "localhost:50050"
_DEFAULT_PORT: Final = 50050
_SCHEME = re.compile(r"^(dns|ipv4|ipv6|unix|unix-abstract|xds):")
# gRPC makes no more than five attempts at a call, whatever is asked for.
MOST_RETRIES: Final = 4


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """Give what carries the caller's trace on, where OpenTelemetry is in use; elsewhere nothing is imported."""
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry.propagate import inject  # noqa: PLC0415  (whoever traces has it)

    carrier: dict[str, str] = {}
    inject(carrier)
    return tuple((key.lower(), value) for key, value in carrier.items())


@dataclass(frozen=True, slots=True)
class Tls:
    """Files for a TLS connection, PEM.

    Attributes:
        root_certificates: Who may vouch for the server; None takes the roots that come with gRPC.
        certificate: The client's own certificate (mutual TLS), with its `key`.
        key: Private key of `certificate`.
    """

    root_certificates: str | PathLike[str] | None = None
    certificate: str | PathLike[str] | None = None
    key: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("mutual TLS needs both: certificate and key")

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files now; OSError where that fails."""

        def read(path: str | PathLike[str] | None) -> bytes | None:
            return None if path is None else Path(path).read_bytes()

        return grpc.ssl_channel_credentials(read(self.root_certificates), read(self.key), read(self.certificate))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One mesh, and the credentials for it.

    Attributes:
        target: Name for gRPC's resolver.
        credentials: None for a connection without TLS.
        metadata: Sent with every call.
        options: Of the channel.
    """

    target: str
    credentials: grpc.ChannelCredentials | None = field(repr=False)
    metadata: tuple[tuple[str, str], ...] = field(repr=False)
    options: tuple[tuple[str, str | int], ...] = field(repr=False)

    def open(self) -> grpc.Channel:
        """Make a channel; it connects with the first call."""
        if self.credentials is None:
            return grpc.insecure_channel(self.target, self.options)
        return grpc.secure_channel(self.target, self.credentials, self.options)

    def open_async(self) -> grpc.aio.Channel:
        """Make a channel of the running event loop; it connects with the first call."""
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.target, self.options)
        return grpc.aio.secure_channel(self.target, self.credentials, self.options)


def endpoint(
    address: str | None,
    *,
    tls: bool | Tls,
    token: str | None,
    allow_insecure_token: bool,
    retries: int,
    max_message_bytes: int,
) -> Endpoint:
    """Check what a client was given and put it into gRPC's terms.

    Raises:
        ValueError: Something that cannot work or must not be done; the sentence says what to change.
    """
    if not 0 <= retries <= MOST_RETRIES:
        raise ValueError(f"retries is {retries}; gRPC allows 0 to {MOST_RETRIES}")
    if max_message_bytes < 2**16:
        raise ValueError(f"max_message_bytes is {max_message_bytes}; give at least 65536")
    target = parse_address(address or os.environ.get("EMBEDMESH_ADDRESS") or DEFAULT_ADDRESS)
    loopback = is_loopback(target)
    if token is not None:
        if not token.isascii() or not token.isprintable() or not token:
            raise ValueError("the token must be printable ASCII, without a line end")
        if not tls and not loopback and not allow_insecure_token:
            raise ValueError(
                f"the token would travel to {target} in clear text; use tls=True, or allow_insecure_token=True "
                "where something else (a service mesh, a tunnel) encrypts the connection"
            )
    credentials = (Tls() if tls is True else tls).credentials() if tls else None
    return Endpoint(
        target=target,
        credentials=credentials,
        metadata=(("authorization", f"Bearer {token}"),) if token is not None else (),
        options=(
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.service_config", service_config(retries)),
            ("grpc.enable_retries", int(retries > 0)),
            # A call larger than this buffer (256 KiB by default) is not retried by gRPC.
            ("grpc.per_rpc_retry_buffer_size", max_message_bytes),
            # Finds a dead peer within 40 s; servers of embedmesh allow a ping each 10 s.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 1_000),
            ("grpc.max_reconnect_backoff_ms", 3_000),
            # A proxy from the environment is not meant for this machine.
            ("grpc.enable_http_proxy", int(not loopback)),
        ),
    )


def parse_address(address: str) -> str:
    """Give gRPC's target for "host", "host:port" or a target with a scheme ("ipv4:10.0.0.1:50050,10.0.0.2:50050").

    Plain names are resolved to all their addresses, between which calls are spread.

    Raises:
        ValueError: An address of another protocol.
    """
    if "://" in address and not _SCHEME.match(address):
        raise ValueError(f"{address!r} is no address of gRPC; give host:port, for example {DEFAULT_ADDRESS}")
    if _SCHEME.match(address):
        return address
    if address.count(":") > 1 and not address.startswith("["):
        address = f"[{address}]"  # an IPv6 address without a port
    if not re.search(r":\d+$", address.rpartition("]")[2]):
        address = f"{address}:{_DEFAULT_PORT}"
    return f"dns:///{address}"


def is_loopback(target: str) -> bool:
    """Whether every address of `target` is this machine, as far as can be told without asking anybody."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    hosts = _SCHEME.sub("", target).rpartition("/")[2].split(",")
    return all(_is_loopback_host(re.sub(r":\d+$", "", host).strip("[]")) for host in hosts)


def _is_loopback_host(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def service_config(retries: int) -> str:
    """Give gRPC's service config: spread calls over all addresses, retry what may pass.

    CANCELLED is how a grpc.aio server that begins to stop ends the calls that arrive in that
    moment; what the caller cancels is over and never retried. A server's `grpc-retry-pushback-ms`
    goes before the pauses named here. Streams are not listed: the clients resume them themselves.
    """
    config: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if retries:
        config["methodConfig"] = [
            {
                "name": [
                    {"service": "embedmesh.v1.Gateway", "method": "Embed"},
                    {"service": "embedmesh.v1.ModelCatalog"},
                ],
                "retryPolicy": {
                    "maxAttempts": retries + 1,
                    "initialBackoff": f"{BACKOFF_FIRST}s",
                    "maxBackoff": f"{BACKOFF_MOST}s",
                    "backoffMultiplier": BACKOFF_FACTOR,
                    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"],
                },
            }
        ]
        # The most that gRPC allows: no retry once 500 more attempts failed than succeeded.
        config["retryThrottling"] = {"maxTokens": 1000, "tokenRatio": 1}
    return json.dumps(config)
