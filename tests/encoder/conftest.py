"""A real text encoder on the fake backend, in process, whose backend can be stopped at a gate."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from embedmesh.v1 import catalog_pb2_grpc, text_pb2, text_pb2_grpc
from embedmesh_encoder.backend.fake import FakeBackend, write_model
from embedmesh_encoder.encoder import Encoder, EncoderOptions
from embedmesh_encoder.memory import trim
from embedmesh_encoder.model import ModelSpec, write_manifest
from embedmesh_encoder.service import (
    CATALOG_SERVICE,
    TEXT_SERVICE,
    EmbedService,
    ModelCatalogServicer,
    Models,
    TextEncoderServicer,
)
from embedmesh_encoder.text import TextItem, TextPreparer
from embedmesh_server.metrics import EncoderMetrics
from embedmesh_server.node import Node
from embedmesh_server.settings import NodeSettings


class Gate:
    """The fake backend behind a gate, which is open at first."""

    name = "fake"
    precision = "float32"

    def __init__(self, spec: ModelSpec, *, lanes_apart: bool = False) -> None:
        self._backend = FakeBackend(spec)
        self.run_beside = self._run_beside if lanes_apart else None
        self.beside: list[int] = []
        self._open = threading.Event()
        self._open.set()
        self.batches: list[int] = []
        self.outputs: list[tuple[str, ...]] = []
        self.closed = False

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
        self.batches.append(int(feeds["segment_ids"].max()) + 1)
        assert self._open.wait(60)
        self.outputs.append(tuple(outputs))
        return self._backend.run(feeds, outputs)

    def _run_beside(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
        self.beside.append(int(feeds["segment_ids"].max()) + 1)
        return self.run(feeds, outputs)

    def close(self) -> None:
        self.closed = True

    def shut(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    async def entered(self, batches: int) -> None:
        """Wait until so many batches have come in."""
        async with asyncio.timeout(10):
            while len(self.batches) < batches:
                await asyncio.sleep(0.001)


class House:
    """A node that serves text models, with all that a test wants to reach."""

    def __init__(self, models: Models, gates: list[Gate], node: Node, registry: CollectorRegistry) -> None:
        self.models, self.gates, self.node = models, gates, node
        self.gate = gates[0]
        self.registry = registry
        self.channel = grpc.aio.insecure_channel(node.grpc_address)
        self.text: Any = text_pb2_grpc.TextEncoderStub(self.channel)
        self.catalog: Any = catalog_pb2_grpc.ModelCatalogStub(self.channel)

    def embed(self, *texts: str, timeout: float | None = 30, **request: Any) -> Any:
        message = text_pb2.EmbedTextRequest(inputs=[text_pb2.TextInput(text=text) for text in texts], **request)
        return self.text.EmbedText(message, timeout=timeout)

    def sample(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"embedmesh_{name}", {"model": "fake-text", **labels}) or 0.0

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.001)

    async def fill_queue(self) -> list[Any]:
        """Stop the backend with one call in it, and one of 100 units in the queue of 100."""
        running = await self.block()
        waiting = self.embed("w" * 98)
        await self.until(lambda: self.sample("queue_cost_units") == 100)
        return [running, waiting]

    async def block(self) -> Any:
        """Stop the backend with one call in it, the first batch since the warm-up."""
        self.gate.shut()
        running = self.embed("running")
        await self.gate.entered(1)
        return running


@pytest.fixture
def describe(tmp_path: Path) -> Callable[..., ModelSpec]:
    """Write the manifest of a small text model beside the `model.onnx` that is there."""

    def describe(**changes: Any) -> ModelSpec:
        write_model(tmp_path)  # for its tokenizer
        entries: dict[str, Any] = {
            "name": "tiny",
            "modality": "text",
            "space": "tiny",
            "dimensions": 2,
            "normalized": False,
            "max_input_units": 16,
            "license": "Apache-2.0",
            "source": "this test",
            "backend": "onnxruntime",
            "graph": {"file": "model.onnx", "layout": "packed"},
            "text": {"tokenizer": "tokenizer.json"},
        }
        return write_manifest(tmp_path, entries | changes, ["model.onnx", "tokenizer.json"])

    return describe


@pytest.fixture
def make_gate() -> type[Gate]:
    return Gate


@pytest.fixture
def kept_bytes() -> Callable[[], int]:
    """What is resident when glibc has given back what it only holds, by other tests too."""

    def kept() -> int:
        gc.collect()
        trim()
        return int(psutil.Process().memory_info().rss)

    return kept


@pytest.fixture
async def make_encoder(tmp_path: Path) -> AsyncIterator[Callable[..., tuple[Encoder, Gate, CollectorRegistry]]]:
    made: list[tuple[Encoder, Gate]] = []

    def make(
        *,
        wrap: Callable[[TextPreparer], Any] = lambda preparer: preparer,
        model: Mapping[str, Any] = {},
        lanes_apart: bool = False,
        **options: Any,
    ) -> tuple[Encoder, Gate, CollectorRegistry]:
        spec = write_model(tmp_path / f"model{len(made)}", **{"dimensions": 16, **model})
        gate = Gate(spec, lanes_apart=lanes_apart)
        registry = CollectorRegistry()
        encoder = Encoder(spec, wrap(TextPreparer(spec)), gate, EncoderMetrics(registry), EncoderOptions(**options))
        made.append((encoder, gate))
        return encoder, gate, registry

    yield make
    for encoder, gate in made:
        gate.open()
        await encoder.close(10)


@pytest.fixture
async def open_house(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[House]]]:
    async with AsyncExitStack() as stack:

        async def open_house(
            *models: Mapping[str, Any],
            loaded: int | None = None,
            max_inputs: int = 256,
            max_text_bytes: int = 1 << 20,
            default_timeout_seconds: float = 60.0,
            **options: Any,
        ) -> House:
            """Serve `models` (arguments of `write_model`), of which the first `loaded` are loaded."""
            specs = [
                write_model(tmp_path / f"model{i}", **{"dimensions": 64, "truncatable_dimensions": (32, 16), **model})
                for i, model in enumerate(models or ({},))
            ]
            registry = CollectorRegistry()
            metrics = EncoderMetrics(registry)
            served = Models(specs)
            gates = [Gate(spec) for spec in specs]
            settings: dict[str, Any] = {"drain_seconds": 1}
            services = [TEXT_SERVICE, CATALOG_SERVICE]
            node = Node(NodeSettings(**settings), role="text", registry=registry, services=services)
            service = EmbedService(
                served, metrics, max_inputs=max_inputs, default_timeout_seconds=default_timeout_seconds
            )
            text_pb2_grpc.add_TextEncoderServicer_to_server(TextEncoderServicer(service), node.server)
            catalog_pb2_grpc.add_ModelCatalogServicer_to_server(
                ModelCatalogServicer(served, max_inputs=max_inputs), node.server
            )
            for spec, gate in list(zip(specs, gates, strict=True))[:loaded]:
                encoder = Encoder(spec, TextPreparer(spec, max_text_bytes), gate, metrics, EncoderOptions(**options))
                stack.push_async_callback(encoder.close, 10)
                stack.callback(gate.open)
                await encoder.warm_up([TextItem("warm")])
                served.add(encoder)
                gate.batches.clear()
            await stack.enter_async_context(node)
            node.set_ready(TEXT_SERVICE)
            node.set_ready(CATALOG_SERVICE)
            house = House(served, gates, node, registry)
            stack.push_async_callback(house.channel.close)
            for gate in gates:
                stack.callback(gate.open)
            return house

        yield open_house
