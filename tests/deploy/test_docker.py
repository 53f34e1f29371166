"""The images' recipe and the compose file, against the code. `deploy/docker/prove.py` builds what the recipe says."""

import asyncio
import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "deploy/docker"
COMPOSE = ROOT / "deploy/compose.yaml"


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


def test_every_target_runs_as_the_user_of_the_chart() -> None:
    parse = runpy.run_path(str(DOCKER / "prove.py"))["parse"]
    stages = parse((DOCKER / "Dockerfile").read_text())
    for target in ("gateway", "encoder-cpu", "encoder-gpu"):
        assert stages[target].user == "10001:10001"
        assert stages[target].env["PATH"].startswith("/opt/embedmesh/bin:")
    helpers = (ROOT / "deploy/chart/templates/_helpers.tpl").read_text()
    assert "runAsUser: 10001" in helpers


def test_scripts_that_the_recipe_runs_exist() -> None:
    for script, words in re.findall(r"RUN sh (\S+) (.+)", (DOCKER / "Dockerfile").read_text()):
        assert (ROOT / script).is_file()
        if script.endswith("install.sh"):
            assert (ROOT / f"requirements/{words.split()[0]}.txt").is_file()


def test_images_hold_what_is_locked_for_development() -> None:
    """One version of everything, whoever runs it."""

    def pins(name: str) -> dict[str, str]:
        return dict(re.findall(r"^([a-z0-9-]+)==(\S+) ", (ROOT / f"requirements/{name}.txt").read_text(), re.MULTILINE))

    tested = pins("dev")
    for name in ("gateway", "encoder", "gpu", "build"):
        ours = {package: version for package, version in pins(name).items() if package in tested}
        assert ours == {package: tested[package] for package in ours}
    assert "onnxruntime" in pins("encoder")
    assert "onnxruntime-gpu" in pins("gpu")
    assert "onnxruntime" not in pins("gpu")


def test_versions_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((ROOT / "deploy/chart/Chart.yaml").read_text())
    assert chart["appVersion"] == version
    assert {each["image"].partition(":")[2] for each in services().values() if "build" in each} == {version}


def test_compose_builds_targets_that_exist() -> None:
    recipe = (DOCKER / "Dockerfile").read_text()
    for each in services().values():
        assert each["read_only"] is True
        assert each["cap_drop"] == ["ALL"]
        if "build" in each:
            assert (COMPOSE.parent / each["build"]["context"] / each["build"]["dockerfile"]).is_file()
            assert f" AS {each['build']['target']}\n" in recipe
        for volume in each.get("volumes", ()):
            assert (COMPOSE.parent / volume.partition(":")[0]).is_file()


def test_prometheus_of_compose_reads_every_process() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (targets,) = [each["targets"] for each in job["static_configs"]]
    ports = {
        f"{name}:{word.partition('=')[2]}"
        for name, each in services().items()
        for word in each["command"]
        if word.startswith("--http-port=")
    }
    assert set(targets) == ports


@pytest.mark.timeout(180)
async def test_compose_s_commands_start_and_are_healthy(
    models: Path, tmp_path: Path, make_container: Any, make_place: Any
) -> None:
    """As for the chart: real processes, with the commands as they stand there, asked by their own health checks."""
    place = make_place({"/models": models})
    containers = {}
    for name, each in services().items():
        if name == "prometheus":
            continue
        ports = [int(word.rpartition("=")[2]) for word in each["command"] if re.fullmatch(r"--(http-)?port=\d+", word)]
        spec = {
            "name": name,
            "command": each["command"],
            "env": [{"name": key, "value": value} for key, value in each.get("environment", {}).items()],
            "ports": [{"name": str(port), "containerPort": port} for port in ports or [6379]],
        }
        containers[name] = make_container(spec, place, tmp_path / f"{name}.log")
        place.hosts |= {(name, str(port)): containers[name].ports[port] for port in containers[name].ports}
    try:
        await asyncio.gather(*(one.start() for name, one in containers.items() if name != "gateway"))
        for name in ("text", "image", "audio", "gateway"):
            if name == "gateway":
                await containers[name].start()
            check = services()[name]["healthcheck"]["test"]
            assert check[0] == "CMD"
            (port,) = re.findall(r"127\.0\.0\.1:(\d+)", check[-1])
            program = check[-1].replace(f":{port}/", f":{containers[name].ports[int(port)]}/")
            async with asyncio.timeout(60):
                while await _status(["python3", "-c", program]) != 0:
                    await asyncio.sleep(0.2)
        stopped = await asyncio.gather(*(one.stop(30) for one in containers.values()))
        assert set(stopped) == {0}
    finally:
        for one in containers.values():
            await one.end()


async def _status(words: list[str]) -> int:
    process = await asyncio.create_subprocess_exec(*words, stderr=asyncio.subprocess.DEVNULL)
    return await process.wait()
