from __future__ import annotations

import asyncio
import datetime as dt
import math
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from prometheus_client import CollectorRegistry

from embedmesh import vectors
from embedmesh.errors import DeadlineExceeded, EncoderUnreachable, InferenceFailed, InternalError, NotReady
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh.v1 import text_pb2
from embedmesh_gateway.upstream import Terms, Upstream
from embedmesh_server.files import Files, Followed
from embedmesh_server.metrics import FileMetrics, GatewayMetrics
from embedmesh_server.tls import Identity, TlsFiles, follow


@pytest.fixture
async def open_upstream() -> AsyncIterator[Callable[..., tuple[Upstream, CollectorRegistry]]]:
    opened: list[Upstream] = []

    def open_one(target: str, **options: Any) -> tuple[Upstream, CollectorRegistry]:
        registry = CollectorRegistry()
        values: dict[str, Any] = {"max_message_bytes": 8 << 20, "longest_call": 20.0}
        opened.append(Upstream("text", target, metrics=GatewayMetrics(registry), **(values | options)))
        return opened[-1], registry

    yield open_one
    for upstream in opened:
        await upstream.__aexit__()


async def embed(upstream: Upstream, *texts: str, seconds: float = 20.0) -> Any:
    return await upstream.embed(
        [text_pb2.TextInput(text=text) for text in texts],
        Terms("", (pb.EMBEDDING_KIND_DENSE,), pb.TRUNCATION_START, pb.PRIORITY_BULK),
        deadline=asyncio.get_running_loop().time() + seconds,
    )


async def test_a_call_carries_options_and_answers_in_order(open_upstream: Any, encoder: Any) -> None:
    upstream, registry = open_upstream(encoder.address)
    answers = await embed(upstream, "a", "[[bad]]", "b")
    (call,) = encoder.calls
    assert (call.truncation, call.priority) == (pb.TRUNCATION_START, pb.PRIORITY_BULK)
    assert not call.output.HasField("normalize")
    assert (call.output.dimensions, call.output.dtype) == (0, 0)
    assert [answer.result.HasField("embedding") for answer in answers] == [True, False, True]
    assert answers[0].model == encoder.info.model
    assert "x-request-id" in encoder.metadata[0]
    assert registry.get_sample_value("embedmesh_upstream_inputs_total", {"modality": "text"}) == 3
    assert registry.get_sample_value("embedmesh_upstream_requests_total", {"modality": "text", "code": "OK"}) == 1


async def test_a_passed_deadline_makes_no_call(open_upstream: Any, encoder: Any) -> None:
    upstream, _ = open_upstream(encoder.address)
    with pytest.raises(DeadlineExceeded):
        await embed(upstream, "a", seconds=-1)
    assert encoder.calls == []


async def test_without_a_deadline_a_call_still_ends(open_upstream: Any, encoder: Any) -> None:
    async def never(request: Any) -> None:
        await asyncio.Event().wait()

    encoder.before = never
    upstream, _ = open_upstream(encoder.address, longest_call=0.2)
    with pytest.raises(DeadlineExceeded):
        await embed(upstream, "a", seconds=math.inf)


async def test_an_error_of_the_encoder_is_passed_on(open_upstream: Any, encoder: Any) -> None:
    async def fail(request: Any) -> None:
        raise InferenceFailed("broken", metadata={"request_id": "7"})

    encoder.before = fail
    upstream, registry = open_upstream(encoder.address)
    with pytest.raises(InferenceFailed) as caught:
        await embed(upstream, "a")
    assert caught.value.metadata == {"request_id": "7"}
    assert registry.get_sample_value("embedmesh_upstream_requests_total", {"modality": "text", "code": "INTERNAL"}) == 1


async def test_nobody_there(open_upstream: Any) -> None:
    upstream, _ = open_upstream("ipv4:127.0.0.1:1")
    start = time.monotonic()
    with pytest.raises(EncoderUnreachable) as caught:
        await embed(upstream, "a")
    assert caught.value.retry_after
    assert time.monotonic() - start < 10
    with pytest.raises(EncoderUnreachable):
        await upstream.list_models(within=5)


async def test_someone_else_there(open_upstream: Any) -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    upstream, _ = open_upstream(f"127.0.0.1:{port}")
    with pytest.raises(InternalError, match="unexpected"):  # UNIMPLEMENTED says nothing to a caller of the mesh
        await embed(upstream, "a")
    await server.stop(None)


async def test_a_loading_replica_is_passed_over(open_upstream: Any, encoder: Any, make_encoder: Any) -> None:
    loading = make_encoder("text")

    async def refuse(request: Any) -> None:
        raise NotReady("loading", retry_after=0.01)

    loading.before = refuse
    await loading.start()
    upstream, _ = open_upstream(f"ipv4:{encoder.address},{loading.address}")
    for _ in range(20):
        assert len(await embed(upstream, "a")) == 1
    assert loading.calls
    assert len(encoder.calls) == 20
    await loading.stop()


async def test_large_requests_are_retried_too(open_upstream: Any, encoder: Any) -> None:
    """gRPC keeps 256 KiB for retries by default and silently gives up on larger calls."""
    attempts = 0

    async def refuse_once(request: Any) -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise NotReady("draining", retry_after=0.01)

    encoder.before = refuse_once
    upstream, _ = open_upstream(encoder.address)
    assert len(await embed(upstream, "x" * 3_000_000)) == 1
    assert attempts == 2


@pytest.mark.parametrize("grace", [None, 5.0], ids=["at once", "drained"])
async def test_a_replica_that_stops_under_load_fails_no_call(
    open_mesh: Any, make_encoder: Any, settle: Any, grace: float | None
) -> None:
    first, second = make_encoder("text"), make_encoder("text")
    done = 0

    async def busy(request: Any) -> None:
        await asyncio.sleep(0.002)

    first.before = second.before = busy
    async with open_mesh({"text": [first, second]}) as mesh:
        stop = asyncio.Event()

        async def call(number: int) -> None:
            nonlocal done
            serial = 0
            while not stop.is_set():
                serial += 1
                text = f"{number} {serial}"
                response = await mesh.embed([text])
                assert np.array_equal(vectors.decode(response.results[0].embedding.dense), mesh.expected(text))
                done += 1

        async with asyncio.TaskGroup() as group:
            for number in range(16):
                group.create_task(call(number))
            await settle(lambda: len(first.calls) > 50 and len(second.calls) > 50)
            await first.stop(grace)
            seen = done
            await settle(lambda: done > seen + 200)
            # It comes back, and gets its share again.
            first.calls.clear()
            await first.start(first.address)
            await settle(lambda: len(first.calls) > 50)
            stop.set()


async def test_the_repr_tells_the_state(open_upstream: Any) -> None:
    upstream, _ = open_upstream("ipv4:127.0.0.1:1")
    assert repr(upstream) == "<Upstream text ipv4:127.0.0.1:1 IDLE>"


# TLS.


@pytest.fixture
async def tls_encoder(make_encoder: Any, tmp_path: Path) -> AsyncIterator[tuple[Any, trustme.CA]]:
    """An encoder that speaks TLS as `encoder.internal`, and asks for certificates of the authority."""
    authority = trustme.CA()
    leaf = authority.issue_cert("encoder.internal")
    pair = (leaf.private_key_pem.bytes(), leaf.cert_chain_pems[0].bytes())
    encoder = make_encoder("text")
    trusted = authority.cert_pem.bytes()
    await encoder.start(credentials=grpc.ssl_server_credentials([pair], trusted, require_client_auth=True))
    yield encoder, authority
    await encoder.stop()


def identity_of(folder: Path, authority: trustme.CA, own: trustme.LeafCert | None) -> Followed[Identity]:
    (folder / "ca.crt").write_bytes(authority.cert_pem.bytes())
    if own is not None:
        (folder / "tls.crt").write_bytes(own.cert_chain_pems[0].bytes())
        (folder / "tls.key").write_bytes(own.private_key_pem.bytes())
    pair = (folder / "tls.crt", folder / "tls.key") if own else (None, None)
    paths = TlsFiles(pair[0], pair[1], folder / "ca.crt")
    return follow(Files(FileMetrics(CollectorRegistry())), "upstream_tls", paths)


async def test_an_encoder_by_mutual_tls(open_upstream: Any, tls_encoder: Any, tmp_path: Path) -> None:
    encoder, authority = tls_encoder
    own = authority.issue_cert("gateway.internal")
    upstream, _ = open_upstream(
        f"ipv4:{encoder.address}", tls=identity_of(tmp_path, authority, own), tls_name="encoder.internal"
    )
    assert len(await embed(upstream, "a")) == 1


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("plain", ""),
        ("authority", "CERTIFICATE_VERIFY_FAILED"),
        ("name", "Hostname Verification Check failed"),
        ("no certificate", ""),
        ("expired", ""),
        ("stranger", ""),
    ],
)
async def test_an_encoder_that_is_not_trusted_or_does_not_trust(
    *, open_upstream: Any, tls_encoder: Any, tmp_path: Path, wrong: str, why: str
) -> None:
    encoder, authority = tls_encoder
    past = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
    own = {
        "no certificate": None,
        "stranger": trustme.CA().issue_cert("gateway.internal"),
        "expired": authority.issue_cert("gateway.internal", not_before=past - dt.timedelta(days=1), not_after=past),
    }.get(wrong, authority.issue_cert("gateway.internal"))
    identity = identity_of(tmp_path, trustme.CA() if wrong == "authority" else authority, own)
    upstream, _ = open_upstream(
        f"ipv4:{encoder.address}",
        tls=None if wrong == "plain" else identity,
        tls_name="" if wrong == "name" else "encoder.internal",
    )
    with pytest.raises(EncoderUnreachable) as caught:
        await upstream.list_models(within=20)
    assert why in " ".join(caught.value.__notes__)
    assert encoder.calls == []


async def test_a_new_certificate_takes_over_without_a_failed_call(
    open_upstream: Any, tls_encoder: Any, tmp_path: Path
) -> None:
    encoder, authority = tls_encoder
    identity = identity_of(tmp_path, authority, authority.issue_cert("gateway.internal"))
    upstream, _ = open_upstream(f"ipv4:{encoder.address}", tls=identity, tls_name="encoder.internal")
    stop = asyncio.Event()
    calls = 0

    async def load() -> None:
        nonlocal calls
        while not stop.is_set():
            await embed(upstream, f"{calls}")
            calls += 1

    release = asyncio.Event()

    async def wait(request: Any) -> None:
        if request.inputs[0].text == "slow":
            await release.wait()

    encoder.before = wait
    slow = asyncio.create_task(embed(upstream, "slow"))
    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(load())
        for _ in range(3):
            before = upstream._channel
            identity_of(tmp_path, authority, authority.issue_cert("gateway.internal"))
            while upstream._channel is before:
                identity.look()
                await asyncio.sleep(0.01)
        stop.set()
    assert not slow.done()  # through the first channel, which lives as long as it is needed
    release.set()
    assert len(await slow) == 1
    assert calls > 10


async def test_a_new_certificate_that_no_encoder_takes_does_not_replace_one_that_works(
    open_upstream: Any, tls_encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, settle: Any
) -> None:
    monkeypatch.setattr("embedmesh_gateway.upstream._CONNECT_SECONDS", 0.2)
    encoder, authority = tls_encoder
    identity = identity_of(tmp_path, authority, authority.issue_cert("gateway.internal"))
    upstream, _ = open_upstream(f"ipv4:{encoder.address}", tls=identity, tls_name="encoder.internal")
    await embed(upstream, "a")
    identity_of(tmp_path, trustme.CA(), authority.issue_cert("gateway.internal"))
    identity.look()
    identity.look()
    await settle(lambda: "cannot be reached with the new certificate, the old one stays" in caplog.text)
    assert len(await embed(upstream, "b")) == 1
    identity_of(tmp_path, authority, authority.issue_cert("gateway.internal"))
    before = upstream._channel
    identity.look()
    identity.look()
    await settle(lambda: upstream._channel is not before)
    assert len(await embed(upstream, "c")) == 1
