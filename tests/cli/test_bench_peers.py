"""Other servers: how they are described, installed, asked and read."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from embedmesh_cli.bench.load import Closed, Generator, Load
from embedmesh_cli.bench.material import json_requests
from embedmesh_cli.bench.measure import NOBODY, Measured
from embedmesh_cli.bench.peers import environment, read_specs
from embedmesh_cli.console import UserError

PEERS = Path(__file__).parents[1] / "bench" / "peers"
TINY = "[tiny]\nabout = ''\nrequirements = 'none.txt'\ncommand = []\nhealth = ''\npath = ''\nbody = {}\n"


def test_the_peers_of_this_project_are_whole() -> None:
    specs = read_specs(PEERS)
    assert [spec.name for spec in specs] == ["infinity", "sentence-transformers", "triton"]
    for spec in specs:
        pins = [line for line in spec.requirements.read_text().splitlines() if not line.startswith("#")]
        assert all("==" in pin for pin in pins)
        assert any("{port}" in word for word in spec.command)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot read peers.toml: No such file"),
        ("[a", "is not as it should be"),
        ("[a]\nabout = 'x'", "is not as it should be: 'requirements'"),
        ("[a]\nrequirements = 'x'\nport = 3", "is not as it should be: .*port"),
        (f"{TINY}wire = 'morse'\n", "wire is one of openai, kserve, not morse"),
    ],
)
def test_mistakes_in_the_description(tmp_path: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "peers.toml").write_text(content)
    with pytest.raises(UserError, match=sentence):
        read_specs(tmp_path)


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDMESH_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "none.txt").write_text("# nothing\n")
    (tmp_path / "peers.toml").write_text(TINY)
    (spec,) = read_specs(tmp_path)
    said: list[str] = []
    folder = environment(spec, said.append)
    assert (folder / "bin" / "python").exists()
    assert environment(spec, said.append) == folder
    assert len(said) == 1
    (tmp_path / "none.txt").write_text("embedmesh-has-no-such-package==1\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"tiny could not be installed from .*none.txt: .*No matching distribution"):
        environment(spec, said.append)


@asynccontextmanager
async def server(*, chunked: bool) -> AsyncIterator[str]:
    """Answers every third request with 429, the others with two floats for each text."""
    calls = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        while head := await reader.readline():
            assert head == b"POST /embed HTTP/1.1\r\n"
            fields = dict(
                line.decode().strip().split(": ")
                for line in (await reader.readuntil(b"\r\n\r\n")).splitlines(keepends=True)[:-1]
            )
            texts = json.loads(await reader.readexactly(int(fields["Content-Length"])))["texts"]
            calls += 1
            status = "429 Too Many" if calls % 3 == 0 else "200 OK"
            rows = [{"object": "embedding", "index": i, "embedding": [1.0, 2.0]} for i in range(len(texts))]
            body = json.dumps({"data": rows}).encode()
            if chunked:
                pieces = [body[i : i + 50] for i in range(0, len(body), 50)]
                coded = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
                writer.write(f"HTTP/1.1 {status}\r\ntransfer-encoding: chunked\r\n\r\n".encode() + coded)
            else:
                writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        host, port = listening.sockets[0].getsockname()
        yield f"{host}:{port}"


@pytest.mark.parametrize("chunked", [True, False])
async def test_calls_over_http(chunked: bool) -> None:
    payloads = json_requests([f"text {i}" for i in range(6)], 3, {"model": "m"}, "texts")
    async with server(chunked=chunked) as address, Generator() as generator:
        load = Load(
            wire="http",
            address=address,
            payloads=payloads,
            pace=Closed(2),
            seconds=0.5,
            warm_seconds=0.1,
            path="/embed",
            units=[30, 60],
        )
        (calls,), seen = await generator.run([load], NOBODY.over)
        again, _ = await generator.run([load, load], NOBODY.over)
    measured = Measured.of(calls, seen)
    assert set(measured.codes) == {"RESOURCE_EXHAUSTED"}
    assert len(measured.latency) > 3
    assert measured.vectors == pytest.approx(3 * measured.answered)
    assert 30 <= measured.units / measured.answered <= 60
    assert set(np.unique(calls.vectors)) == {0, 3}
    assert [set(each.codes) for each in again] == [{"OK", "RESOURCE_EXHAUSTED"}] * 2


async def test_vectors_of_the_kserve_protocol_are_counted() -> None:
    header = b'{"model_name":"m","outputs":[{"name":"embedding","datatype":"FP32","shape":[3,2]}]}'

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = header + np.zeros((3, 2), "<f4").tobytes()
        while line := await reader.readline():
            if line == b"\r\n":  # the end of the head; what is posted is "{}"
                await reader.readexactly(2)
                writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening, Generator() as generator:
        address = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        pace = Closed(1)
        load = Load(wire="http", address=address, payloads=[b"{}"], pace=pace, seconds=0.2, warm_seconds=0, path="/")
        (calls,), _ = await generator.run([load], NOBODY.over)
        assert set(np.unique(calls.vectors)) <= {0, 3}
        assert calls.vectors.sum() > 0


async def test_nobody_answers_over_http() -> None:
    load = Load(wire="http", address="127.0.0.1:1", payloads=[b"{}"], pace=Closed(1), seconds=0.1, warm_seconds=0)
    async with Generator() as generator:
        (calls,), _ = await generator.run([load], NOBODY.over)
        assert set(calls.codes) == {"UNAVAILABLE"}
