"""`embedmesh up`: the whole mesh on this machine, one process per role."""

from __future__ import annotations

import asyncio
import signal
import tempfile
import tomllib
from collections.abc import Mapping
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from embedmesh import AsyncClient, EmbedMeshError, ModelInfo
from embedmesh_cli.connection import credentials
from embedmesh_cli.console import USAGE, UserError, command_name, starter_model
from embedmesh_cli.mesh import MODALITIES, Mesh, MeshError, MeshOptions, Role
from embedmesh_gateway.redis_url import parse_redis_url, redacted

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
            help="Cache behind the gateway: a Valkey of our own, none, or the URL of yours (embedmesh-gateway --help).",
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
        typer.Option(
            metavar="DIR",
            show_envvar=False,
            help="Folder of an image model; repeat for more. Without it a small one that comes with this package, "
            "for emoji and plain drawings, in the space of the text model.",
        ),
    ] = None,
    audio_model: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            show_envvar=False,
            help="Folder of an audio model; repeat for more. Without it a small one that comes with this package, "
            "for single spoken words and simple sounds, in the space of the text model.",
        ),
    ] = None,
    models: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            show_envvar=False,
            help="Folder of models of any modality, besides those above; repeat for more. It is followed: models are "
            "served and let go as their folders come, change and go, and no call fails by it.",
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE", show_envvar=False, help="Leave text, image or audio out; repeat for more."),
    ] = None,
    backend: Annotated[
        Literal["auto", "onnxruntime", "cuda", "tensorrt", "openvino", "triton", "fake"],
        typer.Option(
            metavar="NAME",
            show_envvar=False,
            help="What runs the text model (`embedmesh-encoder text --help`); fake needs no model, and leaves out "
            "image and audio unless you name models for them.",
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
    tracing: Annotated[
        bool,
        typer.Option(
            "--tracing",
            show_envvar=False,
            help="Record spans of calls and send them by OTLP, where the OTEL_ variables of OpenTelemetry say; "
            "needs embedmesh[tracing].",
        ),
    ] = False,
    trace_ratio: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="RATIO",
            show_envvar=False,
            help="Part of the calls to record whose callers have not decided that; by default what "
            "OTEL_TRACES_SAMPLER says, else 0.01.",
        ),
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
    if redis not in {"embedded", "none"}:
        try:
            parse_redis_url(redis)
        except ValueError as error:
            raise UserError(f"--redis {redacted(redis)}: say embedded, none, or a URL; it {error}.", USAGE) from None
    credentials()  # with which the mesh will be asked what it serves: better told now
    console = Console()
    with ExitStack() as stack:
        named = {"text": text_model or [], "image": image_model or [], "audio": audio_model or []}
        _require_sense(named, set(without or ()))
        folders = _folders(named, set(without or ()), fake=_fake_model(stack) if backend == "fake" else None)
        common: dict[str, object] = {"tracing": True} if tracing else {}
        common |= {} if trace_ratio is None else {"trace_ratio": trace_ratio}
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
            model_folders=_roots(models or []),
            gateway=common,
            text=common if backend == "auto" else {**common, "backend": backend},
            image=common,
            audio=common,
        )
        try:
            asyncio.run(_run(options, console))
        except MeshError as error:
            raise UserError(str(error)) from None


def _require_sense(named: Mapping[str, list[Path]], without: set[str]) -> None:
    """See that every model that is named is there and wanted, and that something is left to serve."""
    if unknown := sorted(without - set(MODALITIES)):
        raise UserError(f"--without {unknown[0]}: say text, image or audio.", USAGE)
    if len(without) == len(MODALITIES):
        raise UserError("--without leaves nothing to serve: keep one of text, image, audio.", USAGE)
    for modality, folders in named.items():
        if folders and modality in without:
            raise UserError(f"give --{modality}-model or --without {modality}, not both.", USAGE)
        for folder in folders:
            if not (folder / "model.toml").is_file():
                raise UserError(
                    f"--{modality}-model {folder}: no model there (a model folder holds a model.toml).", USAGE
                )


def _roots(folders: list[Path]) -> tuple[Path, ...]:
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--models {folder}: there is no such folder.", USAGE)
    return tuple(folders)


def _folders(named: Mapping[str, list[Path]], without: set[str], fake: Path | None) -> dict[str, tuple[Path, ...]]:
    """Give the models of each modality: those that are named, else the starter model (or the fake one), or none."""
    folders = {modality: tuple(paths) for modality, paths in named.items()}
    for modality in MODALITIES:
        if folders[modality] or modality in without:
            continue
        if fake is None:
            folders[modality] = (starter_model(modality, Console(stderr=True)),)
        elif modality == "text":
            folders[modality] = (fake,)
    return folders


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
            if isinstance(role, Role) and (models := _names(await served(role.grpc))):
                self._say(f"{role.name:8}  serves {models}")
        self._say(hint(mesh, await served(mesh.address)))

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
        self._models = {role.name: _names(await served(role.grpc)) for role in mesh.roles if isinstance(role, Role)}
        self._hint = hint(mesh, await served(mesh.address))
        self.show(mesh)


def hint(mesh: Mesh, models: list[ModelInfo]) -> str:
    """What to do with a mesh that is ready."""
    address = "" if mesh.options.port == DEFAULT_PORT else f" --address {mesh.address}"
    command = command_name()
    lines = [f'{command} embed{address} "hello world"'] if mesh.options.text_models else []
    if mesh.options.image_models or mesh.options.audio_models:
        lines.append(f"{command} embed{address} --media FILE-OR-FOLDER ...")
    lines += [f"{command} models list --address {mesh.address}", f"curl -s http://{mesh.http_address}/metrics"]
    commands = "".join(f"  {line}\n" for line in lines)
    return (
        f"\nReady. {_spaces(models)}Try in another terminal:\n\n{commands}\n"
        f"Logs are in {mesh.log_dir}. Ctrl-C stops the mesh.\n"
    )


def _spaces(models: list[ModelInfo]) -> str:
    """Which vectors can be compared, where there are models of several modalities."""
    spaces = sorted({info.space for info in models})
    if len({info.modality for info in models}) < 2:
        return ""
    if len(spaces) == 1:
        return f"All vectors lie in one space ({spaces[0]}): compare any with any. "
    return f"Vectors lie in {len(spaces)} spaces ({', '.join(spaces)}): compare only those of one. "


async def served(address: str) -> list[ModelInfo]:
    """The models at an address; none where that cannot be learnt now."""
    try:
        async with AsyncClient(address, retries=0, **credentials()) as client:
            return await client.list_models(timeout=5)
    except (EmbedMeshError, ValueError):  # a key, for example, that would travel in clear text
        return []


def _names(models: list[ModelInfo]) -> str:
    return ", ".join(f"{info.name} ({info.dimensions})" for info in models)
