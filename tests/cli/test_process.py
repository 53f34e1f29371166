"""One process kept alive: restart, backoff, giving up, stopping, and no survivors."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from embedmesh_cli.process import MeshError, Process, RestartPolicy

FAST = RestartPolicy(first_pause=0.01, longest_pause=0.02, most_deaths=3)


def script(text: str, *args: object) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(text), *map(str, args)]


def make(tmp_path: Path, command: Sequence[str], restart: RestartPolicy = FAST) -> Process:
    """A process that serves once it has written its pid into `ready`."""
    ready = tmp_path / "ready"

    async def is_serving(pid: int) -> bool:
        return ready.exists() and ready.read_text() == str(pid)

    return Process(
        "worker", command=lambda: command, is_serving=is_serving, log=tmp_path / "worker.log", restart=restart
    )


def gone(pid: int) -> bool:
    try:
        # A zombie is gone too; in these tests its parent may be a process that was killed itself.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


async def until(condition: object, seconds: float = 20) -> None:
    assert callable(condition)
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


SERVE = """
    import os, pathlib, sys, time
    pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
    time.sleep(600)
"""


async def test_serves_and_stops(tmp_path: Path) -> None:
    process = make(tmp_path, script(SERVE, tmp_path / "ready"))
    await process.start(20)
    assert repr(process) == f"<Process worker serving pid={process.pid} deaths=0>"
    pid = process.pid
    assert pid is not None
    await process.stop(10)
    assert process.state == "stopped"
    assert process.pid is None
    assert gone(pid)


async def test_a_killed_process_comes_back(tmp_path: Path) -> None:
    process = make(tmp_path, script(SERVE, tmp_path / "ready"))
    await process.start(20)
    first = process.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: process.state == "serving" and process.pid != first)
    assert process.deaths == 1
    await process.stop(10)


async def test_one_that_never_served_is_not_tried_again(tmp_path: Path) -> None:
    process = make(tmp_path, script("import sys; sys.exit('the model folder is missing')"))
    with pytest.raises(MeshError, match=r"(?s)did not start: it ended with status 1.*the model folder is missing"):
        await process.start(20)
    assert process.deaths == 1
    await process.stop(10)


async def test_a_crash_loop_is_given_up_with_the_last_lines(tmp_path: Path) -> None:
    dies = """
        import os, pathlib, sys, time
        pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
        time.sleep(0.2)
        sys.exit("out of luck")
    """
    process = make(tmp_path, script(dies, tmp_path / "ready"))
    await process.start(20)
    await asyncio.wait_for(process.failed.wait(), 30)
    assert process.state == "failed"
    assert "died 3 times in a row" in str(process.error())
    assert "out of luck" in str(process.error())
    await process.stop(10)


async def test_a_slow_start_is_named(tmp_path: Path) -> None:
    process = make(tmp_path, script("import time; time.sleep(600)"))
    with pytest.raises(MeshError, match="does not serve after 0 s"):
        await process.start(0.2)
    await process.stop(10)
    assert process.pid is None


async def test_one_that_ignores_sigterm_is_killed_after_the_bound(tmp_path: Path) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + textwrap.dedent(SERVE)
    process = make(tmp_path, [sys.executable, "-c", stubborn, str(tmp_path / "ready")])
    await process.start(20)
    pid = process.pid
    assert pid is not None
    await process.stop(0.3)
    assert gone(pid)


async def test_stop_while_waiting_for_a_restart(tmp_path: Path) -> None:
    patient = RestartPolicy(first_pause=600, longest_pause=600)
    process = make(tmp_path, script(SERVE, tmp_path / "ready"), patient)
    await process.start(20)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    await until(lambda: process.state == "restarting")
    assert "was killed by SIGKILL" in process.note
    await asyncio.wait_for(process.stop(10), 10)
    assert process.state == "stopped"


async def test_a_command_that_cannot_be_made_fails_at_once(tmp_path: Path) -> None:
    def command() -> list[str]:
        raise OSError("no server for this machine")

    async def is_serving(_: int) -> bool:
        return True

    process = Process("worker", command=command, is_serving=is_serving, log=tmp_path / "worker.log")
    with pytest.raises(MeshError, match="worker cannot be run: no server for this machine"):
        await process.start(20)
    await process.stop(10)
    assert process.state == "failed"


async def test_json_lines_are_shown_for_people(tmp_path: Path) -> None:
    line = '{"time": "now", "level": "error", "message": "no luck", "exception": "Traceback:\\n  Boom"}'
    process = make(tmp_path, script(f"import sys; sys.exit({line!r})"))
    with pytest.raises(MeshError) as caught:
        await process.start(20)
    assert str(caught.value).endswith("\n  error: no luck\n  Traceback:\n    Boom")
    await process.stop(10)


def test_pauses_double_up_to_a_bound() -> None:
    policy = RestartPolicy(first_pause=0.2, longest_pause=1)
    assert [policy.pause(deaths) for deaths in (1, 2, 3, 4, 50)] == [0.2, 0.4, 0.8, 1, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="the leash is a feature of the Linux kernel")
def test_nothing_outlives_a_parent_that_was_killed(tmp_path: Path) -> None:
    keeper = """
        import asyncio, os, pathlib, sys
        from embedmesh_cli.process import Process

        async def main():
            ready = pathlib.Path(sys.argv[1])
            async def is_serving(pid):
                return ready.exists()
            command = [sys.executable, "-c", sys.argv[2], str(ready)]
            process = Process("worker", command=lambda: command, is_serving=is_serving, log=ready.with_name("log"))
            await process.start(20)
            print(process.pid, flush=True)
            await asyncio.sleep(600)

        asyncio.run(main())
    """
    command = script(keeper, tmp_path / "ready", textwrap.dedent(SERVE))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
    end = time.monotonic() + 20
    while not gone(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert gone(pid)
