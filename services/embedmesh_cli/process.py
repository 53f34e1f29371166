"""Keep one process alive: start it, know when it serves, restart it with backoff, stop it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["MeshError", "Process", "RestartPolicy", "State"]

State = Literal["waiting", "starting", "serving", "restarting", "draining", "stopped", "failed"]

_LEASH = Path(__file__).with_name("leash.py")
_POLL_SECONDS = 0.05
_LOG_CHECK_SECONDS = 30.0
_LOG_LIMIT_BYTES = 32 * 1024 * 1024
_TAIL_LINES = 12


class MeshError(RuntimeError):
    """The mesh cannot run. The text is for people: what happened and what to do."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a dead process is started again, and when that is given up."""

    first_pause: float = 0.2  # seconds, doubled each time
    longest_pause: float = 5.0
    stable_seconds: float = 30.0  # served that long: earlier deaths are forgotten
    most_deaths: int = 5

    def pause(self, deaths: int) -> float:
        """Seconds to wait after the `deaths`-th death in a row."""
        return float(min(self.first_pause * 2 ** (deaths - 1), self.longest_pause))


class Process:
    """One command that should always run.

    The command gets a session of its own, so that Ctrl-C in a terminal reaches only us and we
    decide the order of things, and a leash, so that it never outlives us. Its output goes to `log`.

    Attributes:
        name: For people and file names, `text-1`.
        state: What it does now.
        pid: Of the running process; None while there is none.
        note: Why it is in this state, where there is something to say.
        deaths: How often it ended without being told to.
        failed: Is set when it will not be started again; `error()` tells why.
    """

    def __init__(
        self,
        name: str,
        *,
        command: Callable[[], Sequence[str]],
        is_serving: Callable[[int], Awaitable[bool]],
        log: Path,
        env: Mapping[str, str] | None = None,
        restart: RestartPolicy | None = None,
        on_change: Callable[[Process], None] = lambda _: None,
    ) -> None:
        self.name = name
        self.state: State = "waiting"
        self.pid: int | None = None
        self.note = ""
        self.deaths = 0
        self.log = log
        self.failed = asyncio.Event()
        self._command = command
        self._is_serving = is_serving
        self._env = env
        self._restart = restart or RestartPolicy()
        self._on_change = on_change
        self._serving = asyncio.Event()
        self._stopping = asyncio.Event()
        self._running: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Process {self.name} {self.state} pid={self.pid} deaths={self.deaths}>"

    async def start(self, timeout: float) -> None:  # noqa: ASYNC109  (the error must name the process and its log)
        """Start it and return once it serves.

        Raises:
            MeshError: It ended, or did not serve within `timeout` seconds.
        """
        self._task = asyncio.create_task(self._keep(), name=f"keep {self.name}")
        self._task.add_done_callback(self._ended)
        serving = asyncio.create_task(self._serving.wait())
        failed = asyncio.create_task(self.failed.wait())
        try:
            await asyncio.wait({serving, failed}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            serving.cancel()
            failed.cancel()
        if self.failed.is_set():
            raise self.error()
        if not self._serving.is_set():
            self._fail(f"does not serve after {timeout:.0f} s")
            raise self.error()

    async def stop(self, drain_seconds: float) -> None:
        """SIGTERM, then SIGKILL after `drain_seconds`. Returns when the process is gone."""
        self._stopping.set()
        if self._task is None:
            return
        if self._running is not None:
            self._set("draining")
            self._send(signal.SIGTERM)
        await asyncio.wait({self._task}, timeout=drain_seconds)
        self.kill()
        await asyncio.wait({self._task})
        if self.state != "failed":
            self._set("stopped")

    def kill(self) -> None:
        """SIGKILL at once, where it still runs."""
        self._stopping.set()
        self._send(signal.SIGKILL)

    def error(self) -> MeshError:
        """Why it failed, with the last lines it wrote."""
        tail = self.tail()
        lines = f"; its last lines ({self.log}):\n{tail}" if tail else f"; it wrote nothing ({self.log})"
        return MeshError(f"{self.name} {self.note}{lines}")

    def tail(self) -> str:
        """The last lines of its log, indented; JSON as people read it."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 64 * 1024))
                raw = file.read().decode("utf-8", "replace").splitlines()[-_TAIL_LINES:]
        except OSError:
            return ""
        lines = [part for line in raw for part in _readable(line).splitlines()]
        return "\n".join(f"  {line}" for line in lines[-_TAIL_LINES:])

    def _set(self, state: State, note: str = "") -> None:
        self.state, self.note = state, note
        self._on_change(self)

    def _fail(self, note: str) -> None:
        self._set("failed", note)
        self.failed.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        # What stops us from even trying, a program that is missing for example, is a failure like others.
        if not task.cancelled() and (error := task.exception()):
            self.kill()
            self._fail(f"cannot be run: {error}")

    def _send(self, number: signal.Signals) -> None:
        # asyncio's transport knows whether the pid is still ours; a reaped one is never signalled.
        if self._running is not None:
            with suppress(ProcessLookupError):
                self._running.send_signal(number)

    async def _launch(self) -> asyncio.subprocess.Process:
        command = [sys.executable, "-I", "-S", str(_LEASH), str(os.getpid()), *self._command()]
        with self.log.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                env=self._env,
            )

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        recent = 0
        while not self._stopping.is_set():
            self._set("starting", self.note)
            started = loop.time()
            self._running = await self._launch()
            self.pid = self._running.pid
            if self._stopping.is_set():
                self._send(signal.SIGTERM)
            code = await self._attend(self._running)
            self._running = self.pid = None
            if self._stopping.is_set():
                return
            self.deaths += 1
            ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            if not self._serving.is_set():
                # It never worked: wrong settings, a taken port. Trying again would only hide the reason.
                self._fail(f"did not start: it {ended}")
                return
            recent = 1 if loop.time() - started > self._restart.stable_seconds else recent + 1
            if recent >= self._restart.most_deaths:
                self._fail(f"died {recent} times in a row and is given up: the last time it {ended}")
                return
            pause = self._restart.pause(recent)
            self._set("restarting", f"{ended}, starting again in {pause:.1f} s")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)

    async def _attend(self, running: asyncio.subprocess.Process) -> int:
        """Notice when it serves, keep its log small, return its status when it ends."""
        ended = asyncio.create_task(running.wait())
        serving = False
        while not ended.done():
            await asyncio.wait({ended}, timeout=_LOG_CHECK_SECONDS if serving else _POLL_SECONDS)
            if not serving and not ended.done() and await self._is_serving(running.pid):
                serving = True
                self._serving.set()
                if not self._stopping.is_set() and not self.failed.is_set():
                    self._set("serving", f"restarts: {self.deaths}" if self.deaths else "")
            self._trim_log()
        return ended.result()

    def _trim_log(self) -> None:
        # The process appends (O_APPEND), so that the file can be copied and emptied under it.
        if self.log.stat().st_size > _LOG_LIMIT_BYTES:
            shutil.copyfile(self.log, self.log.with_suffix(".log.1"))
            os.truncate(self.log, 0)


def _readable(line: str) -> str:
    try:
        entry = json.loads(line)
        return f"{entry['level']}: {entry['message']}\n{entry.get('exception', '')}".rstrip()
    except (ValueError, TypeError, KeyError, AttributeError):
        return line
