"""What surrounds the calls: addresses, TLS, tokens, the catalogue, ends and cancellations, what is imported."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import embedmesh
from embedmesh._channel import is_loopback, parse_address
from embedmesh.v1 import catalog_pb2, embedding_pb2, gateway_pb2

TLS = Path(__file__).parent / "tls"


@pytest.mark.parametrize(
    ("address", "target", "loopback"),
    [
        ("localhost:1", "dns:///localhost:1", True),
        ("localhost", "dns:///localhost:50050", True),
        ("mesh.example", "dns:///mesh.example:50050", False),
        ("127.0.0.1:7", "dns:///127.0.0.1:7", True),
        ("::1", "dns:///[::1]:50050", True),
        ("[::1]:7", "dns:///[::1]:7", True),
        ("[2001:db8::1]", "dns:///[2001:db8::1]:50050", False),
        ("dns:///mesh:1", "dns:///mesh:1", False),
        ("dns://8.8.8.8/localhost:1", "dns://8.8.8.8/localhost:1", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:2", "ipv4:127.0.0.1:1,127.0.0.2:2", True),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", "ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("ipv6:[::1]:1", "ipv6:[::1]:1", True),
        ("unix:/run/mesh.sock", "unix:/run/mesh.sock", True),
    ],
)
def test_addresses(address: str, target: str, loopback: bool) -> None:
    assert parse_address(address) == target
    assert is_loopback(target) is loopback


def test_the_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, connect: Any, gateway: Any) -> None:
    monkeypatch.setenv("EMBEDMESH_ADDRESS", gateway.address)
    assert connect().embed(["7"]).vectors[0, 0] == 7
    assert connect("elsewhere:1").client._endpoint.target == "dns:///elsewhere:1"
    monkeypatch.delenv("EMBEDMESH_ADDRESS")
    assert connect().client._endpoint.target == "dns:///localhost:50050"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"address": "https://mesh.example"}, "give host:port"),
        ({"max_inputs": 0}, "max_inputs is 0"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"retries": 5}, "gRPC allows 0 to 4"),
        ({"retries": -1}, "gRPC allows 0 to 4"),
        ({"max_message_bytes": 1}, "at least 65536"),
        ({"token": ""}, "printable ASCII"),
        ({"token": "two\nlines"}, "printable ASCII"),
        ({"token": "schlüssel"}, "printable ASCII"),
        ({"address": "mesh.example", "token": "t"}, "clear text; use tls=True"),
    ],
)
def test_options_that_cannot_work(connect: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        connect(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"address": "localhost:1"},
        {"address": "mesh.example", "tls": True},
        {"address": "mesh.example", "allow_insecure_token": True},
    ],
)
def test_where_a_token_may_go(connect: Any, options: dict[str, Any]) -> None:
    assert connect(**options, token="secret").client._endpoint.metadata == (("authorization", "Bearer secret"),)  # noqa: S106


def test_the_token_goes_with_every_call_and_never_into_repr(connect: Any, gateway: Any) -> None:
    client = connect(gateway.address, token="secret")  # noqa: S106
    client.embed(["1"])
    client.stream(["1"])
    client.list_models()
    assert [entry["authorization"] for entry in gateway.metadata] == ["Bearer secret"] * 3
    assert "secret" not in repr(client.client) + repr(client.client._endpoint)


def test_tls(connect: Any, serve: Any) -> None:
    pair = ((TLS / "server.key").read_bytes(), (TLS / "server.pem").read_bytes())
    gateway = serve(credentials=grpc.ssl_server_credentials([pair]))
    client = connect(gateway.address, tls=embedmesh.Tls(root_certificates=TLS / "ca.pem"), token="t")  # noqa: S106
    assert client.embed(["7"]).vectors[0, 0] == 7
    assert gateway.metadata[0]["authorization"] == "Bearer t"
    assert " tls=on " in repr(client.client)
    with pytest.raises(embedmesh.Retryable, match=r"CERTIFICATE_VERIFY_FAILED|failing"):
        connect(gateway.address, tls=True, retries=0).embed(["1"])


def test_mutual_tls(connect: Any, serve: Any) -> None:
    pair = ((TLS / "server.key").read_bytes(), (TLS / "server.pem").read_bytes())
    gateway = serve(
        credentials=grpc.ssl_server_credentials([pair], (TLS / "ca.pem").read_bytes(), require_client_auth=True)
    )
    tls = embedmesh.Tls(TLS / "ca.pem", certificate=TLS / "client.pem", key=TLS / "client.key")
    assert connect(gateway.address, tls=tls).embed(["7"]).vectors[0, 0] == 7
    with pytest.raises(embedmesh.Retryable):
        connect(gateway.address, tls=embedmesh.Tls(TLS / "ca.pem"), retries=0).embed(["7"])


def test_tls_files_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="both"):
        embedmesh.Tls(certificate="client.pem")
    with pytest.raises(OSError, match=r"absent\.pem"):
        embedmesh.Client(tls=embedmesh.Tls("absent.pem"))


def test_calls_are_spread_over_all_addresses(connect: Any, serve: Any) -> None:
    gateways = [serve("127.0.0.1:0"), serve("127.0.0.1:0")]
    ports = [gateway.address.rpartition(":")[2] for gateway in gateways]
    client = connect("ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports))

    def spread() -> bool:
        client.embed(["1"])
        return all(gateway.requests for gateway in gateways)

    assert any(spread() for _ in range(1000))


def test_models_are_listed(connect: Any, gateway: Any) -> None:
    info = catalog_pb2.ModelInfo(
        model=embedding_pb2.ModelRef(name="m", revision="r", space="s"),
        family="f",
        modality=catalog_pb2.MODALITY_IMAGE,
        kinds=[embedding_pb2.EMBEDDING_KIND_DENSE, embedding_pb2.EMBEDDING_KIND_MULTI_VECTOR],
        dimensions=512,
        truncatable_dimensions=[64, 128],
        max_input_units=50,
        max_inputs=256,
        is_default=True,
        ready=True,
        normalized=True,
        limits={"image_bytes": 10},
    )
    newer = catalog_pb2.ModelInfo()
    newer.ParseFromString(b"\x18\x63")  # modality 99, which this client does not know
    gateway.on_list = lambda _: catalog_pb2.ListModelsResponse(models=[info, newer])
    first, second = connect(gateway.address).list_models()
    assert first == embedmesh.ModelInfo(
        name="m",
        revision="r",
        space="s",
        family="f",
        modality="image",
        kinds=("dense", "multi_vector"),
        dimensions=512,
        truncatable_dimensions=(64, 128),
        max_input_units=50,
        max_inputs=256,
        is_default=True,
        ready=True,
        normalized=True,
        limits={"image_bytes": 10},
    )
    assert second.modality == "99"


def test_listing_fails_like_any_call(connect: Any, gateway: Any) -> None:
    gateway.on_list = lambda context: gateway.fail(context, embedmesh.NotReady("loading", retry_after=0.01))
    with pytest.raises(embedmesh.NotReady, match="loading"):
        connect(gateway.address, retries=1).list_models()
    assert len(gateway.metadata) == 2
    with pytest.raises(embedmesh.InvalidRequest, match="timeout"):
        connect(gateway.address).list_models(timeout=-1)


def test_state_is_shown(gateway: Any) -> None:
    gateway.on_embed = lambda _, context: gateway.hold(context)
    with embedmesh.Client(gateway.address) as client:
        target = f"dns:///{gateway.address}"
        assert repr(client) == f"<Client {target} tls=off calls=0>"

        def embed() -> None:
            with pytest.raises(embedmesh.EmbedMeshError):
                client.embed(["1"])

        call = threading.Thread(target=embed)
        call.start()
        gateway.wait_for(lambda: bool(gateway.requests))
        assert repr(client) == f"<Client {target} tls=off calls=1>"
    call.join()
    assert repr(client) == f"<Client {target} tls=off closed>"


@pytest.mark.parametrize("inputs", [["1"], ["1", "2"], ["1"] * 20])
def test_closing_fails_the_calls_in_flight(gateway: Any, inputs: list[str]) -> None:
    client = embedmesh.Client(gateway.address, max_inputs=1)
    gateway.on_embed = lambda *_: client.close()
    with pytest.raises(embedmesh.EmbedMeshError) as caught:
        client.embed(inputs)
    assert caught.value.code is grpc.StatusCode.CANCELLED


def test_a_channel_closed_in_the_moment_of_sending() -> None:
    client = embedmesh.Client()
    client._channel.close()  # what another thread does between the check and the call
    with pytest.raises(ValueError, match="closed channel"):
        client.embed(["1"])
    sending = client._sending()
    with pytest.raises(embedmesh.EmbedMeshError, match="client was closed"), sending:
        client.close()
        client._gateway.Embed(gateway_pb2.EmbedRequest())


async def test_closing_fails_the_calls_in_flight_async(gateway: Any) -> None:
    client = embedmesh.AsyncClient(gateway.address)
    loop = asyncio.get_running_loop()
    gateway.on_embed = lambda *_: asyncio.run_coroutine_threadsafe(client.close(), loop).result(30)
    with pytest.raises(embedmesh.EmbedMeshError, match="client was closed") as caught:
        await client.embed(["1"])
    assert caught.value.code is grpc.StatusCode.CANCELLED


async def test_cancelling_a_task_cancels_its_calls(gateway: Any) -> None:
    gateway.on_embed = lambda _, context: gateway.hold(context)
    async with embedmesh.AsyncClient(gateway.address, max_inputs=1) as client:
        call = asyncio.create_task(client.embed(["1", "2"]))
        await asyncio.to_thread(gateway.wait_for, lambda: len(gateway.requests) == 2)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await asyncio.to_thread(gateway.cancelled.wait, 30)
        assert repr(client).endswith("calls=0>")


async def test_cancelling_a_task_cancels_a_listing(gateway: Any) -> None:
    gateway.on_list = gateway.hold
    async with embedmesh.AsyncClient(gateway.address) as client:
        call = asyncio.create_task(client.list_models())
        await asyncio.to_thread(gateway.wait_for, lambda: bool(gateway.metadata))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await asyncio.to_thread(gateway.cancelled.wait, 30)


async def test_cancelling_a_task_cancels_its_stream(gateway: Any) -> None:
    gateway.on_chunk = lambda _, context: gateway.hold(context)
    async with embedmesh.AsyncClient(gateway.address) as client:

        async def consume() -> None:
            async for _ in client.embed_stream(["1"]):
                pass

        call = asyncio.create_task(consume())
        await asyncio.to_thread(gateway.wait_for, lambda: bool(gateway.chunks))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await asyncio.to_thread(gateway.cancelled.wait, 30)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell has what it runs in the background ignore SIGINT, and Python goes by that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("inputs", [["1"], ["1", "2"]])
def test_an_interrupted_call_is_cancelled(gateway: Any, inputs: list[str]) -> None:
    first = threading.Lock()  # a second signal would end the tests

    def interrupt(_: Any, context: Any) -> Any:
        gateway.wait_for(lambda: len(gateway.requests) == len(inputs))
        if first.acquire(blocking=False):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        gateway.hold(context)

    gateway.on_embed = interrupt
    with embedmesh.Client(gateway.address, max_inputs=1) as client:
        with pytest.raises(KeyboardInterrupt):
            client.embed(inputs)
        assert gateway.cancelled.wait(30)
        assert repr(client).endswith("calls=0>")


def test_an_async_client_belongs_to_one_loop(gateway: Any) -> None:
    client = embedmesh.AsyncClient(gateway.address)

    async def use() -> None:
        await client.embed(["1"])

    with asyncio.Runner() as first:
        first.run(use())
        with asyncio.Runner() as second, pytest.raises(RuntimeError, match="another event loop"):
            second.run(use())
        first.run(client.close())


async def test_an_async_client_that_was_never_used_can_be_closed() -> None:
    async with embedmesh.AsyncClient():
        pass


def test_threads_may_share_a_client(gateway: Any) -> None:
    with embedmesh.Client(gateway.address, max_inputs=3) as client:
        failures: list[BaseException] = []

        def use(number: int) -> None:
            try:
                inputs = [str(number * 100 + i) for i in range(10)]
                assert client.embed(inputs).vectors[:, 0].tolist() == [float(text) for text in inputs]
            except BaseException as error:  # noqa: BLE001  (shown below)
                failures.append(error)

        threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_public_names_are_sorted_and_there() -> None:
    assert embedmesh.__all__ == sorted(embedmesh.__all__)
    assert all(hasattr(embedmesh, name) for name in embedmesh.__all__)
    public = {
        name
        for name, value in vars(embedmesh).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("embedmesh.")
    }
    assert public <= set(embedmesh.__all__)


def test_importing_the_package_loads_nothing_of_the_servers() -> None:
    # Debian's Python, for one, starts with modules of its own.
    program = (
        "import sys; before = set(sys.modules)\n"
        "import embedmesh; print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    # grpc itself looks for its companions; all of them are small.
    by_grpc = {
        "grpc_health",
        "grpc_reflection",
        "grpc_tools",
        "grpc_status",
        "grpc_channelz",
        "grpc_csds",
        "grpc_admin",
    }
    third_party = {name for name in loaded - sys.stdlib_module_names - by_grpc if not name.startswith("_")}
    assert third_party <= {"embedmesh", "google", "grpc", "numpy", "typing_extensions", "cython_runtime"}
    assert {"embedmesh", "grpc", "numpy"} <= third_party
