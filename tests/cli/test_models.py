"""`embedmesh models show`, `remove` and `verify`; what needs the reference library is in mesh/test_pulled.py."""

import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from safetensors.numpy import save_file

from embedmesh_encoder.backend.fake import write_model
from embedmesh_encoder.model import ModelSpec, load_spec, write_manifest


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder of models of the command under test, with one in it."""
    write_model(tmp_path / "cache" / "models" / "tiny", name="org/tiny", dimensions=16, prompts={"query": "q: "})
    return tmp_path / "cache" / "models"


@pytest.fixture
def tower(tmp_path: Path, make_tower: Callable[..., Path]) -> Path:
    return make_tower(tmp_path / "tower", "image")


# --- show -----------------------------------------------------------------------------------------


def test_show_tells_what_a_model_is(cli: Any, home: Path) -> None:
    spec = load_spec(home / "tiny")
    for words in ("org/tiny", f"org/tiny@{spec.revision}", "tiny", home / "tiny"):
        done = cli("models", "show", words)
        assert done.status == 0, done.err
        for part in (
            "name        org/tiny\n",
            f"revision    {spec.revision}\n",
            "gives       16 numbers, normalised",
            f"reads       text, up to {spec.max_input_units} tokens\n",
            "before texts of role query: 'q: '",
            "runs        fake, float32",
            spec.license,
            str(spec.folder),
        ):
            assert part in done.out, done.out
    table = json.loads(cli("models", "show", "tiny", "--json").out)
    assert (table["name"], table["revision"], table["kinds"]) == ("org/tiny", spec.revision, ["dense"])
    assert table["files"] == dict(spec.files)


def test_show_tells_every_kind_of_vector(cli: Any, tmp_path: Path) -> None:
    write_model(tmp_path, kinds=("sparse", "multi_vector"), multi_vector_dimensions=8)
    done = cli("models", "show", tmp_path)
    assert "gives       sparse: lexical weights of its tokens, over a vocabulary of 262\n" in done.out
    assert "            multi-vector: 8 numbers a token, normalised\n" in done.out
    assert "-> token_weights, token_vectors)\n" in done.out


def test_show_tells_how_tokens_become_a_vector(cli: Any, tmp_path: Path) -> None:
    save_file({"linear.weight": np.zeros((4, 16), np.float32)}, tmp_path / "dense.safetensors")
    for name in ("model.onnx", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"{}")
    layer = {"kind": "dense", "file": "dense.safetensors", "inputs": 16, "outputs": 4, "activation": "tanh"}
    manifest = {
        "name": "headed", "family": "towers", "modality": "text", "space": "headed", "dimensions": 4,
        "truncatable_dimensions": [2], "normalized": False, "max_input_units": 8, "license": "MIT", "source": "a test",
        "backend": "onnxruntime", "text": {"tokenizer": "tokenizer.json", "prompts": {"default": "p: "}},
        "graph": {"file": "model.onnx", "layout": "padded", "pooling": ["cls", "mean"]}, "head": {"layers": [layer]},
        "layers": {"kept": 3, "of": 6, "averaged": [1, 3]},
    }  # fmt: skip
    write_manifest(tmp_path, manifest, ["model.onnx", "tokenizer.json", "dense.safetensors"])
    done = cli("models", "show", tmp_path)
    assert "4 numbers, not normalised; may be cut to 2" in done.out
    assert "pooled here: cls and mean" in done.out
    assert "then dense, tanh: 16 -> 4 (dense.safetensors)" in done.out
    assert "layers      3 of 6; the mean of hidden states 1 and 3 is pooled\n" in done.out
    assert "before texts without a role: 'p: '" in done.out
    assert "family      towers" in done.out


@pytest.mark.parametrize("command", ["show", "remove", "verify"])
def test_a_model_that_is_not_there(cli: Any, home: Path, command: str) -> None:
    done = cli("models", command, "org/other")
    assert done.status == 2
    assert done.err == "embedmesh: there is no model org/other at hand: `embedmesh models list` shows those that are.\n"
    (home / "tiny" / "model.toml").write_text("format = 1")
    for words in ("tiny", home / "tiny"):
        done = cli("models", command, words)
        assert done.status == 1
        assert "model.toml has" in done.err


# --- remove ---------------------------------------------------------------------------------------


def test_remove_takes_a_model_away_and_nothing_else(cli: Any, home: Path) -> None:
    write_model(home / "other", name="other")
    done = cli("models", "remove", "org/tiny", "--yes")
    assert done.status == 0, done.err
    assert f"Removed {home / 'tiny'}" in done.out
    assert [path.name for path in home.iterdir()] == ["other"]


def test_remove_asks(cli: Any, home: Path) -> None:
    done = cli("models", "remove", "tiny")
    assert done.status == 2
    assert f"say --yes to remove {home / 'tiny'} without being asked" in done.err
    assert (home / "tiny" / "model.toml").is_file()


def test_remove_touches_nothing_outside_of_its_home(cli: Any, home: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "mine", name="mine")
    done = cli("models", "remove", tmp_path / "mine", "--yes")
    assert done.status == 2
    assert f"{tmp_path / 'mine'} is not in {home}: remove it yourself" in done.err
    # A link in the home goes, what it leads to stays.
    (home / "link").symlink_to(tmp_path / "mine")
    assert cli("models", "remove", "mine", "--yes").status == 0
    assert not (home / "link").is_symlink()
    assert (tmp_path / "mine" / "model.toml").is_file()
    # A model that is the home itself would take all others along.
    write_model(home, name="home")
    done = cli("models", "remove", home, "--yes")
    assert done.status == 2
    assert (home / "tiny" / "model.toml").is_file()


def test_the_starter_towers_are_not_removed(cli: Any, home: Path) -> None:
    rows = [json.loads(line) for line in cli("models", "list", "--json").out.splitlines()]
    assert "org/tiny" in {row["name"] for row in rows}
    image = next(row["name"] for row in rows if row["modality"] == "image")
    done = cli("models", "remove", image, "--yes")
    assert done.status == 2
    assert "remove it yourself" in done.err


# --- verify ---------------------------------------------------------------------------------------


def test_verify_without_the_reference_library_says_what_to_install(
    cli: Any, tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # where it is installed, hide it
    done = cli("models", "verify", tower, "--reference", "org/tiny")
    assert done.status == 2
    assert "pip install 'embedmesh[verify]', or see to the rest with --no-reference" in done.err


def test_verify_wants_to_know_the_original(cli: Any, tower: Path) -> None:
    done = cli("models", "verify", tower)
    assert done.status == 2
    assert 'says "made by a test" of where it comes from: name the original' in done.err


def test_verify_sees_to_files_numbers_and_company(cli: Any, tower: Path) -> None:
    done = cli("models", "verify", tower, "--no-reference", "--json")
    assert done.status == 0, done.err
    report = json.loads(done.out)
    assert report["verified"]
    assert report["revision"] == load_spec(tower).revision
    assert (report["files"], report["samples"], report["nonfinite"], report["problems"]) == (2, 24, 0, [])
    assert 0 <= report["company_difference"] <= 1e-5
    assert "verified" in cli("models", "verify", tower, "--no-reference").out.splitlines()


def test_verify_finds_changed_files(cli: Any, tower: Path) -> None:
    with (tower / "preprocessor_config.json").open("a") as stream:
        stream.write(" ")
    done = cli("models", "verify", tower, "--no-reference", "--json")
    assert done.status == 1
    report = json.loads(done.out)
    assert not report["verified"]
    assert "has sha256" in report["problems"][0]
    done = cli("models", "verify", tower, "--no-reference")
    assert done.status == 1
    assert "NOT VERIFIED" in done.out


def test_verify_finds_vectors_that_depend_on_their_company(cli: Any, tower: Path) -> None:
    model = onnx.load(tower / "m.onnx")
    model.graph.node[-1].output[0] = "own"
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "batch"))
    model.graph.node.append(helper.make_node("ReduceMean", ["own", "batch"], ["others"], keepdims=1))
    model.graph.node.append(helper.make_node("Add", ["own", "others"], ["embeds"]))
    onnx.save(model, tower / "m.onnx")
    rewrite(tower)
    done = cli("models", "verify", tower, "--no-reference")
    assert done.status == 1
    assert "vectors depend on what else is in their batch, by " in done.out


def test_verify_finds_numbers_that_are_not_finite(cli: Any, home: Path, tmp_path: Path) -> None:
    samples = tmp_path / "samples.txt"
    samples.write_text("a text\n\nnot a number [[nan]]\n")
    done = cli("models", "verify", "tiny", "--no-reference", "--samples", samples)
    assert done.status == 1
    assert "samples    2, 1 of them with numbers that are not finite" in done.out
    assert "the vectors of 1 samples are not finite" in done.out


def rewrite(folder: Path) -> ModelSpec:
    """Write the manifest anew, after its files have changed."""
    manifest = tomllib.loads((folder / "model.toml").read_text())
    files = manifest.pop("files")
    del manifest["format"]
    return write_manifest(folder, manifest, files)


@pytest.mark.parametrize(
    ("samples", "message"),
    [("nowhere", "nowhere: No such file or directory"), ("empty", "holds nothing to verify with")],
)
def test_verify_without_samples(cli: Any, tower: Path, tmp_path: Path, samples: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    done = cli("models", "verify", tower, "--no-reference", "--samples", tmp_path / samples)
    assert done.status in {1, 2}
    assert message in done.err


def test_verify_looks_at_what_a_mesh_serves(cli: Any, home: Path, mesh: Any, tmp_path: Path) -> None:
    served = json.loads(cli("models", "list", "--address", mesh.address, "--json").out.splitlines()[0])
    write_model(home / "served", name=served["name"], dimensions=served["dimensions"])
    words = ("models", "verify", "served", "--no-reference", "--address", mesh.address, "--json")
    done = cli(*words)
    assert done.status == 0, done.err
    report = json.loads(done.out)
    assert (report["revision"], report["where"]) == (served["revision"], mesh.address)
    assert report["company_difference"] == 0
    # What a node refuses to give is told.
    samples = tmp_path / "samples.txt"
    samples.write_text("not a number [[nan]]\n")
    done = cli(*words, "--samples", samples)
    assert done.status == 1
    assert f"{mesh.address} could not embed some of the samples" in done.err
    done = cli("models", "verify", "tiny", "--no-reference", "--address", mesh.address)
    assert done.status == 1
    assert "MODEL_NOT_FOUND" in done.err
    done = cli("models", "verify", "tiny", "--no-reference", "--address", "127.0.0.1:9")
    assert done.status == 3
