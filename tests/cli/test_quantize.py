"""`embedmesh models quantize` on the real text model and on tiny towers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from embedmesh_encoder.backend import Machine, choose
from embedmesh_encoder.backend.fake import write_model
from embedmesh_encoder.model import ModelSpec, load_spec, verify_files, write_manifest

TEXTS = ("a cat sat on the mat", "war and peace", "", "the quick brown fox jumps over the lazy dog " * 8)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(5)
    for number in range(3):
        Image.fromarray(random.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def tower(tmp_path: Path, make_tower: Callable[..., Path]) -> Path:
    return make_tower(tmp_path / "tower", "image")


def test_int8_is_a_model_of_its_own(cli: Any, starter_model: Path, tmp_path: Path) -> None:
    samples = tmp_path / "samples.txt"
    samples.write_text("\n".join(TEXTS))
    target = tmp_path / "small"
    done = cli("models", "quantize", starter_model, "--precision", "int8", "--samples", samples, "--output", target)
    assert done.status == 0, done.err
    original, made = load_spec(starter_model), load_spec(target)
    verify_files(made)
    assert (made.name, made.family, made.precision) == (f"{original.name}-int8", f"{original.name}-int8", "int8")
    assert made.space == f"{original.space}-int8"
    assert made.revision != original.revision
    assert made.variant is not None
    assert made.variant.of == f"{original.name}@{original.revision}"
    assert made.variant.samples == 3
    assert 0.97 < made.variant.cosine_min <= made.variant.cosine_p1 <= made.variant.cosine_mean < 0.9999
    assert 0.97 < made.variant.company_min < 1
    assert f"min {made.variant.cosine_min:.6f}" in done.out
    assert f"min {made.variant.cosine_min:.6f}" in (target / "README.md").read_text()
    assert f"{made.name}@{made.revision}" in done.out
    assert "do not mix its vectors with the original's" in done.out
    assert made.path("model.onnx").stat().st_size < 0.7 * original.path("model.onnx").stat().st_size
    # What was measured is no part of what decides a vector.
    assert made.model_copy(update={"variant": None}).revision == made.revision
    # It runs as what it is, whatever precision is wished for automatically.
    machine = Machine(bfloat16="amx_bf16", packages=frozenset({"openvino"}))
    assert choose(made, precision="auto", machine=machine).spec.precision == "int8"
    done = cli("models", "quantize", target, "--precision", "int8", "--samples", samples)
    assert done.status == 2
    assert "is made for onnxruntime in int8: quantize the original" in done.err


def test_float16_keeps_the_space(cli: Any, tower: Path, pictures: Path) -> None:
    done = cli("models", "quantize", tower, "--precision", "float16", "--samples", pictures)
    assert done.status == 0, done.err
    original, made = load_spec(tower), load_spec(tower.with_name("tower-float16"))
    assert (made.name, made.precision, made.space) == ("tiny-image-float16", "float16", original.space)
    assert made.variant is not None
    assert made.variant.cosine_min >= 0.9999
    assert "may be compared with the original's" in done.out
    graph = onnx.load(made.path("m.onnx")).graph
    assert [one.data_type for one in graph.initializer if one.name == "weights"] == [TensorProto.FLOAT16]


def test_too_unlike_a_variant_is_not_kept(cli: Any, tower: Path, pictures: Path) -> None:
    words = ("models", "quantize", tower, "--precision", "int8", "--samples", pictures, "--min-cosine", 1)
    done = cli(*words)
    assert done.status == 1
    assert "is below 1.0: the variant is not kept" in done.err
    assert [path.name for path in tower.parent.iterdir()] == ["pictures", "tower"]
    assert cli(*words, "--force").status == 0
    assert load_spec(tower.with_name("tower-int8")).precision == "int8"
    done = cli(*words, "--force")
    assert done.status == 2
    assert "tower-int8 exists" in done.err


def test_weights_beside_the_graph_move_into_it(cli: Any, tower: Path, pictures: Path) -> None:
    graph = onnx.load(tower / "m.onnx")
    onnx.save(graph, tower / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=100)
    write_manifest(tower, manifest(load_spec(tower)), ["m.onnx", "m.data", "preprocessor_config.json"])
    done = cli("models", "quantize", tower, "--precision", "float16", "--samples", pictures)
    assert done.status == 0, done.err
    assert set(load_spec(tower.with_name("tower-float16")).files) == {"m.onnx", "preprocessor_config.json"}


def manifest(spec: ModelSpec) -> dict[str, Any]:
    simple = spec.model_dump(include={"name", "modality", "space", "dimensions", "normalized", "max_input_units"})
    tables = {"graph": spec.graph.model_dump(), "image": spec.image and spec.image.model_dump()}
    return {**simple, **tables, "license": spec.license, "source": spec.source, "backend": spec.backend}


@pytest.mark.parametrize("what", ["no samples", "no files", "no picture", "no folder", "no model", "fake"])
def test_what_cannot_be_measured(cli: Any, tower: Path, pictures: Path, tmp_path: Path, what: str) -> None:
    samples: tuple[object, ...] = ("--samples", pictures)
    if what == "no samples":
        samples = ()
    elif what == "no files":
        for file in pictures.iterdir():
            file.unlink()
    elif what == "no picture":
        (pictures / "9.txt").write_text("no picture")
    elif what == "no folder":
        samples = ("--samples", tmp_path / "nowhere")
    elif what == "no model":
        tower = tmp_path
    elif what == "fake":
        tower = tmp_path / "fake"
        write_model(tower)
    message = {
        "no samples": "tiny-image is for image: name a folder of files with --samples.",
        "no files": "holds nothing to embed.",
        "no picture": "sample 4 cannot be embedded: ",
        "no folder": "nowhere: No such file or directory.",
        "no model": "is not a model folder",
        "fake": "fake-text is made for fake in float32: quantize the original.",
    }[what]
    done = cli("models", "quantize", tower, "--precision", "int8", *samples, "--output", tmp_path / "made")
    assert done.status in {1, 2}
    assert message in done.err
    assert done.err.startswith("embedmesh: ")
    assert not (tmp_path / "made").exists()


def test_a_graph_without_products(cli: Any, tower: Path, pictures: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("GlobalAveragePool", ["pixel_values"], ["embeds"])],
        "pool",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("embeds", TensorProto.FLOAT, ["n", 3, 1, 1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tower / "m.onnx")
    write_manifest(tower, manifest(load_spec(tower)) | {"dimensions": 3}, ["m.onnx", "preprocessor_config.json"])
    done = cli("models", "quantize", tower, "--precision", "int8", "--samples", pictures)
    assert done.status == 1
    assert "tiny-image has no products with weights that int8 would make faster." in done.err
