"""A whole mesh of real processes with TLS on every hop and keys: who gets in, what leaks, how it is renewed."""

import asyncio
import base64
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from embedmesh import AsyncClient, EmbedMeshError, Tls, Unauthenticated
from embedmesh.v1 import text_pb2, text_pb2_grpc
from embedmesh_cli.mesh import Mesh

TOKEN = base64.b64encode(hashlib.sha256(b"the caller's").digest()).decode()
SHA256 = hashlib.sha256(TOKEN.encode()).hexdigest()


class Pki:
    """The files of gateway, encoders and client, whose certificates come from one or several authorities."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secrets: set[str] = set()
        self.trust([trustme.CA()])
        self.issue(self.authorities[0])
        (folder / "keys.toml").write_text(f'[keys.ann]\nsha256 = ["{SHA256}"]\n')

    def trust(self, authorities: Sequence[trustme.CA]) -> None:
        self.authorities = list(authorities)
        self._write("ca.crt", b"".join(each.cert_pem.bytes() for each in authorities))

    def issue(self, authority: trustme.CA) -> None:
        hosts = {
            "gateway": ("localhost", "127.0.0.1"),
            "encoder": ("encoder.internal",),
            "client": ("client.internal",),
        }
        for name, names in hosts.items():
            leaf = authority.issue_cert(*names)
            self._write(f"{name}.crt", leaf.cert_chain_pems[0].bytes())
            self._write(f"{name}.key", leaf.private_key_pem.bytes())
            self.secrets.add(leaf.private_key_pem.bytes().decode().splitlines()[1])

    def _write(self, name: str, content: bytes) -> None:
        partial = self.folder / f".{name}"
        partial.write_bytes(content)
        partial.replace(self.folder / name)

    @property
    def client(self) -> Tls:
        return Tls(self.folder / "ca.crt", self.folder / "client.crt", self.folder / "client.key")

    def options(self, **more: Any) -> dict[str, Any]:
        """What a mesh with all of it is started with."""
        at = self.folder
        return {
            "gateway": {
                "tls_cert": at / "gateway.crt",
                "tls_key": at / "gateway.key",
                "tls_client_ca": at / "ca.crt",
                "upstream_tls_ca": at / "ca.crt",
                "upstream_tls_cert": at / "gateway.crt",
                "upstream_tls_key": at / "gateway.key",
                "upstream_tls_name": "encoder.internal",
                "keys_file": at / "keys.toml",
                "log_level": "debug",
                **more,
            },
            "text": {
                "tls_cert": at / "encoder.crt",
                "tls_key": at / "encoder.key",
                "tls_client_ca": at / "ca.crt",
                "log_level": "debug",
                **more,
            },
        }


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


def address(mesh: Mesh) -> str:
    return mesh.address.replace("127.0.0.1", "localhost")


async def refused(client: AsyncClient) -> EmbedMeshError:
    async with client:
        with pytest.raises(EmbedMeshError) as caught:
            await client.embed(["a"], timeout=20)
    return caught.value


async def test_only_whoever_may_gets_in_and_nothing_leaks(
    pki: Pki, start_mesh: Any, tmp_path: Path, scrape: Any
) -> None:
    logs = tmp_path / "logs"
    async with start_mesh(**pki.options(), log_dir=logs) as mesh:
        at = address(mesh)
        async with AsyncClient(at, tls=pki.client, token=TOKEN) as client:
            assert len((await client.embed(["a", "b"])).vectors) == 2
            assert [result.index async for result in client.embed_stream(["c", "d"])] == [0, 1]
            assert [info.name for info in await client.list_models()]
        stranger = trustme.CA()
        (tmp_path / "stranger.crt").write_bytes(stranger.cert_pem.bytes())
        for tls in (
            False,
            Tls(pki.folder / "ca.crt"),
            Tls(tmp_path / "stranger.crt", pki.client.certificate, pki.client.key),
        ):
            error = await refused(AsyncClient(at, tls=tls, token=TOKEN, retries=0))
            assert error.code is grpc.StatusCode.UNAVAILABLE
        for token in (None, TOKEN[:-2], SHA256):
            assert isinstance(await refused(AsyncClient(at, tls=pki.client, token=token)), Unauthenticated)

        # Nobody calls an encoder past the gateway.
        encoder = mesh.role("text").grpc
        async with grpc.aio.insecure_channel(encoder) as channel:
            stub: Any = text_pb2_grpc.TextEncoderStub(channel)
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.EmbedText(text_pb2.EmbedTextRequest(), timeout=10)

        pages = [str(await scrape(role.http)) for role in mesh.roles if role.http]
        commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in mesh.pids.values()]
    shown = "".join(pages + commands + [path.read_text() for path in logs.iterdir()])
    assert '"key": "ann"' in shown
    for secret in (TOKEN, TOKEN[:-2], SHA256, *pki.secrets):
        assert secret not in shown


async def test_everything_is_renewed_under_load_without_a_failed_call(
    pki: Pki, start_mesh: Any, scrape: Any, total: Any
) -> None:
    """From one authority to another: both are trusted, certificates are issued anew, the old one is forgotten."""
    old, new = pki.authorities[0], trustme.CA()
    pki.trust([old, new])
    async with start_mesh(**pki.options(max_connection_age_seconds=1), replicas={"text": 2}) as mesh:
        nodes = [role.http for role in mesh.roles if role.http]

        async def reloads() -> list[float]:
            pages = [await scrape(each) for each in nodes]
            assert not sum(total(page, "embedmesh_file_stale") for page in pages)
            return [total(page, "embedmesh_file_reloads_total", outcome="ok") for page in pages]

        async def taken(before: list[float]) -> None:
            # The gateway follows two sets of files, encoders one.
            wanted = [
                count + (2 if http == mesh.http_address else 1) for http, count in zip(nodes, before, strict=True)
            ]
            give_up = time.monotonic() + 30
            while any(count < want for count, want in zip(await reloads(), wanted, strict=True)):
                assert time.monotonic() < give_up
                await asyncio.sleep(0.1)

        stop = asyncio.Event()
        calls = 0

        async def load(number: int) -> None:
            nonlocal calls
            while not stop.is_set():
                # As a caller with files of its own would: it reads them now and then.
                async with AsyncClient(address(mesh), tls=pki.client, token=TOKEN) as client:
                    for call in range(20):
                        await client.embed([f"{number} {call} {calls}"], timeout=20)
                        calls += 1

        async with asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(load(number))
            before = await reloads()
            pki.issue(new)
            await taken(before)
            before = await reloads()
            pki.trust([new])
            await taken(before)
            # Connections made before are gone by then: all goes by the new authority alone.
            await asyncio.sleep(2.5)
            stop.set()
        # The channel to the encoders is one of the new certificate's.
        async with AsyncClient(address(mesh), tls=pki.client, token=TOKEN) as client:
            assert (await client.embed(["the last one"])).vectors.shape == (1, 16)
        assert calls > 50


def test_the_command_talks_to_it(pki: Pki, fake_model: Path, tmp_path: Path) -> None:
    """`embedmesh up` with a config, and `embed` and `models list` by the variables that all three read."""
    tables = []
    for name, options in pki.options().items():
        tables += [f"[{name}]", *(f"{key} = {json.dumps(str(value))}" for key, value in options.items())]
    tables += ["[up]", "port = 0", "http_port = 0", 'redis = "none"', 'without = ["image", "audio"]']
    tables += [f"text_model = [{json.dumps(str(fake_model))}]", f'log_dir = "{tmp_path / "logs"}"']
    config = tmp_path / "mesh.toml"
    config.write_text("\n".join(tables))
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN + "\n")
    environ = {
        **os.environ,
        "EMBEDMESH_TLS_CA": str(pki.folder / "ca.crt"),
        "EMBEDMESH_TLS_CERT": str(pki.folder / "client.crt"),
        "EMBEDMESH_TLS_KEY": str(pki.folder / "client.key"),
        "EMBEDMESH_TOKEN_FILE": str(token_file),
    }

    def run(*words: str, **changed: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "embedmesh_cli", *words]
        return subprocess.run(command, env=environ | changed, capture_output=True, text=True, timeout=60, check=False)

    command = [sys.executable, "-m", "embedmesh_cli", "up", "--config", str(config)]
    up = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert up.stdout
        said = ""
        while "models list --address " not in said:
            line = up.stdout.readline()
            assert line, said
            said += line
        assert "gateway   serves " in said
        at = said.rpartition("models list --address ")[2].split()[0]
        done = run("embed", "--address", at, "hello")
        assert (done.returncode, done.stderr) == (0, "")
        assert len(json.loads(done.stdout)["vector"]) == 16
        assert "ready" in run("models", "list", "--address", at).stdout
        for changed, status, sentence in (
            ({"EMBEDMESH_TOKEN_FILE": ""}, 1, "the call brings no key"),
            ({"EMBEDMESH_TLS_CA": ""}, 3, "there is no trust by TLS"),
            ({"EMBEDMESH_TLS_CA": str(tmp_path / "none")}, 2, "none: No such file"),
            ({"EMBEDMESH_TLS_KEY": ""}, 2, "mutual TLS needs both"),
        ):
            done = run("embed", "--address", at, "hello", **changed)
            assert (done.returncode, sentence in done.stderr) == (status, True), done.stderr
            assert TOKEN not in done.stderr
        assert TOKEN not in said
    finally:
        up.terminate()
        up.communicate(timeout=60)
