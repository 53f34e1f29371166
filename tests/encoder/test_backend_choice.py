from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedmesh_encoder.backend import Machine, best_lanes, choose, look
from embedmesh_encoder.backend.fake import write_model
from embedmesh_encoder.model import ModelError, ModelSpec

BARE = Machine()
MODERN = Machine(bfloat16="avx512_bf16", packages=frozenset({"openvino"}))
GPU = Machine(bfloat16="amx_bf16", gpu=True, packages=frozenset({"openvino", "onnxruntime-gpu"}))
Make = Callable[..., ModelSpec]


@pytest.fixture
def make(tmp_path: Path, describe: Make) -> Make:
    (tmp_path / "model.onnx").write_bytes(b"")
    return describe


@pytest.mark.parametrize(
    ("model", "asked", "machine", "chosen", "why"),
    [
        ({}, {}, BARE, ("onnxruntime", "float32"), "onnxruntime is what the model was made for"),
        # Full precision is kept, whatever the hardware, and with it the revision.
        ({}, {}, MODERN, ("onnxruntime", "float32"), "float32 is the model's precision"),
        ({}, {"precision": "auto"}, MODERN, ("openvino", "bfloat16"), "this CPU has avx512_bf16"),
        ({}, {"precision": "auto"}, BARE, ("onnxruntime", "float32"), "no better one can be had here"),
        (
            {},
            {"precision": "auto"},
            Machine(bfloat16="amx_bf16"),
            ("onnxruntime", "float32"),
            "no better one can be had here",
        ),
        (
            {},
            {"precision": "auto", "backend": "openvino"},
            Machine(packages=frozenset({"openvino"})),
            ("openvino", "float32"),
            "openvino was asked for",
        ),
        ({}, {"precision": "auto", "backend": "openvino"}, MODERN, ("openvino", "bfloat16"), "avx512_bf16"),
        ({}, {"precision": "auto", "backend": "onnxruntime"}, MODERN, ("onnxruntime", "float32"), "asked for"),
        ({}, {"precision": "bfloat16"}, MODERN, ("openvino", "bfloat16"), "bfloat16 was asked for"),
        ({}, {"backend": "openvino"}, MODERN, ("openvino", "float32"), "openvino was asked for"),
        ({}, {}, GPU, ("cuda", "float32"), "cuda because there is an NVIDIA GPU"),
        ({}, {"precision": "auto"}, GPU, ("cuda", "float32"), "cuda because there is an NVIDIA GPU"),
        ({}, {"backend": "onnxruntime"}, GPU, ("onnxruntime", "float32"), "onnxruntime was asked for"),
        ({}, {"backend": "tensorrt", "precision": "float16"}, GPU, ("tensorrt", "float16"), "float16 was asked for"),
        ({"backend": "openvino"}, {}, MODERN, ("openvino", "float32"), "openvino is what the model was made for"),
        ({"backend": "openvino"}, {"precision": "auto"}, MODERN, ("openvino", "bfloat16"), "avx512_bf16"),
        ({"precision": "bfloat16"}, {}, MODERN, ("openvino", "bfloat16"), "bfloat16 is the model's precision"),
        ({"precision": "bfloat16"}, {"precision": "float32"}, BARE, ("onnxruntime", "float32"), "was asked for"),
        ({"precision": "int8"}, {"precision": "auto"}, MODERN, ("onnxruntime", "int8"), "int8 is the model's"),
        ({"precision": "int8"}, {"backend": "openvino"}, MODERN, ("openvino", "int8"), "int8 is the model's"),
    ],
)
def test_what_is_chosen_and_why(
    make: Make, model: dict[str, Any], asked: dict[str, Any], machine: Machine, chosen: tuple[str, str], why: str
) -> None:
    spec = make(**model)
    choice = choose(spec, **asked, machine=machine)
    assert (choice.spec.backend, choice.spec.precision) == chosen
    assert why in choice.why
    assert (choice.spec.revision == spec.revision) is (chosen == (spec.backend, spec.precision))


@pytest.mark.parametrize(
    ("model", "asked", "machine", "message"),
    [
        ({}, {"backend": "openvino"}, BARE, "without the package openvino: pip install 'embedmesh[openvino]'"),
        ({}, {"precision": "bfloat16"}, BARE, "without the package openvino"),
        ({"backend": "openvino"}, {}, BARE, "without the package openvino"),
        ({}, {"backend": "cuda"}, MODERN, "pip install 'embedmesh[gpu]', in an environment without onnxruntime"),
        ({}, {"backend": "onnxruntime", "precision": "bfloat16"}, MODERN, "in float32, not in bfloat16"),
        ({}, {"precision": "int8"}, MODERN, "in float32, not in int8 (`embedmesh models quantize` makes such a model)"),
        ({"precision": "int8"}, {"precision": "float32"}, MODERN, "in int8, not in float32"),
        ({}, {"backend": "openvino", "precision": "float16"}, MODERN, "in float32 or bfloat16, not in float16"),
        ({}, {"backend": "triton"}, MODERN, "has no [triton] table"),
        ({}, {"backend": "fake"}, MODERN, 'was made for backend "onnxruntime" and cannot run on "fake"'),
    ],
)
def test_what_cannot_be_had_is_refused(
    make: Make, model: dict[str, Any], asked: dict[str, Any], machine: Machine, message: str
) -> None:
    with pytest.raises(ModelError) as caught:
        choose(make(**model), **asked, machine=machine)
    assert message in str(caught.value)


def test_the_fake_is_only_the_fakes(tmp_path: Path) -> None:
    spec = write_model(tmp_path)
    assert choose(spec, precision="auto", machine=GPU).spec.backend == "fake"
    with pytest.raises(ModelError, match='was made for backend "fake" and cannot run on "openvino"'):
        choose(spec, "openvino", machine=MODERN)


def test_a_model_of_a_server_runs_there_only(make: Make) -> None:
    machine = Machine(packages=frozenset({"tritonclient", "openvino"}))
    spec = make(backend="triton", graph={"layout": "packed"}, triton={"model": "minilm", "version": "1"})
    assert choose(spec, machine=machine).spec.backend == "triton"
    with pytest.raises(ModelError, match='has no graph of its own, only "triton" can run it'):
        choose(spec, "openvino", machine=machine)
    with pytest.raises(ModelError, match=r"without the package tritonclient: pip install 'embedmesh\[triton\]'"):
        choose(spec, machine=BARE)


def test_this_machine_is_looked_at() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    machine = look()
    assert bool(machine.bfloat16) is ("amx_bf16" in flags or "avx512_bf16" in flags)
    assert machine.gpu is Path("/dev/nvidiactl").exists()
    assert "openvino" in machine.packages


@pytest.mark.parametrize(
    ("backend", "cores", "size", "lanes"),
    [
        ("openvino", {0}, 0, 1),
        ("openvino", {0, 1}, 0, 2),
        ("openvino", set(range(32)), 2**30, 2),
        ("onnxruntime", {0}, 0, 1),
        ("onnxruntime", {0, 1}, 200 * 2**20, 2),
        # Its second lane needs a second copy of the weights.
        ("onnxruntime", {0, 1}, 300 * 2**20, 1),
        ("cuda", {0, 1}, 0, 1),
    ],
)
def test_lanes(
    make: Make, backend: Any, cores: set[int], size: int, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: cores)
    spec = make().run_by(backend, "float32")
    with (spec.folder / "model.onnx").open("wb") as graph:
        graph.truncate(size)
    assert best_lanes(spec) == lanes
