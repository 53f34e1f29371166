"""Scenarios of conduct: who waits for whom, and what happens when there is too much."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeAlias

from embedmesh_cli.bench.load import Closed, Open
from embedmesh_cli.bench.material import requests
from embedmesh_cli.bench.measure import Latencies, Measured, Spread
from embedmesh_cli.bench.report import Check, Section, milliseconds, number, percent, speed_table, tail_table
from embedmesh_cli.bench.session import BOUND, Session
from embedmesh_encoder.backend.fake import write_model

__all__ = ["fairness", "overload"]

_Rows: TypeAlias = dict[str, list[Measured]]

# Interactive callers ask for one text, this part of what bulk work alone gets done.
_INTERACTIVE_SHARE = 0.05
_CHUNK, _WINDOW = 16, 8
# So many interactive callers of so many texts leave nothing over.
_ENDLESS_CALLERS, _ENDLESS_TEXTS = 32, 4
_KEPT_BULK = 0.7
_OVER = 3.0
# The queue of the overload scenario holds the work of so many seconds.
_QUEUE_SECONDS = 1.0
# Of the queue: inputs that fit into a batch overtake larger ones that do not.
_OVERTAKING = 0.1
_KEPT_GOODPUT = 0.95
_REFUSED_SECONDS = 0.005
_CALL = 4
# A batch of 2 ms and 0.02 ms a token: the core is free for the server around it.
_BASE_MS, _UNIT_MS = 2.0, 0.02


async def fairness(session: Session) -> Section:
    """A bulk stream that fills an encoder, and people who ask for single texts meanwhile."""
    section = Section(
        "fairness",
        "a bulk stream that fills the encoder, single interactive texts (Poisson) meanwhile; and each alone.",
    )
    material = session.material("text")
    section.notes.append(material.about())
    texts = material.inputs
    async with (
        session.mesh("text", redis="none") as target,
        session.bound(target, "text", texts) as bound,
    ):
        single = requests("gateway", texts, 1, priority="interactive")
        many = requests("gateway", texts, _ENDLESS_TEXTS, priority="interactive")
        cool = session.options.seconds / 2
        chunks = requests("stream", texts, _CHUNK, priority="bulk")
        bulk = session.load("stream", target.address, chunks, Closed(_WINDOW), cool_seconds=cool)
        (first,) = await session.measure(target.observer, bulk)
        rate = max(1.0, _INTERACTIVE_SHARE * first.vectors)
        people = session.load("gateway", target.address, single, Open(rate, seed=1), cool_seconds=cool)
        endless = session.load("gateway", target.address, many, Closed(_ENDLESS_CALLERS), cool_seconds=cool)
        rows = await session.rounds(
            await session.best(bound, texts)
            | {
                "interactive alone": lambda: session.measure(target.observer, people),
                "bulk alone": lambda: session.measure(target.observer, bulk),
                "both": lambda: session.measure(target.observer, people, bulk),
                "endless interactive, and bulk": lambda: session.measure(target.observer, endless, bulk),
            }
        )
    flat = {
        f"interactive alone, {number(rate)} texts/s": [each[0] for each in rows["interactive alone"]],
        "bulk alone": [each[0] for each in rows["bulk alone"]],
        "interactive, with bulk": [each[0] for each in rows["both"]],
        "bulk, with interactive": [each[1] for each in rows["both"]],
        f"endless interactive, {_ENDLESS_CALLERS} callers": [each[0] for each in rows["endless interactive, and bulk"]],
        "bulk, with endless interactive": [each[1] for each in rows["endless interactive, and bulk"]],
    }
    alone, solo, with_bulk, kept, _, starved = flat.values()
    unloaded, loaded = (Latencies.merged(one.latency for one in each).at(99) for each in (alone, with_bulk))
    batch = Spread.of(one.seen.batch_seconds for one in solo).median
    limit = 2 * unloaded + batch
    part, least = (_rate(each) / _rate(solo) for each in (kept, starved))
    section.tables += [
        speed_table("throughput", {BOUND: rows[BOUND], **flat}, BOUND),
        tail_table("latency of a call", flat),
    ]
    section.checks += [
        Check(
            f"interactive p99 under bulk within twice its unloaded value and one batch, {milliseconds(limit)} ms",
            f"{milliseconds(loaded)} ms (unloaded {milliseconds(unloaded)}, a batch {milliseconds(batch)})",
            loaded <= limit,
        ),
        Check(f"bulk keeps {percent(_KEPT_BULK)} of its solo rate", f"{percent(part)}", part >= _KEPT_BULK),
        Check("bulk goes on under endless interactive work", f"{percent(least)} of its solo rate", least > 0),
    ]
    section.data["rows"] = {name: [one.as_dict() for one in each] for name, each in flat.items()}
    return section


async def overload(session: Session) -> Section:
    """Three times more than the mesh can do, from callers who do not wait: the model, and one of fixed service time."""
    section = Section(
        "overload",
        f"{_OVER:g} times the capacity offered in an open loop; the queue holds {_QUEUE_SECONDS:g} s of work. Once "
        "with the model, and once with one that only waits, so that the server has the processor for itself.",
    )
    material = session.material("text")
    section.notes.append(material.about())
    rows: _Rows = {}
    with session.folder() as folder:
        write_model(folder, base_ms=_BASE_MS, ms_per_unit=_UNIT_MS)
        for name, model in (("model", session.model("text")), ("fixed service time", folder)):
            rows |= await _overload(session, section, name, model, material.inputs)
    section.tables += [speed_table("goodput", rows), tail_table("latency of accepted calls", rows)]
    section.data["rows"] = {name: [one.as_dict() for one in each] for name, each in rows.items()}
    return section


async def _overload(session: Session, section: Section, name: str, model: Path, texts: Any) -> _Rows:
    payloads = requests("gateway", texts, _CALL)

    async with session.mesh(redis="none", text_models=(model,)) as target:
        session.say(f"{name}: capacity")
        first = await session.one(target, payloads, Closed(32))
    queue = max(1, round(first.units * _QUEUE_SECONDS))
    # As many as half fill the queue: enough for full batches, and nobody is refused.
    callers = max(4, round(queue / 2 / (first.units / first.answered)))
    async with session.mesh(redis="none", text_models=(model,), text={"max_queue_cost": queue}) as target:
        capacity = (await session.one(target, payloads, Closed(callers))).answered
        found = await session.rounds(
            {
                f"{name}, capacity": lambda: session.one(target, payloads, Closed(callers)),
                f"{name}, overloaded": lambda: session.one(target, payloads, Open(_OVER * capacity, seed=1)),
            }
        )
    able, overloaded = found.values()
    goodput = _rate(overloaded) / _rate(able)
    refused = Latencies.merged(one.refusal for one in overloaded)
    # What waits, what overtakes because it fits where that does not, what runs, and what is being made ready; at the
    # rate of that very round, because how much of the capacity is left is the check before.
    limits = [(1 + _OVERTAKING) * queue / (one.units or math.nan) + 3 * one.seen.batch_seconds for one in overloaded]
    waited, limit = max(
        zip((one.latency.at(99) for one in overloaded), limits, strict=True), key=lambda pair: pair[0] / pair[1]
    )
    section.checks += [
        Check(
            f"{name}: goodput at least {percent(_KEPT_GOODPUT)} of capacity",
            f"{percent(goodput)} ({number(_rate(overloaded))} of {number(_rate(able))} texts/s)",
            goodput >= _KEPT_GOODPUT,
        ),
        Check(
            f"{name}: accepted p99 of each round within 1.1 full queues and three batches, {milliseconds(limit)} ms",
            f"{milliseconds(waited)} ms",
            waited <= limit,
        ),
        Check(
            f"{name}: the excess is refused in {_REFUSED_SECONDS * 1e3:g} ms (p99)",
            f"p50 {milliseconds(refused.at(50))} ms, p99 {milliseconds(refused.at(99))} ms, {len(refused)} calls"
            if len(refused)
            else "nothing was refused: so much could not be offered here",
            refused.at(99) <= _REFUSED_SECONDS,
        ),
    ]
    others = {code for one in overloaded for code in one.codes} - {"RESOURCE_EXHAUSTED"}
    section.checks.append(
        Check(f"{name}: nothing ends in another way", ", ".join(sorted(others)) or "none did", not others)
    )
    return found


def _rate(rounds: list[Measured]) -> float:
    return Spread.of(one.vectors for one in rounds).median
