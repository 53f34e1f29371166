"""Keys and quotas, at a gateway that serves."""

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.errors import EmbedMeshError, QuotaExceeded, Unauthenticated, from_rpc_error, from_status
from embedmesh.v1 import catalog_pb2, gateway_pb2
from embedmesh_gateway.tenants import Bucket, read_keys
from embedmesh_server import files
from embedmesh_server.files import FileError

KEYS_A = f'[keys.a]\nsha256 = "{"a" * 64}"'
ANN, BOB, OLD = "ann-Vm9sa3N3YWdlbg", "bob-S2FydG9mZmVs", "old-QmxhdWJlZXJl"
Settle = Callable[[Callable[[], Any]], Awaitable[None]]


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    write(path)
    return path


def write(path: Path, quotas: str = "", *, ann: tuple[str, ...] = (ANN, OLD), bob: str = BOB) -> None:
    hashes = ", ".join(f'"{sha256(token)}"' for token in ann)
    path.write_text(f'[keys.ann]\nsha256 = [{hashes}]\n{quotas}\n[keys.bob]\nsha256 = "{sha256(bob)}"\n')


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LOOK_SECONDS", 0.02)


async def embed(mesh: Any, token: str | None, inputs: Any = ("a",), **metadata: Any) -> Any:
    """Give the response, or the error."""
    given = bearer(token) if token is not None else ()
    try:
        return await mesh.gateway.Embed(mesh.request(inputs), metadata=given, timeout=20)
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)


async def test_keys_let_in_and_everything_else_is_refused(open_mesh: Any, keys_file: Path) -> None:
    async with open_mesh(keys_file=keys_file) as mesh:
        for token in (ANN, BOB, OLD):
            assert (await embed(mesh, token)).results
        for token in ("", "nobody", ANN.upper(), ANN[:-1], f"{ANN} ", sha256(ANN), "x" * 4000):
            error = await embed(mesh, token)
            assert (type(error), error.retryable, error.retry_after) == (Unauthenticated, False, None)
            assert not token or token not in error.message
        for metadata in ((), (("authorization", ANN),), (("authorization", f"Basic {ANN}"),)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await mesh.catalog.ListModels(catalog_pb2.ListModelsRequest(), metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert "authorization: Bearer KEY" in str(caught.value.details())
        # The scheme's name is written as one likes.
        request = catalog_pb2.ListModelsRequest()
        assert await mesh.catalog.ListModels(request, metadata=(("authorization", f"bearer {BOB}"),))
        health: Any = health_pb2_grpc.HealthStub(mesh.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status
        assert len(mesh.text.calls) == 1  # whoever is refused costs no encoder anything; the others shared a vector
        assert mesh.metric("embedmesh_key_inputs_total", key="ann", outcome="admitted") == 2
        assert mesh.metric("embedmesh_key_inputs_total", key="bob", outcome="admitted") == 1


async def test_a_key_is_revoked_by_the_file_also_for_streams_that_run(
    open_mesh: Any, keys_file: Path, settle: Settle
) -> None:
    async with open_mesh(keys_file=keys_file) as mesh:
        stream = mesh.gateway.EmbedStream(metadata=bearer(OLD))
        message = gateway_pb2.EmbedStreamRequest(sequence=1, request=mesh.request(["a"]))
        await stream.write(message)
        assert (await stream.read()).response.results
        write(keys_file, ann=(ANN,))
        await settle(lambda: mesh.metric("embedmesh_file_reloads_total", file="keys", outcome="ok"))
        assert isinstance(await embed(mesh, OLD), Unauthenticated)
        assert (await embed(mesh, ANN)).results  # of the same name
        await stream.write(message)
        error = from_status((await stream.read()).error)
        assert (type(error), error.message) == (Unauthenticated, "the key was revoked")
        stream.cancel()


async def test_a_name_that_is_gone_leaves_the_metrics(open_mesh: Any, keys_file: Path, settle: Settle) -> None:
    async with open_mesh(keys_file=keys_file) as mesh:
        assert (await embed(mesh, BOB)).results
        keys_file.write_text(f'[keys.eve]\nsha256 = "{sha256(ANN)}"\n')
        await settle(lambda: mesh.metric("embedmesh_file_reloads_total", file="keys", outcome="ok"))
        assert isinstance(await embed(mesh, BOB), Unauthenticated)
        assert (await embed(mesh, ANN)).results
        names = {
            sample.labels["key"]
            for metric in mesh.registry.collect()
            for sample in metric.samples
            if "key" in sample.labels
        }
        assert names == {"eve"}


async def test_a_spoilt_file_locks_nobody_out(
    open_mesh: Any, keys_file: Path, settle: Settle, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_mesh(keys_file=keys_file) as mesh:
        failures = 0

        def failed() -> bool:
            return bool(mesh.metric("embedmesh_file_reloads_total", file="keys", outcome="failed") > failures)

        for spoilt in ("", "[keys.ann\n", f'[keys.ann]\nsha256 = "{ANN}"\n'):
            keys_file.write_text(spoilt)
            await settle(failed)
            failures += 1
            assert mesh.metric("embedmesh_file_stale", file="keys") == 1
            assert (await embed(mesh, ANN)).results
        write(keys_file)
        await settle(lambda: not mesh.metric("embedmesh_file_stale", file="keys"))
    assert "what was read before stays in use" in caplog.text
    assert ANN not in caplog.text


async def test_no_secret_is_logged_or_shown(open_mesh: Any, keys_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with open_mesh(keys_file=keys_file) as mesh:
        await embed(mesh, ANN)
        await embed(mesh, "wrong-R2VoZWlt")
        shown = caplog.text + "".join(str(metric) for metric in mesh.registry.collect()) + repr(mesh.node)
    lines = [record.__dict__ for record in caplog.records if record.getMessage() == "call"]
    assert [line.get("key") for line in lines if line["method"].endswith("/Embed")] == ["ann", None]
    for secret in (ANN, "R2VoZWlt", sha256(ANN)):
        assert secret not in shown
        assert not any(secret in str(line) for line in lines)


@pytest.mark.parametrize("quota", ["inputs_per_second", "requests_per_second"])
async def test_a_rate_holds_within_five_per_cent(open_mesh: Any, keys_file: Path, quota: str) -> None:
    """Callers who never wait take what the bucket gives: not more, nor less. A slow machine changes neither."""
    rate, burst = 200, 400
    size, calls = (10, 4) if quota == "inputs_per_second" else (1, 4)
    write(keys_file, f"{quota} = {rate}\nburst_{quota.partition('_')[0]} = {burst}")
    async with open_mesh(keys_file=keys_file) as mesh:
        start = time.monotonic()
        admitted, ended = 0, start
        refusals: list[EmbedMeshError] = []

        async def hammer() -> None:
            nonlocal admitted, ended
            while time.monotonic() < start + 3:
                answer = await embed(mesh, ANN, ["a"] * size)
                if isinstance(answer, EmbedMeshError):
                    refusals.append(answer)
                else:
                    admitted, ended = admitted + size, time.monotonic()

        await asyncio.gather(*(hammer() for _ in range(calls)))
        most = burst + rate * (ended - start)
        assert 0.95 * most <= admitted <= 1.0 * most + size
        assert {type(refusal) for refusal in refusals} == {QuotaExceeded}
        refusal = refusals[0]
        assert refusal.retryable
        assert refusal.retry_after is not None
        assert 0 < refusal.retry_after <= size / rate + 0.002
        assert refusal.metadata == {"quota": quota, "limit": str(rate)}
        assert "key ann" in refusal.message
        # Another name's callers have quotas of their own, here none.
        assert (await embed(mesh, BOB, ["a"] * 500)).results
        assert mesh.metric("embedmesh_key_inputs_total", key="ann", outcome="admitted") == admitted
        assert mesh.metric("embedmesh_key_inputs_total", key="ann", outcome=quota) == size * len(refusals)


async def test_whoever_comes_back_when_told_is_let_in(open_mesh: Any, keys_file: Path) -> None:
    write(keys_file, "inputs_per_second = 50\nburst_inputs = 5")
    async with open_mesh(keys_file=keys_file) as mesh:
        for _ in range(3):
            while not isinstance(refusal := await embed(mesh, ANN, ["a"] * 5), QuotaExceeded):
                pass
            assert refusal.retry_after
            await asyncio.sleep(refusal.retry_after)
            assert (await embed(mesh, ANN, ["a"] * 5)).results


async def test_a_stream_waits_for_its_quota_and_loses_nothing(open_mesh: Any, keys_file: Path) -> None:
    write(keys_file, "inputs_per_second = 100\nburst_inputs = 10")
    async with open_mesh(keys_file=keys_file) as mesh:
        start = time.monotonic()
        messages = [
            gateway_pb2.EmbedStreamRequest(sequence=number, request=mesh.request([f"{number}-{i}" for i in range(10)]))
            for number in range(6)
        ]
        answers = [each async for each in mesh.gateway.EmbedStream(iter(messages), metadata=bearer(ANN), timeout=20)]
        assert sorted(answer.sequence for answer in answers) == list(range(6))
        assert all(len(answer.response.results) == 10 for answer in answers)
        assert time.monotonic() - start >= (60 - 10) / 100
        # One that cannot be served in the time left is told so instead.
        (late,) = [
            each
            async for each in mesh.gateway.EmbedStream(
                iter([gateway_pb2.EmbedStreamRequest(sequence=1, request=mesh.request(["a"] * 200))]),
                metadata=bearer(ANN),
                timeout=0.05,
            )
        ]
        assert isinstance(from_status(late.error), QuotaExceeded)


async def test_inputs_in_flight_are_bounded_by_name(open_mesh: Any, keys_file: Path, settle: Settle) -> None:
    write(keys_file, "inflight_inputs = 10")
    async with open_mesh(keys_file=keys_file) as mesh:
        release = asyncio.Event()

        async def wait(_: Any) -> None:
            await release.wait()

        mesh.text.before = wait
        first = asyncio.create_task(embed(mesh, ANN, [f"a{i}" for i in range(8)]))
        await settle(lambda: mesh.metric("embedmesh_key_inputs_in_flight", key="ann") == 8)
        refusal = await embed(mesh, ANN, ["b1", "b2", "b3"])
        assert isinstance(refusal, QuotaExceeded)
        assert refusal.metadata == {"quota": "inflight_inputs", "limit": "10"}
        assert refusal.retry_after
        more = [asyncio.create_task(embed(mesh, token, ["c1", "c2"])) for token in (ANN, BOB)]
        await settle(lambda: mesh.metric("embedmesh_key_inputs_in_flight", key="ann") == 10)
        # Another limit counts at once, for what comes next.
        write(keys_file, "inflight_inputs = 13")
        await settle(lambda: mesh.metric("embedmesh_file_reloads_total", file="keys", outcome="ok"))
        more.append(asyncio.create_task(embed(mesh, ANN, ["b1", "b2", "b3"])))
        await settle(lambda: mesh.metric("embedmesh_key_inputs_in_flight", key="ann") == 13)
        release.set()
        assert all(answer.results for answer in await asyncio.gather(first, *more))
        assert mesh.metric("embedmesh_key_inputs_in_flight", key="ann") == 0


async def test_what_the_gateway_has_no_room_for_is_given_back(open_mesh: Any, keys_file: Path, settle: Settle) -> None:
    write(keys_file, "inputs_per_second = 0.001\nburst_inputs = 10")
    async with open_mesh(keys_file=keys_file, max_inflight_inputs=5) as mesh:
        release = asyncio.Event()

        async def wait(_: Any) -> None:
            await release.wait()

        mesh.text.before = wait
        first = asyncio.create_task(embed(mesh, BOB, [f"a{i}" for i in range(5)]))
        await settle(lambda: mesh.metric("embedmesh_key_inputs_in_flight", key="bob") == 5)
        for _ in range(3):
            assert (await embed(mesh, ANN, ["b"] * 5)).reason == "OVERLOADED"
        release.set()
        await first
        assert (await embed(mesh, ANN, ["b"] * 5)).results
        assert (await embed(mesh, ANN, ["b"] * 5)).results
        assert (await embed(mesh, ANN, ["b"])).reason == "QUOTA_EXCEEDED"


async def test_a_reload_gives_nobody_a_fresh_bucket(open_mesh: Any, keys_file: Path, settle: Settle) -> None:
    write(keys_file, "inputs_per_second = 0.001\nburst_inputs = 10")
    async with open_mesh(keys_file=keys_file) as mesh:
        assert (await embed(mesh, ANN, ["a"] * 10)).results
        write(keys_file, "inputs_per_second = 0.002\nburst_inputs = 10\n")
        await settle(lambda: mesh.metric("embedmesh_file_reloads_total", file="keys", outcome="ok"))
        refusal = await embed(mesh, ANN, ["a"])
        assert isinstance(refusal, QuotaExceeded)
        assert refusal.metadata["limit"] == "0.002"


@given(
    rate=st.floats(0.1, 1000),
    size=st.integers(1, 100),
    wishes=st.lists(st.tuples(st.integers(1, 300), st.floats(0, 5)), max_size=50),
)
def test_a_bucket_never_gives_more_than_it_may(rate: float, size: int, wishes: list[tuple[int, float]]) -> None:
    now, taken, largest = 0.0, 0, 0
    bucket = Bucket(rate, size, now)
    for n, later in wishes:
        now += later
        pause = bucket.pause(n, now)
        if pause:
            # Whoever waits exactly so long is let in, and nobody who waits less.
            assert bucket.pause(n, now + pause * 0.99) > 0
            now += pause * (1 + 1e-9)
            assert bucket.pause(n, now) * rate < 1e-3
        bucket.take(n)
        taken, largest = taken + n, max(largest, n)
        assert taken <= size + rate * now + max(0, largest - size) + 1e-3 * len(wishes)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "keys: Field required"),
        ("keys = 3", "keys: Input should be a valid dictionary"),
        ("[keys]", "keys: Dictionary should have at least 1 item"),
        ("[keys.a]", "keys.a.sha256: Field required"),
        ("[keys.a]\nsha256 = []", "keys.a.sha256: Tuple should have at least 1 item"),
        ('[keys.a]\nsha256 = "SECRET"', "keys.a.sha256.0: String should match pattern"),
        (f'{KEYS_A}\ntoken = "SECRET"', "keys.a.token: Extra inputs are not permitted"),
        (f'[keys."a b"]\nsha256 = "{"a" * 64}"', "keys.a b: String should match pattern"),
        (
            f"{KEYS_A}\ninputs_per_second = 0",
            "keys.a.inputs_per_second: Input should be greater",
        ),
        (
            f"{KEYS_A}\ninputs_per_second = inf",
            "keys.a.inputs_per_second: Input should be a fin",
        ),
        (
            f"{KEYS_A}\ninflight_inputs = 1.5",
            "keys.a.inflight_inputs: Input should be a valid int",
        ),
        (
            f'{KEYS_A}\n[keys.b]\nsha256 = "{"a" * 64}"',
            "keys.a and keys.b have a token in common",
        ),
        ("[keys.a\nSECRET", "is not TOML"),
    ],
)
def test_mistakes_in_the_file_are_told_without_its_values(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(FileError) as caught:
        read_keys(path)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(f"{path}")
    assert "SECRET" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be read: No such file"):
        read_keys(tmp_path / "none")


def test_defaults_of_the_file(keys_file: Path) -> None:
    quotas = read_keys(keys_file)["bob"]
    assert quotas.sha256 == (sha256(BOB),)
    assert sha256(BOB) not in repr(quotas)
    assert math.isinf(quotas.inputs_per_second or math.inf)
