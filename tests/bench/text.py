"""What the text path costs, next to what the model alone can do: `make bench`.

Everything is measured in one run, in rounds that take turns, on the 1,000 definitions of the demo
(`bypass`: no cache). The bound is this process running the same packed batches on the same model
with nothing around them. Quote the ratios: absolute figures belong to the machine and the moment.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy as np
import psutil

from embedmesh import AsyncClient
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_cli import demo
from embedmesh_cli.mesh import Mesh, MeshOptions
from embedmesh_cli.starter import ensure_starter
from embedmesh_encoder.backend import Backend, create_backend
from embedmesh_encoder.model import load_spec
from embedmesh_encoder.preparation import Prepared
from embedmesh_encoder.text import TextItem, TextPreparer

ROUNDS = 5
SINGLES = 200


def texts() -> list[str]:
    """The demo's definitions."""
    lines = (Path(demo.__file__).parent / "wordnet.tsv").read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[1] for line in lines if "\t" in line]


def packed(preparer: TextPreparer, backend: Backend, prepared: Sequence[Prepared], budget: int) -> None:
    """Run everything in rows of at most `budget` tokens, in order of arrival."""
    batch: list[Prepared] = []
    for one in prepared:
        if batch and sum(each.units for each in batch) + one.units > budget:
            backend.run(preparer.collate(batch))
            batch = []
        batch.append(one)
    backend.run(preparer.collate(batch))


def padded(backend: Backend, prepared: Sequence[Prepared], size: int) -> float:
    """Run batches of `size` texts in order of arrival, each padded to the longest; gives the padding share."""
    real = computed = 0
    for start in range(0, len(prepared), size):
        batch = prepared[start : start + size]
        shape = (len(batch), max(one.units for one in batch))
        feeds = {name: np.zeros(shape, np.int64) for name in ("input_ids", "position_ids", "segment_ids")}
        feeds["segment_ids"][:] = -1
        for i, one in enumerate(batch):
            feeds["input_ids"][i, : one.units] = one.data
            feeds["position_ids"][i, : one.units] = np.arange(one.units)
            feeds["segment_ids"][i, : one.units] = i
        backend.run(feeds)
        real += sum(one.units for one in batch)
        computed += shape[0] * shape[1]
    return 1 - real / computed


async def callers(client: AsyncClient, batches: Sequence[Sequence[str]], concurrency: int, cache: str) -> None:
    """Answer all batches, so many at a time."""
    waiting = iter(batches)

    async def work() -> None:
        for batch in waiting:
            _ = (await client.embed(batch, cache=cache)).vectors  # type: ignore[arg-type]

    await asyncio.gather(*(work() for _ in range(concurrency)))


async def timed(work: Awaitable[None]) -> float:
    start = time.perf_counter()
    await work
    return time.perf_counter() - start


def cut(items: Sequence[str], size: int) -> list[list[str]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


async def main() -> None:
    model = ensure_starter(print)
    spec = load_spec(model)
    preparer, backend = TextPreparer(spec), create_backend(spec)
    corpus = texts()
    prepared = [preparer.prepare(TextItem(text), pb.TRUNCATION_END) for text in corpus]
    tokens = sum(one.units for one in prepared)
    share = padded(backend, prepared, 32)

    async with Mesh(MeshOptions(text_models=(model,))) as mesh, AsyncClient(mesh.address) as client:
        one, many = cut(corpus, 1), cut(corpus, 32)
        await callers(client, many, 4, "read_write")  # warm, and fills the cache

        def here(run: Callable[[], object]) -> Callable[[], Awaitable[None]]:
            async def measured() -> None:
                await asyncio.to_thread(run)

            return measured

        plans: dict[str, Callable[[], Awaitable[None]]] = {
            "in process, packed 256 (the bound)": here(lambda: packed(preparer, backend, prepared, 256)),
            "in process, one by one": here(lambda: packed(preparer, backend, prepared, 1)),
            f"in process, padded 32 ({share:.0%} padding)": here(lambda: padded(backend, prepared, 32)),
            "mesh, 32 callers of 1 text, no cache": lambda: callers(client, one, 32, "bypass"),
            "mesh, 4 callers of 32 texts, no cache": lambda: callers(client, many, 4, "bypass"),
            "mesh, 4 callers of 32 texts, cached": lambda: callers(client, many, 4, "read_write"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in plans}
        for _ in range(ROUNDS):
            for name, run in plans.items():
                seconds[name].append(await timed(run()))

        short = TextItem(corpus[0])
        latency: dict[str, list[float]] = {"in process": [], "mesh, no cache": [], "mesh, cached": []}
        for _ in range(SINGLES):
            start = time.perf_counter()
            backend.run(preparer.collate([preparer.prepare(short, pb.TRUNCATION_END)]))
            latency["in process"].append(time.perf_counter() - start)
            for name, cache in (("mesh, no cache", "bypass"), ("mesh, cached", "read_write")):
                latency[name].append(await timed(callers(client, [[corpus[0]]], 1, cache)))
        memory = {name: psutil.Process(pid).memory_info().rss / 2**20 for name, pid in mesh.pids.items()}

    bound = statistics.median(next(iter(seconds.values())))
    print(f"\n{len(corpus)} texts, {tokens} tokens, {ROUNDS} rounds, medians\n")
    print(f"{'':45} {'texts/s':>9} {'tokens/s':>9} {'of the bound':>13}")
    for name, each in seconds.items():
        median = statistics.median(each)
        print(f"{name:45} {len(corpus) / median:9.0f} {tokens / median:9.0f} {bound / median:13.2f}")
    print(f"\none text of {preparer.prepare(short, pb.TRUNCATION_END).units} tokens, nobody else, {SINGLES} calls")
    for name, each in latency.items():
        p99 = statistics.quantiles(each, n=100)[98]
        print(f"{name:45} p50 {statistics.median(each) * 1e3:6.2f} ms   p99 {p99 * 1e3:6.2f} ms")
    print("\nresident memory at the end: " + ", ".join(f"{name} {size:.0f} MiB" for name, size in memory.items()))


if __name__ == "__main__":
    asyncio.run(main())
