import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from embedmesh import errors
from embedmesh.v1 import catalog_pb2, catalog_pb2_grpc, text_pb2, text_pb2_grpc
from embedmesh_encoder.__main__ import main
from embedmesh_encoder.backend.fake import write_model
from embedmesh_encoder.model import load_spec

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Process:
    """`embedmesh-encoder text` as users start it."""

    def __init__(self, folder: Path, *flags: str, **environment: str) -> None:
        self.ready_file = folder / "ready.json"
        self.log = folder / "log"
        command = [sys.executable, "-m", "embedmesh_encoder", "text", "--port", "0", "--http-port", "0"]
        with self.log.open("wb") as stderr:
            self.popen = subprocess.Popen(
                [*command, "--ready-file", str(self.ready_file), *flags],
                stderr=stderr,
                env={**os.environ, **environment},
            )

    def until(self, condition: Callable[[], Any]) -> Any:
        end = time.monotonic() + 30
        while not (found := condition()):
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.01)
        return found

    def ready(self) -> str:
        self.until(lambda: self.ready_file.exists() or self.popen.poll() is not None)
        return str(json.loads(self.ready_file.read_text())["grpc"])

    def logged(self, message: str) -> dict[str, Any]:
        """Wait for a line of the log."""

        def find() -> dict[str, Any] | None:
            lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.endswith("}")]
            return next((line for line in lines if line["message"] == message), None)

        found: dict[str, Any] = self.until(find)
        return found

    def wait(self) -> int:
        return self.popen.wait(30)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(*flags: str, **environment: str) -> Process:
        process = Process(tmp_path, *flags, **environment)
        started.append(process)
        return process

    yield start
    for process in started:
        process.popen.kill()
        process.popen.wait(10)


def embed(channel: grpc.Channel | grpc.aio.Channel, *texts: str) -> Any:
    stub: Any = text_pb2_grpc.TextEncoderStub(channel)
    inputs = [text_pb2.TextInput(text=text) for text in texts]
    return stub.EmbedText(text_pb2.EmbedTextRequest(inputs=inputs), timeout=30)


async def in_flight(process: Process, channel: grpc.aio.Channel, calls: int) -> list[asyncio.Task[Any]]:
    """Start calls, and wait until the node serves them all."""

    async def one(number: int) -> Any:
        return await embed(channel, f"text {number}")

    tasks = [asyncio.create_task(one(number)) for number in range(calls)]
    while sample(process, "embedmesh_encoder_stage_seconds_count", 'stage="prepare"') < calls:
        await asyncio.sleep(0.01)
    return tasks


def sample(process: Process, name: str, label: str = "") -> float:
    """Sum of the samples of a metric that /metrics shows."""
    address = json.loads(process.ready_file.read_text())["http"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{") and label in line)


async def test_sigterm_loses_no_call_in_flight(start: Callable[..., Process], tmp_path: Path) -> None:
    write_model(tmp_path / "model", base_ms=50)
    process = start("--model", str(tmp_path / "model"), "--batch-items", "2")
    address = await asyncio.to_thread(process.ready)
    async with grpc.aio.insecure_channel(address) as channel:
        tasks = await in_flight(process, channel, 40)
        assert not all(task.done() for task in tasks)
        process.popen.send_signal(signal.SIGTERM)
        responses = await asyncio.gather(*tasks)
    assert all(response.results[0].HasField("embedding") for response in responses)
    assert await asyncio.to_thread(process.wait) == 0


async def test_a_second_signal_quits_at_once(start: Callable[..., Process], tmp_path: Path) -> None:
    write_model(tmp_path / "model", base_ms=200)
    process = start("--model", str(tmp_path / "model"), "--batch-items", "1")
    address = await asyncio.to_thread(process.ready)
    async with grpc.aio.insecure_channel(address) as channel:
        tasks = await in_flight(process, channel, 50)
        process.popen.send_signal(signal.SIGTERM)
        await asyncio.to_thread(process.logged, "draining")
        process.popen.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait) == 128 + signal.SIGTERM
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    failed = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert failed
    assert {error.code() for error in failed} == {grpc.StatusCode.UNAVAILABLE}


def test_a_hanging_backend_does_not_keep_the_process(start: Callable[..., Process], tmp_path: Path) -> None:
    # Serves its warm-up at once, then takes for ever for a long batch.
    write_model(tmp_path / "model", ms_per_unit=50, max_input_units=4)
    process = start("--model", str(tmp_path / "model"), "--drain-seconds", "0", "--max-queue-cost", "10000")
    with grpc.insecure_channel(process.ready()) as channel:
        call = embed_future(channel, *(["text"] * 60))
        process.until(lambda: sample(process, "embedmesh_requests_in_flight") == 1)
        process.until(lambda: sample(process, "embedmesh_queue_inputs") == 0)
        process.popen.send_signal(signal.SIGTERM)
        assert process.wait() == 1
        assert call.code() is not grpc.StatusCode.OK
    assert process.logged("a batch still runs in the backend, leaving it behind")


def test_health_says_so_while_a_batch_hangs(start: Callable[..., Process], tmp_path: Path) -> None:
    write_model(tmp_path / "model", ms_per_unit=50, max_input_units=4)
    process = start("--model", str(tmp_path / "model"), "--stall-seconds", "0.5")
    with grpc.insecure_channel(process.ready()) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)

        def status() -> int:
            request = health_pb2.HealthCheckRequest(service="embedmesh.v1.TextEncoder")
            return int(health.Check(request, timeout=10).status)

        assert status() == SERVING
        call = embed_future(channel, *(["text"] * 20))  # one batch of 3 s
        process.until(lambda: status() == NOT_SERVING)
        assert not call.done()
        assert len(call.result().results) == 20
        process.until(lambda: status() == SERVING)


def embed_future(channel: grpc.Channel, *texts: str) -> Any:
    stub = text_pb2_grpc.TextEncoderStub(channel)
    inputs = [text_pb2.TextInput(text=text) for text in texts]
    return stub.EmbedText.future(text_pb2.EmbedTextRequest(inputs=inputs), timeout=60)


def test_probes_are_answered_while_models_load(start: Callable[..., Process], tmp_path: Path) -> None:
    write_model(tmp_path / "model", base_ms=700)
    process = start("--model", str(tmp_path / "model"))
    listening = process.logged("listening")
    with grpc.insecure_channel(listening["grpc"]) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)

        def status(service: str) -> int:
            return int(health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status)

        assert status("embedmesh.v1.TextEncoder") == NOT_SERVING
        assert status("") == NOT_SERVING
        assert status("embedmesh.v1.ModelCatalog") == SERVING
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://{listening['http']}/readyz", timeout=10)
        assert caught.value.code == 503
        caught.value.close()
        with pytest.raises(grpc.RpcError) as refused:
            embed(channel, "too early")
        assert isinstance(errors.from_rpc_error(refused.value), errors.NotReady)
        assert not process.ready_file.exists()
        process.ready()
        assert status("embedmesh.v1.TextEncoder") == SERVING
        process.until(lambda: status("") == SERVING)
        assert embed(channel, "now").results[0].HasField("embedding")
    process.popen.send_signal(signal.SIGINT)
    assert process.wait() == 0


def test_a_signal_while_models_load(start: Callable[..., Process], tmp_path: Path) -> None:
    write_model(tmp_path / "model", base_ms=300)
    process = start("--model", str(tmp_path / "model"))
    process.logged("listening")
    process.popen.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    assert "Traceback" not in process.log.read_text()


def test_a_broken_model_does_not_take_the_others_along(start: Callable[..., Process], tmp_path: Path) -> None:
    write_model(tmp_path / "broken", name="broken")
    write_model(tmp_path / "good", name="good")
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    # One flag, one environment variable that the flag overrides.
    both = f"{tmp_path / 'broken'},{tmp_path / 'good'}"
    process = start(EMBEDMESH_TEXT_MODEL=both)
    with grpc.insecure_channel(process.ready()) as channel:
        catalog: Any = catalog_pb2_grpc.ModelCatalogStub(channel)
        models = catalog.ListModels(catalog_pb2.ListModelsRequest(), timeout=10).models
        assert [(m.model.name, m.ready, m.is_default) for m in models] == [
            ("broken", False, True),
            ("good", True, False),
        ]
    assert "sha256" in process.log.read_text()
    assert "Traceback" not in process.log.read_text()


def listed(channel: grpc.Channel) -> list[tuple[str, bool]]:
    catalog: Any = catalog_pb2_grpc.ModelCatalogStub(channel)
    models = catalog.ListModels(catalog_pb2.ListModelsRequest(), timeout=10).models
    return [(info.model.name, info.ready) for info in models]


def test_a_folder_of_models_is_followed(
    start: Callable[..., Process], tmp_path: Path, make_tower: Callable[..., Path]
) -> None:
    root = tmp_path / "models"
    make_tower(root / "picture", "image")  # for the encoder of pictures
    process = start("--models", str(root))
    listening = process.logged("listening")
    with grpc.insecure_channel(listening["grpc"]) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)

        def status(service: str = "embedmesh.v1.TextEncoder") -> int:
            return int(health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status)

        assert (status(), status(""), status("embedmesh.v1.ModelCatalog")) == (NOT_SERVING, NOT_SERVING, SERVING)
        assert listed(channel) == []
        write_model(tmp_path / "made", name="one")
        (tmp_path / "made").rename(root / "one")
        process.until(lambda: status() == status("") == SERVING)
        assert embed(channel, "now").models[0].name == "one"
        shutil.rmtree(root / "one")
        process.until(lambda: status() == status("") == NOT_SERVING)
        assert process.logged("model let go")["model"] == "one"
    process.popen.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    assert "Traceback" not in process.log.read_text()


def test_hangups_while_models_load(start: Callable[..., Process], tmp_path: Path) -> None:
    write_model(tmp_path / "named", name="named", base_ms=300)
    (tmp_path / "models").mkdir()
    process = start("--model", str(tmp_path / "named"), "--models", str(tmp_path / "models"))
    with grpc.insecure_channel(process.logged("listening")["grpc"]) as channel:
        for _ in range(2):
            process.popen.send_signal(signal.SIGHUP)
        process.ready()
        write_model(tmp_path / "models" / "other", name="other", base_ms=300)
        for _ in range(2):
            process.popen.send_signal(signal.SIGHUP)
        process.until(lambda: listed(channel) == [("named", True), ("other", False)])
        process.popen.send_signal(signal.SIGHUP)
        process.until(lambda: listed(channel) == [("named", True), ("other", True)])
    process.popen.send_signal(signal.SIGTERM)
    assert process.wait() == 0


def test_a_signal_while_another_model_loads(start: Callable[..., Process], tmp_path: Path) -> None:
    write_model(tmp_path / "models" / "quick", name="quick")
    process = start("--models", str(tmp_path / "models"))
    with grpc.insecure_channel(process.ready()) as channel:
        write_model(tmp_path / "models" / "slow", name="slow", base_ms=60_000)
        process.until(lambda: ("slow", False) in listed(channel))
        call = embed_future(channel, "in flight")
        process.popen.send_signal(signal.SIGTERM)
        assert process.wait() == 0  # the load would take three minutes
        assert call.done()
    assert process.logged("a model still loads, leaving it behind")


def test_what_a_model_took_is_given_back(start: Callable[..., Process], tmp_path: Path, starter_model: Path) -> None:
    root = tmp_path / "models"
    write_model(root / "small", name="small")
    process = start("--models", str(root), "--log-level", "debug")
    node = psutil.Process(process.popen.pid)
    with grpc.insecure_channel(process.ready()) as channel:
        embed(channel, "small")
        shutil.copytree(starter_model, root / "big")
        process.until(lambda: ("all-MiniLM-L6-v2", True) in listed(channel))
        loaded = node.memory_info().rss
        shutil.rmtree(root / "big")
        # Its weights are 90 MB.
        process.until(lambda: node.memory_info().rss < loaded - 60_000_000)
        assert listed(channel) == [("small", True)]
        assert sample(process, "embedmesh_model_info", 'model="all-MiniLM-L6-v2"') == 0


def test_the_backend_is_chosen_and_said(start: Callable[..., Process], starter_model: Path) -> None:
    process = start("--model", str(starter_model), "--backend", "openvino")
    with grpc.insecure_channel(process.ready()) as channel:
        catalog: Any = catalog_pb2_grpc.ModelCatalogStub(channel)
        (model,) = catalog.ListModels(catalog_pb2.ListModelsRequest(), timeout=10).models
        made_by = embed(channel, "hello").models[0]
    chosen = process.logged("backend chosen")
    assert chosen["why"] == "float32 is the model's precision; openvino was asked for"
    assert chosen["revision"] == model.model.revision == made_by.revision != load_spec(starter_model).revision
    labels = (
        f'backend="openvino",modality="text",model="all-MiniLM-L6-v2",precision="float32",revision="{made_by.revision}"'
    )
    assert sample(process, "embedmesh_model_info", labels) == 1


def test_a_backend_that_cannot_be_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path)
    assert main(["text", "--model", str(tmp_path), "--backend", "openvino"]) == 2
    assert 'was made for backend "fake" and cannot run on "openvino"' in capsys.readouterr().err


def test_no_model_loads(start: Callable[..., Process], tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    process = start("--model", str(tmp_path / "model"))
    assert process.wait() == 1
    assert "fetch the model again" in process.log.read_text()
    assert process.logged("no model could be loaded, giving up")
    assert "Traceback" not in process.log.read_text()


def test_a_taken_port(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "embedmesh_encoder", "text", "--http-port", "0", "--port", str(port)]
        done = subprocess.run(
            [*command, "--model", str(tmp_path / "model")], capture_output=True, text=True, timeout=30, check=False
        )
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    assert "embedmesh-encoder text --model" in capsys.readouterr().out


def test_help_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["text", "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    for words in ("--model", "--batch-cost", "--max-queue-cost", "--lanes", "--threads", "50051", "9051"):
        assert words in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("embedmesh-encoder 0.")


@pytest.mark.parametrize(
    ("modality", "sentence"),
    [("video", "'video' is no modality"), ("txet", "'txet' is no modality")],
)
def test_other_modalities(modality: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([modality, "--model", "x"]) == 2
    assert sentence in capsys.readouterr().err


def test_wrong_settings_are_reported_together(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["text", "--batch-cost", "0", "--lanes", "many", "--modle", "x"])
    assert left.value.code == 2
    err = capsys.readouterr().err
    for words in ("--batch-cost", "--lanes", "did you mean --model?", "name the folder of at least one model"):
        assert words in err


def test_wrong_model_folders_are_reported_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make_tower: Callable[..., Path]
) -> None:
    folders = [tmp_path / "nothing", tmp_path, make_tower(tmp_path / "picture", "image")]
    words = [word for folder in folders for word in ("--model", str(folder))]
    assert main(["text", *words, "--models", str(tmp_path / "no")]) == 2
    err = capsys.readouterr().err
    assert f"--models {tmp_path / 'no'}: there is no such folder" in err
    assert f"{tmp_path / 'nothing'} is not a model folder" in err
    assert f"{tmp_path} is not a model folder" in err
    assert "is for image, not for text" in err
