"""A soak for seconds, with what it must find: calls that are too slow, a process that grows or keeps connections."""

import asyncio
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(180)]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy/loadtest/soak.py"
MIB = 2**20


@pytest.fixture(scope="module")
def soak() -> Any:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


async def test_it_reports_and_fails_when_the_load_does(tool: Any, starter_model: Path, tmp_path: Path) -> None:
    tool("k6")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, SCRIPT, "--minutes=0.15", "--every=0.3", "--p99-ms=0.01", "--growth-mib=1000"),
        f"--output={tmp_path}",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 120)
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    assert process.returncode == 1, output.decode()
    report = (tmp_path / "report.md").read_text().splitlines()
    # Nothing else was wrong.
    assert report[-2:] == ["", "k6 ended with status 99: its output says why."], report
    for role in ("redis", "text", "image", "audio", "gateway"):
        assert f"{role} MiB" in report[0]
        assert any(line.startswith(f"| {role} | ") for line in report)
    minute, calls, streams, inputs, _, failed, *_ = report[2].strip("| ").split(" | ")
    assert (minute, failed) == ("1", "0")
    assert int(calls) > 100
    assert 5 < int(streams) < 20
    assert int(inputs) > int(calls)


def test_what_grows_is_named(soak: Any) -> None:
    def samples(role: str, grows: float, more_files: int) -> list[Any]:
        return [
            soak.Sample(second, role, int((100 + grows * second / 1200) * MIB), 20 + more_files * second // 1200, 1.0)
            for second in range(0, 1201, 10)
        ]

    fine = samples("gateway", 0, 0)
    assert soak.grown(fine, 1200, 4 * MIB) == []
    # Nor what begins once and stays.
    warm = [soak.Sample(each.second, "text", each.rss + (each.second > 100) * 99 * MIB, 20, 1.0) for each in fine]
    assert soak.grown(warm, 1200, 4 * MIB) == []
    (found,) = soak.grown([*fine, *samples("text", 10, 0)], 1200, 4 * MIB)
    assert found == "text grew by 7.5 MiB; 4 are allowed."
    (found,) = soak.grown([*fine, *samples("audio", 0, 20)], 1200, 4 * MIB)
    assert found == "audio has 20 more files open after the load than before."


def test_a_process_that_was_hardly_seen_is_no_proof(soak: Any) -> None:
    (found,) = soak.grown([soak.Sample(0.0, "gateway", 1, 1, 0.0)], 1200, 4 * MIB)
    assert found.startswith("gateway: too few looks at its memory")
