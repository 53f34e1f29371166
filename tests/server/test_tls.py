"""A node that speaks TLS: whom it refuses, and how its certificates are renewed."""

import asyncio
import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from embedmesh.v1 import text_pb2, text_pb2_grpc
from embedmesh_server import files
from embedmesh_server.files import FileError
from embedmesh_server.settings import NodeSettings

Served = tuple[Any, Any]


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


def write(folder: Path, certificate: trustme.LeafCert) -> dict[str, Path]:
    """Write a certificate and its key, as settings name them."""
    folder.mkdir(exist_ok=True)
    (folder / "tls.crt").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    (folder / "tls.key").write_bytes(certificate.private_key_pem.bytes())
    return {"tls_cert": folder / "tls.crt", "tls_key": folder / "tls.key"}


def credentials(authority: trustme.CA, own: trustme.LeafCert | None = None) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        authority.cert_pem.bytes(),
        *((own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes()) if own else ()),
    )


async def call(address: str, given: grpc.ChannelCredentials | None) -> str:
    """Make one call on a connection of its own; gives the code, and what gRPC says when it fails."""
    target = address.replace("127.0.0.1", "localhost")
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = grpc.aio.secure_channel(target, given, options) if given else grpc.aio.insecure_channel(target, options)
    async with channel:
        stub: Any = text_pb2_grpc.TextEncoderStub(channel)
        try:
            await stub.EmbedText(text_pb2.EmbedTextRequest(), timeout=20)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
    return "OK"


async def test_who_is_let_in_by_a_certificate_alone(
    authority: trustme.CA, make_node: Callable[..., Served], tmp_path: Path
) -> None:
    node, _ = make_node(**write(tmp_path, authority.issue_cert("localhost")), drain_seconds=0)
    async with node:
        assert await call(node.grpc_address, credentials(authority)) == "OK"
        assert (await call(node.grpc_address, None)).startswith("UNAVAILABLE")
        unknown = await call(node.grpc_address, credentials(trustme.CA()))
        assert "CERTIFICATE_VERIFY_FAILED" in unknown


@pytest.mark.parametrize("wrong", ["name", "expired"])
async def test_a_client_refuses_a_server(
    authority: trustme.CA, make_node: Callable[..., Served], tmp_path: Path, wrong: str
) -> None:
    past = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
    leaf = (
        authority.issue_cert("elsewhere.example")
        if wrong == "name"
        else authority.issue_cert("localhost", not_after=past, not_before=past - dt.timedelta(days=1))
    )
    node, _ = make_node(**write(tmp_path, leaf), drain_seconds=0)
    async with node:
        said = await call(node.grpc_address, credentials(authority))
    assert said.startswith("UNAVAILABLE")
    assert {"name": "Hostname Verification Check failed", "expired": "certificate has expired"}[wrong] in said


async def test_mutual_tls(authority: trustme.CA, make_node: Callable[..., Served], tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(authority.cert_pem.bytes())
    past = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
    client = authority.issue_cert("client.example")
    expired = authority.issue_cert("client.example", not_after=past, not_before=past - dt.timedelta(days=1))
    stranger = trustme.CA().issue_cert("client.example")
    settings = write(tmp_path, authority.issue_cert("localhost")) | {"tls_client_ca": tmp_path / "ca.crt"}
    node, _ = make_node(**settings, drain_seconds=0)
    async with node:
        assert await call(node.grpc_address, credentials(authority, client)) == "OK"
        for own in (None, stranger, expired):
            assert (await call(node.grpc_address, credentials(authority, own))).startswith("UNAVAILABLE")
        # Health goes the same way; the HTTP probes stay plain.
        async with grpc.aio.secure_channel(
            node.grpc_address.replace("127.0.0.1", "localhost"), credentials(authority, client)
        ) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            assert (await stub.Check(health_pb2.HealthCheckRequest())).status
        host, _, port = node.http_address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert b"200 OK" in await reader.readline()
        writer.close()


async def test_certificates_are_renewed_under_load_without_a_failed_call(
    authority: trustme.CA, make_node: Callable[..., Served], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Certificate, key and the authorities of clients change four times, while connections are made all the time."""
    monkeypatch.setattr(files, "_LOOK_SECONDS", 0.05)
    bundle = tmp_path / "ca.crt"
    bundle.write_bytes(authority.cert_pem.bytes())
    settings = write(tmp_path, authority.issue_cert("localhost")) | {"tls_client_ca": bundle}
    node, _ = make_node(**settings, drain_seconds=0)
    done: list[str] = []
    async with node:
        stop = asyncio.Event()

        async def load() -> None:
            own = credentials(authority, authority.issue_cert("client.example"))
            while not stop.is_set():
                done.append(await call(node.grpc_address, own))

        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(load())
            for _ in range(4):
                other = trustme.CA()
                newcomer = credentials(authority, other.issue_cert("client.example"))
                assert (await call(node.grpc_address, newcomer)).startswith("UNAVAILABLE")
                write(tmp_path, authority.issue_cert("localhost"))
                bundle.write_bytes(authority.cert_pem.bytes() + other.cert_pem.bytes())
                while await call(node.grpc_address, newcomer) != "OK":
                    await asyncio.sleep(0.05)
            stop.set()
    assert set(done) == {"OK"}
    assert len(done) > 10


async def test_an_authority_that_is_taken_away_lets_nobody_in_any_more(
    authority: trustme.CA, make_node: Callable[..., Served], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_LOOK_SECONDS", 0.05)
    (tmp_path / "ca.crt").write_bytes(authority.cert_pem.bytes())
    settings = write(tmp_path, authority.issue_cert("localhost")) | {"tls_client_ca": tmp_path / "ca.crt"}
    own = credentials(authority, authority.issue_cert("client.example"))
    node, _ = make_node(**settings, drain_seconds=0)
    async with node:
        assert await call(node.grpc_address, own) == "OK"
        (tmp_path / "ca.crt").write_bytes(trustme.CA().cert_pem.bytes())
        while await call(node.grpc_address, own) == "OK":
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"tls_key": "other/tls.key"}, "is not the key of the certificate in"),
        ({"tls_key": "none"}, "none cannot be read: No such file or directory"),
        ({"tls_cert": "empty"}, "empty is empty"),
        ({"tls_key": "nonsense"}, "are not a certificate and its private key in PEM, unencrypted"),
        ({"tls_client_ca": "nonsense"}, "nonsense holds no certificates of authorities in PEM"),
        ({"tls_client_ca": "binary"}, "binary holds no certificates of authorities in PEM"),
        ({"tls_cert": "binary"}, "are not a certificate and its private key in PEM, unencrypted"),
        ({"tls_client_ca": "other"}, "cannot be read: Is a directory"),
    ],
)
async def test_files_that_cannot_be_used_are_named_and_not_shown(
    *, authority: trustme.CA, make_node: Callable[..., Served], tmp_path: Path, changed: dict[str, str], sentence: str
) -> None:
    good = write(tmp_path, authority.issue_cert("localhost"))
    write(tmp_path / "other", authority.issue_cert("localhost"))
    (tmp_path / "empty").touch()
    (tmp_path / "nonsense").write_text("secret words")
    (tmp_path / "binary").write_bytes(b"\x30\x82\xff\x00")
    node, _ = make_node(**(good | {name: tmp_path / path for name, path in changed.items()}))
    with pytest.raises(FileError, match=sentence) as caught:
        await node.start()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"tls_cert": "a"}, "--tls-cert and --tls-key go together"),
        ({"tls_key": "a"}, "--tls-cert and --tls-key go together"),
        ({"tls_client_ca": "a"}, "needs --tls-cert and --tls-key"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        NodeSettings(**given)
