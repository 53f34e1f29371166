"""The `embedmesh-encoder` command: reads settings, builds the objects, wires them, serves."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Final

from prometheus_client import CollectorRegistry

from embedmesh.v1 import catalog_pb2_grpc, text_pb2_grpc
from embedmesh_encoder.backend import Backend, BackendOptions, create_backend
from embedmesh_encoder.encoder import Encoder, EncoderOptions
from embedmesh_encoder.model import ModelError, ModelSpec, load_spec, verify_files
from embedmesh_encoder.service import (
    CATALOG_SERVICE,
    TEXT_SERVICE,
    EmbedService,
    ModelCatalogServicer,
    Models,
    TextEncoderServicer,
)
from embedmesh_encoder.settings import TextSettings
from embedmesh_encoder.text import TextItem, TextPreparer
from embedmesh_server import logs
from embedmesh_server.metrics import EncoderMetrics
from embedmesh_server.node import BindError, Node
from embedmesh_server.settings import load

_log = logging.getLogger("embedmesh_encoder")

PROG: Final = "embedmesh-encoder"
USAGE: Final = f"""usage: {PROG} MODALITY [flags]

Serve embedding models of one modality over gRPC.

modalities:
  text    sentences, passages, queries

image and audio encoders come with a later release.

`{PROG} text --help` shows the flags. Example:

  {PROG} text --model ./all-MiniLM-L6-v2
"""
# A batch that still runs after the calls were drained gets so long before the process leaves it behind.
_CLOSE_SECONDS: Final = 2.0
_FAILED, _MISUSED = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit status: 0 after a clean drain, 1 after a failure, 2 for wrong settings."""
    modality, *rest = (list(sys.argv[1:] if argv is None else argv)) or ["--help"]
    if modality in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    if modality == "--version":
        sys.stdout.write(f"{PROG} {version('embedmesh')}\n")
        return 0
    if modality in ("image", "audio"):
        return _misused(f"the {modality} encoder comes with a later release; this one serves text")
    if modality != "text":
        return _misused(f"{modality!r} is no modality; try `{PROG} text --model DIR`, or `{PROG} --help`")
    settings = load(TextSettings, prog=f"{PROG} text", section="text", env_prefix="EMBEDMESH_TEXT_", argv=rest)
    try:
        models = Models(_read_specs(settings))
    except ModelError as error:
        return _misused(str(error))
    logs.configure(settings.log_level, settings.log_format, "text")
    status, hung = asyncio.run(_serve(settings, models))
    if hung:
        # The interpreter would wait for ever for the thread in which the backend hangs.
        _log.error("a batch still runs in the backend, leaving it behind")
        logging.shutdown()
        os._exit(_FAILED)
    return status


def _misused(sentence: str) -> int:
    sys.stderr.write(f"{PROG}: {sentence}\n")
    return _MISUSED


def _read_specs(settings: TextSettings) -> list[ModelSpec]:
    """Read all manifests.

    Raises:
        ModelError: With the problems of all of them.
    """
    specs: list[ModelSpec] = []
    problems: list[str] = []
    for folder in settings.model:
        try:
            spec = load_spec(folder)
        except ModelError as error:
            problems.append(str(error))
            continue
        if spec.modality == "text":
            specs.append(spec)
        else:
            problems.append(f'model "{spec.name}" in {folder} is for {spec.modality}, not for text')
    if problems:
        raise ModelError("\n".join(problems))
    return specs


async def _serve(settings: TextSettings, models: Models) -> tuple[int, bool]:
    """Serve until a signal; gives the exit status, and whether a backend hangs."""
    registry = CollectorRegistry()
    metrics = EncoderMetrics(registry)
    node = Node(settings, role="text", registry=registry, services=[TEXT_SERVICE, CATALOG_SERVICE])
    service = EmbedService(
        models,
        metrics,
        max_inputs=settings.max_inputs,
        default_timeout_seconds=settings.default_timeout_seconds,
    )
    text_pb2_grpc.add_TextEncoderServicer_to_server(TextEncoderServicer(service), node.server)
    catalog_pb2_grpc.add_ModelCatalogServicer_to_server(
        ModelCatalogServicer(models, max_inputs=settings.max_inputs), node.server
    )
    try:
        await node.start()
    except BindError as error:
        _log.error("%s", error)
        return _FAILED, False
    # Probes are answered from here on, with NOT_SERVING until the models are warm.
    node.set_ready(CATALOG_SERVICE, True)
    running = asyncio.create_task(node.run())
    loading = asyncio.create_task(_load_all(settings, models, metrics))
    await asyncio.wait((running, loading), return_when=asyncio.FIRST_COMPLETED)
    status = 0
    if running.done():
        loading.cancel()
    elif loading.result():
        watching = asyncio.create_task(_watch(node, models, settings.stall_seconds))
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


async def _watch(node: Node, models: Models, stall_seconds: float) -> None:
    """Keep health honest: a node with a model whose backend hangs must get no more calls."""
    healthy = False
    while True:
        stalled = [name for name, encoder in models.encoders.items() if encoder.stalled_seconds >= stall_seconds]
        if healthy is bool(stalled):
            healthy = not stalled
            node.set_ready(TEXT_SERVICE, healthy)
            if stalled:
                _log.error(
                    "no batch ended for %s s, not serving until one does", stall_seconds, extra={"models": stalled}
                )
        await asyncio.sleep(min(1.0, stall_seconds / 4))


async def _load_all(settings: TextSettings, models: Models, metrics: EncoderMetrics) -> bool:
    """Load one model after the other; gives whether there is any to serve."""
    for spec in models.specs:
        started = time.perf_counter()
        try:
            encoder = await _load(spec, settings, metrics)
        except ModelError as error:
            _log.error("%s", error, exc_info=error.__cause__)
        except Exception:  # noqa: BLE001  (one broken model does not take the others along)
            _log.exception("cannot load model %s from %s", spec.name, spec.folder)
        else:
            models.add(encoder)
            seconds = round(time.perf_counter() - started, 3)
            _log.info("model ready", extra={"model": spec.name, "revision": spec.revision, "seconds": seconds})
    return bool(models.encoders)


async def _load(spec: ModelSpec, settings: TextSettings, metrics: EncoderMetrics) -> Encoder:
    def read() -> tuple[TextPreparer, Backend]:
        verify_files(spec)
        preparer = TextPreparer(spec, settings.max_text_bytes)
        return preparer, create_backend(spec, BackendOptions(settings.backend, settings.threads))

    preparer, backend = await asyncio.to_thread(read)
    options = EncoderOptions(
        batch_cost=settings.batch_cost,
        batch_items=settings.batch_items,
        aging_seconds=settings.aging_seconds,
        max_queue_cost=settings.max_queue_cost,
        lanes=settings.lanes,
        prepare_threads=settings.prepare_threads,
    )
    encoder = Encoder(spec, preparer, backend, metrics, options)
    try:
        # A short text, and one as long as the model reads.
        texts = ("warm", "warm " * spec.max_input_units)
        await encoder.warm_up([TextItem(text[: settings.max_text_bytes]) for text in texts])
    except BaseException:
        await encoder.close()
        raise
    return encoder


if __name__ == "__main__":
    sys.exit(main())
