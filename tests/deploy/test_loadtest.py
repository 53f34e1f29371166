"""The load tests run by a real k6 against a real mesh, for seconds; what must fail a run fails it."""

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedmesh_cli.mesh import Mesh, MeshOptions
from embedmesh_cli.starter import starter_tower
from embedmesh_encoder.backend.fake import write_model

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(180)]

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "deploy/loadtest"
# k6: thresholds have been crossed.
CROSSED = 99


@dataclass(frozen=True)
class Run:
    status: int
    output: str
    metrics: dict[str, Any]


@pytest.fixture
def k6(tool: Any, tmp_path: Path) -> Any:
    """Run a script for some seconds; gives what it said and measured."""

    async def run(script: str, address: str, **knobs: object) -> Run:
        summary = tmp_path / f"{script}.json"
        process = await asyncio.create_subprocess_exec(
            *(tool("k6"), "run", "--quiet", f"--summary-export={summary}", "--address=", SCRIPTS / f"{script}.js"),
            env={
                "HOME": str(tmp_path),
                "PATH": os.environ["PATH"],
                "K6_NO_USAGE_REPORT": "true",
                "ADDRESS": address,
                **{name: str(value) for name, value in knobs.items()},
            },
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), 90)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        assert summary.exists(), output.decode()
        return Run(process.returncode, output.decode(), json.loads(summary.read_text())["metrics"])

    return run


@asynccontextmanager
async def mesh(folder: Path, **options: Any) -> AsyncIterator[Mesh]:
    """Texts from a model that takes no time, pictures and sounds from the starter models."""
    write_model(folder / "fake", dimensions=64)
    models = {
        "text_models": (folder / "fake",),
        "image_models": (starter_tower("image"),),
        "audio_models": (starter_tower("audio"),),
    }
    async with Mesh(MeshOptions(**(models | options))) as started:
        yield started


async def test_smoke_mixed_and_cached_pass(k6: Any, tmp_path: Path) -> None:
    async with mesh(tmp_path) as started:
        smoke = await k6("smoke", started.address, RATE=5, DURATION="4s", P99_MS=5000)
        mixed = await k6("mixed", started.address, RATE=5, DURATION="4s", P99_MS=5000)
        cached = await k6("cached", started.address, RATE=40, INPUTS=20, DURATION="6s", P99_MS=5000, CACHED=0.3)
    for run in (smoke, mixed, cached):
        assert run.status == 0, run.output
        assert run.metrics["failed_inputs"]["value"] == 0
    assert smoke.metrics["vectors"]["count"] == 3 * smoke.metrics["iterations"]["count"]
    assert {f"grpc_req_duration{{scenario:{name}}}" for name in ("text", "image", "audio")} <= set(mixed.metrics)
    assert cached.metrics["cached_inputs"]["value"] > 0.3
    assert smoke.metrics["cached_inputs"]["value"] == 0


async def test_soak_and_ramp_run(k6: Any, tmp_path: Path) -> None:
    """Shortened: that they run and count, not that this machine holds the load."""
    async with mesh(tmp_path) as started:
        soak = await k6("soak", started.address, RATE=20, DURATION="4s", P99_MS=5000)
        ramp = await k6("ramp", started.address, RATE=4, DURATION="1s", P99_MS=5000)
    assert soak.status == 0, soak.output
    # Of four chunks each, all answered.
    assert soak.metrics["grpc_streams_msgs_received"]["count"] == 4 * soak.metrics["grpc_streams"]["count"]
    assert 0.05 < soak.metrics["cached_inputs"]["value"] < 0.95
    assert ramp.status == 0, ramp.output
    assert ramp.metrics["iterations"]["count"] > 20


async def test_a_missing_modality_fails_the_run(k6: Any, tmp_path: Path) -> None:
    async with mesh(tmp_path, audio_models=()) as started:
        run = await k6("smoke", started.address, RATE=5, DURATION="2s", P99_MS=5000)
    assert run.status == CROSSED, run.output
    assert run.metrics["failed_inputs"]["value"] > 0.3


async def test_a_gateway_that_is_not_there_fails_the_run(k6: Any, free_port: Any) -> None:
    run = await k6("smoke", f"127.0.0.1:{free_port()}", RATE=2, DURATION="2s")
    assert run.status == CROSSED, run.output
    assert run.metrics["failed_calls"]["value"] == 1
    assert "connection refused" in run.output


async def test_a_stream_that_fails_fails_the_run(k6: Any, tmp_path: Path) -> None:
    """A chunk of nothing but pictures and sounds, which nobody embeds."""
    async with mesh(tmp_path, image_models=(), audio_models=()) as started:
        run = await k6("soak", started.address, RATE=20, DURATION="2s", P99_MS=5000)
    assert run.status == CROSSED, run.output
    assert run.metrics["failed_calls"]["passes"] == run.metrics["grpc_streams"]["count"], run.output


async def test_slowness_fails_the_run(k6: Any, tmp_path: Path) -> None:
    async with mesh(tmp_path, image_models=(), audio_models=()) as started:
        run = await k6("cached", started.address, RATE=5, DURATION="2s", P99_MS=0.01, CACHED=0)
    assert run.status == CROSSED, run.output


async def test_refusals_are_told_from_failures(k6: Any, tmp_path: Path) -> None:
    """A full mesh refuses with the time to come back: the spike allows that, and nothing else."""
    write_model(tmp_path / "slow", dimensions=64, base_ms=150)
    async with mesh(tmp_path, text_models=(tmp_path / "slow",), gateway={"max_inflight_inputs": 8}) as started:
        spike = await k6("spike", started.address, RATE=3, DURATION="1s", PEAK="2s")
        soak = await k6("soak", started.address, RATE=30, DURATION="2s", P99_MS=60000)
    assert spike.status == 0, spike.output
    # Over hours nothing should be refused.
    assert soak.status == CROSSED, soak.output
    for run in (spike, soak):
        assert run.metrics["refused_calls"]["value"] > 0.1
        assert run.metrics["failed_calls"]["value"] == 0


async def test_the_job_runs_what_is_mounted(render: Any, tmp_path: Path, make_container: Any, make_place: Any) -> None:
    """Its command starts here, with its environment, against the address that the chart gives a release called mesh."""
    job = yaml.safe_load((SCRIPTS / "job.yaml").read_text())
    kustomization = yaml.safe_load((SCRIPTS / "kustomization.yaml").read_text())
    (generated,) = kustomization["configMapGenerator"]
    spec = job["spec"]["template"]["spec"]
    assert spec["volumes"][0]["configMap"]["name"] == generated["name"]
    assert set(generated["files"]) == {path.name for path in SCRIPTS.glob("*.js")}
    (container,) = spec["containers"]
    services = {each["metadata"]["name"] for each in render() if each["kind"] == "Service"}
    host, _, port = next(each["value"] for each in container["env"] if each["name"] == "ADDRESS").partition(":")
    assert host in services
    container["args"] = [*container["args"], "--address="]
    container["env"].append({"name": "DURATION", "value": "2s"})
    async with mesh(tmp_path) as started:
        place = make_place({"/scripts": SCRIPTS}, {(host, port): int(started.address.rpartition(":")[2])})
        run = make_container(container, place, tmp_path / "job.log")
        await run.start()
        try:
            status = await run.ended()
        finally:
            await run.end()
    log = run.log.read_text()
    assert status in {0, CROSSED}, log
    assert "failed_calls" in log


@pytest.mark.parametrize("version", ["1.27", "1.32", "1.37"])
def test_the_job_is_valid(tool: Any, version: str) -> None:
    done = subprocess.run(
        [tool("kubernetes-validate"), "--strict", "-k", version, SCRIPTS / "job.yaml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert all(line.startswith("INFO") for line in (done.stdout + done.stderr).splitlines())
