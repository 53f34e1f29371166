"""What all scenarios share: the options, the mesh under test, rounds that take turns."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np

from embedmesh import AsyncClient, Audio, Image
from embedmesh_cli.bench import material
from embedmesh_cli.bench.bound import Bound
from embedmesh_cli.bench.load import Closed, Generator, Load, Open, Wire, merge, split
from embedmesh_cli.bench.material import Material
from embedmesh_cli.bench.measure import NOBODY, Measured, Observer
from embedmesh_cli.bench.report import Section
from embedmesh_cli.console import USAGE, UserError
from embedmesh_cli.mesh import MODALITIES, Mesh, MeshOptions, Role
from embedmesh_encoder.model import load_spec

__all__ = ["BOUND", "Options", "Plan", "Session", "Skipped", "Target"]

T = TypeVar("T")
# Measures a row once.
Plan: TypeAlias = Callable[[], Awaitable[Any]]

BOUND: Final = "in process: the bound"

# Full precision on the same backend; other batches round differently, in the seventh digit.
_SAME_COSINE: Final = 0.9999
_COMPARED: Final = 8


class Skipped(Exception):  # noqa: N818  (no error: the report says why a scenario has no figures)
    """A scenario cannot be run here; the text says why, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user chose.

    Attributes:
        seconds: Length of a measured window.
        warm_seconds: Load before it.
        rounds: How often each row is measured.
        target_ms: The p99 that the search for the highest rate allows.
        inputs: Most different inputs of a modality.
        generators: Load processes for each load.
        cache_entries: Size of the fullest cache in the scenario about cost.
        address: A mesh that runs already; None starts one.
        models: Folder by modality, where the user named one.
        texts: File of texts.
        images: Folder of pictures.
        sounds: Folder of sounds.
        peers: Folder that describes other servers.
    """

    seconds: float = 6.0
    warm_seconds: float = 1.5
    rounds: int = 5
    target_ms: float = 100.0
    inputs: int = 1000
    generators: int = 1
    cache_entries: int = 1_000_000
    address: str | None = None
    models: Mapping[str, Path] = field(default_factory=dict)
    texts: Path | None = None
    images: Path | None = None
    sounds: Path | None = None
    peers: Path | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """A mesh under test.

    Attributes:
        address: Of its gateway.
        encoders: host:port of an encoder by modality; empty where the mesh is not ours.
        observer: Sees its processes; None where the mesh is not ours.
        mesh: The processes; None where they are not ours.
    """

    address: str
    encoders: Mapping[str, str]
    observer: Observer
    mesh: Mesh | None


class Session:
    """One run of the command.

    Args:
        options: What the user chose.
        generator: Makes the load.
        starter_text: Gives the folder of the starter text model.
        say: Called with a line for people at each step.
        tell: Called before something that happens once and takes minutes.
    """

    def __init__(
        self,
        options: Options,
        generator: Generator,
        *,
        starter_text: Callable[[], Path],
        say: Callable[[str], None],
        tell: Callable[[str], None],
    ) -> None:
        self.options = options
        self.say = say
        self.tell = tell
        self._generator = generator
        self._starter_text = starter_text

    # What is measured with

    def material(self, modality: str) -> Material:
        """Inputs of a modality; Skipped where there are none."""
        options = self.options
        try:
            match modality:
                case "text":
                    return material.texts(options.texts, options.inputs)
                case "image":
                    return material.pictures(options.images, options.inputs)
                case _:
                    return material.sounds(options.sounds, options.inputs)
        except UserError as error:
            if error.status == USAGE:
                raise
            raise Skipped(str(error)) from None

    def model(self, modality: str) -> Path:
        """Folder of the model of a modality: the user's, else the starter's; Skipped where there is none."""
        if folder := self.options.models.get(modality):
            if not (folder / "model.toml").is_file():
                raise UserError(
                    f"--{modality}-model {folder}: no model there (a model folder holds a model.toml).", USAGE
                )
            return folder
        if modality == "text":
            return self._starter_text()
        try:
            towers: Any = importlib.import_module("embedmesh_cli.starter.towers")
        except ModuleNotFoundError:
            raise Skipped(
                f"this version has no starter model for {modality}: name one with --{modality}-model DIR."
            ) from None
        return Path(towers.starter_tower(modality))

    @asynccontextmanager
    async def mesh(self, *modalities: str, **changes: Any) -> AsyncIterator[Target]:
        """Start a mesh with the models of these modalities, or take the one at --address.

        Args:
            modalities: Served with the user's models, or the starter's.
            changes: As in `MeshOptions`.
        """
        if self.options.address:
            yield Target(self.options.address, {}, NOBODY, None)
            return
        changes |= {f"{modality}_models": (self.model(modality),) for modality in modalities}
        async with Mesh(MeshOptions(**changes)) as mesh:
            roles = [role for role in mesh.roles if isinstance(role, Role)]
            encoders: dict[str, str] = {}
            for role in roles:
                modality = role.name.partition("-")[0]
                if modality in MODALITIES:
                    encoders.setdefault(modality, role.grpc)
            yield Target(
                mesh.address, encoders, Observer(lambda: mesh.pids, {role.name: role.http for role in roles}), mesh
            )

    @asynccontextmanager
    async def bound(self, target: Target, modality: str, inputs: Sequence[Any]) -> AsyncIterator[Bound]:
        """Load the model of a mesh into this process, and see that both give the same vectors.

        Raises:
            Skipped: The mesh is not ours and serves another model.
            UserError: The vectors differ.
        """
        folder = self.model(modality)
        spec = await asyncio.to_thread(load_spec, folder)
        wrap: Callable[[Any], Any] = {"image": Image, "audio": Audio}.get(modality, str)
        async with AsyncClient(target.address) as client:
            offered = {model.revision: model for model in await client.list_models()}
            if spec.revision not in offered:
                raise Skipped(
                    f"the mesh at {target.address} does not serve {spec.name}@{spec.revision}, so that nothing bounds "
                    f"its figures: name the folder of its model with --{modality}-model DIR."
                )
            some = [wrap(each) for each in inputs[:_COMPARED]]
            served = (await client.embed(some, model=f"{spec.name}@{spec.revision}", cache="bypass")).vectors
        with await asyncio.to_thread(Bound, folder, modality) as bound:
            expected = await asyncio.to_thread(
                lambda: np.stack([bound.vectors(bound.prepare([each]))[0] for each in inputs[:_COMPARED]])
            )
            cosines = (served * expected).sum(1) / np.linalg.norm(served, axis=1) / np.linalg.norm(expected, axis=1)
            if not cosines.min() >= _SAME_COSINE:
                raise UserError(
                    f"the mesh's vectors are not those of the model in process: cosine {cosines.min():.6f}. "
                    "Figures of wrong vectors are worth nothing."
                )
            yield bound

    @asynccontextmanager
    async def reference(
        self, section: Section, target: Target, modality: str, inputs: Sequence[Any]
    ) -> AsyncIterator[Bound | None]:
        """As `bound`; where there is none, the section says why."""
        async with AsyncExitStack() as stack:
            try:
                bound: Bound | None = await stack.enter_async_context(self.bound(target, modality, inputs))
            except Skipped as why:
                section.notes.append(str(why))
                bound = None
            yield bound

    async def best(self, bound: Bound | None, inputs: Sequence[Any]) -> dict[str, Plan]:
        """Give the row of the bound, where there is one."""
        if bound is None:
            return {}
        prepared = await asyncio.to_thread(bound.prepare, inputs)
        return {BOUND: lambda: asyncio.to_thread(bound.best, prepared, self.options.seconds)}

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder for models that are made for one scenario."""
        with tempfile.TemporaryDirectory(prefix="embedmesh-bench-") as name:
            yield Path(name)

    # Measuring

    def load(self, wire: Wire, address: str, payloads: Sequence[bytes], pace: Closed | Open, **changes: Any) -> Load:
        """Make a load with the user's window."""
        options = self.options
        load = Load(
            wire=wire,
            address=address,
            payloads=payloads,
            pace=pace,
            seconds=options.seconds,
            warm_seconds=options.warm_seconds,
        )
        return dataclasses.replace(load, **changes)

    async def one(
        self,
        target: Target,
        payloads: Sequence[bytes],
        pace: Closed | Open,
        *,
        wire: Wire = "gateway",
        address: str = "",
    ) -> Measured:
        """Measure one load of a mesh, through its gateway unless another wire and address are given."""
        load = self.load(wire, address or target.address, payloads, pace)
        (measured,) = await self.measure(target.observer, load)
        return measured

    async def measure(self, observer: Observer, *loads: Load) -> list[Measured]:
        """Make loads at the same time; what was seen of the mesh stands in each result."""
        parts = [split(load, self.options.generators) for load in loads]
        calls, seen = await self._generator.run([part for each in parts for part in each], observer.over)
        rows = iter(calls)
        return [Measured.of(merge([next(rows) for _ in each]), seen, alone=len(loads) == 1) for each in parts]

    async def rounds(self, plans: Mapping[str, Callable[[], Awaitable[T]]]) -> dict[str, list[T]]:
        """Measure rows in turns, A B A B, so that what happens to the machine happens to all of them."""
        found: dict[str, list[T]] = {name: [] for name in plans}
        for number in range(self.options.rounds):
            for name, plan in plans.items():
                self.say(f"round {number + 1} of {self.options.rounds}: {name}")
                found[name].append(await plan())
        return found

    async def fill(self, address: str, inputs: Sequence[Any], model: str = "") -> None:
        """Embed every input once, so that the cache knows it."""
        async with AsyncClient(address) as client:
            for result in (await client.embed(inputs, model=model, timeout=600)).results:
                if result.error:
                    raise result.error
