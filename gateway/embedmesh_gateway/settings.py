"""What a gateway can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from embedmesh_gateway.redis_url import parse_redis_url, redacted
from embedmesh_server.settings import MIB, NodeSettings

__all__ = ["GatewaySettings"]


class _Secret(str):
    """A string whose repr, as shown in error messages about settings, hides the password."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(redacted(str(self)))


def _hide(value: object) -> object:
    return _Secret(value) if isinstance(value, str) else value


def _check_redis_url(url: str) -> str:
    if url:
        parse_redis_url(url)
    return url


class GatewaySettings(NodeSettings):
    """One address for text, image and audio embeddings, with a cache in front of the encoders."""

    port: int = Field(50050, ge=0, le=65535, description="Port of the gRPC service; 0 takes any free one.")
    http_port: int = Field(
        8080, ge=0, le=65535, description="Port of /metrics, /healthz and /readyz; 0 takes any free one."
    )

    text_target: str = Field(
        "", description="gRPC target of the text encoders, e.g. dns:///encoder-text:50051; empty: no text."
    )
    image_target: str = Field("", description="gRPC target of the image encoders; empty: no images.")
    audio_target: str = Field("", description="gRPC target of the audio encoders; empty: no audio.")
    upstream_tls_ca: Path | None = Field(
        None, description="Authorities of the encoders' certificates, PEM; with it encoders are called by TLS only."
    )
    upstream_tls_cert: Path | None = Field(
        None, description="Certificate to show to encoders, PEM, where they ask for one (their --tls-client-ca)."
    )
    upstream_tls_key: Path | None = Field(None, description="Private key of --upstream-tls-cert, PEM, unencrypted.")
    upstream_tls_name: str = Field(
        "", description="Name in the encoders' certificates, where it is not the host of the target."
    )
    keys_file: Path | None = Field(
        None, description="TOML file of who may call, hashes of their keys and quotas; without it everybody may."
    )
    catalog_refresh_seconds: float = Field(10.0, gt=0, description="How often encoders are asked for their models.")

    # repr=False: the URL may hold a password.
    redis_url: Annotated[str, AfterValidator(_check_redis_url), BeforeValidator(_hide)] = Field(
        "",
        repr=False,
        description="Redis-compatible cache: redis://, rediss:// or unix:// of a server, redis+sentinel://A,B/MASTER, "
        "redis+cluster://A,B (rediss+... with TLS); empty: memory only.",
    )
    cache_ttl_seconds: float = Field(7 * 86400.0, ge=1, description="How long Redis keeps a vector.")
    cache_memory_bytes: int = Field(64 * MIB, ge=0, description="Size of the in-process cache; 0 turns it off.")
    cache_timeout_ms: float = Field(50.0, gt=0, description="The longest a request waits for Redis.")
    cache_breaker_failures: int = Field(
        5, ge=1, description="After this many failures in a row Redis is left alone for a while."
    )
    cache_breaker_seconds: float = Field(1.0, gt=0, description="How long Redis is left alone before one new try.")

    max_inputs: int = Field(1024, ge=1, description="Most inputs in one request.")
    max_inflight_inputs: int = Field(
        8192, ge=1, description="Most inputs being served at a time; more are refused. Bulk work may take half."
    )
    hold_ms: float = Field(
        5.0,
        ge=0,
        description="The longest that a call of few inputs is held, so that others share its call to an encoder: an "
        "eighth of what it would wait there anyway, and not at all where it would not. 0 sends each by itself.",
    )
    stream_window: int = Field(4, ge=1, description="Chunks of one EmbedStream being served at a time.")
    workers: int = Field(
        1, ge=1, le=256, description="Processes that share the port, each with its part of cache and in-flight inputs."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not (self.text_target or self.image_target or self.audio_target):
            raise ValueError("nothing to serve: give --text-target, --image-target or --audio-target")
        if (self.upstream_tls_cert is None) != (self.upstream_tls_key is None):
            raise ValueError("--upstream-tls-cert and --upstream-tls-key go together: give both, or none")
        if self.upstream_tls_ca is None and (self.upstream_tls_cert is not None or self.upstream_tls_name):
            raise ValueError("TLS to the encoders needs --upstream-tls-ca: the authorities of their certificates")
        return self

    @property
    def targets(self) -> dict[str, str]:
        """The gRPC target of each modality that is offered."""
        given = {"text": self.text_target, "image": self.image_target, "audio": self.audio_target}
        return {modality: target for modality, target in given.items() if target}
