"""Spans of real processes, as a real receiver of OTLP gets them."""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, use_span

import embedmesh
from embedmesh.v1 import gateway_pb2, gateway_pb2_grpc
from embedmesh_cli.mesh import Mesh
from embedmesh_encoder.backend.fake import FAIL, write_model

GATEWAY, ENCODER = "embedmesh-gateway", "embedmesh-encoder-text"
EMBED, EMBED_TEXT = "embedmesh.v1.Gateway/Embed", "embedmesh.v1.TextEncoder/EmbedText"
SERVER, CLIENT = 2, 3  # of the enum SpanKind
ERROR = 2  # of the enum StatusCode
SECRET, TOKEN = "a text that nobody else may see", "sesame-open-3b1f"
BOUND = 20.0  # seconds; nothing is waited for longer


@dataclass
class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it gets: spans by the name of their service."""

    endpoint: str = ""
    raw: bytes = b""
    spans: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))

    async def Export(self, request: Any, context: Any) -> Any:
        self.raw += request.SerializeToString()
        for resource in request.resource_spans:
            named = {each.key: each.value.string_value for each in resource.resource.attributes}
            self.spans[named["service.name"]] += [span for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, service: str, name: str, trace_id: bytes = b"") -> list[Any]:
        return [
            span for span in self.spans[service] if span.name == name and (not trace_id or span.trace_id == trace_id)
        ]

    async def get(self, service: str, name: str, trace_id: bytes = b"", *, count: int = 1) -> Any:
        """Wait for so many spans of a name, and give the first, or the list if there are several."""
        end = time.monotonic() + BOUND
        while len(found := self.named(service, name, trace_id)) < count:
            assert time.monotonic() < end, f"{service} sent {[span.name for span in self.spans[service]]}, not {name}"
            await asyncio.sleep(0.02)
        return found[0] if count == 1 else found


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    server, servicer = grpc.aio.server(), Receiver()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    servicer.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield servicer
    await server.stop(None)


def traced(endpoint: str, **settings: Any) -> dict[str, Any]:
    """Options of a mesh that sends its spans to `endpoint`, at once."""
    on = {"tracing": True, **settings}
    return {
        "gateway": on,
        "text": on,
        "env": {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"},
        "redis": "none",
    }


def caller(number: int, *, sampled: bool = True) -> AbstractContextManager[Any]:
    """A span of the caller's own, whose ids are `number`."""
    return use_span(NonRecordingSpan(SpanContext(number, number, False, TraceFlags(int(sampled)))))


def ids(number: int) -> tuple[bytes, bytes]:
    return number.to_bytes(16, "big"), number.to_bytes(8, "big")


def of(span: Any) -> dict[str, Any]:
    """The attributes of a span."""
    values = {each.key: each.value for each in span.attributes}
    return {
        key: [item.string_value for item in value.array_value.values]
        if value.WhichOneof("value") == "array_value"
        else getattr(value, value.WhichOneof("value"))
        for key, value in values.items()
    }


async def test_one_trace_leads_from_the_caller_to_the_batch(start_mesh: Any, receiver: Receiver) -> None:
    trace_id, caller_id = ids(11)
    async with start_mesh(**traced(receiver.endpoint)) as mesh:
        async with embedmesh.AsyncClient(mesh.address, token=TOKEN) as client:
            with caller(11):
                await client.embed([SECRET, "another", SECRET])
                await client.embed([SECRET])
        first, again = await receiver.get(GATEWAY, EMBED, count=2)
        call = await receiver.get(GATEWAY, EMBED_TEXT)
        lookup, store = await receiver.get(GATEWAY, "cache.get"), await receiver.get(GATEWAY, "cache.set")
        served = await receiver.get(ENCODER, EMBED_TEXT)
        prepare, queue = await receiver.get(ENCODER, "prepare"), await receiver.get(ENCODER, "queue")
        infer, batch = await receiver.get(ENCODER, "infer"), await receiver.get(ENCODER, "batch")

    every = [span for spans in receiver.spans.values() for span in spans]
    assert {span.trace_id for span in every} == {trace_id}
    assert len(every) == 10  # nothing else was recorded
    assert (first.kind, call.kind, served.kind) == (SERVER, CLIENT, SERVER)
    assert first.parent_span_id == again.parent_span_id == caller_id
    assert {span.parent_span_id for span in (lookup, call, store)} == {first.span_id}
    assert served.parent_span_id == call.span_id
    assert {span.parent_span_id for span in (prepare, queue, infer, batch)} == {served.span_id}
    assert [link.span_id for link in batch.links] == [served.span_id]
    assert [link.span_id for link in infer.links] == [batch.span_id]
    assert queue.end_time_unix_nano == batch.start_time_unix_nano == infer.start_time_unix_nano
    assert infer.end_time_unix_nano == batch.end_time_unix_nano
    assert batch.end_time_unix_nano - batch.start_time_unix_nano > 1e6  # the fake model takes a millisecond
    assert served.start_time_unix_nano <= queue.start_time_unix_nano <= served.end_time_unix_nano

    rpc = {"rpc.system": "grpc", "rpc.service": "embedmesh.v1.TextEncoder", "rpc.method": "EmbedText"}
    assert of(call) == rpc | {"rpc.grpc.status_code": 0, "embedmesh.modality": "text", "embedmesh.inputs": 2}
    encoder = of(served)
    assert encoder.items() >= {**rpc, "rpc.grpc.status_code": 0, "embedmesh.inputs": 2, "embedmesh.failed": 0}.items()
    assert encoder["embedmesh.model"]
    assert encoder["embedmesh.revision"]
    units = encoder["embedmesh.units"]
    assert units > 2
    model = {"embedmesh.model": encoder["embedmesh.model"]}
    ridden = {"embedmesh.batch_inputs": 2, "embedmesh.batch_units": units, "embedmesh.padding_units": 0}
    assert of(batch) == model | ridden | {"embedmesh.failed": 0}
    assert of(queue).keys() == {"embedmesh.inputs", "embedmesh.units", "embedmesh.queue_seconds"}
    assert of(lookup) == {"embedmesh.inputs": 2, "embedmesh.cached": 0}
    assert of(first)["embedmesh.models"] == [encoder["embedmesh.model"]]
    assert (of(first)["embedmesh.cached"], of(again)["embedmesh.cached"]) == (0, 1)
    assert SECRET.encode() not in receiver.raw
    assert TOKEN.encode() not in receiver.raw


async def test_requests_that_shared_a_batch_are_linked_to_it_and_it_to_them(
    start_mesh: Any, receiver: Receiver, tmp_path: Path
) -> None:
    write_model(tmp_path / "slow", dimensions=16, base_ms=300.0)
    async with (
        start_mesh(**traced(receiver.endpoint), text_models=(tmp_path / "slow",)) as mesh,
        embedmesh.AsyncClient(mesh.address) as client,
    ):

        async def embed(number: int, *, sampled: bool = True) -> None:
            with caller(number, sampled=sampled):
                await client.embed([f"text {number}"])

        async with asyncio.TaskGroup() as group:
            group.create_task(embed(1))
            await asyncio.sleep(0.1)  # it has the only lane
            for number in (2, 3):
                group.create_task(embed(number))
            group.create_task(embed(4, sampled=False))
        await receiver.get(ENCODER, "infer", count=3)
        batches = await receiver.get(ENCODER, "batch", count=2)
    (shared,) = (batch for batch in batches if len(batch.links) > 1)
    assert {link.trace_id for link in shared.links} == {ids(2)[0], ids(3)[0]}  # the third of them is not recorded
    assert of(shared)["embedmesh.batch_inputs"] == 3
    for number in (2, 3):
        (infer,) = receiver.named(ENCODER, "infer", ids(number)[0])
        assert [(link.trace_id, link.span_id) for link in infer.links] == [(shared.trace_id, shared.span_id)]
        (served,) = receiver.named(ENCODER, EMBED_TEXT, ids(number)[0])
        assert served.span_id in {link.span_id for link in shared.links}
    assert not [span for spans in receiver.spans.values() for span in spans if span.trace_id == ids(4)[0]]


async def test_the_caller_decides_in_any_language_else_the_ratio(start_mesh: Any, receiver: Receiver) -> None:
    # Only the gateway is asked: what it decides holds for the encoder.
    options = traced(receiver.endpoint, trace_ratio=0)
    options["text"] = {"tracing": True, "trace_ratio": 1}
    async with start_mesh(**options) as mesh, grpc.aio.insecure_channel(mesh.address) as channel:
        stub: Any = gateway_pb2_grpc.GatewayStub(channel)
        for number, parent in enumerate(("", "nonsense", f"00-{7:032x}-{7:016x}-00", f"00-{8:032x}-{8:016x}-01")):
            request = gateway_pb2.EmbedRequest()
            request.inputs.add().text.text = f"text {number}"
            await stub.Embed(request, metadata=(("traceparent", parent),) if parent else ())
        await receiver.get(GATEWAY, EMBED)
        await receiver.get(ENCODER, "batch")
        await mesh.stop()  # whatever else was recorded has been sent by now
    assert {span.trace_id for spans in receiver.spans.values() for span in spans} == {ids(8)[0]}
    assert len(receiver.named(ENCODER, EMBED_TEXT)) == 1


async def test_failures_have_a_code_and_no_text(start_mesh: Any, receiver: Receiver) -> None:
    async with (
        start_mesh(**traced(receiver.endpoint)) as mesh,
        embedmesh.AsyncClient(mesh.address, retries=0) as client,
    ):
        with caller(1):
            response = await client.embed([f"{SECRET} {FAIL}"])
            assert response.results[0].error is not None
        batch = await receiver.get(ENCODER, "batch")
        assert (batch.status.code, of(batch)["embedmesh.failed"]) == (ERROR, 1)
        assert of(await receiver.get(GATEWAY, EMBED))["embedmesh.failed"] == 1
        # The log finds the trace, and the trace the log.
        assert f'"trace_id": "{1:032x}"' in (mesh.log_dir / "text.log").read_text()

        with caller(2), pytest.raises(embedmesh.EmbedMeshError):
            await client.embed([SECRET], model="nobody")
        refused = await receiver.get(GATEWAY, EMBED, ids(2)[0])
        assert of(refused)["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0]
        assert refused.status.code != ERROR  # the caller's doing

        mesh.role("text").process.kill()
        with caller(3), pytest.raises(embedmesh.EmbedMeshError):
            await client.embed([SECRET], timeout=10)
        for name in (EMBED, EMBED_TEXT):
            failed = await receiver.get(GATEWAY, name, ids(3)[0])
            assert of(failed)["rpc.grpc.status_code"] == grpc.StatusCode.UNAVAILABLE.value[0]
            assert failed.status.code == ERROR
    assert SECRET.encode() not in receiver.raw
    assert FAIL.encode() not in receiver.raw


async def test_each_chunk_of_a_stream_is_a_span(start_mesh: Any, receiver: Receiver) -> None:
    texts = [f"text {i}" for i in range(5)]
    async with start_mesh(**traced(receiver.endpoint)) as mesh:
        with caller(5), embedmesh.Client(mesh.address) as client:
            read = await asyncio.to_thread(_in(caller(5), lambda: list(client.embed_stream(texts, chunk_inputs=2))))
        assert len(read) == 5
        chunks = await receiver.get(GATEWAY, "chunk", count=3)
        stream = await receiver.get(GATEWAY, "embedmesh.v1.Gateway/EmbedStream")
        calls = await receiver.get(GATEWAY, EMBED_TEXT, count=3)
    assert (stream.trace_id, stream.parent_span_id) == ids(5)
    assert {chunk.parent_span_id for chunk in chunks} == {stream.span_id}
    assert {call.parent_span_id for call in calls} == {chunk.span_id for chunk in chunks}
    assert sorted(of(chunk)["embedmesh.inputs"] for chunk in chunks) == [1, 2, 2]


def _in(context: AbstractContextManager[Any], work: Callable[[], Sequence[Any]]) -> Callable[[], Sequence[Any]]:
    def run() -> Sequence[Any]:
        with context:
            return work()

    return run


async def test_switched_off_nothing_is_sent_and_opentelemetry_is_not_imported(
    start_mesh: Any, receiver: Receiver
) -> None:
    options = traced(receiver.endpoint, trace_ratio=1) | {"redis": "embedded"}
    for role in ("gateway", "text"):
        options[role] = {"tracing": False, "trace_ratio": 1}
    options["env"] |= {"PYTHONPROFILEIMPORTTIME": "1"}  # each import is a line of the log
    async with start_mesh(**options) as mesh, embedmesh.AsyncClient(mesh.address) as client:
        with caller(1):
            await client.embed(["a text"])
        await mesh.role("gateway").process.stop(5)
        await mesh.role("text").process.stop(5)
        # Of the API and the metrics redis-py loads what is installed, whatever it is told.
        for role, absent in (("gateway", "opentelemetry.exporter"), ("text", "opentelemetry")):
            log = (mesh.log_dir / f"{role}.log").read_text()
            assert "embedmesh_server.tracing" in log
            assert "embedmesh_server.otel" not in log
            assert absent not in log
    assert not receiver.raw


async def test_what_was_recorded_is_sent_before_a_process_ends(start_mesh: Any, receiver: Receiver) -> None:
    options = traced(receiver.endpoint)
    options["env"]["OTEL_BSP_SCHEDULE_DELAY"] = "600000"
    async with start_mesh(**options) as mesh:
        async with embedmesh.AsyncClient(mesh.address) as client:
            with caller(1):
                await client.embed(["a text"])
        assert not receiver.raw
        await mesh.stop()
    assert receiver.named(GATEWAY, EMBED)
    assert receiver.named(ENCODER, "batch")


async def test_a_receiver_that_is_away_is_told_of_once_and_costs_no_call(start_mesh: Any, unused_tcp_port: int) -> None:
    options = traced(f"http://127.0.0.1:{unused_tcp_port}", trace_ratio=1)
    options["env"] |= {"OTEL_EXPORTER_OTLP_TIMEOUT": "1", "OTEL_BSP_MAX_QUEUE_SIZE": "20"}
    options["env"]["OTEL_BSP_MAX_EXPORT_BATCH_SIZE"] = "10"
    async with start_mesh(**options) as mesh, embedmesh.AsyncClient(mesh.address) as client:
        for number in range(60):
            assert not (await client.embed([f"text {number}"])).results[0].error
        await _until_logged(mesh, "spans cannot be sent")
        await client.embed(["one more"])
        await mesh.role("gateway").process.stop(BOUND)
        lines = (mesh.log_dir / "gateway.log").read_text().splitlines()
    about = [line for line in lines if "spans" in line or "opentelemetry" in line]
    assert sum("spans cannot be sent" in line for line in about) == 1
    assert sum("were lost" in line for line in about) == 1
    assert len(about) <= 5, about


async def _until_logged(mesh: Mesh, words: str) -> None:
    end = time.monotonic() + BOUND
    while words not in (mesh.log_dir / "gateway.log").read_text():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.05)
