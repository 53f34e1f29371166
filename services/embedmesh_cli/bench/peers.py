"""Other servers with the same weights, started for real in environments of their own, measured in turns with a mesh.

A folder describes them in `peers.toml`, a table for each:

    [name]
    about = "what it is"                      # for the report
    requirements = "name.txt"                 # pinned; installed with pip into an environment of its own
    command = ["{bin}/server", "{model}", "--port", "{port}"]    # also {folder}: of peers.toml
    health = "/health"                        # answers 200 once it serves
    path = "/embeddings"                      # takes a POST
    wire = "openai"                           # of what shape: default; or "kserve", input "text", answer in binary
    body = { model = "minilm" }               # beside the texts

The model is the folder that its authors published (sentence-transformers layout); the mesh may have the same weights
on another backend (--text-model). Before anything is timed, the peer's vectors are compared with those of the mesh.
Whoever is not being measured is stopped (SIGSTOP), because some servers spend processor time on waiting. Answers of
peers are counted, not decoded, which favours them.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np

from embedmesh import AsyncClient
from embedmesh_cli.bench.load import Closed, Open
from embedmesh_cli.bench.material import chunks, json_requests, json_vectors, kserve_requests, kserve_vectors, requests
from embedmesh_cli.bench.measure import Measured, Observer, family
from embedmesh_cli.bench.report import Section, speed_table, tail_table
from embedmesh_cli.bench.session import BOUND, Plan, Session, Skipped, Target
from embedmesh_cli.console import USAGE, UserError
from embedmesh_cli.process import MeshError, Process
from embedmesh_cli.starter import StarterError, cache_folder
from embedmesh_cli.starter.minilm import original_model

__all__ = ["Spec", "environment", "peers", "read_specs"]

_FILE: Final = "peers.toml"
_SAME_COSINE: Final = 0.9999
_START_SECONDS: Final = 600.0
_BATCH, _CALLERS, _SINGLES = 32, 4, 32
# Of what the slowest can do, offered to all as single texts.
_EASY: Final = 0.5


_Wire = Literal["openai", "kserve"]


@dataclass(frozen=True, slots=True)
class Spec:
    """A table of peers.toml."""

    name: str
    about: str
    requirements: Path
    command: Sequence[str]
    health: str
    path: str
    body: Mapping[str, Any]
    wire: _Wire = "openai"

    def requests(self, texts: Sequence[str], size: int) -> list[bytes]:
        """Serialise requests of `size` texts each."""
        if self.wire == "kserve":
            return kserve_requests(texts, size, self.body, "text")
        return json_requests(texts, size, self.body, "input")


class _Peer:
    """One other server that runs.

    Attributes:
        spec: What it is.
        address: host:port.
        observer: Sees its processes.
    """

    def __init__(self, spec: Spec, port: int, pid: int) -> None:
        self.spec = spec
        self.address = f"127.0.0.1:{port}"
        self.observer = Observer(lambda: {spec.name: pid}, {})
        self._pid = pid

    def pause(self) -> None:
        """Take the processor away from it."""
        for each in family(self._pid):
            each.suspend()

    def resume(self) -> None:
        """Give it back."""
        for each in reversed(family(self._pid)):
            each.resume()

    async def vectors(self, texts: Sequence[str]) -> Any:
        """Embed some texts: float32 [n, d]."""
        (payload,) = self.spec.requests(texts, len(texts))

        def post() -> Any:
            request = urllib.request.Request(
                f"http://{self.address}{self.spec.path}", payload, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                body = answer.read()
                if self.spec.wire == "kserve":
                    return kserve_vectors(body, int(answer.headers["Inference-Header-Content-Length"]))
                return json_vectors(body)

        return await asyncio.to_thread(post)


async def peers(session: Session) -> Section:
    """Start each peer and a mesh, see that all give the same vectors, and measure them in turns."""
    section = Section("peers", "other servers with the same weights, texts and callers, in turns with a mesh.")
    if session.options.peers is None:
        raise Skipped(f"name the folder of a {_FILE} with --peers DIR (in a checkout: tests/bench/peers).")
    folder = session.options.peers.resolve()
    if session.options.address:
        raise UserError("peers: compares servers on this machine; leave --address out.", USAGE)
    specs = read_specs(folder)
    material = session.material("text")
    section.notes.append(material.about())
    section.notes += [f"{spec.name}: {spec.about}" for spec in specs]
    try:
        original = await asyncio.to_thread(original_model, cache_folder() / "peers", session.tell)
    except StarterError as error:
        raise UserError(f"{error}.") from None
    async with AsyncExitStack() as stack:
        target = await stack.enter_async_context(session.mesh("text", redis="none"))
        bound = await stack.enter_async_context(session.bound(target, "text", material.inputs))
        section.notes.append(f"embedmesh: {bound.about}")
        running = [await stack.enter_async_context(_running(session, spec, folder, original)) for spec in specs]
        await _compare(target, running, material.inputs[:_BATCH])
        for peer in running:
            stack.callback(peer.resume)  # or it could not end
            peer.pause()
        prepared = await asyncio.to_thread(bound.prepare, material.inputs)
        units = [one.units for one in prepared]
        plans = await session.best(bound, material.inputs)
        for size, callers in ((_BATCH, _CALLERS), (1, _SINGLES)):
            plans |= _plans(session, target, running, material.inputs, units, size, Closed(callers))
        rows = await session.rounds(plans)
        singles = [rounds for name, rounds in rows.items() if name.endswith(f"{_SINGLES} callers of 1")]
        rate = max(1.0, _EASY * min(np.median([one.answered for one in rounds]) for rounds in singles))
        easy = await session.rounds(
            _plans(session, target, running, material.inputs, units, 1, Open(float(rate), seed=1))
        )
    section.tables.append(speed_table("texts, nothing cached", rows, BOUND))
    section.tables.append(tail_table("latency of a single text, Poisson, the same rate for all", easy))
    section.data["rows"] = {name: [one.as_dict() for one in rounds] for name, rounds in {**rows, **easy}.items()}
    return section


def _plans(  # noqa: PLR0917  (all of them say what is measured)
    session: Session, target: Target, running: Sequence[_Peer], texts: Any, units: Sequence[int], size: int, pace: Any
) -> dict[str, Plan]:
    """The same load for the mesh and for every peer."""
    what = f"{pace.callers} callers of {size}" if isinstance(pace, Closed) else f"{pace.rate:.0f} texts/s"
    payloads = requests("gateway", texts, size)
    plans: dict[str, Plan] = {f"embedmesh, {what}": lambda: session.one(target, payloads, pace)}
    sizes = [sum(each) for each in chunks(units, size)]

    def plan(peer: _Peer) -> Plan:
        bodies = peer.spec.requests(texts, size)
        load = replace(session.load("http", peer.address, bodies, pace), path=peer.spec.path, units=sizes)

        async def measured() -> Measured:
            peer.resume()
            try:
                (found,) = await session.measure(peer.observer, load)
            finally:
                peer.pause()
            return found

        return measured

    return plans | {f"{peer.spec.name}, {what}": plan(peer) for peer in running}


async def _compare(target: Target, running: Sequence[_Peer], texts: Sequence[str]) -> None:
    async with AsyncClient(target.address) as client:
        ours = (await client.embed(list(texts), cache="bypass")).vectors
    for peer in running:
        theirs = await peer.vectors(texts)
        cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
        if not cosines.min() >= _SAME_COSINE:
            raise UserError(f"{peer.spec.name} gives other vectors: cosine {cosines.min():.6f}. It is not compared.")


def read_specs(folder: Path) -> list[Spec]:
    """Read peers.toml; raises UserError where it is not as described above."""
    try:
        tables = tomllib.loads((folder / _FILE).read_text(encoding="utf-8"))
        specs = [
            Spec(name=name, **{**table, "requirements": folder / table["requirements"]})
            for name, table in tables.items()
        ]
    except OSError as error:
        raise UserError(f"--peers {folder}: cannot read {_FILE}: {error.strerror}.", USAGE) from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"--peers {folder}: {_FILE} is not as it should be: {error}.", USAGE) from None
    if odd := {spec.wire for spec in specs} - set(get_args(_Wire)):
        known = ", ".join(get_args(_Wire))
        raise UserError(f"--peers {folder}: {_FILE}: wire is one of {known}, not {', '.join(odd)}.", USAGE)
    return specs


@asynccontextmanager
async def _running(session: Session, spec: Spec, folder: Path, model: Path) -> AsyncIterator[_Peer]:
    home = await asyncio.to_thread(environment, spec, session.tell)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    places = {"bin": home / "bin", "model": model, "port": port, "folder": folder}
    words = [word.format(**places) for word in spec.command]

    async def is_serving(_: int) -> bool:
        return await asyncio.to_thread(_healthy, f"http://127.0.0.1:{port}{spec.health}")

    session.say(f"starting {spec.name}")
    with session.folder() as logs:
        # Nothing is fetched: the model is a folder, and a server that asks a hub must not make us wait.
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        process = Process(
            spec.name, command=lambda: words, is_serving=is_serving, log=logs / f"{spec.name}.log", env=env
        )
        try:
            await process.start(_START_SECONDS)
        except MeshError as error:
            raise UserError(str(error)) from None
        try:
            assert process.pid is not None  # noqa: S101  (it has just answered)
            yield _Peer(spec, port, process.pid)
        finally:
            await process.stop(10.0)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310  (our own child on this machine)
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def environment(spec: Spec, say: Callable[[str], None]) -> Path:
    """Make the environment of a peer in the cache folder, or find the one made from the same requirements."""
    pins = spec.requirements.read_bytes()
    tag = hashlib.sha256(pins + sys.version.encode()).hexdigest()[:12]
    folder = cache_folder() / "peers" / f"{spec.name}-{tag}"
    made = folder / "made"
    if made.exists():
        return folder
    say(f"installing {spec.name} into {folder}: minutes, and gigabytes, once")
    # The environment needs no pip of its own: ours installs into it.
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "--quiet"]
    pip += ["--disable-pip-version-check", "--requirement", str(spec.requirements)]
    try:
        for command in ([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)], pip):
            subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603  (pip, with pinned names)
    except subprocess.CalledProcessError as error:
        last = (error.stderr or error.stdout).strip().splitlines()[-3:]
        raise UserError(
            f"{spec.name} could not be installed from {spec.requirements}: {' '.join(last)}. It needs the Python that "
            "its pins are for, and a package index that pip can reach."
        ) from None
    made.touch()
    return folder
