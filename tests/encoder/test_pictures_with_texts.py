"""Pictures with texts: from the call of an encoder to a real graph that reads both."""

import io
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from embedmesh.errors import EmbedMeshError, InputTooLarge, InvalidRequest, UndecodableInput
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_encoder.backend import create_backend
from embedmesh_encoder.encoder import Encoded, Encoder, EncoderOptions
from embedmesh_encoder.image import ImageItem, ImagePreparer
from embedmesh_encoder.modalities import image_preparer, warm_images
from embedmesh_encoder.model import load_spec, write_manifest
from embedmesh_encoder.settings import ImageSettings
from embedmesh_server.metrics import EncoderMetrics

PICTURE = 4
LIMIT = 16
WIDTH = 6
WORDS = ["<pad>", "<image>", "<s>", "user", "answer", "<unk>", "a", "red", "coat", "find", "<", ">", "image"]
Embed = Callable[..., Any]


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mean of the pixels times a matrix, and the vectors of all tokens that the mask counts."""
    folder = tmp_path_factory.mktemp("both")
    rng = np.random.default_rng(7)
    constants = {
        "weights": rng.standard_normal((3, WIDTH)).astype(np.float32),
        "table": rng.standard_normal((len(WORDS), WIDTH)).astype(np.float32),
        "area": np.array([2, 3]),
        "one": np.array([1]),
        "two": np.array([2]),
    }
    nodes = [
        helper.make_node("ReduceMean", ["pixel_values", "area"], ["colour"], keepdims=0),
        helper.make_node("MatMul", ["colour", "weights"], ["seen"]),
        helper.make_node("Gather", ["table", "input_ids"], ["tokens"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "two"], ["wide"]),
        helper.make_node("Mul", ["tokens", "wide"], ["counted"]),
        helper.make_node("ReduceSum", ["counted", "one"], ["read"], keepdims=0),
        helper.make_node("Add", ["seen", "read"], ["image_embeds"]),
    ]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["n", "longest"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["n", "longest"]),
        helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["n", 3, 32, 32]),
    ]
    outputs = [helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, ["n", WIDTH])]
    graph = helper.make_graph(
        nodes, "both", inputs, outputs, [numpy_helper.from_array(array, name) for name, array in constants.items()]
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), folder / "model.onnx")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[5]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<pad>", "<image>", "<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    square = {"height": 32, "width": 32}
    config = {"image_processor": {"image_processor_type": "ViTImageProcessor", "size": square}}
    (folder / "processor_config.json").write_text(json.dumps(config))
    manifest = {
        "name": "both",
        "modality": "image",
        "space": "both",
        "dimensions": WIDTH,
        "normalized": False,
        "max_input_units": LIMIT,
        "license": "Apache-2.0",
        "source": "made by a test",
        "backend": "onnxruntime",
        "graph": {
            "file": "model.onnx",
            "layout": "padded",
            "inputs": [each.name for each in inputs],
            "output": "image_embeds",
        },
        "image": {"processor": "processor_config.json"},
        "text": {
            "tokenizer": "tokenizer.json",
            "template": "user <image> {text} answer",
            "image_token": "<image>",
            "image_tokens": PICTURE,
            "prompts": {"default": "find "},
        },
    }
    write_manifest(folder, manifest, ["model.onnx", "processor_config.json", "tokenizer.json"])
    return folder


@pytest.fixture
def preparer(model: Path) -> ImagePreparer:
    return image_preparer(load_spec(model), ImageSettings.model_validate({"model": [model]}))


@pytest.fixture
async def embed(model: Path, preparer: ImagePreparer) -> AsyncIterator[Embed]:
    spec = load_spec(model)
    options = EncoderOptions(batch_cost=1 << 16)
    encoder = Encoder(spec, preparer, create_backend(spec), EncoderMetrics(CollectorRegistry()), options)
    await encoder.warm_up(warm_images(spec, ImageSettings.model_validate({"model": [model]})))
    yield encoder.embed
    assert await encoder.close(1)


@pytest.fixture
def expected(model: Path, preparer: ImagePreparer) -> Callable[[bytes, str], NDArray[np.float32]]:
    """What the graph gives for a picture and the words around it."""
    constants = {each.name: numpy_helper.to_array(each) for each in onnx.load(model / "model.onnx").graph.initializer}

    def vector(content: bytes, words: str) -> NDArray[np.float32]:
        ids = [WORDS.index(word) for word in words.split()]
        pixels, _ = preparer.prepare(ImageItem(content), pb.TRUNCATION_END).data
        found: NDArray[np.float32] = pixels.mean(axis=(1, 2)) @ constants["weights"] + constants["table"][ids].sum(0)
        return found

    return vector


IMAGES = "<image> " * PICTURE


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({}, f"<s> user {IMAGES} find answer"),
        ({"text": "a red coat"}, f"<s> user {IMAGES} find a red coat answer"),
        ({"text": "coat", "instruction": "a "}, f"<s> user {IMAGES} a coat answer"),
        ({"text": "a <image> coat"}, f"<s> user {IMAGES} find a < image > coat answer"),
        ({"text": "nonsense"}, f"<s> user {IMAGES} find <unk> answer"),
    ],
)
async def test_a_picture_and_its_text_become_one_vector(
    embed: Embed, expected: Any, item: dict[str, str], words: str
) -> None:
    content = picture(1)
    # In the company of a longer one.
    [found, _] = await embed([ImageItem(content, **item), ImageItem(picture(2), "a red coat " * 2)])
    assert isinstance(found, Encoded)
    np.testing.assert_allclose(found.vector, expected(content, words), atol=1e-5)
    assert (found.units, found.truncated) == (len(words.split()), False)


async def test_only_the_text_is_truncated(embed: Embed, expected: Any) -> None:
    content = picture(1)
    item = ImageItem(content, "red " * 10 + "coat " * 10)
    for truncation, kept in (
        (pb.TRUNCATION_END, "find " + "red " * 8),
        (pb.TRUNCATION_START, "coat " * 9),
    ):
        [found] = await embed([item], truncation=truncation)
        assert isinstance(found, Encoded)
        np.testing.assert_allclose(found.vector, expected(content, f"<s> user {IMAGES} {kept} answer"), atol=1e-5)
        assert (found.units, found.original_units, found.truncated) == (LIMIT, PICTURE + 3 + 21, True)
    [chunks, whole] = await embed([item, ImageItem(content, "red")], truncation=pb.TRUNCATION_CHUNK)
    assert isinstance(chunks, InvalidRequest)
    assert "stand in a template, and cannot be read in chunks" in chunks.message
    np.testing.assert_allclose(whole.vector, expected(content, f"<s> user {IMAGES} find red answer"), atol=1e-5)
    [refused] = await embed([item], truncation=pb.TRUNCATION_REFUSE)
    assert isinstance(refused, InputTooLarge)
    assert (refused.field, refused.metadata["unit"], refused.metadata["actual"]) == ("text", "tokens", "28")


async def test_whatever_is_wrong_hurts_one_input(embed: Embed, expected: Any) -> None:
    content = picture(1)
    items = [
        ImageItem(content, "coat"),
        ImageItem(b"no picture", "coat"),
        ImageItem(b"", "coat"),
        ImageItem(content, "x" * (1 << 20)),
        ImageItem(content, "y" * ((1 << 20) + 1)),
        ImageItem(content, instruction="\ud800"),
        ImageItem(content[: len(content) // 2], "coat"),
        ImageItem(content, "red"),
    ]
    outcomes = await embed(items)
    for place, word in ((0, "coat"), (3, "<unk>"), (7, "red")):
        assert isinstance(outcomes[place], Encoded)
        np.testing.assert_allclose(
            outcomes[place].vector, expected(content, f"<s> user {IMAGES} find {word} answer"), atol=1e-5
        )
    kinds = {1: UndecodableInput, 2: UndecodableInput, 4: InputTooLarge, 5: InvalidRequest, 6: UndecodableInput}
    assert {i: type(each) for i, each in enumerate(outcomes) if isinstance(each, EmbedMeshError)} == kinds
    assert [outcomes[place].field for place in (4, 5)] == ["text", "instruction"]


def test_limits_are_told(preparer: ImagePreparer) -> None:
    assert preparer.padded
    assert set(preparer.limits) == {"image_bytes", "image_pixels", "text_bytes"}


def test_a_model_that_reads_no_text_says_so(make_tower: Any, tmp_path: Path) -> None:
    spec = load_spec(make_tower(tmp_path / "m", "image"))
    preparer = image_preparer(spec, ImageSettings.model_validate({"model": [tmp_path / "m"]}))
    for item, field in (({"text": "a"}, "text"), ({"instruction": "a"}, "instruction")):
        with pytest.raises(InvalidRequest, match="this model reads no text with pictures") as caught:
            preparer.prepare(ImageItem(picture(1), **item), pb.TRUNCATION_END)
        assert caught.value.field == field
