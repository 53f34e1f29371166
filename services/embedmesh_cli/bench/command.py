"""`embedmesh bench`: options, scenarios in turn, report."""

from __future__ import annotations

import asyncio
import importlib
import shlex
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from embedmesh import AsyncClient
from embedmesh.errors import EmbedMeshError
from embedmesh_cli.console import FAILED, USAGE, UserError, explain, starter_model
from embedmesh_cli.mesh import MeshError

__all__ = ["EXAMPLES", "bench"]

EXAMPLES = """\b
Examples:
  embedmesh bench                          # the standard set, about an hour
  embedmesh bench text cached --rounds 3
  embedmesh bench latency --address mesh.example:50050 --target-ms 50
"""


@dataclass(frozen=True, slots=True)
class _Scenario:
    """One of the words that `embedmesh bench` takes."""

    module: str
    about: str
    anywhere: bool = False  # can be run against a mesh that is not ours
    standard: bool = True


_SCENARIOS: Final = {
    "text": _Scenario("speed", "texts, nothing cached: throughput against the model in one process", anywhere=True),
    "image": _Scenario("speed", "pictures, likewise", anywhere=True),
    "audio": _Scenario("speed", "sounds, likewise", anywhere=True),
    "cached": _Scenario("speed", "texts of which the cache knows all, some or none", anywhere=True),
    "idle": _Scenario("speed", "one text at a time: what the way through the mesh costs", anywhere=True),
    "latency": _Scenario("speed", "percentiles at given rates; the highest rate within --target-ms", anywhere=True),
    "fairness": _Scenario("conduct", "bulk and interactive work at the same time"),
    "overload": _Scenario("conduct", "three times more than the mesh can do"),
    "scaling": _Scenario("growth", "1, 2 and 4 replicas of an encoder with a fixed service time"),
    "cost": _Scenario("growth", "CPU over request size, batch size, width, entries of the cache"),
    "resources": _Scenario("growth", "memory, and the time from start to READY"),
    "library": _Scenario("library", "transformers in process beside the mesh, on a GPU where one is", standard=False),
    "peers": _Scenario("peers", "other servers with the same model, side by side", standard=False),
}


def bench(
    *,
    scenarios: Annotated[
        list[str] | None, typer.Argument(metavar="SCENARIO...", help="What to measure; the standard set unless given.")
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="List the scenarios.")] = False,
    seconds: Annotated[float, typer.Option(min=0.1, metavar="N", help="Length of a measured window.")] = 6.0,
    warm_seconds: Annotated[float, typer.Option(min=0.0, metavar="N", help="The same load before it.")] = 1.5,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Windows of each row; rows take turns.")] = 5,
    target_ms: Annotated[
        float, typer.Option(min=0.1, metavar="N", help="The p99 allowed when the highest rate is searched.")
    ] = 100.0,
    inputs: Annotated[int, typer.Option(min=1, metavar="N", help="Most different inputs of a modality.")] = 1000,
    generators: Annotated[int, typer.Option(min=1, metavar="N", help="Processes that make each load.")] = 1,
    cache_entries: Annotated[
        int, typer.Option(min=1000, metavar="N", help="Entries of the fullest cache in `cost` (about 2 GB a million).")
    ] = 1_000_000,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Load this mesh instead of starting one; CPU and batches are not seen then."
        ),
    ] = None,
    text_model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of a text model; the starter's unless given.")
    ] = None,
    image_model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of an image model; the starter's unless given.")
    ] = None,
    audio_model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of an audio model; the starter's unless given.")
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One text a line. Default: Debian's fortunes, else the demo's definitions."),
    ] = None,
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of pictures; the demo's.")] = None,
    sounds: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of sounds; the demo's.")] = None,
    peers: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with peers.toml, for `peers`: tests/bench/peers.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write report.json, report.txt and report.html here.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="End with 1 when something promised does not hold.")] = False,
) -> None:
    """Measure a mesh: throughput, latency, fairness, overload, scaling, resources.

    Starts a mesh of its own on this machine for each scenario, with load from processes of their own, and
    puts next to every figure what the model alone does in one process. Leave the machine alone meanwhile.
    """
    if list_only:
        for name, scenario in _SCENARIOS.items():
            typer.echo(f"{name:10} {scenario.about}{'' if scenario.standard else ' (only when named)'}")
        return
    chosen = _choose(scenarios or [], address)
    try:
        from embedmesh_cli.bench.session import Options  # noqa: PLC0415  (needs the extra `bench`)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        raise UserError(f"{name} is missing: `pip install 'embedmesh[bench]'` brings it.") from None
    given = {"text": text_model, "image": image_model, "audio": audio_model}
    options = Options(
        seconds=seconds,
        warm_seconds=warm_seconds,
        rounds=rounds,
        target_ms=target_ms,
        inputs=inputs,
        generators=generators,
        cache_entries=cache_entries,
        address=address,
        models={modality: folder for modality, folder in given.items() if folder},
        texts=texts,
        images=images,
        sounds=sounds,
        peers=peers,
    )
    try:
        held = asyncio.run(_run(chosen, options, output))
    except MeshError as error:
        raise UserError(str(error)) from None
    except EmbedMeshError as error:
        raise explain(error, address or "the mesh under test") from None
    if check and not held:
        raise typer.Exit(FAILED)


def _choose(names: Sequence[str], address: str | None) -> list[str]:
    if unknown := [name for name in names if name not in _SCENARIOS]:
        raise UserError(f"no scenario {', '.join(unknown)}; there is {', '.join(_SCENARIOS)}.", USAGE)
    if not address:
        return list(names) or [name for name, scenario in _SCENARIOS.items() if scenario.standard]
    own = [name for name in names if not _SCENARIOS[name].anywhere]
    if own:
        raise UserError(f"{', '.join(own)}: needs a mesh of its own, leave --address out.", USAGE)
    return list(names) or ["text", "latency"]


async def _run(names: Sequence[str], options: Any, output: Path | None) -> bool:
    from embedmesh_cli.bench.load import Generator  # noqa: PLC0415  (as above)
    from embedmesh_cli.bench.report import Report, Section, describe_machine, text_of  # noqa: PLC0415
    from embedmesh_cli.bench.session import Session, Skipped  # noqa: PLC0415

    console, progress = Console(), Console(stderr=True)

    def say(line: str) -> None:
        # On a terminal a spinner moves beside the step; elsewhere steps would only bury the report.
        if progress.is_terminal:
            status.update(line)

    def tell(line: str) -> None:
        progress.print(line, markup=False, highlight=False, soft_wrap=True)

    report = Report(shlex.join(["embedmesh", *sys.argv[1:]]), describe_machine())
    console.print("\n".join(report.headline()), markup=False, highlight=False, soft_wrap=True)
    if options.address:
        async with AsyncClient(options.address, retries=1) as client:
            await client.list_models(timeout=10)  # a missing mesh is told at once
    status = progress.status("")
    async with Generator() as generator:
        session = Session(options, generator, starter_text=lambda: starter_model("text", progress), say=say, tell=tell)
        for name in names:
            scenario = _SCENARIOS[name]
            module = importlib.import_module(f"embedmesh_cli.bench.{scenario.module}")
            run: Callable[[Session], Awaitable[Section]] = getattr(module, name)
            status.start()
            try:
                section = await run(session)
            except Skipped as why:
                section = Section(name, f"{scenario.about}.", notes=[f"not measured: {why}"])
            finally:
                status.stop()
            report.sections.append(section)
            console.print("\n".join(text_of(section)), markup=False, highlight=False, soft_wrap=True)
            if output:
                # After each scenario: what was measured survives what comes next.
                files = _write(report, output)
    if output:
        console.print(f"\nwritten: {', '.join(map(str, files))}", markup=False, highlight=False, soft_wrap=True)
    return report.held


def _write(report: Any, folder: Path) -> list[Path]:
    from embedmesh_cli.bench.page import as_html  # noqa: PLC0415  (needs the extra `bench`)

    folder.mkdir(parents=True, exist_ok=True)
    files = {"report.json": report.as_json(), "report.txt": report.as_text(), "report.html": as_html(report)}
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    return [folder / name for name in files]
