"""The command as a whole: help, version, models on disk."""

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import pytest

from embedmesh.errors import EncoderUnreachable, Overloaded
from embedmesh_cli.console import command_name, explain
from embedmesh_encoder.backend.fake import write_model


def test_version(cli: Any) -> None:
    assert cli("--version").out == f"embedmesh {version('embedmesh')}\n"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["up"],
        ["embed"],
        ["models"],
        *(["models", command] for command in ("list", "pull", "quantize", "remove", "show", "verify")),
        ["demo"],
        ["bench"],
    ],
)
def test_help(cli: Any, words: list[str]) -> None:
    done = cli(*words, "--help")
    assert done.status == 0
    assert done.out.startswith(" ".join(["Usage: embedmesh", *words, "["]))
    assert max(map(len, done.out.splitlines())) <= 100


def test_no_command_shows_the_help(cli: Any) -> None:
    assert "up      Run the whole mesh" in cli().err + cli().out


def test_a_mistyped_command(cli: Any) -> None:
    done = cli("upp")
    assert done.status == 2
    assert "No such command 'upp'" in done.err


def test_models_on_disk(cli: Any, tmp_path: Path) -> None:
    write_model(tmp_path / "models" / "good", name="good-one")
    (tmp_path / "models" / "bad").mkdir()
    (tmp_path / "models" / "bad" / "model.toml").write_text("nonsense")
    done = cli("models", "list", "--folder", tmp_path / "models")
    assert done.status == 0
    header, bad, good = done.out.splitlines()
    assert header.split() == ["name", "revision", "space", "modality", "dims", "state", "where"]
    assert "unusable" in bad
    assert re.match(r"good-one +[0-9a-f]{16} +good-one +text +384 +on disk +/", good)
    rows = [
        json.loads(line) for line in cli("models", "list", "--folder", tmp_path / "models", "--json").out.splitlines()
    ]
    assert [row["name"] for row in rows] == ["bad", "good-one"]


def test_no_models_yet(cli: Any, tmp_path: Path) -> None:
    done = cli("models", "list", "--folder", tmp_path)
    assert done.status == 0
    assert done.out.startswith(f"No models in {tmp_path}. ")
    assert "makes the starter text model on first use" in done.out


def test_the_starter_models_that_come_along_are_listed(cli: Any) -> None:
    rows = [json.loads(line) for line in cli("models", "list", "--json").out.splitlines()]
    assert [(row["name"], row["modality"], row["space"], row["state"]) for row in rows] == [
        ("starter-image", "image", "all-MiniLM-L6-v2", "on disk"),
        ("starter-audio", "audio", "all-MiniLM-L6-v2", "on disk"),
    ]


def test_models_of_nobody(cli: Any) -> None:
    done = cli("models", "list", "--address", "localhost:1")
    assert done.status == 3
    assert "no mesh answers at localhost:1" in done.err


def test_failed_calls_are_explained() -> None:
    busy = explain(Overloaded("the queue is full", retry_after=0.25), "a:1")
    assert (str(busy), busy.status) == ("the queue is full (try again in 0.2 s) [OVERLOADED]", 1)
    away = explain(EncoderUnreachable("no text encoder answers"), "a:1")
    assert (str(away), away.status) == ("no text encoder answers [ENCODER_UNREACHABLE]", 3)
    assert EncoderUnreachable.code is grpc.StatusCode.UNAVAILABLE


def test_the_command_is_named_as_it_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Path(sys.executable).with_name("embedmesh")
    monkeypatch.setenv("PATH", str(beside.parent))
    assert command_name() == "embedmesh"
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(beside.parents[1])
    assert command_name() == "bin/embedmesh"
    monkeypatch.chdir("/")
    assert command_name() == str(beside)
