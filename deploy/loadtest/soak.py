"""Run soak.js against a mesh of its own, and fail when a call failed or a process grew.

    make soak                                        # 20 minutes; ARGS="--minutes 120 --rate 50"
    .venv/bin/python deploy/loadtest/soak.py --help

The caches are kept so small that they are full before memory is first looked at: what grows afterwards is a leak. Every
figure goes into OUTPUT/samples.csv and OUTPUT/calls.csv, the table into OUTPUT/report.md.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import os
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil
import redis.asyncio
from rich.console import Console

from embedmesh_cli.console import starter_model
from embedmesh_cli.mesh import MODALITIES, Mesh, MeshOptions

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parents[1]
MIB: Final = 2**20
# A few thousand vectors in either.
GATEWAY_CACHE_BYTES: Final = 2 * MIB
VALKEY_CACHE: Final = "4mb"
# The parts of a run whose memory is compared, as shares of it: minutes 3 to 5 and 18 to 20 of 20.
EARLY: Final = (2 / 20, 5 / 20)
LATE: Final = (17 / 20, 1.0)
CLOSING_SECONDS: Final = 2.0
# A gateway opens some connections to Redis once there is work; a leak opens one for every so many calls.
FILES: Final = 16


@dataclass(frozen=True, slots=True)
class Sample:
    """What a process had at a moment.

    Attributes:
        second: Since the load began.
        rss: Resident bytes.
        files: Open file descriptors, connections included.
        cpu_seconds: Since its start.
    """

    second: float
    role: str
    rss: int
    files: int
    cpu_seconds: float


@dataclass(slots=True)
class Minute:
    """What k6 saw in a minute: milliseconds of each call, and what was not as it should be."""

    milliseconds: list[float] = field(default_factory=list)
    streams: int = 0
    failed: int = 0
    refused: int = 0
    inputs: int = 0
    failed_inputs: int = 0
    cached: int = 0


def main() -> int:
    """Do it; gives the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="how long (20)")
    parser.add_argument("--rate", type=int, default=20, help="calls a second (20); streams come to a twentieth")
    parser.add_argument("--p99-ms", type=float, default=1000.0, help="p99 that is demanded of calls (1000)")
    parser.add_argument("--growth-mib", type=float, default=4.0, help="what a process may grow by (4)")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two looks at memory (10)")
    parser.add_argument("--output", type=Path, default=Path("build/soak"), help="folder of the report (build/soak)")
    options = parser.parse_args()
    k6 = shutil.which("k6", path=f"{ROOT / '.venv-deploy/bin'}{os.pathsep}{os.environ['PATH']}")
    if k6 is None:
        parser.error("k6 is not installed: run this by `make soak`")
    options.output.mkdir(parents=True, exist_ok=True)
    problems, samples = asyncio.run(soak(k6, options))
    minutes = by_minute(options.output / "calls.csv")
    problems += grown(samples, 60 * options.minutes, options.growth_mib * MIB)
    report = "\n".join([*table(minutes, samples), "", *comparison(samples, 60 * options.minutes), ""])
    verdict = "\n".join(problems or ["Nothing failed, and no process grew."])
    (options.output / "report.md").write_text(f"{report}\n{verdict}\n")
    sys.stdout.write(f"{report}\n{verdict}\n")
    return 1 if problems else 0


async def soak(k6: str, options: argparse.Namespace) -> tuple[list[str], list[Sample]]:
    """Run the load; gives what went wrong, and the samples."""
    console = Console(stderr=True)
    text, image, audio = ((starter_model(modality, console),) for modality in MODALITIES)
    options_of_mesh = MeshOptions(
        text_models=text, image_models=image, audio_models=audio, gateway={"cache_memory_bytes": GATEWAY_CACHE_BYTES}
    )
    async with Mesh(options_of_mesh) as mesh:
        async with redis.asyncio.Redis.from_url(mesh.role("redis").grpc) as store:
            await store.config_set("maxmemory", VALKEY_CACHE)
        started = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            *(k6, "run", "--quiet", "--address=", f"--out=csv={options.output / 'calls.csv'}", HERE / "soak.js"),
            env={
                **os.environ,
                "K6_NO_USAGE_REPORT": "true",
                "ADDRESS": mesh.address,
                "RATE": str(options.rate),
                "DURATION": f"{options.minutes * 60:g}s",
                "P99_MS": f"{options.p99_ms:g}",
            },
        )
        ended = asyncio.create_task(process.wait())
        samples: list[Sample] = []
        with (options.output / "samples.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["second", "role", "rss_bytes", "open_files", "cpu_seconds"])

            def look_now() -> None:
                now = look(mesh.pids, time.monotonic() - started)
                writer.writerows((each.second, each.role, each.rss, each.files, each.cpu_seconds) for each in now)
                file.flush()
                samples.extend(now)

            try:
                while not ended.done():
                    look_now()
                    await asyncio.wait([ended], timeout=options.every)
                # k6's connections are gone by then.
                await asyncio.sleep(CLOSING_SECONDS)
                look_now()
            finally:
                if not ended.done():
                    process.terminate()
                    await ended
        problems = [f"k6 ended with status {ended.result()}: its output says why."] if ended.result() else []
        problems += [
            f"{role.name} ended {role.process.deaths} times and was started again."
            for role in mesh.roles
            if role.process.deaths
        ]
        return problems, samples


def look(pids: Mapping[str, int], second: float) -> list[Sample]:
    """See what every process has now."""
    found = []
    for role, pid in pids.items():
        process = psutil.Process(pid)
        with process.oneshot():
            times = process.cpu_times()
            found.append(Sample(second, role, process.memory_info().rss, process.num_fds(), times.user + times.system))
    return found


def by_minute(calls: Path) -> list[Minute]:
    """Read k6's samples, a minute of them at a time; calls count when they end."""
    minutes: dict[int, Minute] = {}
    first = None
    with calls.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name, at, value = row["metric_name"], int(row["timestamp"]), float(row["metric_value"])
            first = at if first is None else first
            minute = minutes.setdefault((at - first) // 60, Minute())
            match name:
                # Not the questions by which k6 finds the services.
                case "grpc_req_duration" if row["method"] == "Embed":
                    minute.milliseconds.append(value)
                case "stream_duration":
                    minute.streams += 1
                case "failed_calls":
                    minute.failed += int(value)
                case "refused_calls":
                    minute.refused += int(value)
                case "failed_inputs":
                    minute.inputs += 1
                    minute.failed_inputs += int(value)
                case "cached_inputs":
                    minute.cached += int(value)
    return [minutes[number] for number in sorted(minutes)]


def table(minutes: Sequence[Minute], samples: Sequence[Sample]) -> list[str]:
    """One row a minute, in Markdown."""
    roles = list(dict.fromkeys(each.role for each in samples))
    head = ["minute", "calls", "streams", "inputs", "cached", "failed", "p50 ms", "p95", "p99"]
    head += [f"{role} MiB" for role in roles]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    for number, minute in enumerate(minutes):
        resident = {
            role: [each.rss for each in samples if each.role == role and number * 60 <= each.second < number * 60 + 60]
            for role in roles
        }
        if len(minute.milliseconds) < 2 or not all(resident.values()):
            continue  # the second or two in which the last calls end
        hundredths = statistics.quantiles(minute.milliseconds, n=100, method="inclusive")
        cells = [str(number + 1), str(len(minute.milliseconds)), str(minute.streams), str(minute.inputs)]
        cells += [
            f"{minute.cached / max(minute.inputs, 1):.0%}",
            str(minute.failed + minute.refused + minute.failed_inputs),
        ]
        cells += [f"{hundredths[49]:.1f}", f"{hundredths[94]:.0f}", f"{hundredths[98]:.0f}"]
        cells += [f"{statistics.median(resident[role]) / MIB:.1f}" for role in roles]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def window(samples: Sequence[Sample], role: str, seconds: float, part: tuple[float, float]) -> list[Sample]:
    """The samples of a role in a part of the run."""
    return [each for each in samples if each.role == role and part[0] * seconds <= each.second <= part[1] * seconds]


def before_and_after(samples: Sequence[Sample], role: str) -> tuple[int, int]:
    """Open files of a role at the first look and at the last."""
    files = [each.files for each in samples if each.role == role]
    return files[0], files[-1]


def comparison(samples: Sequence[Sample], seconds: float) -> list[str]:
    """What each process had early and late, in Markdown."""
    lines = ["| process | MiB early | late | open files before | after | share of a core |", "| --- " * 6 + "|"]
    for role in dict.fromkeys(each.role for each in samples):
        early, late = (window(samples, role, seconds, part) for part in (EARLY, LATE))
        if early and late:
            cells = [f"{statistics.median(each.rss for each in part) / MIB:.1f}" for part in (early, late)]
            cells += [str(files) for files in before_and_after(samples, role)]
            busy = (late[-1].cpu_seconds - early[0].cpu_seconds) / (late[-1].second - early[0].second)
            lines.append(f"| {role} | {' | '.join(cells)} | {busy:.1%} |")
    return lines


def grown(samples: Sequence[Sample], seconds: float, allowed: float) -> list[str]:
    """A sentence for every process whose memory grew between the early and the late part, or that kept files open."""
    found = []
    for role in dict.fromkeys(each.role for each in samples):
        early, late = (window(samples, role, seconds, part) for part in (EARLY, LATE))
        if not early or not late:
            found.append(f"{role}: too few looks at its memory to compare; run longer, or look more often.")
            continue
        growth = statistics.median(each.rss for each in late) - statistics.median(each.rss for each in early)
        if growth > allowed:
            found.append(f"{role} grew by {growth / MIB:.1f} MiB; {allowed / MIB:g} are allowed.")
        before, after = before_and_after(samples, role)
        if after - before > FILES:
            found.append(f"{role} has {after - before} more files open after the load than before.")
    return found


if __name__ == "__main__":
    sys.exit(main())
