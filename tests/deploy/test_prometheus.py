"""Rules and dashboard, in a real Prometheus that scraped a real mesh under load with every kind of trouble."""

import asyncio
import itertools
import json
import os
import re
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from embedmesh.v1 import embedding_pb2 as pb
from embedmesh.v1 import gateway_pb2, gateway_pb2_grpc
from embedmesh_cli.demo import material
from embedmesh_cli.mesh import Mesh, MeshOptions
from embedmesh_cli.process import RestartPolicy
from embedmesh_cli.starter import starter_tower
from embedmesh_encoder.backend.fake import FAIL, NAN, write_model

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(180)]

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "deploy/chart/files"
# How much of the past a rate looks at: in Grafana $__rate_interval, four times the interval of scraping at least.
RATE = "30s"


def get(address: str, path: str, **query: str) -> Any:
    with urllib.request.urlopen(f"http://{address}{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
        return json.load(answer)["data"]


def test_rules_are_right(tool: Any) -> None:
    for words in (
        ["check", "rules", "deploy/chart/files/rules.yaml"],
        ["test", "rules", "deploy/prometheus/rules_test.yaml"],
    ):
        done = subprocess.run(
            [tool("promtool"), *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_configuration_is_right(tool: Any, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text((FILES / "rules.yaml").read_text())
    (tmp_path / "prometheus.yml").write_text((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    done = subprocess.run(
        [tool("promtool"), "check", "config", tmp_path / "prometheus.yml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_chart_s_rules_are_right_too(render: Any, tool: Any, tmp_path: Path) -> None:
    """As the operator will hand them to Prometheus, with the target that was set."""
    (rule,) = [e for e in render(ROOT / "deploy/chart/ci/autoscaled.yaml") if e["kind"] == "PrometheusRule"]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(rule["spec"]))
    done = subprocess.run(
        [tool("promtool"), "check", "rules", path], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout
    shipped = yaml.safe_load((FILES / "rules.yaml").read_text())
    (target,) = [
        r for g in shipped["groups"] for r in g["rules"] if r.get("record") == "embedmesh:latency_target:seconds"
    ]
    target["expr"] = "vector(0.25)"
    assert rule["spec"] == shipped


def test_the_chart_s_dashboard_is_the_one_tested(render: Any) -> None:
    (board,) = [
        e for e in render(ROOT / "deploy/chart/ci/autoscaled.yaml") if e["metadata"]["name"].endswith("-dashboard")
    ]
    assert json.loads(board["data"]["embedmesh.json"]) == json.loads((FILES / "dashboard.json").read_text())


@asynccontextmanager
async def prometheus(program: str, targets: list[str], folder: Path, free_port: Any) -> AsyncIterator[str]:
    """Run one that reads `targets` every second and evaluates our rules; gives its address."""
    (folder / "rules.yaml").write_text((FILES / "rules.yaml").read_text())
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "2s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "mesh", "static_configs": [{"targets": targets}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    with (folder / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            program,
            *(f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"),
            f"--web.listen-address={address}",
            stdout=log,
            stderr=log,
        )
    try:
        give_up = time.monotonic() + 40
        while True:
            try:
                found = await asyncio.to_thread(get, address, "/api/v1/targets")
                if {t["labels"]["instance"] for t in found["activeTargets"] if t["health"] == "up"} == set(targets):
                    break
            except OSError:
                pass
            assert process.returncode is None, (folder / "prometheus.log").read_text()
            assert time.monotonic() < give_up, (folder / "prometheus.log").read_text()
            await asyncio.sleep(0.2)
        yield address
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def trouble(stub: Any, seconds: float, mesh: Mesh) -> None:
    """Everything that can happen to a call, again and again."""
    numbers = itertools.count()
    stop = time.monotonic() + seconds
    demo = material.load()

    def request(*texts: str) -> gateway_pb2.EmbedRequest:
        made = gateway_pb2.EmbedRequest()
        for text in texts:
            made.inputs.add().text.text = text
        return made

    async def send(made: gateway_pb2.EmbedRequest, timeout: float = 10) -> None:  # noqa: ASYNC109  (gRPC keeps it)
        try:
            await stub.Embed(made, timeout=timeout)
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.05)

    async def ordinary() -> None:
        while time.monotonic() < stop:
            made = request("the same text every time", f"another one, {next(numbers)}", "x" * 1000)
            made.inputs.add().image.content = demo.pictures[next(numbers) % len(demo.pictures)].content
            made.inputs.add().audio.content = demo.clips[next(numbers) % len(demo.clips)].content
            await send(made)

    async def bad() -> None:
        while time.monotonic() < stop:
            number = next(numbers)
            made = request(f"{NAN} {number}")
            made.inputs.add().image.content = b"no picture"
            await send(made)
            await send(request(f"{FAIL} {number}"))
            await send(request(*(f"{number} {i}" for i in range(40))), timeout=0.02)
            await send(request(*(f"far too many {number} {i}" for i in range(200))))
            bulk = request(f"bulk {number}")
            bulk.priority = pb.PRIORITY_BULK
            await send(bulk)

    async def without_redis() -> None:
        await asyncio.sleep(seconds / 2)
        os.kill(mesh.pids["redis"], signal.SIGKILL)

    await asyncio.gather(*(ordinary() for _ in range(4)), *(bad() for _ in range(2)), without_redis())


def queries() -> list[tuple[str, str]]:
    """Title and query of every panel, as Grafana would send it with all namespaces chosen."""
    board = json.loads((FILES / "dashboard.json").read_text())
    found = []
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$namespace", ".*").replace("$__rate_interval", RATE)
            assert "$" not in query, query
            found.append((panel["title"], query))
    return found


async def test_every_query_gives_data(tool: Any, tmp_path: Path, free_port: Any) -> None:
    program = tool("prometheus")
    write_model(tmp_path / "fake", dimensions=16, base_ms=1.0, ms_per_unit=0.02)
    options = MeshOptions(
        text_models=(tmp_path / "fake",),
        image_models=(starter_tower("image"),),
        audio_models=(starter_tower("audio"),),
        gateway={"max_inflight_inputs": 300, "cache_memory_bytes": 20_000, "catalog_refresh_seconds": 1},
        text={"max_queue_cost": 3000},
        # Longer than the rest of the test: the breaker is to be seen open.
        restart=RestartPolicy(first_pause=60, longest_pause=60),
    )
    async with Mesh(options) as mesh:
        targets = [role.http for role in mesh.roles if role.http]
        async with (
            prometheus(program, targets, tmp_path, free_port) as address,
            grpc.aio.insecure_channel(mesh.address) as channel,
        ):
            await trouble(gateway_pb2_grpc.GatewayStub(channel), 14, mesh)

            def ask(query: str) -> list[Any]:
                return list(get(address, "/api/v1/query", query=query)["result"])

            answers = {(title, query): await asyncio.to_thread(ask, query) for title, query in queries()}
            assert [key for key, found in answers.items() if not found] == []
            assert [key for key, found in answers.items() if all(each["value"][1] == "NaN" for each in found)] == []
            must_be_seen = {
                "Inputs refused because something was full",
                "Operations that failed",
                "Cut, dropped, not finite",
            }
            for (title, query), found in answers.items():
                if title in must_be_seen:
                    assert any(float(each["value"][1]) > 0 for each in found), query
            await recorded_rules_give_data(address)


async def recorded_rules_give_data(address: str) -> None:
    """All rules are evaluated without error; all records exist; the alerts that need no patience are on their way."""
    groups = (await asyncio.to_thread(get, address, "/api/v1/rules"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []
    for rule in rules:
        if rule["type"] == "recording":
            assert (await asyncio.to_thread(get, address, "/api/v1/query", query=rule["name"]))["result"], rule["name"]
    seen = {rule["name"]: [alert["annotations"] for alert in rule["alerts"]] for rule in rules if rule.get("alerts")}
    assert {"EmbedmeshNonfiniteVectors", "EmbedmeshInputsRefused", "EmbedmeshErrorRatioHigh"} <= set(seen)
    for annotations in itertools.chain.from_iterable(seen.values()):
        assert not re.search(r"\{\{|<no value>|error", annotations["summary"]), annotations["summary"]
