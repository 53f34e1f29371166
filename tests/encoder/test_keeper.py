"""Models come, change and go while calls run: real nodes and folders, the backend behind a gate."""

import asyncio
import gc
import os
import shutil
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from embedmesh import errors
from embedmesh.v1 import catalog_pb2, catalog_pb2_grpc, text_pb2, text_pb2_grpc
from embedmesh_encoder.backend.fake import write_model
from embedmesh_encoder.encoder import Encoder
from embedmesh_encoder.keeper import Keeper
from embedmesh_encoder.model import ModelSpec, load_spec, verify_files
from embedmesh_encoder.service import (
    CATALOG_SERVICE,
    TEXT_SERVICE,
    EmbedService,
    ModelCatalogServicer,
    Models,
    TextEncoderServicer,
)
from embedmesh_encoder.text import TextItem, TextPreparer
from embedmesh_server.files import Files
from embedmesh_server.metrics import EncoderMetrics, FileMetrics
from embedmesh_server.node import Node
from embedmesh_server.settings import NodeSettings


class Kept:
    """A node whose models follow the folders in `root`; it looks when a test says so."""

    def __init__(self, root: Path, make_gate: Callable[[ModelSpec], Any], *, default: str) -> None:
        self.root = root
        self.registry = CollectorRegistry()
        metrics = EncoderMetrics(self.registry)
        self.models = Models(default=default)
        self.gates: dict[str, Any] = {}  # by revision, of the last load
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.loads: list[str] = []

        async def load(spec: ModelSpec) -> Encoder:
            self.loads.append(spec.revision)
            verify_files(spec)
            await self.may_load.wait()
            gate = self.gates[spec.revision] = make_gate(spec)
            encoder = Encoder(spec, TextPreparer(spec), gate, metrics)
            await encoder.warm_up([TextItem("warm")])
            gate.batches.clear()
            return encoder

        files = FileMetrics(self.registry)
        self.keeper = Keeper(
            self.models,
            roots=(root,),
            read=load_spec,
            load=load,
            metrics=metrics,
            files=files,
        )
        drained: dict[str, Any] = {"drain_seconds": 1}
        self.node = Node(
            NodeSettings(**drained),
            role="text",
            registry=self.registry,
            services=[TEXT_SERVICE, CATALOG_SERVICE],
            files=Files(files),
        )
        service = EmbedService(self.models, metrics, max_inputs=256)
        text_pb2_grpc.add_TextEncoderServicer_to_server(TextEncoderServicer(service), self.node.server)
        catalog_pb2_grpc.add_ModelCatalogServicer_to_server(
            ModelCatalogServicer(self.models, max_inputs=256), self.node.server
        )

    def write(self, folder: str, seed: int = 0, **model: Any) -> ModelSpec:
        """Put a model there in one piece."""
        with_dot = self.root / f".{folder}"
        spec = write_model(with_dot, dimensions=16, seed=seed, **model)
        place = self.root / folder
        shutil.rmtree(place, ignore_errors=True)
        with_dot.rename(place)
        return spec

    async def look(self) -> None:
        """See a change, and that it is still."""
        await self.keeper.look()
        await self.keeper.look()

    def embed(self, text: str = "a", model: str = "") -> Any:
        stub: Any = text_pb2_grpc.TextEncoderStub(self.channel)
        return stub.EmbedText(
            text_pb2.EmbedTextRequest(model=model, inputs=[text_pb2.TextInput(text=text)]), timeout=30
        )

    async def seed(self, model: str = "") -> int:
        """Which revision answers."""
        made_by = (await self.embed(model=model)).models[0]
        (spec,) = (encoder.spec for encoder in self.models.encoders if encoder.spec.ref() == made_by)
        assert spec.fake
        return spec.fake.seed

    async def refusal(self, model: str = "") -> errors.EmbedMeshError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.embed(model=model)
        return errors.from_rpc_error(caught.value)

    async def listed(self) -> list[tuple[str, bool, bool]]:
        stub: Any = catalog_pb2_grpc.ModelCatalogStub(self.channel)
        infos = (await stub.ListModels(catalog_pb2.ListModelsRequest())).models
        return [(f"{info.model.name}@{info.model.revision}", info.ready, info.is_default) for info in infos]

    def samples(self, **labels: str) -> list[str]:
        """Names of all samples with these labels."""
        found = (sample for metric in self.registry.collect() for sample in metric.samples)
        return [sample.name for sample in found if labels.items() <= sample.labels.items()]

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"embedmesh_{name}", labels)

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.001)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self.node, grpc.aio.insecure_channel(self.node.grpc_address) as self.channel:
            self.node.set_ready(TEXT_SERVICE)
            yield
            for gate in self.gates.values():
                gate.open()
            for encoder in (*await self.keeper.aclose(), *self.models.encoders):
                assert await encoder.close(10)


@pytest.fixture
def keep(tmp_path: Path, make_gate: Any) -> Callable[..., Any]:
    @asynccontextmanager
    async def keep(*, default: str = "") -> AsyncIterator[Kept]:
        (tmp_path / "models").mkdir()
        kept = Kept(tmp_path / "models", make_gate, default=default)
        async with kept.running():
            yield kept

    return keep


async def test_models_come_and_go(keep: Any) -> None:
    async with keep() as kept:
        await kept.look()
        assert await kept.listed() == []
        assert isinstance(await kept.refusal(), errors.ModelNotFound)
        one = kept.write("one", name="one")
        await kept.keeper.look()
        assert not kept.loads  # it may not be still
        await kept.keeper.look()
        two = kept.write("two", name="two")
        await kept.look()
        names = [f"{spec.name}@{spec.revision}" for spec in (one, two)]
        assert await kept.listed() == [(names[0], True, True), (names[1], True, False)]
        assert kept.value("model_ready", model="one") == 1
        assert await kept.seed("one") == 0

        # The default goes: its name does with it, and so does every line of its metrics.
        shutil.rmtree(kept.root / "one")
        await kept.look()
        assert await kept.listed() == [(names[1], True, True)]
        assert isinstance(await kept.refusal("one"), errors.ModelNotFound)
        await kept.until(lambda: not kept.samples(model="one"))
        shutil.rmtree(kept.root / "two")
        await kept.look()
        assert await kept.listed() == []
        await kept.until(lambda: not kept.samples(model="two"))


async def test_calls_in_flight_end_before_a_model_is_freed(keep: Any) -> None:
    async with keep() as kept:
        spec = kept.write("one")
        await kept.look()
        gate, encoder = kept.gates[spec.revision], weakref.ref(kept.models.encoders[0])
        gate.shut()
        running = kept.embed("in the backend")
        await gate.entered(1)
        waiting = kept.embed("in the queue")
        await kept.until(lambda: kept.value("queue_inputs", model="fake-text", priority="interactive") == 1)
        shutil.rmtree(kept.root / "one")
        await kept.look()
        assert await kept.listed() == []
        assert isinstance(await kept.refusal("fake-text"), errors.ModelNotFound)
        assert not gate.closed
        gate.open()
        for response in await asyncio.gather(running, waiting):
            assert response.results[0].HasField("embedding")
        await kept.until(lambda: gate.closed)
        await kept.until(lambda: not kept.samples(model="fake-text"))
        await kept.until(lambda: encoder() is None)


async def test_what_the_node_froze_is_freed_too(keep: Any) -> None:
    async with keep() as kept:
        kept.write("one")
        await kept.look()
        encoder = weakref.ref(kept.models.encoders[0])
        gc.freeze()
        try:
            shutil.rmtree(kept.root / "one")
            await kept.look()
            await kept.until(lambda: encoder() is None)
            assert gc.get_freeze_count()
        finally:
            gc.unfreeze()


async def test_a_changed_model_is_loaded_beside_the_old_one(keep: Any) -> None:
    async with keep() as kept:
        old = kept.write("one", seed=1)
        await kept.look()
        kept.may_load.clear()
        new = kept.write("one", seed=2)
        looking = asyncio.create_task(kept.look())
        await kept.until(lambda: kept.loads == [old.revision, new.revision])
        assert await kept.seed() == 1
        assert kept.keeper.loading
        assert [name for name, *_ in await kept.listed()] == [f"fake-text@{old.revision}"]
        kept.gates[old.revision].shut()
        running = kept.embed("in the old one")
        await kept.gates[old.revision].entered(2)
        kept.may_load.set()
        await looking
        assert not kept.keeper.loading
        assert await kept.seed() == 2
        assert await kept.listed() == [(f"fake-text@{new.revision}", True, True)]
        assert not kept.gates[old.revision].closed
        kept.gates[old.revision].open()
        assert (await running).models[0].revision == old.revision
        await kept.until(lambda: kept.gates[old.revision].closed)
        # What both were counted in stays, of the old one alone nothing does.
        await kept.until(lambda: not kept.samples(revision=old.revision))
        assert kept.value("model_ready", model="fake-text") == 1
        assert kept.value("encoder_inputs_total", model="fake-text", outcome="ok")


async def test_two_revisions_side_by_side(keep: Any) -> None:
    async with keep() as kept:
        old, new = kept.write("b", seed=1), kept.write("a", seed=2)
        # What counts is when it was written, not where or when it was found.
        os.utime(kept.root / "b" / "model.toml", (1000, 1000))
        await kept.look()
        assert await kept.seed() == await kept.seed("fake-text") == 2
        assert await kept.seed(f"fake-text@{old.revision}") == 1
        assert await kept.listed() == [
            (f"fake-text@{new.revision}", True, True),
            (f"fake-text@{old.revision}", True, False),
        ]
        shutil.rmtree(kept.root / "a")
        await kept.look()
        assert await kept.seed() == 1
        assert isinstance(await kept.refusal(f"fake-text@{new.revision}"), errors.ModelNotFound)


async def test_the_default_stays_when_others_come_and_when_it_is_replaced(keep: Any) -> None:
    async with keep(default="m") as kept:
        kept.write("first", name="m", seed=1)
        await kept.look()
        kept.write("a", name="a", seed=5)
        kept.write("second", name="m", seed=2)
        await kept.look()
        assert await kept.seed() == 2
        shutil.rmtree(kept.root / "first")
        shutil.rmtree(kept.root / "second")
        await kept.look()
        error = await kept.refusal()
        assert isinstance(error, errors.ModelNotFound)
        assert 'no model "m" here' in error.message
        assert await kept.seed("a") == 5


async def test_a_half_written_folder_is_tried_again(keep: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with keep() as kept:
        spec = write_model(kept.root / ".whole", seed=3)
        (kept.root / "one").mkdir()
        await kept.look()
        shutil.copy(kept.root / ".whole" / "model.toml", kept.root / "one")
        await kept.look()
        assert await kept.listed() == []  # a file that the manifest names is not there
        whole = (kept.root / ".whole" / "tokenizer.json").read_bytes()
        (kept.root / "one" / "tokenizer.json").write_bytes(whole[:100])
        await kept.look()
        assert await kept.listed() == [(f"fake-text@{spec.revision}", False, True)]
        error = await kept.refusal("fake-text")
        assert isinstance(error, errors.NotReady)
        assert str(kept.root) not in error.message
        assert (kept.value("model_ready", model="fake-text"), kept.value("file_stale", file="models")) == (0, 1)
        lines = len(caplog.records)
        await kept.look()
        assert len(caplog.records) == lines  # said once, not with every look
        (kept.root / "one" / "tokenizer.json").write_bytes(whole)
        await kept.look()
        assert await kept.seed() == 3
        assert (kept.value("model_ready", model="fake-text"), kept.value("file_stale", file="models")) == (1, 0)
    assert all(
        str(kept.root / "one") in record.getMessage() for record in caplog.records if record.levelname == "ERROR"
    )


async def test_a_load_that_fails_keeps_what_is_served(keep: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with keep() as kept:
        old = kept.write("one", seed=1)
        await kept.look()
        kept.write("one", seed=2)
        (kept.root / "one" / "tokenizer.json").write_text("{}")
        kept.write("two", name="two")
        await kept.look()
        assert await kept.seed("fake-text") == 1
        assert await kept.seed("two") == 0  # others are served
        (said,) = (record.getMessage() for record in caplog.records if record.levelname == "ERROR")
        assert 'file "tokenizer.json" has sha256' in said
        assert said.endswith(f"fetch the model again; revision {old.revision} of fake-text stays")
        # Another one of that name that is broken is listed, and answers nobody who does not ask for it.
        newer = kept.write("newer", seed=4)
        (kept.root / "newer" / "tokenizer.json").write_text("{}")
        await kept.look()
        assert await kept.seed("fake-text") == 1
        assert isinstance(await kept.refusal(f"fake-text@{newer.revision}"), errors.NotReady)
        assert kept.value("model_ready", model="fake-text") == 1


async def test_asked_it_looks_at_once_and_tries_again(keep: Any) -> None:
    async with keep() as kept:
        kept.may_load.clear()
        spec = kept.write("one")
        running = asyncio.create_task(kept.keeper.run())
        kept.keeper.ask()
        await kept.until(lambda: kept.loads)
        two = kept.write("two", name="two")
        for _ in range(3):  # while it loads
            kept.keeper.ask()
        kept.may_load.set()
        await kept.until(lambda: len(kept.models.encoders) == 2)
        assert kept.loads == [spec.revision, two.revision]
        running.cancel()
        # What failed and has not changed is tried only when somebody asks.
        content = (kept.root / "two" / "tokenizer.json").read_bytes()
        (kept.root / "two" / "tokenizer.json").write_text("{}")
        three = kept.write("three", name="three")
        (kept.root / "three" / "tokenizer.json").write_text("{}")
        await kept.look()
        await kept.look()
        assert kept.loads[2:] == [three.revision]
        (kept.root / "two" / "tokenizer.json").write_bytes(content)
        await kept.keeper.look(asked=True)
        assert kept.loads[2:] == [three.revision, three.revision]


async def test_a_folder_that_is_renamed_or_copied_is_not_loaded_again(keep: Any) -> None:
    async with keep() as kept:
        spec = kept.write("one")
        await kept.look()
        shutil.copytree(kept.root / "one", kept.root / "copy")
        await kept.look()
        shutil.rmtree(kept.root / "one")
        await kept.look()
        (kept.root / "copy").rename(kept.root / "renamed")
        await kept.look()
        assert kept.loads == [spec.revision]
        assert await kept.listed() == [(f"fake-text@{spec.revision}", True, True)]
        # What is no part of the revision is loaded anew, and shown.
        kept.write("renamed", space="another")
        await kept.look()
        assert (await kept.embed()).models[0].space == "another"
        await kept.until(lambda: not kept.samples(space="fake-text"))
        assert kept.samples(space="another", revision=spec.revision)


async def test_a_volume_that_is_away_takes_no_model_along(keep: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with keep() as kept:
        kept.write("one", seed=1)
        await kept.look()
        kept.root.rename(kept.root.with_name("away"))
        await kept.look()
        assert await kept.seed() == 1
        assert sum("cannot look at the folders of models" in record.getMessage() for record in caplog.records) == 1
        assert kept.value("file_stale", file="models") == 1
        kept.root.with_name("away").rename(kept.root)
        await kept.look()
        assert kept.value("file_stale", file="models") == 0
        assert len(kept.loads) == 1


async def test_no_call_fails_while_revisions_replace_each_other(keep: Any) -> None:
    async with keep() as kept:
        kept.write("m-0", seed=0)
        await kept.look()
        stop, seeds = asyncio.Event(), set()

        async def call() -> None:
            while not stop.is_set():
                response = await kept.embed("x" * 20, model="fake-text")
                assert response.results[0].HasField("embedding")
                seeds.add(response.models[0].revision)

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(call())
            for seed in range(1, 6):
                kept.write(f"m-{seed}", seed=seed)
                await kept.look()
                shutil.rmtree(kept.root / f"m-{seed - 1}")
                await kept.look()
            stop.set()
        assert len(seeds) >= 5
        await kept.until(lambda: sum(gate.closed for gate in kept.gates.values()) == 5)
