"""A mesh of real processes with the fake backend, started by the command itself."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from embedmesh_cli.__main__ import main

UP = [sys.executable, "-m", "embedmesh_cli", "up", "--backend", "fake", "--port", "0", "--http-port", "0"]


@dataclass
class Up:
    """A running `embedmesh up`."""

    process: subprocess.Popen[str]
    text: str  # what it printed until it was ready

    @property
    def address(self) -> str:
        return self.find(r"embed --address (\S+)")[0]

    @property
    def http(self) -> str:
        return self.find(r"curl -s http://(\S+)/metrics")[0]

    @property
    def pids(self) -> list[int]:
        return [int(pid) for pid in self.find(r"pid (\d+)")]

    def find(self, pattern: str) -> list[str]:
        return re.findall(pattern, self.text)

    def rest(self) -> str:
        """What it prints from now to its end."""
        assert self.process.stdout
        return self.process.stdout.read()


StartUp = Callable[..., Up]


@pytest.fixture(scope="session")
def start_up() -> Iterator[StartUp]:
    """Start `embedmesh up` with more options; ends with the session at the latest."""
    running: list[subprocess.Popen[str]] = []

    def start(*options: str) -> Up:
        process = subprocess.Popen([*UP, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        running.append(process)
        assert process.stdout
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "Ctrl-C stops the mesh" in line:
                return Up(process, "".join(lines))
        pytest.fail("embedmesh up ended: " + "".join(lines))

    yield start
    for process in running:
        process.terminate()
    for process in running:
        process.communicate(timeout=60)


@pytest.fixture(scope="session")
def mesh(start_up: StartUp) -> Up:
    """One mesh for all tests that leave it as it is."""
    return start_up()


@dataclass
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Run the command in this process, with a cache folder of its own."""
    monkeypatch.setenv("EMBEDMESH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("EMBEDMESH_ADDRESS", raising=False)

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["embedmesh", *map(str, words)])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        return Outcome(status, *capfd.readouterr())

    return run
