"""The `embedmesh-encoder` command: reads settings, builds the objects, wires them, serves."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

from prometheus_client import CollectorRegistry

from embedmesh.v1 import audio_pb2_grpc, catalog_pb2_grpc, image_pb2_grpc, text_pb2_grpc
from embedmesh_encoder.backend import (
    Backend,
    BackendOptions,
    Choice,
    TritonOptions,
    best_lanes,
    choose,
    create_backend,
    look,
)
from embedmesh_encoder.encoder import Encoder, EncoderOptions
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
from embedmesh_server.files import FileError
from embedmesh_server.metrics import EncoderMetrics
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
    try:
        choices = _read_specs(settings, modality)
        models = Models([choice.spec for choice in choices])
    except ModelError as error:
        return _misused(str(error))
    logs.configure(settings.log_level, settings.log_format, modality)
    # Pillow warns and logs in words taken from the file, which whoever sent it has chosen.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    for choice in choices:
        _log.info(
            "backend chosen",
            extra={
                "model": choice.spec.name,
                "revision": choice.spec.revision,
                "backend": choice.spec.backend,
                "precision": choice.spec.precision,
                "why": choice.why,
            },
        )
    try:
        spans = tracing.start(settings, modality)
    except TracingError as error:
        return _misused(str(error))
    if spans.on:
        logs.stamp(spans.ids)
    status, hung = asyncio.run(_serve(settings, models, modality, spans))
    if hung:
        # The interpreter would wait for ever for the thread in which the backend hangs.
        _log.error("a batch still runs in the backend, leaving it behind")
        logging.shutdown()
        os._exit(_FAILED)
    return status


def _misused(sentence: str) -> int:
    sys.stderr.write(f"{PROG}: {sentence}\n")
    return _MISUSED


def _read_specs(settings: EncoderSettings, modality: str) -> list[Choice]:
    """Read all manifests, and choose what runs each.

    Raises:
        ModelError: With the problems of all of them.
    """
    choices: list[Choice] = []
    problems: list[str] = []
    machine = look()
    for folder in settings.model:
        try:
            spec = load_spec(folder)
            if spec.modality == modality:
                choices.append(choose(spec, settings.backend, settings.precision, machine))
            else:
                problems.append(f'model "{spec.name}" in {folder} is for {spec.modality}, not for {modality}')
        except ModelError as error:
            problems.append(str(error))
    if problems:
        raise ModelError("\n".join(problems))
    return choices


async def _serve(settings: EncoderSettings, models: Models, modality: str, spans: Tracing) -> tuple[int, bool]:
    """Serve until a signal; gives the exit status, and whether a backend hangs."""
    stop = stop_on_signal()
    kind = _MODALITIES[modality]
    registry = CollectorRegistry()
    metrics = EncoderMetrics(registry)
    node = Node(settings, role=modality, registry=registry, services=[kind.service, CATALOG_SERVICE], tracing=spans)
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
    try:
        await node.start()
    except (BindError, FileError) as error:
        _log.error("%s", error)
        return _FAILED, False
    # Probes are answered from here on, with NOT_SERVING until the models are warm.
    node.set_ready(CATALOG_SERVICE, True)
    running = asyncio.create_task(node.run(stop))
    loading = asyncio.create_task(_load_all(settings, models, metrics, kind, spans))
    await asyncio.wait((running, loading), return_when=asyncio.FIRST_COMPLETED)
    status = 0
    if running.done():
        loading.cancel()
    elif loading.result():
        watching = asyncio.create_task(_watch(node, kind.service, models, settings.stall_seconds))
        await asyncio.wait((running,))
        watching.cancel()
    else:
        _log.error("no model could be loaded, giving up")
        status = _FAILED
        running.cancel()
        await node.stop()
    await asyncio.gather(running, loading, return_exceptions=True)
    stopped = [await encoder.close(_CLOSE_SECONDS) for encoder in models.encoders.values()]
    return status, not all(stopped)


async def _watch(node: Node, service: str, models: Models, stall_seconds: float) -> None:
    """Keep health honest: a node with a model whose backend hangs must get no more calls."""
    healthy = False
    while True:
        stalled = [name for name, encoder in models.encoders.items() if encoder.stalled_seconds >= stall_seconds]
        if healthy is bool(stalled):
            healthy = not stalled
            node.set_ready(service, healthy)
            if stalled:
                _log.error(
                    "no batch ended for %s s, not serving until one does", stall_seconds, extra={"models": stalled}
                )
        await asyncio.sleep(min(1.0, stall_seconds / 4))


async def _load_all(
    settings: EncoderSettings, models: Models, metrics: EncoderMetrics, kind: _Modality, spans: Tracing
) -> bool:
    """Load one model after the other; gives whether there is any to serve."""
    for spec in models.specs:
        started = time.perf_counter()
        try:
            encoder = await _load(spec, settings, metrics, kind, spans)
        except ModelError as error:
            _log.error("%s", error, exc_info=error.__cause__)
        except Exception:  # noqa: BLE001  (one broken model does not take the others along)
            _log.exception("cannot load model %s from %s", spec.name, spec.folder)
        else:
            models.add(encoder)
            seconds = round(time.perf_counter() - started, 3)
            _log.info("model ready", extra={"model": spec.name, "revision": spec.revision, "seconds": seconds})
    return bool(models.encoders)


async def _load(
    spec: ModelSpec, settings: EncoderSettings, metrics: EncoderMetrics, kind: _Modality, spans: Tracing
) -> Encoder:
    lanes = settings.lanes or best_lanes(spec.backend)

    def read() -> tuple[Preparer, Backend]:
        verify_files(spec)
        options = BackendOptions(
            intra_op_threads=settings.threads,
            lanes=lanes,
            batch_items=settings.batch_items,
            cache_folder=settings.compile_cache,
            cuda_graphs=settings.cuda_graphs,
            triton=TritonOptions(settings.triton_url, settings.triton_timeout_seconds, settings.triton_shared_memory),
        )
        return kind.inputs.preparer(spec, settings), create_backend(spec, options)

    preparer, backend = await asyncio.to_thread(read)
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
