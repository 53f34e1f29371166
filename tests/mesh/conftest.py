"""A whole mesh of real processes, and a load that notices every failed call."""

import asyncio
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from embedmesh.v1 import gateway_pb2, gateway_pb2_grpc
from embedmesh_cli.__main__ import main
from embedmesh_cli.mesh import Mesh, MeshOptions
from embedmesh_cli.starter import cache_folder
from embedmesh_cli.starter.minilm import original_model
from embedmesh_encoder.backend.fake import write_model

# Of one look-up in Redis. A call makes one look-up, so no fault of Redis may cost it more than this.
CACHE_TIMEOUT_MS = 50


@pytest.fixture(scope="session")
def tokenizer() -> Path:
    """A real tokenizer, that of all-MiniLM-L6-v2."""
    return original_model(cache_folder() / "peers", lambda line: None) / "tokenizer.json"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of models of the commands that a test runs."""
    monkeypatch.setenv("EMBEDMESH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@dataclass
class Load:
    """Calls of a closed loop of workers, every outcome kept."""

    stub: Any
    texts: Callable[[int], Sequence[str]]
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    inputs_failed: list[str] = field(default_factory=list)

    @property
    def calls(self) -> int:
        return len(self.seconds) + len(self.failures)

    async def call(self, number: int) -> None:
        request = gateway_pb2.EmbedRequest()
        for text in self.texts(number):
            request.inputs.add().text.text = text
        start = time.perf_counter()
        try:
            response = await self.stub.Embed(request, timeout=20)
        except grpc.aio.AioRpcError as error:
            self.failures.append(f"{error.code().name}: {error.details()}")
            return
        self.seconds.append(time.perf_counter() - start)
        self.inputs_failed += [r.error.message for r in response.results if r.HasField("error")]

    def raise_if_any_failed(self) -> None:
        assert not self.failures, self.failures[:5]
        assert not self.inputs_failed, self.inputs_failed[:5]


@asynccontextmanager
async def running(load: Load, workers: int) -> AsyncIterator[Load]:
    """Keep `workers` callers busy while the block runs."""
    stop = asyncio.Event()
    numbers = iter(range(10**9))

    async def work() -> None:
        while not stop.is_set():
            await load.call(next(numbers))

    async with asyncio.TaskGroup() as group:
        for _ in range(workers):
            group.create_task(work())
        try:
            yield load
        finally:
            stop.set()


@pytest.fixture(name="running")
def running_fixture() -> Any:
    return running


@pytest.fixture
def make_load() -> Any:
    @asynccontextmanager
    async def make(mesh: Mesh, texts: Callable[[int], Sequence[str]]) -> AsyncIterator[Load]:
        # No client-side retries: what the gateway cannot hide counts as failed.
        options = [("grpc.enable_retries", 0), ("grpc.max_receive_message_length", 64 * 2**20)]
        async with grpc.aio.insecure_channel(mesh.address, options=options) as channel:
            yield Load(gateway_pb2_grpc.GatewayStub(channel), texts)

    return make


@pytest.fixture
def scrape() -> Callable[[str], Any]:
    """Give the samples of a node's /metrics as {(name, frozenset of label pairs): value}."""

    async def read(address: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        def fetch() -> str:
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
                return str(response.read().decode())

        families = text_string_to_metric_families(await asyncio.to_thread(fetch))
        return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}

    return read


@pytest.fixture
def total() -> Callable[..., float]:
    """Sum the samples of a name that carry the given labels."""

    def add(samples: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str, **labels: str) -> float:
        wanted = frozenset(labels.items())
        return sum(value for (found, given), value in samples.items() if found == name and wanted <= given)

    return add


@pytest.fixture
def fake_model(tmp_path: Path) -> Path:
    """A model of 16 numbers that takes 1 ms a batch and 0.05 ms a token."""
    write_model(tmp_path / "fake", dimensions=16, truncatable_dimensions=(8,), base_ms=1.0, ms_per_unit=0.05)
    return tmp_path / "fake"


@pytest.fixture
def start_mesh(fake_model: Path) -> Any:
    """Start a mesh on the fake model; options as in MeshOptions."""

    @asynccontextmanager
    async def start(**options: Any) -> AsyncIterator[Mesh]:
        gateway = {"cache_timeout_ms": CACHE_TIMEOUT_MS, "catalog_refresh_seconds": 1} | options.pop("gateway", {})
        async with Mesh(MeshOptions(**{"text_models": (fake_model,), "gateway": gateway} | options)) as mesh:
            yield mesh

    return start


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command in this process; gives its status."""

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["embedmesh", *map(str, words)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


@pytest.fixture(scope="session")
def randomise() -> Callable[[Any], None]:
    """Give a torch model weights that keep the size of what passes through it, so that texts can be told apart."""

    def randomise(model: Any) -> None:
        import torch

        torch.manual_seed(20261125)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1:
                    table = "embed" in name.lower() or "shared" in name
                    weight.normal_(0, 1.0 if table else weight[0].numel() ** -0.5)
                else:
                    weight.add_(0.1 * torch.randn_like(weight))

    return randomise
