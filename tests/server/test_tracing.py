import asyncio
import http.server
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from embedmesh_server import tracing
from embedmesh_server.settings import NodeSettings
from embedmesh_server.tracing import NO_TRACING, TracingError, start


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EXPORTER_OTLP_ENDPOINT", "EXPORTER_OTLP_PROTOCOL", "TRACES_SAMPLER", "TRACES_SAMPLER_ARG"):
        monkeypatch.delenv(f"OTEL_{name}", raising=False)


def told(**settings: Any) -> NodeSettings:
    return NodeSettings.model_validate(settings)


def test_off_is_the_default_and_costs_no_import() -> None:
    assert start(told(), "text") is NO_TRACING
    probe = (
        "import sys, embedmesh_encoder.__main__\n"
        "from embedmesh_server import settings, tracing\n"
        "tracing.start(settings.NodeSettings(), 'text')\n"
        "import embedmesh\n"
        "embedmesh.Client('localhost:1')._metadata\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))\n"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, timeout=60)


def test_without_the_extra_a_node_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "embedmesh_server.otel", raising=False)
    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(TracingError, match=re.escape("pip install 'embedmesh[tracing]'")):
        start(told(tracing=True), "text")


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4317"}, "put http:// (no TLS) or https:// before it"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "say grpc or http/protobuf"),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "soon"}, "an OTEL_EXPORTER_OTLP_ variable makes no sense"),
        ({"OTEL_TRACES_SAMPLER": "allways_on"}, "say always_on, always_off, traceidratio"),
        ({"OTEL_TRACES_SAMPLER": "traceidratio"}, "OTEL_TRACES_SAMPLER_ARG '': say 0 to 1"),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "nan"}, "'nan': say 0 to 1"),
    ],
)
def test_variables_that_make_no_sense_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sentence: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TracingError, match=re.escape(sentence)):
        start(told(tracing=True), "text")


@pytest.mark.parametrize("process", ["gateway", "encoder"])
def test_a_process_refuses_in_one_sentence(process: str, tmp_path: Any) -> None:
    from embedmesh_encoder.backend.fake import write_model

    write_model(tmp_path / "model")
    words = {"gateway": ["--text-target=localhost:1"], "encoder": ["text", f"--model={tmp_path / 'model'}"]}[process]
    hidden = f"import sys; sys.modules['opentelemetry'] = None; from embedmesh_{process}.__main__ import main; "
    done = subprocess.run(
        [sys.executable, "-c", f"{hidden}sys.exit(main(sys.argv[1:]))", *words, "--tracing", "--port=0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (1, 2)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert len(lines) == 1
    assert lines[0] == (
        f"embedmesh-{process}: --tracing needs OpenTelemetry, and opentelemetry is not installed: "
        "pip install 'embedmesh[tracing]', or go without --tracing"
    )


@pytest.mark.parametrize("ratio", ["-0.1", "1.1", "nan"])
def test_a_ratio_is_from_0_to_1(ratio: str) -> None:
    with pytest.raises(ValueError, match="trace_ratio"):
        told(trace_ratio=ratio)


@pytest.fixture
def http_receiver() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Gives the address of a receiver of OTLP by HTTP, and what it got: paths and bodies."""
    got: list[tuple[str, bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *words: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", got
        server.shutdown()
        thread.join()


async def test_otlp_by_http(monkeypatch: pytest.MonkeyPatch, http_receiver: Any) -> None:
    address, got = http_receiver
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    spans = start(told(tracing=True, trace_ratio=1), "text")
    await asyncio.create_task(_serve_one(spans))
    await spans.close(5)
    ((path, body),) = got
    assert path == "/v1/traces"
    (resource,) = trace_service_pb2.ExportTraceServiceRequest.FromString(body).resource_spans
    assert "ours" in {each.value.string_value for each in resource.resource.attributes}
    assert [span.name for scope in resource.scope_spans for span in scope.spans] == ["a.Service/Method"]


@pytest.mark.parametrize("baggage", ["\u00e9=1", "a%0Ab=1", "a=%0A%00", "x=" + "y" * 9000, "no pair", ","])
async def test_headers_of_a_hostile_caller_go_on_clean_or_not_at_all(
    baggage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    spans = start(told(tracing=True, trace_ratio=0), "text")

    async def serve() -> None:
        headers = {"traceparent": f"00-{1:032x}-{2:016x}-00", "tracestate": "\u00e9=1,a=b\n", "baggage": baggage}
        spans.serve("a.Service", "Method", headers)
        sent = dict(spans.call("/a.Service/Method").metadata)
        assert sent["traceparent"].startswith(f"00-{1:032x}-")
        assert all(value.isascii() and value.isprintable() and len(value) < 200 for value in sent.values())

    await asyncio.create_task(serve())
    await spans.close(5)
    assert not caplog.records


async def test_a_receiver_that_hangs_holds_up_the_end_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections and says nothing
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "600")
        spans = start(told(tracing=True, trace_ratio=1), "text")
        await asyncio.create_task(_serve_one(spans))
        began = time.monotonic()
        await spans.close(0.2)
        assert time.monotonic() - began < 20  # without the bound: 30 s


async def _serve_one(spans: tracing.Tracing) -> None:
    import grpc

    spans.serve("a.Service", "Method", {}).answer(grpc.StatusCode.OK)
