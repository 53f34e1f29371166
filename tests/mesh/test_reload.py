"""Models are replaced while calls run through the gateway: none may fail, and each vector says what made it."""

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embedmesh
from embedmesh_encoder.backend.fake import write_model
from embedmesh_encoder.model import ModelSpec

MODEL = "followed"
COMMON = "a text that every call has"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[int], ModelSpec]:
    """Put a revision of the model into the folder that is followed, in one piece."""
    (tmp_path / "models").mkdir()

    def write(seed: int) -> ModelSpec:
        made = tmp_path / "models" / f".{seed}"
        spec = write_model(made, name=MODEL, dimensions=16, seed=seed, base_ms=2, ms_per_unit=0.02)
        made.rename(tmp_path / "models" / str(seed))
        return spec

    return write


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.05)


class Callers:
    """Calls without end, and a stream as long as they take; what they were answered."""

    def __init__(self, client: embedmesh.AsyncClient) -> None:
        self._client = client
        self.stop = asyncio.Event()
        self.seen: dict[str, set[bytes]] = {}  # vectors of the common text, by the revision that made them
        self.failures: list[str] = []

    async def call(self, number: int) -> None:
        for text in range(10**9):
            if self.stop.is_set():
                return
            try:
                response = await self._client.embed([COMMON, f"text {number} {text}"], model=MODEL)
            except embedmesh.EmbedMeshError as error:
                self.failures.append(repr(error))
                continue
            self.failures += [repr(result.error) for result in response.results if result.error]
            common = response.results[0]
            if common.model:
                self.seen.setdefault(common.model.revision, set()).add(common.vector.tobytes())

    async def stream(self) -> None:
        async def texts() -> AsyncIterator[str]:
            while not self.stop.is_set():
                yield COMMON
                await asyncio.sleep(0.001)

        async for result in self._client.embed_stream(texts(), model=MODEL, chunk_inputs=8):
            if result.error:
                self.failures.append(repr(result.error))

    async def answered_by(self, spec: ModelSpec) -> None:
        await until(lambda: done(spec.revision in self.seen))


async def done(value: bool) -> bool:
    return value


async def offer(addresses: Sequence[str], revisions: Sequence[str]) -> bool:
    """Whether all of these nodes offer these revisions, in this order."""
    for address in addresses:
        async with embedmesh.AsyncClient(address) as client:
            models = await client.list_models()
        if [info.revision for info in models if info.name == MODEL and info.ready] != list(revisions):
            return False
    return True


async def test_a_revision_takes_the_place_of_another_under_load(
    start_mesh: Any, scrape: Any, total: Any, tmp_path: Path, write: Callable[[int], ModelSpec]
) -> None:
    specs = [write(1)]
    async with (
        start_mesh(model_folders=(tmp_path / "models",), replicas={"text": 2}) as mesh,
        embedmesh.AsyncClient(mesh.address, retries=0) as client,
    ):
        encoders = [mesh.role(name) for name in ("text-1", "text-2")]
        nodes = [mesh.address, *(encoder.grpc for encoder in encoders)]
        callers = Callers(client)
        async with asyncio.TaskGroup() as group:
            for number in range(6):
                group.create_task(callers.call(number))
            group.create_task(callers.stream())
            await callers.answered_by(specs[0])
            for seed in (2, 3):
                old, new = specs[-1], write(seed)
                specs.append(new)
                if seed == 3:
                    for encoder in encoders:
                        os.kill(mesh.pids[encoder.name], signal.SIGHUP)
                await until(partial(offer, nodes, [new.revision, old.revision]))
                # Both can be had, each from entries of its own in the cache.
                pinned = [(await client.embed([COMMON], model=f"{MODEL}@{spec.revision}")) for spec in (old, new)]
                assert [response.models[0].revision for response in pinned] == [old.revision, new.revision]
                assert not np.array_equal(pinned[0].vectors, pinned[1].vectors)
                await callers.answered_by(new)
                shutil.rmtree(tmp_path / "models" / str(seed - 1))
                await until(partial(offer, nodes, [new.revision]))
            callers.stop.set()
        assert not callers.failures, callers.failures[:5]
        # Each revision made one vector of it, which was never given out as another's.
        assert callers.seen.keys() == {spec.revision for spec in specs}
        assert sorted(map(len, callers.seen.values())) == [1, 1, 1]
        assert len(set.union(*callers.seen.values())) == 3
        with pytest.raises(embedmesh.ModelNotFound):
            await client.embed([COMMON], model=f"{MODEL}@{specs[0].revision}")
        for encoder in encoders:
            samples = await scrape(encoder.http)
            assert total(samples, "embedmesh_model_info", model=MODEL) == 1
            assert total(samples, "embedmesh_model_info", revision=specs[-1].revision) == 1
