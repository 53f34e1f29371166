"""`embedmesh up`: the whole mesh on this machine, one process per role."""

from __future__ import annotations

import asyncio
import signal
import tempfile
import tomllib
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from embedmesh import AsyncClient, EmbedMeshError
from embedmesh_cli.console import USAGE, UserError, command_name, starter_model
from embedmesh_cli.mesh import MODALITIES, Mesh, MeshError, MeshOptions, Role

__all__ = ["up"]

DEFAULT_PORT = 50050
_STYLES = {"serving": "green", "failed": "red", "restarting": "yellow", "draining": "cyan", "starting": "cyan"}
# What `up` decides itself may also stand in the table of the gateway, so that one file serves both.
_GATEWAY_KEYS = {"host": "host", "port": "port", "http_port": "http_port", "redis_url": "redis"}


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the [up] table as the defaults of the options: flags and variables win."""
    if path is None:
        return None
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read: {error.strerror}.", USAGE) from None
    except ValueError as error:
        raise UserError(f"--config {path}: is not TOML: {error}.", USAGE) from None
    wanted: dict[str, Any] = {}
    for section in ("gateway", *MODALITIES, "up"):
        if not isinstance(tables.get(section, {}), dict):
            raise UserError(f"--config {path}: [{section}] must be a table.", USAGE)
    wanted |= {ours: tables["gateway"][key] for key, ours in _GATEWAY_KEYS.items() if key in tables.get("gateway", {})}
    wanted |= {key.replace("-", "_"): value for key, value in tables.get("up", {}).items()}
    known = {parameter.name for parameter in context.command.params} - {"_config", "help"}
    if unknown := sorted(set(wanted) - known):
        raise UserError(
            f"--config {path}: [up] has no setting {', '.join(unknown)}; it has {', '.join(sorted(map(str, known)))}.",
            USAGE,
        )
    context.default_map = wanted
    return path


def _replicas(values: list[str]) -> dict[str, int]:
    counts = {}
    for value in values:
        role, _, number = value.partition("=")
        if role not in MODALITIES or not number.isdecimal() or not 1 <= int(number) <= 64:
            raise UserError(f"--replicas {value}: say text=N, image=N or audio=N with N from 1 to 64.", USAGE)
        counts[role] = int(number)
    return counts


def up(
    *,
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, metavar="N", show_envvar=False, help="gRPC port of the gateway; 0 takes any free one."
        ),
    ] = DEFAULT_PORT,
    http_port: Annotated[
        int,
        typer.Option(
            min=0,
            max=65535,
            metavar="N",
            show_envvar=False,
            help="HTTP port of the gateway (metrics, probes); 0 takes any free one.",
        ),
    ] = 8080,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", show_envvar=False, help="Address the gateway listens on; 0.0.0.0 for all.")
    ] = "127.0.0.1",
    redis: Annotated[
        str,
        typer.Option(
            metavar="embedded|none|URL",
            show_envvar=False,
            help="Cache behind the gateway: a Valkey of our own, none, or redis:// rediss:// unix:// of yours.",
        ),
    ] = "embedded",
    text_model: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            show_envvar=False,
            help="Folder of a text model; repeat for more, the first is the default. "
            "Without it all-MiniLM-L6-v2, which is made on first use.",
        ),
    ] = None,
    image_model: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", show_envvar=False, help="Folder of an image model; repeat for more."),
    ] = None,
    audio_model: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", show_envvar=False, help="Folder of an audio model; repeat for more."),
    ] = None,
    backend: Annotated[
        Literal["auto", "onnxruntime", "cuda", "tensorrt", "openvino", "triton", "fake"],
        typer.Option(
            metavar="NAME",
            show_envvar=False,
            help="What runs the text model (`embedmesh-encoder text --help`); fake needs no model.",
        ),
    ] = "auto",
    replicas: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=N", show_envvar=False, help="Run a role N times, for example text=2."),
    ] = None,
    log_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", show_envvar=False, help="Keep the logs of the roles here, one file each."),
    ] = None,
    _config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            envvar="EMBEDMESH_CONFIG",
            is_eager=True,
            callback=_read_config,
            help="TOML file: [up] holds these options, [gateway], [text], [image], [audio] the settings of the roles "
            "(`embedmesh-gateway --help`, `embedmesh-encoder text --help`).",
        ),
    ] = None,
) -> None:
    """Run the whole mesh on this machine until Ctrl-C: gateway, encoders, cache.

    A role that dies is started again. No process is left behind when this command ends, however it ends.
    Each option can also be a variable (EMBEDMESH_UP_HTTP_PORT for --http-port) or a key of [up] in the
    --config file; options win over variables, variables over the file.
    """
    if redis not in {"embedded", "none"} and not redis.startswith(("redis://", "rediss://", "unix://")):
        raise UserError(f"--redis {redis}: say embedded, none, or a URL with redis://, rediss:// or unix://.", USAGE)
    console = Console()
    with ExitStack() as stack:
        models = tuple(text_model or ())
        if not models and backend == "fake":
            models = (_fake_model(stack),)
        elif not models:
            models = (starter_model(Console(stderr=True)),)
        folders = {"text": models, "image": tuple(image_model or ()), "audio": tuple(audio_model or ())}
        for modality, folder in ((modality, folder) for modality, given in folders.items() for folder in given):
            if not (folder / "model.toml").is_file():
                raise UserError(
                    f"--{modality}-model {folder}: no model there (a model folder holds a model.toml).", USAGE
                )
        options = MeshOptions(
            text_models=folders["text"],
            image_models=folders["image"],
            audio_models=folders["audio"],
            replicas=_replicas(replicas or []),
            host=host,
            port=port,
            http_port=http_port,
            redis=redis,
            config=_config,
            log_dir=log_dir,
            text={} if backend == "auto" else {"backend": backend},
        )
        try:
            asyncio.run(_run(options, console))
        except MeshError as error:
            raise UserError(str(error)) from None


def _fake_model(stack: ExitStack) -> Path:
    from embedmesh_encoder.backend.fake import write_model  # noqa: PLC0415  (only for --backend fake)

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="embedmesh-fake-")))
    write_model(folder)
    return folder


async def _run(options: MeshOptions, console: Console) -> None:
    """Run until a signal (returns) or until a role is given up (raises MeshError)."""
    view = _LiveView(console) if console.is_terminal else _View(console)
    mesh = Mesh(options, on_change=lambda: view.show(mesh))

    async def serve() -> None:
        async with AsyncExitStack() as stack:
            stack.enter_context(view)
            await stack.enter_async_context(mesh)
            await view.ready(mesh)
            raise await mesh.failure()

    task = asyncio.create_task(serve())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # The first stops in order, the second at once.
        loop.add_signal_handler(number, lambda: mesh.kill() if mesh.stopping else task.cancel())
    try:
        await task
    except asyncio.CancelledError:
        console.print("Stopped; no process is left.", highlight=False)


class _View:
    """What a person sees of the mesh; this one writes a line for each change."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._shown: dict[str, tuple[object, ...]] = {}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, mesh: Mesh) -> None:
        """Tell what changed."""
        for role in mesh.roles:
            process = role.process
            row = (process.state, role.grpc if process.state == "serving" else "", process.note)
            if process.state != "waiting" and self._shown.get(role.name) != row:
                self._shown[role.name] = row
                pid = f"pid {process.pid}" if process.pid else ""
                self._say("  ".join((f"{role.name:8}", f"{process.state:10}", *filter(None, (*row[1:], pid)))).rstrip())

    async def ready(self, mesh: Mesh) -> None:
        """Say what is served and what can be done now."""
        self.show(mesh)
        for role in mesh.roles:
            if isinstance(role, Role) and (models := await served(role.grpc)):
                self._say(f"{role.name:8}  serves {models}")
        self._say(hint(mesh))

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self.console.file.flush()


class _LiveView(_View):
    """A table that follows the mesh."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._live = Live(console=console, refresh_per_second=8)
        self._models: dict[str, str] = {}
        self._hint = ""

    def __enter__(self) -> None:
        self._live.start()

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, mesh: Mesh) -> None:
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
        for column in ("role", "state", "address", "pid", "models", ""):
            table.add_column(column, overflow="fold")
        for role in mesh.roles:
            process, style = role.process, _STYLES.get(role.process.state, "")
            cells = (role.grpc, str(process.pid or ""), self._models.get(role.name, ""), process.note)
            table.add_row(role.name, Text(process.state, style=style), *cells)
        self._live.update(Group(table, Text("" if mesh.stopping else self._hint)))

    async def ready(self, mesh: Mesh) -> None:
        self._models = {role.name: await served(role.grpc) for role in mesh.roles if isinstance(role, Role)}
        self._hint = hint(mesh)
        self.show(mesh)


def hint(mesh: Mesh) -> str:
    """What to do with a mesh that is ready."""
    address = "" if mesh.options.port == DEFAULT_PORT else f" --address {mesh.address}"
    return (
        f"\nReady. Try in another terminal:\n\n"
        f'  {command_name()} embed{address} "hello world"\n'
        f"  {command_name()} models list --address {mesh.address}\n"
        f"  curl -s http://{mesh.http_address}/metrics\n\n"
        f"Logs are in {mesh.log_dir}. Ctrl-C stops the mesh.\n"
    )


async def served(address: str) -> str:
    """Names and widths of the models at an address; "" where that cannot be learnt now."""
    try:
        async with AsyncClient(address, retries=0) as client:
            models = await client.list_models(timeout=5)
    except EmbedMeshError:
        return ""
    return ", ".join(f"{info.name} ({info.dimensions})" for info in models)
