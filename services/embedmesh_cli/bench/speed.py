"""Scenarios of speed: throughput of each modality, the cache, one caller alone, latency at given rates."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from itertools import count, islice
from typing import Any, Final

from embedmesh_cli.bench.bound import Bound
from embedmesh_cli.bench.load import Closed, Open, Wire
from embedmesh_cli.bench.material import chunks, requests, unseen
from embedmesh_cli.bench.measure import PERCENTILES, Latencies, Measured, Spread
from embedmesh_cli.bench.report import Plot, Section, Series, milliseconds, number, speed_table, tail_table
from embedmesh_cli.bench.search import highest_rate
from embedmesh_cli.bench.session import BOUND, Plan, Session, Target

__all__ = ["audio", "cached", "idle", "image", "latency", "text"]

# Of one modality
_BATCH: Final = 32
_CALLERS, _SINGLES, _WINDOW = 4, 32, 8
_STREAMED: Final = 64
# Enough to keep an encoder busy with single texts.
_MANY: Final = 64


async def text(session: Session) -> Section:
    """Texts through gateway and encoder, nothing cached, against the model alone in one process."""
    return await _modality(session, "text")


async def image(session: Session) -> Section:
    """Pictures, likewise."""
    return await _modality(session, "image")


async def audio(session: Session) -> Section:
    """Sounds, likewise."""
    return await _modality(session, "audio")


async def _modality(session: Session, modality: str) -> Section:
    section = Section(
        modality, f"{modality} inputs, nothing cached, in closed loops; the bound is the model in one process."
    )
    material = session.material(modality)
    section.notes.append(material.about())
    inputs = material.inputs
    async with (
        session.mesh(modality, redis="none") as target,
        session.reference(section, target, modality, inputs) as bound,
    ):
        plans = await session.best(bound, inputs)
        if bound is not None:
            plans |= await _in_process(session, section, bound, modality, inputs)
        plans |= _mesh_plans(session, target, modality, inputs)
        rows = await session.rounds(plans)
    section.tables.append(speed_table(f"{modality}, nothing cached", rows, BOUND))
    section.data["rows"] = _as_data(rows)
    return section


async def _in_process(
    session: Session, section: Section, bound: Bound, modality: str, inputs: Sequence[Any]
) -> dict[str, Plan]:
    """Other ways to use the model without a server."""
    seconds = session.options.seconds
    prepared = await asyncio.to_thread(bound.prepare, inputs)
    section.notes.append(f"{sum(one.units for one in prepared) / len(prepared):.1f} units an input")
    plans: dict[str, Plan] = {
        "in process, one batch at a time": lambda: asyncio.to_thread(bound.one_batch_at_a_time, prepared, seconds),
        "in process, one by one": lambda: asyncio.to_thread(bound.one_by_one, prepared, seconds),
        f"in process, {_BATCH} prepared, then embedded": lambda: asyncio.to_thread(
            bound.with_preparation, inputs, seconds, _BATCH
        ),
    }
    if modality == "text":
        plans[f"in process, padded batches of {_BATCH} as they come"] = lambda: asyncio.to_thread(
            bound.as_they_come, prepared, seconds, _BATCH
        )
    return plans


def _mesh_plans(session: Session, target: Target, modality: str, inputs: Any) -> dict[str, Plan]:
    """The ways in which callers use a mesh."""

    def through(wire: Wire, address: str, size: int, callers: int) -> Plan:
        payloads = requests(wire, inputs, size, modality=modality)
        return lambda: session.one(target, payloads, Closed(callers), wire=wire, address=address)

    plans = {
        f"mesh, {_CALLERS} callers of {_BATCH}": through("gateway", target.address, _BATCH, _CALLERS),
        f"mesh, {_SINGLES} callers of 1": through("gateway", target.address, 1, _SINGLES),
        f"mesh, a stream of {_STREAMED}, {_WINDOW} ahead": through("stream", target.address, _STREAMED, _WINDOW),
    }
    if modality in target.encoders:
        wire: Any = modality
        address = target.encoders[modality]
        plans[f"encoder alone, {_CALLERS} callers of {_BATCH}"] = through(wire, address, _BATCH, _CALLERS)
    return plans


async def cached(session: Session) -> Section:
    """Texts that the cache knows, half knows, or does not know."""
    section = Section("cached", "texts of which the cache knows all, some or none; from memory, and from Valkey alone.")
    material = session.material("text")
    section.notes.append(material.about())
    texts = material.inputs
    # Others than in any earlier run, which a cache might remember.
    seeds = count(time.time_ns())
    async with session.mesh("text") as target, session.reference(section, target, "text", texts) as bound:
        await session.fill(target.address, texts)
        probe = requests("gateway", texts, _BATCH)
        capacity = (await session.one(target, probe, Closed(_CALLERS))).vectors

        def known(size: int, callers: int, at: Target) -> Plan:
            payloads = requests("gateway", texts, size, cache="read_write")
            return lambda: session.one(at, payloads, Closed(callers))

        def partly(share: float) -> Plan:
            """Each request holds so many known texts; the others were never seen before."""
            new = max(1, round(_BATCH * (1 - share)))
            # As many as the encoder could embed in the time, and half as many again.
            length = session.options.seconds + session.options.warm_seconds
            enough = 8 + math.ceil(1.5 * capacity * length / new)

            async def plan() -> Measured:
                fresh = unseen(texts, next(seeds))
                old = chunks(texts, _BATCH - new) if new < _BATCH else [[]]
                mixed = [[*islice(fresh, new), *old[i % len(old)]] for i in range(enough)]
                payloads = [requests("gateway", each, _BATCH, cache="read_write")[0] for each in mixed]
                return await session.one(target, payloads, Closed(_CALLERS))

            return plan

        plans = await session.best(bound, texts) | {
            f"no cache, {_CALLERS} callers of {_BATCH}": lambda: session.one(target, probe, Closed(_CALLERS)),
            "none known": partly(0),
            "half known": partly(0.5),
            "9 of 10 known": partly(0.9),
            f"all known, {_CALLERS} callers of {_BATCH}": known(_BATCH, _CALLERS, target),
            f"all known, {_SINGLES} callers of 1": known(1, _SINGLES, target),
            "all known, 1 caller of 32": known(_BATCH, 1, target),
            "all known, 1 caller of 1": known(1, 1, target),
        }
        if target.mesh is None:
            rows = await session.rounds(plans)
        else:
            async with session.mesh("text", gateway={"cache_memory_bytes": 0}) as valkey:
                await session.fill(valkey.address, texts)
                plans[f"all in Valkey, {_CALLERS} callers of {_BATCH}"] = known(_BATCH, _CALLERS, valkey)
                plans["all in Valkey, 1 caller of 32"] = known(_BATCH, 1, valkey)
                plans["all in Valkey, 1 caller of 1"] = known(1, 1, valkey)
                rows = await session.rounds(plans)
    section.tables.append(speed_table("texts and the cache", rows, BOUND))
    section.tables.append(tail_table("latency of a call", {name: each for name, each in rows.items() if name != BOUND}))
    section.data["rows"] = _as_data(rows)
    return section


async def idle(session: Session) -> Section:
    """One text at a time, nobody else: what the way through the mesh costs."""
    section = Section("idle", "one text at a time and nobody else: the way through the mesh, less the model itself.")
    material = session.material("text")
    texts = material.inputs[:64]
    seconds = session.options.seconds
    async with session.mesh("text") as target, session.reference(section, target, "text", texts) as bound:
        await session.fill(target.address, texts)

        def through(wire: Wire, address: str, **changes: Any) -> Plan:
            payloads = requests(wire, texts, 1, **changes)
            return lambda: session.one(target, payloads, Closed(1), wire=wire, address=address)

        plans: dict[str, Plan] = {}
        if bound is not None:
            plans["in process"] = lambda: asyncio.to_thread(bound.alone, texts, seconds)
        plans["gateway, nothing cached"] = through("gateway", target.address)
        if target.encoders:
            plans["encoder alone"] = through("text", target.encoders["text"])
        plans["gateway, from the cache"] = through("gateway", target.address, cache="read_write")
        rows = await session.rounds(plans)
    section.tables.append(tail_table(f"{len(texts)} texts in turn, one at a time", rows))
    medians = {name: _whole(rounds).at(50) for name, rounds in rows.items()}
    if "in process" in medians:
        more = {name: at - medians["in process"] for name, at in medians.items() if name != "in process"}
        section.notes += [
            f"p50 of {name} less that in process: {milliseconds(extra)} ms" for name, extra in more.items()
        ]
        section.data["p50_less_bound_ms"] = {name: extra * 1e3 for name, extra in more.items()}
    section.data["rows"] = _as_data(rows)
    return section


async def latency(session: Session) -> Section:
    """Texts at given rates, whatever the answers do; and the highest rate within a limit of p99."""
    section = Section("latency", "single texts at given rates (open loop: latency counts from when a call was due).")
    material = session.material("text")
    section.notes.append(material.about())
    limit = session.options.target_ms / 1e3
    payloads = requests("gateway", material.inputs, 1)
    seeds = count(1)
    async with (
        session.mesh("text", redis="none") as target,
        session.reference(section, target, "text", material.inputs) as bound,
    ):

        async def at(rate: float, *, poisson: bool = True) -> Measured:
            return await session.one(target, payloads, Open(rate, poisson, next(seeds)))

        def plan(share: float, *, poisson: bool = True) -> Plan:
            return lambda: at(share * capacity, poisson=poisson)

        many = f"{_MANY} callers of 1, closed loop"
        able = await session.rounds(
            await session.best(bound, material.inputs) | {many: lambda: session.one(target, payloads, Closed(_MANY))}
        )
        capacity = Spread.of(each.answered for each in able[many]).median
        plans = {f"Poisson, {share:.0%} of capacity": plan(share) for share in (0.2, 0.5, 0.7, 0.8, 0.9)}
        plans["constant, 70% of capacity"] = plan(0.7, poisson=False)
        rows = await session.rounds(plans)

        async def probe(rate: float) -> _Kept:
            session.say(f"search: {rate:.0f} texts/s")
            return _Kept(await at(rate), rate, limit)

        found = await highest_rate(probe, start=max(1.0, capacity / 2))
    section.tables.append(speed_table("capacity", able, BOUND))
    section.tables.append(tail_table("single texts through the gateway, nothing cached", rows))
    reached = f"{number(found.rate)} texts/s ({found.rate / capacity:.0%} of capacity)"
    more = "; perhaps more, the load generator was late where it broke" if found.generator_late else ""
    section.notes.append(f"highest Poisson rate with p99 within {limit * 1e3:.0f} ms: {reached}{more}")
    poisson = {name: _whole(rounds) for name, rounds in rows.items() if name.startswith("Poisson")}
    offered = [sum(each.offered for each in rows[name]) / len(rows[name]) for name in poisson]
    section.plots.append(
        Plot(
            "latency over rate",
            "texts offered a second",
            "milliseconds",
            [Series(f"p{p:g}", offered, [whole.at(p) * 1e3 for whole in poisson.values()]) for p in PERCENTILES],
            log_y=True,
        )
    )
    tail = (50, 75, 90, 95, 99, 99.5, 99.9, 99.99)
    section.plots.append(
        Plot(
            "the tail",
            "one call in so many is slower",
            "milliseconds",
            [
                Series(
                    name,
                    [100 / (100 - p) for p in tail if whole.knows(p)],
                    [whole.at(p) * 1e3 for p in tail if whole.knows(p)],
                )
                for name, whole in poisson.items()
            ],
            log_x=True,
            log_y=True,
        )
    )
    section.data["rows"] = _as_data({**able, **rows})
    section.data["capacity_texts_per_second"] = capacity
    section.data["highest_rate"] = {
        "p99_limit_ms": limit * 1e3,
        "texts_per_second": found.rate,
        "broken_at": found.broken,
        "generator_late_there": found.generator_late,
    }
    return section


class _Kept:
    """A try of the search: p99 within the limit, all answered, and the rate was really offered."""

    def __init__(self, measured: Measured, rate: float, limit: float) -> None:
        self.generator_late = measured.generator_late
        self.kept = not measured.codes and measured.latency.at(99) <= limit and measured.offered >= 0.8 * rate


def _whole(rounds: Any) -> Latencies:
    return Latencies.merged(each.latency if isinstance(each, Measured) else each for each in rounds)


def _as_data(rows: Any) -> dict[str, Any]:
    return {name: [each.as_dict() for each in rounds] for name, rounds in rows.items()}
