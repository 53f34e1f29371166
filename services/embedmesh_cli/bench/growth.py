"""Scenarios of growth: more replicas, larger requests, wider vectors, a fuller cache; and what a start takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Final, Self

import psutil
import redis.asyncio

from embedmesh_cli.bench.load import Closed, Load
from embedmesh_cli.bench.material import requests
from embedmesh_cli.bench.measure import NOBODY, Measured, Spread
from embedmesh_cli.bench.report import Check, Plot, Section, Series, Table, number, speed_table, tail_table
from embedmesh_cli.bench.session import Plan, Session, Skipped, Target
from embedmesh_cli.mesh import Mesh, MeshOptions
from embedmesh_encoder.backend.fake import write_model

__all__ = ["cost", "resources", "scaling"]

_REPLICAS: Final = (1, 2, 4)
_WORKERS: Final = (1, 2, 4)
_CONNECTIONS: Final = 16
_EFFICIENCY: Final = 0.9
# One batch at a time, of at most 32 texts, in 50 ms: 640 texts a second and replica, whatever the processor does.
_BATCH, _BATCH_MS = 32, 50.0
_REQUEST_SIZES: Final = (1, 4, 16, 64, 256)
_WIDTHS: Final = (64, 384, 1024, 4096)
_BATCH_SIZES: Final = (1, 4, 16, 64)
_CALLERS: Final = 4
_PIPELINE: Final = 2000


async def scaling(session: Session) -> Section:
    """1, 2 and 4 replicas of an encoder whose batches take a fixed time, so that cores are no limit."""
    section = Section(
        "scaling",
        f"replicas of a text encoder that takes {_BATCH_MS:g} ms for a batch of up to {_BATCH} texts and no processor: "
        "what the gateway and its balancing leave of that.",
    )
    texts = session.material("text").inputs
    payloads = requests("gateway", texts, _BATCH)
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(session.folder())
        write_model(folder, base_ms=_BATCH_MS)
        settings = {"batch_cost": 1_000_000, "batch_items": _BATCH, "max_queue_cost": 10_000_000}
        plans = {}
        for count in _REPLICAS:
            target = await stack.enter_async_context(
                session.mesh(redis="none", text_models=(folder,), replicas={"text": count}, text=settings)
            )
            plans[f"{count} replicas"] = _closed(session, target, payloads, 4 * count)
        rows = await session.rounds(plans)
    rates = [Spread.of(each.vectors for each in rounds).median for rounds in rows.values()]
    section.tables.append(speed_table("texts through the gateway, 4 callers of 32 for each replica", rows))
    for count, rate in list(zip(_REPLICAS, rates, strict=True))[1:]:
        efficiency = rate / count / rates[0]
        claim = f"{count} replicas do at least {_EFFICIENCY:.0%} of {count} times the work"
        section.checks.append(Check(claim, f"{efficiency:.0%}", efficiency >= _EFFICIENCY))
    ideal = [count * rates[0] for count in _REPLICAS]
    series = [Series("measured", _REPLICAS, rates), Series("ideal", _REPLICAS, ideal)]
    section.plots.append(Plot("replicas", "encoder replicas", "texts/s", series))
    section.data["rows"] = _as_data(rows)
    section.data["workers"] = _as_data(await _by_workers(session, section, texts))
    return section


async def _by_workers(session: Session, section: Section, texts: Sequence[str]) -> dict[str, list[Measured]]:
    """Gateways that share a port. They are bound by the cores, so what counts is what a core gives."""
    payloads = requests("gateway", texts, _BATCH, cache="read_write")
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(session.folder())
        write_model(folder, max_input_units=1024)
        plans: dict[str, Plan] = {}
        for count in _WORKERS:
            target = await stack.enter_async_context(
                session.mesh(redis="none", text_models=(folder,), gateway={"workers": count})
            )
            load = session.load("gateway", target.address, payloads, Closed(_CONNECTIONS), connections=_CONNECTIONS)
            # Each worker has a memory of its own: the warm-up fills them.
            plans[_workers(count)] = partial(_first, session, target, replace(load, warm_seconds=3.0))
        rows = await session.rounds(plans)
    section.tables.append(
        speed_table(f"texts from the cache, {_CONNECTIONS} connections with a caller of 32 each", rows)
    )
    costs = [Spread.of(each.cpu_ms_per_vector for each in rows[_workers(count)]).median for count in _WORKERS]
    cores = psutil.cpu_count() or 1
    section.notes.append(
        f"workers and the generator share {cores} cores; where they have none each, nothing is judged."
    )
    for count, cost in list(zip(_WORKERS, costs, strict=True))[1:]:
        if count >= cores:
            break
        claim = f"a core gives with {count} gateway workers at least {_EFFICIENCY:.0%} of what it gives with one"
        section.checks.append(Check(claim, f"{costs[0] / cost:.0%}", costs[0] / cost >= _EFFICIENCY))
    return rows


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count > 1 else ''}"


async def _first(session: Session, target: Target, load: Load) -> Measured:
    return (await session.measure(target.observer, load))[0]


async def cost(session: Session) -> Section:
    """What a vector costs in CPU, by request size, batch size, width and cache; the model itself costs nothing."""
    section = Section(
        "cost",
        "CPU of gateway and encoder (and cache) for a vector, with a model that takes no time: what grows, and how.",
    )
    texts = session.material("text").inputs
    rows: dict[str, list[Measured]] = {}
    with session.folder() as folder:
        models = {width: folder / str(width) for width in _WIDTHS}
        for width, model in models.items():
            write_model(model, name=f"fake-{width}", dimensions=width)
        async with session.mesh(text_models=tuple(models.values())) as target:
            rows |= await _by_request(session, section, target, texts, model="fake-384")
            rows |= await _by_width(session, section, target, texts)
        rows |= await _by_batch(session, section, texts, models[384])
        try:
            rows |= await _by_cache(session, section, texts, models[384])
        except Skipped as why:
            section.notes.append(f"cost over entries of the cache: not measured: {why}")
    section.data["rows"] = _as_data(rows)
    return section


async def _by_request(
    session: Session, section: Section, target: Target, texts: Sequence[str], *, model: str
) -> dict[str, list[Measured]]:
    await session.fill(target.address, texts, model)
    plans = {}
    for size in _REQUEST_SIZES:
        for name, cache in (("not cached", "bypass"), ("cached", "read_write")):
            payloads = requests("gateway", texts, size, model=model, cache=cache)  # type: ignore[arg-type]
            plans[f"{size} a request, {name}"] = _closed(session, target, payloads, _CALLERS)
    rows = await session.rounds(plans)
    series = [_cpu(name, rows, _REQUEST_SIZES, f"{{}} a request, {name}") for name in ("not cached", "cached")]
    _show(section, "request size", "texts in a request", rows, series)
    return rows


async def _by_width(
    session: Session, section: Section, target: Target, texts: Sequence[str]
) -> dict[str, list[Measured]]:
    plans = {}
    for width in _WIDTHS:
        model = f"fake-{width}"
        await session.fill(target.address, texts, model)
        for name, cache in (("not cached", "bypass"), ("cached", "read_write")):
            payloads = requests("gateway", texts, _BATCH, model=model, cache=cache)  # type: ignore[arg-type]
            plans[f"{width} wide, {name}"] = _closed(session, target, payloads, _CALLERS)
    rows = await session.rounds(plans)
    series = [_cpu(name, rows, _WIDTHS, f"{{}} wide, {name}") for name in ("not cached", "cached")]
    _show(section, f"width of the vectors, {_BATCH} texts a request", "floats in a vector", rows, series)
    return rows


async def _by_batch(session: Session, section: Section, texts: Sequence[str], model: Any) -> dict[str, list[Measured]]:
    payloads = requests("gateway", texts, _BATCH)
    async with AsyncExitStack() as stack:
        plans = {}
        for size in _BATCH_SIZES:
            settings = {"batch_items": size, "batch_cost": 1_000_000, "max_queue_cost": 10_000_000}
            target = await stack.enter_async_context(session.mesh(redis="none", text_models=(model,), text=settings))
            plans[f"batches of {size}"] = _closed(session, target, payloads, _CALLERS)
        rows = await session.rounds(plans)
    _show(
        section,
        f"batch size in the encoder, {_BATCH} texts a request, not cached",
        "most texts in a batch",
        rows,
        [_cpu("not cached", rows, _BATCH_SIZES, "batches of {}")],
    )
    return rows


async def _by_cache(session: Session, section: Section, texts: Sequence[str], model: Any) -> dict[str, list[Measured]]:
    """Hits in Valkey alone, while it fills up with other vectors of the same size."""
    payloads = requests("gateway", texts, _BATCH, cache="read_write")
    most = session.options.cache_entries
    sizes = sorted({10_000, 100_000, most} if most > 100_000 else {most // 10, most})
    rows: dict[str, list[Measured]] = {}
    async with session.mesh(text_models=(model,), gateway={"cache_memory_bytes": 0}) as target:
        assert target.mesh  # noqa: S101  (this scenario never runs at --address)
        store = redis.asyncio.Redis.from_url(target.mesh.role("redis").grpc)
        async with store:
            await session.fill(target.address, texts)
            while await store.dbsize() < len(set(texts)):  # noqa: ASYNC110  (written behind the answers, by others)
                await asyncio.sleep(0.05)
            some: Any = await store.randomkey()
            value: Any = await store.get(some)
            needed = int(most * 1.2 * (await store.memory_usage(some) or 0))
            free = psutil.virtual_memory().available
            if needed * 1.5 > free:
                raise Skipped(
                    f"{most:,} entries take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free: "
                    "choose fewer with --cache-entries."
                )
            await store.config_set("maxmemory", str(max(needed * 2, 256 * 2**20)))
            for size in sizes:
                session.say(f"filling the cache with {size:,} entries")
                await _pad(store, size, value)
                plan = _closed(session, target, payloads, _CALLERS)
                # Growing is one way: these rows cannot take turns.
                rows |= await session.rounds({f"{size:,} entries in Valkey": plan})
            info = await store.info("memory")
    section.notes.append(f"Valkey with {sizes[-1]:,} entries: {info['used_memory'] / 2**20:,.0f} MiB")
    series = [_cpu("from Valkey", rows, sizes, "{:,} entries in Valkey")]
    _show(section, f"entries of the cache, {_BATCH} texts a request, all in Valkey", "entries", rows, series)
    section.tables.append(tail_table("latency of a request that Valkey answers", rows))
    return rows


async def _pad(store: Any, size: int, value: bytes) -> None:
    """Add values under keys that nobody asks for, until there are `size` entries."""
    present = await store.dbsize()
    for start in range(present, size, _PIPELINE):
        pipeline = store.pipeline(transaction=False)
        for i in range(start, min(start + _PIPELINE, size)):
            pipeline.set(f"bench:{i:013}", value)
        await pipeline.execute()


def _closed(
    session: Session, target: Target, payloads: Sequence[bytes], callers: int
) -> Callable[[], Awaitable[Measured]]:
    return lambda: session.one(target, payloads, Closed(callers))


def _cpu(name: str, rows: Mapping[str, Sequence[Measured]], sizes: Sequence[int], key: str) -> Series:
    found = [Spread.of(one.cpu_ms_per_vector for one in rows[key.format(size)]).median for size in sizes]
    return Series(name, sizes, found)


def _show(
    section: Section, title: str, label: str, rows: Mapping[str, Sequence[Measured]], series: Sequence[Series]
) -> None:
    section.tables.append(speed_table(title, rows))
    section.plots.append(Plot(title, label, "CPU ms a vector", series, log_x=True, log_y=True))


async def resources(session: Session) -> Section:
    """Starts of the whole mesh, one after the other: seconds to READY, memory before and after some work."""
    section = Section("resources", "the mesh with the text model, started again and again: time to READY, and memory.")
    texts = session.material("text").inputs
    payloads = requests("gateway", texts, _BATCH)
    ready: dict[str, list[float]] = {}
    memory: dict[str, list[tuple[float, float]]] = {}
    options = MeshOptions(text_models=(session.model("text"),))
    for turn in range(session.options.rounds):
        session.say(f"start {turn + 1} of {session.options.rounds}")
        async with _Start(options) as start:
            for role, seconds in start.ready.items():
                ready.setdefault(role, []).append(seconds)
            before = _memory(start.mesh)
            load = session.load("gateway", start.mesh.address, payloads, Closed(_CALLERS))
            await session.measure(NOBODY, load)
            for role, after in _memory(start.mesh).items():
                memory.setdefault(role, []).append((before[role], after))
    table = []
    for role, starts in ready.items():
        spread = Spread.of(starts)
        cells = [role, f"{spread.median:.2f}", f"{spread.low:.2f} to {spread.high:.2f}"]
        cells += [number(Spread.of(each[i] for each in memory[role]).median) if role in memory else "" for i in (0, 1)]
        table.append(cells)
    columns = ("", "READY after s", "starts", "MiB resident then", "MiB after load")
    section.tables.append(Table("role", columns, table))
    section.notes.append("files are in the page cache: a cold disk comes on top. States are looked at every 50 ms.")
    section.data["ready_seconds"] = ready
    section.data["resident_mib"] = {
        role: {"ready": [b for b, _ in each], "after_load": [a for _, a in each]} for role, each in memory.items()
    }
    return section


class _Start:
    """A mesh whose start is timed.

    Attributes:
        mesh: It.
        ready: Seconds from start to READY, by role, and of "all".
    """

    def __init__(self, options: MeshOptions) -> None:
        self.mesh = Mesh(options, on_change=self._watch)
        self.ready: dict[str, float] = {}
        self._begun: dict[str, float] = {}

    def _watch(self) -> None:
        now = time.monotonic()
        for role in self.mesh.roles:
            begun = self._begun.setdefault(role.name, now)
            if role.process.state == "serving":
                self.ready.setdefault(role.name, now - begun)

    async def __aenter__(self) -> Self:
        started = time.monotonic()
        await self.mesh.__aenter__()
        self.ready = {"all": time.monotonic() - started, **self.ready}
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.mesh.stop()


def _memory(mesh: Mesh) -> dict[str, float]:
    return {role: psutil.Process(pid).memory_info().rss / 2**20 for role, pid in mesh.pids.items()}


def _as_data(rows: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    return {name: [one.as_dict() for one in rounds] for name, rounds in rows.items()}
