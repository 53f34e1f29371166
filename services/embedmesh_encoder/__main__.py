"""The `embedmesh-encoder` command: reads settings, builds the objects, wires them, serves."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry

from embedmesh.v1 import audio_pb2_grpc, catalog_pb2_grpc, image_pb2_grpc, text_pb2_grpc
from embedmesh_encoder.backend import (
    Backend,
    BackendOptions,
    Choice,
    Machine,
    TritonOptions,
    best_lanes,
    choose,
    create_backend,
    look,
)
from embedmesh_encoder.encoder import Encoder, EncoderOptions
from embedmesh_encoder.keeper import Keeper
from embedmesh_encoder.memory import trim
from embedmesh_encoder.modalities import MODALITIES, Modality
from embedmesh_encoder.model import ModelError, ModelSpec, load_spec, verify_files
from embedmesh_encoder.preparation import Preparer
from embedmesh_encoder.service import (
    AUDIO_SERVICE,
    CATALOG_SERVICE,
    IMAGE_SERVICE,
    TEXT_SERVICE,
    AudioEncoderServicer,
    EmbedService,
    ImageEncoderServicer,
    ModelCatalogServicer,
    Models,
    TextEncoderServicer,
)
from embedmesh_encoder.settings import EncoderSettings
from embedmesh_server import logs, tracing
from embedmesh_server.files import FileError, Files
from embedmesh_server.metrics import EncoderMetrics, FileMetrics
from embedmesh_server.node import BindError, Node, stop_on_signal
from embedmesh_server.settings import load
from embedmesh_server.tracing import Tracing, TracingError

_log = logging.getLogger("embedmesh_encoder")

PROG: Final = "embedmesh-encoder"
USAGE: Final = f"""usage: {PROG} MODALITY [flags]

Serve embedding models of one modality over gRPC.

modalities:
  text    sentences, passages, queries
  image   JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF
  audio   WAV, FLAC, OGG, MP3, AIFF, or samples

`{PROG} text --help` shows the flags. Example:

  {PROG} text --model ./all-MiniLM-L6-v2
"""
# A batch that still runs after the calls were drained gets so long before the process leaves it behind.
_CLOSE_SECONDS: Final = 2.0
_FAILED, _MISUSED = 1, 2


@dataclass(frozen=True)
class _Modality:
    """What sets one modality apart from another; all else is one path."""

    service: str
    add_servicer: Callable[[EmbedService, Any], None]
    inputs: Modality


_MODALITIES: Final = {
    "text": _Modality(
        TEXT_SERVICE,
        lambda service, server: text_pb2_grpc.add_TextEncoderServicer_to_server(TextEncoderServicer(service), server),
        MODALITIES["text"],
    ),
    "image": _Modality(
        IMAGE_SERVICE,
        lambda service, server: image_pb2_grpc.add_ImageEncoderServicer_to_server(
            ImageEncoderServicer(service), server
        ),
        MODALITIES["image"],
    ),
    "audio": _Modality(
        AUDIO_SERVICE,
        lambda service, server: audio_pb2_grpc.add_AudioEncoderServicer_to_server(
            AudioEncoderServicer(service), server
        ),
        MODALITIES["audio"],
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit status: 0 after a clean drain, 1 after a failure, 2 for wrong settings."""
    modality, *rest = (list(sys.argv[1:] if argv is None else argv)) or ["--help"]
    if modality in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    if modality == "--version":
        sys.stdout.write(f"{PROG} {version('embedmesh')}\n")
        return 0
    if modality not in _MODALITIES:
        return _misused(f"{modality!r} is no modality; try `{PROG} text --model DIR`, or `{PROG} --help`")
    settings = load(
        MODALITIES[modality].settings,
        prog=f"{PROG} {modality}",
        section=modality,
        env_prefix=f"EMBEDMESH_{modality.upper()}_",
        argv=rest,
    )
    machine = look()
    if problems := _problems(settings, modality, machine):
        return _misused("\n".join(problems))
    logs.configure(settings.log_level, settings.log_format, modality)
    # Pillow warns and logs in words taken from the file, which whoever sent it has chosen.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    try:
        spans = tracing.start(settings, modality)
    except TracingError as error:
        return _misused(str(error))
    if spans.on:
        logs.stamp(spans.ids)
    status, left = asyncio.run(_serve(settings, modality, machine, spans))
    if left:
        # The interpreter would wait for its thread: of a backend that hangs for ever, of a load for minutes.
        _log.log(logging.ERROR if status else logging.INFO, "%s, leaving it behind", left)
        logging.shutdown()
        os._exit(status)
    return status


def _misused(sentence: str) -> int:
    sys.stderr.write(f"{PROG}: {sentence}\n")
    return _MISUSED


def _problems(settings: EncoderSettings, modality: str, machine: Machine) -> list[str]:
    """What is wrong with the folders that were named: at the start that is a mistake, later it is news."""
    problems = [f"--models {folder}: there is no such folder" for folder in settings.models if not folder.is_dir()]
    for folder in settings.model:
        try:
            _read(folder, settings, modality, machine)
        except ModelError as error:
            problems.append(str(error))
    return problems


def _read(folder: Path, settings: EncoderSettings, modality: str, machine: Machine) -> Choice | None:
    """Read a manifest, and choose what runs the model; gives None for one of another modality in a folder of models.

    Raises:
        ModelError: It has mistakes, or cannot be run here.
    """
    spec = load_spec(folder)
    if spec.modality == modality:
        return choose(spec, settings.backend, settings.precision, machine)
    if folder in settings.model:
        raise ModelError(f'model "{spec.name}" in {folder} is for {spec.modality}, not for {modality}')
    return None


async def _serve(settings: EncoderSettings, modality: str, machine: Machine, spans: Tracing) -> tuple[int, str]:
    """Serve until a signal; gives the exit status, and what has not ended by itself, if anything."""
    stop = stop_on_signal()
    kind = _MODALITIES[modality]
    registry = CollectorRegistry()
    metrics, files = EncoderMetrics(registry), FileMetrics(registry)
    models = Models(default=settings.default_model)
    node = Node(
        settings,
        role=modality,
        registry=registry,
        services=[kind.service, CATALOG_SERVICE],
        files=Files(files),
        tracing=spans,
    )
    service = EmbedService(
        models,
        metrics,
        max_inputs=settings.max_inputs,
        default_timeout_seconds=settings.default_timeout_seconds,
        tracing=spans,
    )
    kind.add_servicer(service, node.server)
    catalog_pb2_grpc.add_ModelCatalogServicer_to_server(
        ModelCatalogServicer(models, max_inputs=settings.max_inputs), node.server
    )
    loader = ThreadPoolExecutor(1, thread_name_prefix="load")

    def read(folder: Path) -> ModelSpec | None:
        choice = _read(folder, settings, modality, machine)
        if choice is None:
            return None
        spec = choice.spec
        described = {"revision": spec.revision, "backend": spec.backend, "precision": spec.precision}
        _log.info("backend chosen", extra={"model": spec.name, **described, "why": choice.why})
        return spec

    changed = asyncio.Event()
    keeper = Keeper(
        models,
        folders=settings.model,
        roots=settings.models,
        read=read,
        load=lambda spec: _load(spec, settings, metrics, kind, spans, threads=loader),
        metrics=metrics,
        files=files,
        on_change=changed.set,
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, keeper.ask)
    try:
        await node.start()
    except (BindError, FileError) as error:
        _log.error("%s", error)
        return _FAILED, ""
    # Probes are answered from here on, with NOT_SERVING until the models are warm.
    node.set_ready(CATALOG_SERVICE, True)
    running = asyncio.create_task(node.run(stop))
    tasks = [asyncio.create_task(keeper.look(asked=True))]
    await asyncio.wait((running, *tasks), return_when=asyncio.FIRST_COMPLETED)
    status, left = 0, ""
    if running.done():
        pass  # stopped before anything was served
    elif models.encoders or settings.models:
        watching = _watch(node, kind.service, models, settings.stall_seconds, changed)
        tasks += [asyncio.create_task(keeper.run()), asyncio.create_task(watching)]
        await asyncio.wait((running,))
    else:
        _log.error("no model could be loaded, giving up")
        status = _FAILED
        running.cancel()
        await node.stop()
    if keeper.loading:
        left = "a model still loads"
    for task in tasks:
        task.cancel()
    await asyncio.gather(running, *tasks, return_exceptions=True)
    loader.shutdown(wait=False, cancel_futures=True)
    if not all([await encoder.close(_CLOSE_SECONDS) for encoder in (*await keeper.aclose(), *models.encoders)]):
        status, left = _FAILED, "a batch still runs in the backend"
    return status, left


async def _watch(node: Node, service: str, models: Models, stall_seconds: float, changed: asyncio.Event) -> None:
    """Keep health honest: a node without a model, or with one whose backend hangs, must get no more calls."""
    healthy = False
    while True:
        changed.clear()
        stalled = [encoder.spec.name for encoder in models.encoders if encoder.stalled_seconds >= stall_seconds]
        good = bool(models.encoders) and not stalled
        if good is not healthy:
            healthy = good
            node.set_ready(service, healthy)
            if stalled:
                _log.error(
                    "no batch ended for %s s, not serving until one does", stall_seconds, extra={"models": stalled}
                )
            elif not healthy:
                _log.warning("no model is left, not serving until there is one")
        with suppress(TimeoutError):
            async with asyncio.timeout(min(1.0, stall_seconds / 4)):
                await changed.wait()


async def _load(
    spec: ModelSpec,
    settings: EncoderSettings,
    metrics: EncoderMetrics,
    kind: _Modality,
    spans: Tracing,
    *,
    threads: ThreadPoolExecutor,
) -> Encoder:
    def read() -> tuple[int, Preparer, Backend]:
        verify_files(spec)
        lanes = settings.lanes or best_lanes(spec)
        options = BackendOptions(
            intra_op_threads=settings.threads,
            lanes=lanes,
            batch_items=settings.batch_items,
            cache_folder=settings.compile_cache,
            cuda_graphs=settings.cuda_graphs,
            triton=TritonOptions(settings.triton_url, settings.triton_timeout_seconds, settings.triton_shared_memory),
        )
        loaded = lanes, kind.inputs.preparer(spec, settings), create_backend(spec, options)
        # Reading and rewriting a graph leaves free memory behind: 35 MiB of MiniLM's.
        trim()
        return loaded

    lanes, preparer, backend = await asyncio.get_running_loop().run_in_executor(threads, read)
    options = EncoderOptions(
        batch_cost=settings.batch_cost,
        batch_items=settings.batch_items,
        aging_seconds=settings.aging_seconds,
        max_queue_cost=settings.max_queue_cost,
        lanes=lanes,
        prepare_threads=settings.prepare_threads,
    )
    encoder = Encoder(spec, preparer, backend, metrics, options, tracing=spans)
    try:
        await encoder.warm_up(kind.inputs.warm(spec, settings))
    except BaseException:
        await encoder.close()
        raise
    return encoder


if __name__ == "__main__":
    sys.exit(main())
