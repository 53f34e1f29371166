"""`embedmesh models pull` from folders and from a hub on loopback, by the real huggingface_hub."""

import importlib.util
import json
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from embedmesh.v1 import embedding_pb2 as pb
from embedmesh.v1 import text_pb2
from embedmesh_cli.likeness import Vectors, join
from embedmesh_cli.local import LocalModel
from embedmesh_encoder.model import load_spec, verify_files
from embedmesh_encoder.text import TextItem

IDENTITY = "torch.nn.modules.linear.Identity"
UNKNOWN = "[UNK]"
WORDS = [
    "[PAD]",
    "[CLS]",
    "[SEP]",
    UNKNOWN,
    "the",
    "a",
    "cat",
    "big",
    "red",
    "fox",
    "sat",
    "query",
    "document",
    ":",
    "text",
]
HIDDEN = 8
RNG = np.random.default_rng(11)
TABLE = RNG.normal(size=(len(WORDS), HIDDEN)).astype(np.float32)
ID = "org/tiny-text"
Files = dict[str, bytes]


def tokenizer(**changes: Any) -> bytes:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return json.dumps(json.loads(made.to_str()) | changes).encode()


def graph(
    inputs: Sequence[str] = ("input_ids", "attention_mask"),
    output: str = "last_hidden_state",
    *,
    dtype: Any = np.float32,
    pooled: bool = False,
    data: str = "",
    extra: Sequence[Any] = (),
    opset: int = 20,
) -> Files:
    """A graph that looks each token up; `pooled` gives the mean, `data` names the file its weights lie in."""
    ids = next((name for name in inputs if name == "input_ids"), inputs[0])
    table = numpy_helper.from_array(TABLE.astype(dtype), "table")
    nodes = [helper.make_node("Gather", ["table", ids], ["rows" if pooled or dtype != np.float32 else output])]
    if dtype != np.float32:
        nodes.append(helper.make_node("Cast", ["rows"], [output], to=TensorProto.FLOAT))
    elif pooled:
        nodes.append(helper.make_node("ReduceMean", ["rows", "axes"], [output], keepdims=0))
    shape: list[str | int] = ["n", HIDDEN] if pooled else ["n", "t", HIDDEN]
    weights = [table, *([numpy_helper.from_array(np.array([1]), "axes")] if pooled else [])]
    made = helper.make_model(
        helper.make_graph(
            [*nodes, *extra],
            "tiny",
            [helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "t"]) for name in inputs],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
            weights,
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=10,
    )
    files: Files = {}
    if data:
        raw = table.raw_data
        held = made.graph.initializer[0]
        held.ClearField("raw_data")
        held.data_location = TensorProto.EXTERNAL
        held.external_data.add(key="location", value=data)
        files[data] = raw
    files["model.onnx"] = made.SerializeToString()
    return files


def sentence_transformer(
    *modules: tuple[str, Mapping[str, Any], Mapping[str, Any]],
    pooling: Mapping[str, Any] | None = None,
) -> Files:
    """A repository as sentence-transformers saves it; further modules are kind, configuration and weights."""
    kinds = ["Transformer", "Pooling", *(kind for kind, _, _ in modules)]
    paths = ["", "1_Pooling", *(f"{i}_{kind}" for i, (kind, _, _) in enumerate(modules, start=2))]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    files: Files = {
        "README.md": b"---\nlicense: mit\ntags: [x]\n---\n# Tiny\n",
        "modules.json": json.dumps(listed).encode(),
        "config.json": json.dumps(
            {"model_type": "bert", "hidden_size": HIDDEN, "max_position_embeddings": 64}
        ).encode(),
        "sentence_bert_config.json": b'{"max_seq_length": 32, "do_lower_case": false}',
        "1_Pooling/config.json": json.dumps(pooling or {"pooling_mode_mean_tokens": True}).encode(),
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": b'{"pad_token": "[PAD]", "model_max_length": 512}',
        "onnx/model.onnx": graph()["model.onnx"],
        "onnx/model_quantized.onnx": b"never looked at",
        "pytorch_model.bin": b"never fetched",
        "modeling_tiny.py": b"raise SystemExit('never run')",
    }
    for (_, config, weights), path in zip(modules, paths[2:], strict=True):
        if config:
            files[f"{path}/config.json"] = json.dumps(config).encode()
        if weights:
            files[f"{path}/model.safetensors"] = save(dict(weights))
    return files


def modules(files: Files, *listed: tuple[str, str]) -> Files:
    """Another list of modules, of sentence-transformers: kind and folder."""
    made = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(listed)
    ]
    return files | {"modules.json": json.dumps(made).encode()}


def splade(**pooling: Any) -> Files:
    files = modules(sentence_transformer(), ("MLMTransformer", ""), ("SpladePooling", "1_Splade"))
    files["1_Splade/config.json"] = json.dumps(pooling).encode()
    return files | {"onnx/model.onnx": graph(output="logits")["model.onnx"]}


def colbert(
    dense: Mapping[str, Any] | None = None, *, output: str = "token_vectors", more: str = "", **settings: Any
) -> Files:
    """A repository as PyLate saves it, whose graph has its Dense inside."""
    listed = [("Transformer", ""), ("Dense", "1_Dense"), *([(more, "2_More")] if more else [])]
    files = modules(sentence_transformer(), *listed)
    config = {"in_features": HIDDEN, "out_features": HIDDEN, "bias": False, "activation_function": IDENTITY}
    said = {"model_type": "ColBERT", "query_length": 6, "document_length": 20, "skiplist_words": [":", "?!"]}
    files |= {
        "1_Dense/config.json": json.dumps(config | dict(dense or {})).encode(),
        "1_Dense/model.safetensors": save({"linear.weight": np.eye(HIDDEN, dtype=np.float32)}),
        "config_sentence_transformers.json": json.dumps(said | settings).encode(),
        "tokenizer_config.json": b'{"pad_token": "[PAD]", "mask_token": "[PAD]", "model_max_length": 512}',
        "onnx/model.onnx": graph(output=output)["model.onnx"],
    }
    return files


def static(**weights: Any) -> Files:
    files = modules({}, ("StaticEmbedding", "0_StaticEmbedding"))
    place = "0_StaticEmbedding"
    return files | {
        f"{place}/tokenizer.json": tokenizer(),
        f"{place}/model.safetensors": save(weights or {"embeddings": TABLE}),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[Files], Path]:
    def write(files: Files) -> Path:
        for name, content in files.items():
            (tmp_path / "tiny" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "tiny" / name).write_bytes(content)
        return tmp_path / "tiny"

    return write


@pytest.fixture
def pull(cli: Any, hub: Any, tmp_path: Path) -> Callable[..., Any]:
    """Pull from the hub into a cache of the test."""

    def run(source: str = ID, *options: object) -> Any:
        return cli("models", "pull", source, "--endpoint", hub.endpoint, "--cache-dir", tmp_path / "hub", *options)

    return run


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models"


def embed(path: Path, *texts: str) -> Any:
    model = LocalModel(load_spec(path))
    vectors = [model.embed(batch, unit=False) for batch in model.batches([TextItem(text) for text in texts])]
    model.close()
    return np.concatenate(vectors)


def rows(text: str) -> Any:
    return TABLE[[1, *(WORDS.index(word) for word in text.split()), 2]]


# --- layouts, from a folder -----------------------------------------------------------------------


def test_a_sentence_transformer_becomes_a_model(cli: Any, folder: Any, home: Path) -> None:
    prompts = {
        "prompts": {"query": "query : ", "passage": "document : ", "cluster": "text : "},
        "default_prompt_name": "passage",
    }
    files = sentence_transformer(("Normalize", {}, {})) | {
        "config_sentence_transformers.json": json.dumps(prompts).encode()
    }
    done = cli("models", "pull", folder(files))
    assert done.status == 0, done.err
    spec = load_spec(home / "tiny")
    verify_files(spec)
    assert (spec.name, spec.modality, spec.dimensions, spec.normalized) == ("tiny", "text", HIDDEN, True)
    assert (spec.max_input_units, spec.license, spec.precision) == (32, "mit", "float32")
    assert (spec.graph.file, spec.graph.layout, spec.graph.pooling) == ("onnx/model.onnx", "padded", "mean")
    assert spec.text is not None
    assert spec.text.prompts.model_dump() == {
        "query": "query : ", "document": "document : ", "default": "document : "
    }  # fmt: skip
    assert set(spec.files) == {"onnx/model.onnx", "tokenizer.json"}
    assert "Taking onnx/model.onnx (text, float32)" in done.out
    assert '{"cluster": "text : "}' in done.out
    assert f"{spec.name}@{spec.revision} is in {home / 'tiny'}" in done.out
    mean = rows("document : the cat").mean(axis=0)
    np.testing.assert_allclose(embed(home / "tiny", "the cat")[0], mean / np.linalg.norm(mean), rtol=1e-5)
    assert [path.name for path in home.iterdir()] == ["tiny"]  # nothing is left beside it


@pytest.mark.parametrize(
    ("pooling", "expected", "way"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls", lambda x: x[0]),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last", lambda x: x[-1]),
        ({"pooling_mode": "max"}, "max", lambda x: x.max(axis=0)),
        (
            {"pooling_mode": "weightedmean"},
            "weightedmean",
            lambda x: np.average(x, axis=0, weights=np.arange(1, len(x) + 1)),
        ),
        ({"pooling_mode": "mean_sqrt_len_tokens"}, "mean_sqrt_len", lambda x: x.sum(axis=0) / len(x) ** 0.5),
        (
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},  # joined in the library's order
            ("cls", "mean"),
            lambda x: np.concatenate([x[0], x.mean(axis=0)]),
        ),
        (
            {"pooling_mode": ["mean", "max"]},
            ("mean", "max"),
            lambda x: np.concatenate([x.mean(axis=0), x.max(axis=0)]),
        ),
        ({}, "mean", lambda x: x.mean(axis=0)),
    ],
)
def test_every_way_of_pooling(
    cli: Any, folder: Any, home: Path, pooling: Any, expected: Any, way: Callable[[Any], Any]
) -> None:
    done = cli("models", "pull", folder(sentence_transformer(pooling={"include_prompt": True, **pooling})))
    assert done.status == 0, done.err
    spec = load_spec(home / "tiny")
    assert spec.graph.pooling == expected
    assert spec.dimensions == HIDDEN * (1 if isinstance(expected, str) else len(expected))
    vectors = embed(home / "tiny", "the big red fox", "a cat")
    np.testing.assert_allclose(vectors, [way(rows("the big red fox")), way(rows("a cat"))], rtol=1e-5)


def test_dense_layers_and_norms_after_pooling(cli: Any, folder: Any, home: Path) -> None:
    weight, bias = RNG.normal(size=(5, HIDDEN)).astype(np.float32), RNG.normal(size=5).astype(np.float32)
    second = RNG.normal(size=(3, 5)).astype(np.float32)
    scale, shift = RNG.normal(size=3).astype(np.float32), RNG.normal(size=3).astype(np.float32)
    files = sentence_transformer(
        (
            "Dense",
            {"in_features": HIDDEN, "out_features": 5, "activation_function": "torch.nn.modules.activation.Tanh"},
            {"linear.weight": weight, "linear.bias": bias},
        ),
        ("Dropout", {"dropout": 0.1}, {}),
        (
            "Dense",
            {
                "in_features": 5,
                "out_features": 3,
                "bias": False,
                "activation_function": "torch.nn.modules.linear.Identity",
            },
            {"linear.weight": second},
        ),
        ("LayerNorm", {"dimension": 3}, {"norm.weight": scale, "norm.bias": shift}),
    )
    done = cli("models", "pull", folder(files))
    assert done.status == 0, done.err
    spec = load_spec(home / "tiny")
    assert (spec.dimensions, spec.normalized, spec.graph_dimensions) == (3, False, HIDDEN)
    x = np.tanh(rows("the cat sat").mean(axis=0) @ weight.T + bias) @ second.T
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * scale + shift
    np.testing.assert_allclose(embed(home / "tiny", "the cat sat")[0], x, rtol=1e-4)
    # What is changed after the pull is noticed.
    (home / "tiny" / "2_Dense" / "model.safetensors").write_bytes(save({"linear.weight": second}))
    assert "has sha256" in cli("models", "verify", "tiny", "--no-reference").out


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_vectors_are_cut_where_the_repository_cuts_them(
    cli: Any, folder: Any, home: Path, normalize: bool, pooled: bool
) -> None:
    files = sentence_transformer(*[("Normalize", {}, {})] * normalize)
    files["config_sentence_transformers.json"] = b'{"truncate_dim": 5}'
    files["config.json"] = json.dumps(
        {"hidden_size": HIDDEN, "max_position_embeddings": 64, "matryoshka_dimensions": [HIDDEN, 5, 4, 2]}
    ).encode()
    if pooled:
        files["onnx/model.onnx"] = graph(output="sentence_embedding", pooled=True)["model.onnx"]
    done = cli("models", "pull", folder(files))
    assert done.status == 0, done.err
    assert "vectors are cut to 5 numbers (truncate_dim)" in done.out
    spec = load_spec(home / "tiny")
    # The library normalises before it cuts, if at all.
    assert (spec.dimensions, spec.graph_dimensions, spec.normalized) == (5, HIDDEN, False)
    assert spec.truncatable_dimensions == (4, 2)
    mean = rows("the cat").mean(axis=0)
    expected = (mean / np.linalg.norm(mean) if normalize else mean)[:5]
    np.testing.assert_allclose(embed(home / "tiny", "the cat")[0], expected, rtol=1e-5)


@pytest.mark.parametrize("width", [0, HIDDEN, 2 * HIDDEN])
def test_a_width_that_cuts_nothing(cli: Any, folder: Any, home: Path, width: int) -> None:
    files = sentence_transformer(("Normalize", {}, {}))
    files["config_sentence_transformers.json"] = json.dumps({"truncate_dim": width}).encode()
    assert cli("models", "pull", folder(files)).status == 0
    spec = load_spec(home / "tiny")
    assert (spec.dimensions, spec.head, spec.normalized) == (HIDDEN, None, True)


@pytest.mark.parametrize(
    ("card", "widths"),
    [
        (
            '{\n "loss": "CosineSimilarityLoss",\n "matryoshka_dims": [\n  8,\n  4,\n  2\n ],\n "n_dims": -1}',
            (4, 2),
        ),
        ('"matryoshka_dims": []', ()),
        ('"matryoshka_dims": [4, "two"]', ()),
        ("matryoshka_dims: [4]", ()),
    ],
)
def test_widths_are_read_from_the_card_of_a_training(
    cli: Any, folder: Any, home: Path, card: str, widths: tuple[int, ...]
) -> None:
    files = sentence_transformer()
    files["README.md"] += f"* Loss: MatryoshkaLoss with these parameters:\n  ```json\n  {card}\n  ```\n".encode()
    assert cli("models", "pull", folder(files)).status == 0
    assert load_spec(home / "tiny").truncatable_dimensions == widths


def test_weights_beside_the_graph_come_along(cli: Any, folder: Any, home: Path) -> None:
    files = sentence_transformer()
    for name, content in graph(data="model.onnx_data").items():
        files[f"onnx/{name}"] = content
    assert cli("models", "pull", folder(files)).status == 0
    assert set(load_spec(home / "tiny").files) == {"onnx/model.onnx", "onnx/model.onnx_data", "tokenizer.json"}
    np.testing.assert_allclose(embed(home / "tiny", "cat")[0], rows("cat").mean(axis=0), rtol=1e-5)


def test_prompts_outside_of_pooling(cli: Any, folder: Any, home: Path) -> None:
    prompts = {"config_sentence_transformers.json": b'{"prompts": {"query": "query : "}}'}
    done = cli("models", "pull", folder(sentence_transformer(pooling={"include_prompt": False}) | prompts))
    assert done.status == 0, done.err
    items = [
        TextItem("cat sat", text_pb2.TEXT_ROLE_QUERY),
        TextItem("cat sat"),
        TextItem("sat", instruction="the big "),
    ]
    model = LocalModel(load_spec(home / "tiny"))
    found = np.concatenate([model.embed(batch, unit=False) for batch in model.batches(items)])
    model.close()
    wanted = [rows("query : cat sat")[3:].mean(0), rows("cat sat").mean(0), rows("sat")[1:].mean(0)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def vectors(path: Path, *texts: str, role: Any = text_pb2.TEXT_ROLE_UNSPECIFIED) -> Vectors:
    model = LocalModel(load_spec(path))
    found = join([model.vectors(batch) for batch in model.batches([TextItem(text, role) for text in texts])])
    model.close()
    return found


def test_logits_become_a_sparse_vector(cli: Any, folder: Any, home: Path) -> None:
    done = cli("models", "pull", folder(splade()))
    assert done.status == 0, done.err
    spec = load_spec(home / "tiny")
    assert (spec.kind_names, spec.dimensions) == (("sparse",), 0)
    ((indices, values),) = vectors(home / "tiny", "the cat sat").sparse or ()
    wanted = np.log1p(np.maximum(rows("the cat sat"), 0)).max(0)
    np.testing.assert_array_equal(indices, np.nonzero(wanted)[0])
    np.testing.assert_allclose(values, wanted[indices], rtol=1e-6)


def test_tokens_become_rows(cli: Any, folder: Any, home: Path) -> None:
    done = cli("models", "pull", folder(colbert()))
    assert done.status == 0, done.err
    assert 'no token of its vocabulary, and so are not skipped: ["?!"]' in done.out
    spec = load_spec(home / "tiny")
    assert spec.multi_vector
    assert (spec.multi_vector.query_length, spec.multi_vector.expand_to, spec.max_input_units) == (6, 6, 20)
    query, document = (
        (vectors(home / "tiny", "the cat :", role=role).multi_vector or [])[0]
        for role in (text_pb2.TEXT_ROLE_QUERY, text_pb2.TEXT_ROLE_DOCUMENT)
    )
    # [CLS] the cat : [SEP], and a token of padding, which is the one to fill up with; without ":" for documents.
    unit = TABLE / np.linalg.norm(TABLE, axis=1, keepdims=True)
    ids = [1, WORDS.index("the"), WORDS.index("cat"), WORDS.index(":"), 2, 0]
    np.testing.assert_allclose(query, unit[ids], rtol=1e-5)
    np.testing.assert_allclose(document, unit[[1, WORDS.index("the"), WORDS.index("cat"), 2]], rtol=1e-5)


@pytest.mark.parametrize(
    ("weights", "factors"),
    [
        ({"embedding.weight": TABLE}, np.ones(len(WORDS))),
        ({"embeddings": TABLE.astype(np.float16)}, np.ones(len(WORDS))),
        (
            {
                "embeddings": TABLE[::-1].copy(),
                "mapping": np.arange(len(WORDS))[::-1].copy(),
                "weights": np.arange(15.0),
            },
            np.arange(15.0),
        ),
    ],
)
def test_a_table_of_tokens(cli: Any, folder: Any, home: Path, weights: Any, factors: Any) -> None:
    done = cli("models", "pull", folder(static(**weights)))
    assert done.status == 0, done.err
    spec = load_spec(home / "tiny")
    assert (spec.graph.layout, spec.max_input_units, spec.normalized) == ("packed", 32_768, False)
    found = vectors(home / "tiny", "the cat sat", "a", "big red fox the cat").dense
    assert found is not None
    table = TABLE * factors[:, None]
    wanted = [
        table[[WORDS.index(word) for word in text.split()]].mean(0)
        for text in ("the cat sat", "a", "big red fox the cat")
    ]
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-3)
    done = cli("models", "pull", folder(static(**weights)), "--max-units", 4, "--replace")
    assert load_spec(home / "tiny").max_input_units == 4


def test_a_graph_that_holds_the_whole_pipeline(cli: Any, folder: Any, home: Path) -> None:
    files = sentence_transformer(("Normalize", {}, {}))
    files["onnx/model.onnx"] = graph(output="sentence_embedding", pooled=True)["model.onnx"]
    assert cli("models", "pull", folder(files)).status == 0
    spec = load_spec(home / "tiny")
    assert (spec.graph.output, spec.graph.pooling, spec.normalized) == ("sentence_embedding", "graph", True)


def test_a_plain_repository_must_be_told_how_it_pools(cli: Any, folder: Any, home: Path) -> None:
    files = {name: content for name, content in sentence_transformer().items() if "modules" not in name}
    path = folder(files)
    done = cli("models", "pull", path)
    assert done.status == 2
    assert "does not say how the vectors of tokens become one" in done.err
    assert not home.exists() or not any(home.iterdir())
    done = cli("models", "pull", path, "--pooling", "cls", "--normalize", "--max-units", 16, "--name", "org/other")
    assert done.status == 0, done.err
    spec = load_spec(home / "org--other")
    assert (spec.name, spec.graph.pooling, spec.normalized, spec.max_input_units) == ("org/other", "cls", True, 16)


def test_positions_that_begin_late_are_counted(cli: Any, folder: Any, home: Path) -> None:
    files = sentence_transformer()
    del files["sentence_bert_config.json"]
    files["config.json"] = json.dumps(
        {"model_type": "roberta", "hidden_size": HIDDEN, "max_position_embeddings": 66}
    ).encode()
    files["tokenizer_config.json"] = json.dumps(
        {"pad_token": {"content": "[CLS]"}, "model_max_length": int(1e30)}
    ).encode()
    assert cli("models", "pull", folder(files)).status == 0
    spec = load_spec(home / "tiny")
    assert spec.text is not None
    assert (spec.text.pad_id, spec.max_input_units) == (1, 64)


IMAGE_CONFIG = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
}


def clip_files(make_tower: Any, tmp_path: Path) -> Files:
    tower = make_tower(tmp_path / "tower", "image")
    model = onnx.load(tower / "m.onnx")
    for node in model.graph.node:
        node.output[:] = ["image_embeds" if name == "embeds" else name for name in node.output]
    model.graph.output[0].name = "image_embeds"
    files = sentence_transformer()
    return {
        "config.json": json.dumps(
            {
                "model_type": "clip", "projection_dim": HIDDEN,
                "vision_config": {"patch_size": 16, "model_type": "clip_vision_model"}, "text_config": {},
            }
        ).encode(),
        "tokenizer.json": files["tokenizer.json"],
        "tokenizer_config.json": files["tokenizer_config.json"],
        "preprocessor_config.json": json.dumps(IMAGE_CONFIG).encode(),
        "onnx/text_model.onnx": graph(("input_ids",), "text_embeds", pooled=True)["model.onnx"],
        "onnx/vision_model.onnx": model.SerializeToString(),
        "onnx/model.onnx": b"takes both, not looked at",
    }  # fmt: skip


def test_towers_share_a_family_and_a_space(cli: Any, folder: Any, home: Path, make_tower: Any, tmp_path: Path) -> None:
    done = cli("models", "pull", folder(clip_files(make_tower, tmp_path)))
    assert done.status == 0, done.err
    text, image = load_spec(home / "tiny-text"), load_spec(home / "tiny-image")
    assert (text.name, image.name) == ("tiny-text", "tiny-image")
    assert text.family == image.family == "tiny"
    assert text.space == image.space
    assert (text.max_input_units, text.graph.inputs, text.graph.pooling) == (77, ("input_ids",), "graph")
    assert image.image is not None
    assert (image.image.patch_size, image.image.extra_tokens, image.max_input_units) == (16, 1, 5)
    assert f"--text-model {home / 'tiny-text'} --image-model {home / 'tiny-image'}" in done.out


def test_of_two_towers_both_come_or_none(cli: Any, folder: Any, home: Path, make_tower: Any, tmp_path: Path) -> None:
    files = clip_files(make_tower, tmp_path)
    files["onnx/vision_model.onnx"] = (
        files["onnx/vision_model.onnx"].replace(b"GlobalAveragePool", b"G").replace(b"ReduceMean", b"ReduceMeen")
    )
    done = cli("models", "pull", folder(files))
    assert done.status == 1
    assert "cannot load" in done.err
    assert list(home.iterdir()) == []


def test_texts_of_siglip_are_padded_to_the_end(cli: Any, folder: Any, home: Path) -> None:
    files = {
        "config.json": b'{"model_type": "siglip", "text_config": {"max_position_embeddings": 16, "hidden_size": 8}}',
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": b'{"pad_token": "[SEP]"}',
        "onnx/text_model.onnx": graph(("input_ids",), "pooler_output", pooled=True)["model.onnx"],
    }
    assert cli("models", "pull", folder(files)).status == 0
    padded = np.concatenate([rows("cat"), np.tile(TABLE[2], (13, 1))]).mean(axis=0)
    np.testing.assert_allclose(embed(home / "tiny", "cat")[0], padded / np.linalg.norm(padded), rtol=1e-5)


# --- what is refused ------------------------------------------------------------------------------

DENSE = {"in_features": HIDDEN, "out_features": 4, "activation_function": "torch.nn.modules.activation.Tanh"}
NODE = helper.make_node("DequantizeLinear", ["q", "s"], ["unused"])
REFUSED: list[tuple[str, Callable[[], Files], str]] = [
    (
        "no graph",
        lambda: {k: v for k, v in sentence_transformer().items() if not k.endswith(".onnx")},
        "has no ONNX graph: `",
    ),
    (
        "quantised only",
        lambda: {k: v for k, v in sentence_transformer().items() if k != "onnx/model.onnx"},
        "has no model.onnx in its usual places, only onnx/model_quantized.onnx: choose one with --file",
    ),
    (
        "quantised by content",
        lambda: sentence_transformer() | {"onnx/model.onnx": graph(extra=[NODE])["model.onnx"]},
        "is quantised to int8, and there is no other",
    ),
    (
        "no ONNX",
        lambda: sentence_transformer() | {"onnx/model.onnx": b"<html>"},
        "is not an ONNX file, or a damaged one",
    ),
    ("empty ONNX", lambda: sentence_transformer() | {"onnx/model.onnx": b""}, "is not an ONNX file, or a damaged one"),
    (
        "truncated ONNX",
        lambda: sentence_transformer() | {"onnx/model.onnx": graph()["model.onnx"][:-40]},
        "is not an ONNX file, or a damaged one",
    ),
    (
        "external data missing",
        lambda: sentence_transformer() | {"onnx/model.onnx": graph(data="model.onnx_data")["model.onnx"]},
        "says that its weights lie in model.onnx_data, which is not there",
    ),
    (
        "external data outside",
        lambda: sentence_transformer() | {"onnx/model.onnx": graph(data="../../secret")["model.onnx"]},
        "says that its weights lie in ../../secret, which is not there",
    ),
    (
        "external data in a pickle's clothes",
        lambda: (
            sentence_transformer() | {"onnx/model.onnx": graph(data="w.bin")["model.onnx"], "onnx/w.bin": b"0" * 1000}
        ),
        "needs onnx/w.bin, which may hold pickled code",
    ),
    (
        "inputs of a decoder",
        lambda: (
            sentence_transformer()
            | {"onnx/model.onnx": graph(("input_ids", "attention_mask", "past_key_values.0.key"))["model.onnx"]}
        ),
        "wants inputs that the encoder does not make (past_key_values.0.key): export it for feature extraction",
    ),
    (
        "another opset",
        lambda: sentence_transformer() | {"onnx/model.onnx": graph(opset=99)["model.onnx"]},
        "cannot load ",
    ),
    (
        "code of its own",
        lambda: (
            sentence_transformer()
            | {"modules.json": b'[{"idx": 0, "name": "0", "path": "", "type": "custom_st.Transformer"}]'}
        ),
        "needs code of its own (custom_st.Transformer), which never runs here",
    ),
    (
        "a table and more",
        lambda: modules(static(), ("StaticEmbedding", "0_StaticEmbedding"), ("Dense", "1_Dense")),
        "is made of StaticEmbedding, Dense: the encoder serves Transformer, Pooling",
    ),
    ("no list", lambda: sentence_transformer() | {"modules.json": b"{}"}, "is not the list of modules"),
    ("no JSON", lambda: sentence_transformer() | {"modules.json": b"["}, "is not the list of modules"),
    (
        "no config",
        lambda: {k: v for k, v in sentence_transformer().items() if not k.startswith("1_")},
        "has no 1_Pooling/config.json",
    ),
    (
        "modules outside",
        lambda: (
            sentence_transformer()
            | {"modules.json": sentence_transformer()["modules.json"].replace(b"1_Pooling", b"../../etc")}
        ),
        "has no ../../etc/config.json",
    ),
    (
        "prompts that are none",
        lambda: sentence_transformer() | {"config_sentence_transformers.json": b'{"prompts": ["query: "]}'},
        "a configuration file of tiny is not as its library writes it",
    ),
    (
        "sizes that are none",
        lambda: sentence_transformer(("Dense", DENSE | {"in_features": "eight"}, {"linear.weight": TABLE})),
        "is not as its library writes it (ValueError: invalid literal for int()",
    ),
    (
        "sizes left out",
        lambda: sentence_transformer(("LayerNorm", {"size": 8}, {"norm.weight": TABLE})),
        "is not as its library writes it (KeyError: 'dimension')",
    ),
    ("a bad config", lambda: sentence_transformer() | {"1_Pooling/config.json": b"["}, "is not JSON"),
    (
        "prompts outside, pooled inside",
        lambda: (
            sentence_transformer(pooling={"include_prompt": False})
            | {"onnx/model.onnx": graph(output="sentence_embedding", pooled=True)["model.onnx"]}
        ),
        "leaves prompts out of its pooling (include_prompt), but onnx/model.onnx pools by itself",
    ),
    (
        "sums of logits",
        lambda: splade(pooling_strategy="sum"),
        "gives logits, from which its sparse vectors cannot be made here",
    ),
    ("another SPLADE", lambda: splade(activation_function="gelu"), "pools by max of gelu, which is no SPLADE"),
    ("rows without their layers", lambda: colbert(output="last_hidden_state"), "which are not its rows"),
    ("rows of another width", lambda: colbert({"out_features": 5}), "has rows of 8 numbers, its modules of 5"),
    ("long queries", lambda: colbert(query_length=33, document_length=32), "has queries of 33 tokens, but reads 32"),
    (
        "longer than positions",
        lambda: colbert(query_length=65, document_length=300),
        "has queries of 65 tokens, but reads 64",
    ),
    (
        "no token to fill up with",
        lambda: colbert() | {"tokenizer_config.json": b'{"pad_token": "[PAD]"}'},
        "names no mask_token or eos_token of the vocabulary",
    ),
    (
        "an unknown expansion",
        lambda: colbert(query_expansion={"strategy": "max"}),
        "fills queries up in a way that the encoder does not know",
    ),
    (
        "pooled rows",
        lambda: colbert(more="HierarchicalTokenPooling"),
        "has a module HierarchicalTokenPooling, which the encoder does not know of rows of tokens",
    ),
    (
        "a table as a pickle",
        lambda: {k: v for k, v in static().items() if not k.endswith(".safetensors")},
        "has no 0_StaticEmbedding/model.safetensors: pickles and other forms of its table are never loaded",
    ),
    ("no table", lambda: static(table=TABLE), "holds no table of numbers for tokens, but {'table': 'float32 [15, 8]'}"),
    (
        "a mapping beyond the table",
        lambda: static(embeddings=TABLE, mapping=np.array([0, 15])),
        "leads beyond its 15 rows",
    ),
    (
        "weights of other tokens",
        lambda: static(embeddings=TABLE, weights=np.ones(3, np.float32)),
        "has (3,) weights for 15 tokens",
    ),
    ("another pooling", lambda: sentence_transformer(pooling={"pooling_mode": "attention"}), "pools by attention"),
    (
        "a pickled Dense",
        lambda: sentence_transformer(("Dense", DENSE, {})) | {"2_Dense/pytorch_model.bin": b"pickle"},
        "has the weights of 2_Dense as a pickle only, which is never loaded",
    ),
    (
        "another activation",
        lambda: sentence_transformer(("Dense", DENSE | {"activation_function": "os.system"}, {"linear.weight": TABLE})),
        "is a Dense that the encoder does not know (activation os.system",
    ),
    (
        "a residual Dense",
        lambda: sentence_transformer(("Dense", DENSE | {"use_residual": True}, {"linear.weight": TABLE})),
        "residual",
    ),
    (
        "a Dense of other sizes",
        lambda: sentence_transformer(("Dense", DENSE, {"linear.weight": np.zeros((4, 9), np.float32)})),
        "does not fit the manifest: it holds {'linear.weight': (4, 9)}",
    ),
    (
        "a Dense that follows nothing",
        lambda: sentence_transformer(
            ("Dense", DENSE | {"in_features": 9}, {"linear.weight": np.zeros((4, 9), np.float32)})
        ),
        "the manifest says 9, from which come dimensions = 4",
    ),
    (
        "Dense after Normalize",
        lambda: sentence_transformer(("Normalize", {}, {}), ("Dense", DENSE, {"linear.weight": TABLE})),
        "has a Dense after Normalize",
    ),
    ("another module", lambda: sentence_transformer(("LSTM", {}, {})), "has a module LSTM"),
    (
        "no tokenizer",
        lambda: {k: v for k, v in sentence_transformer().items() if k != "tokenizer.json"},
        "has no tokenizer.json: make one with",
    ),
    ("a bad tokenizer", lambda: sentence_transformer() | {"tokenizer.json": b"{}"}, "is not a tokenizer"),
    (
        "case lowered elsewhere",
        lambda: (
            sentence_transformer() | {"sentence_bert_config.json": b'{"max_seq_length": 32, "do_lower_case": true}'}
        ),
        "lowers the case of texts outside of its tokenizer",
    ),
    (
        "no limit",
        lambda: (
            sentence_transformer()
            | {"sentence_bert_config.json": b"{}", "config.json": b"{}", "tokenizer_config.json": b"{}"}
        ),
        "does not say how many tokens it reads: name it with --max-units",
    ),
    (
        "no width",
        lambda: sentence_transformer() | {"config_sentence_transformers.json": b'{"truncate_dim": "4"}'},
        'cuts its vectors to "4" numbers, which is no width',
    ),
]


@pytest.mark.parametrize(("files", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_cannot_be_served_exactly_is_refused(
    cli: Any, folder: Any, home: Path, files: Callable[[], Files], message: str
) -> None:
    done = cli("models", "pull", folder(files()))
    assert done.status in {1, 2}
    assert message in done.err, done.err
    assert done.err.startswith("embedmesh: ")
    assert len(done.err.strip().splitlines()) == 1
    assert "Traceback" not in done.err
    assert not home.exists() or list(home.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="the extra is installed here")
def test_export_says_what_it_needs(cli: Any, folder: Any) -> None:
    done = cli("models", "export", folder(sentence_transformer()))
    assert done.status == 2
    assert done.err == "embedmesh: export needs torch and transformers: pip install 'embedmesh[export]'.\n"


def test_a_quantised_graph_can_be_asked_for(cli: Any, folder: Any, home: Path) -> None:
    files = sentence_transformer()
    files["onnx/model_fp16.onnx"] = graph(dtype=np.float16)["model.onnx"]
    assert cli("models", "pull", folder(files), "--file", "onnx/model_fp16.onnx").status == 0
    assert load_spec(home / "tiny").precision == "float16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--file", "onnx/other.onnx"), "tiny has no onnx/other.onnx"),
        (("--file", "../tiny/onnx/model.onnx"), "tiny has no ../tiny/onnx/model.onnx"),
        (("--file", "pytorch_model.bin"), "needs pytorch_model.bin, which may hold pickled code"),
        (("--pooling", "average"), "--pooling average is none of mean, cls, max"),
        (("--pooling", "cls"), "says how it pools and whether it normalises: leave --pooling and --normalize out"),
        (("--max-units", 33), "reads at most 32 tokens, not 33"),
        (("--name", "a b"), '"a b" cannot be the name of a model'),
    ],
)
def test_options_that_do_not_fit(cli: Any, folder: Any, home: Path, options: tuple[object, ...], message: str) -> None:
    done = cli("models", "pull", folder(sentence_transformer()), *options)
    assert done.status in {1, 2}
    assert message in done.err, done.err
    assert not home.exists() or list(home.iterdir()) == []


def test_links_out_of_a_folder_are_not_followed(cli: Any, folder: Any, tmp_path: Path) -> None:
    path = folder(sentence_transformer())
    (tmp_path / "elsewhere").write_bytes((path / "tokenizer.json").read_bytes())
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
    done = cli("models", "pull", path)
    assert done.status == 1
    assert "leads out of the folder: put the file itself there" in done.err


def test_weights_in_attributes_of_nodes_come_along(cli: Any, folder: Any, home: Path) -> None:
    model = onnx.ModelProto.FromString(graph(data="model.onnx_data")["model.onnx"])
    table = model.graph.initializer.pop()
    model.graph.node.insert(0, helper.make_node("Constant", [], ["table"], value=table))
    files = sentence_transformer() | {
        "onnx/model.onnx": model.SerializeToString(),
        "onnx/model.onnx_data": graph(data="model.onnx_data")["model.onnx_data"],
    }
    cli("models", "pull", folder(files))
    assert "onnx/model.onnx_data" in load_spec(home / "tiny").files


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "there is no folder ./nowhere"),
        ("no such/id", "is neither a folder here nor the id of a model on the Hub"),
        ("a/b/c", "is neither a folder here nor the id of a model on the Hub"),
    ],
)
def test_a_source_that_cannot_be(pull: Any, source: str, message: str) -> None:
    done = pull(source)
    assert done.status == 2
    assert message in done.err


# --- from a hub -----------------------------------------------------------------------------------


def test_only_what_is_needed_is_fetched_and_the_commit_is_kept(
    pull: Any, hub: Any, hub_repository: Any, home: Path
) -> None:
    repository = hub.repositories[ID] = hub_repository(sentence_transformer(), revisions=("main", "v1"))
    done = pull(f"{ID}@v1")
    assert done.status == 0, done.err
    spec = load_spec(home / "org--tiny-text")
    assert spec.name == ID
    assert spec.source == f"{hub.endpoint}/{ID}/tree/{repository.commit}"
    assert done.err == ""  # no progress bars but on a terminal
    assert set(hub.downloads()) == {
        "README.md", "config.json", "modules.json", "tokenizer_config.json", "sentence_bert_config.json",
        "1_Pooling/config.json", "tokenizer.json", "onnx/model.onnx",
    }  # fmt: skip
    # The same again: nothing to fetch, nothing changes.
    count = len(hub.downloads())
    before = (home / "org--tiny-text" / "model.toml").stat().st_mtime_ns
    assert pull(f"{ID}@{repository.commit}").status == 0
    assert len(hub.downloads()) == count
    assert (home / "org--tiny-text" / "model.toml").stat().st_mtime_ns == before


def test_another_commit_takes_the_place_of_the_first_only_when_told(
    pull: Any, hub: Any, hub_repository: Any, home: Path, tmp_path: Path
) -> None:
    hub.repositories[ID] = hub_repository(sentence_transformer())
    assert pull().status == 0
    first = load_spec(home / "org--tiny-text")
    hub.repositories[ID] = hub_repository(sentence_transformer(pooling={"pooling_mode": "max"}))
    done = pull()
    assert done.status == 2
    assert f"holds {first.name}@{first.revision} from {first.source}: --replace takes its place" in done.err
    assert load_spec(home / "org--tiny-text").revision == first.revision
    assert pull(ID, "--output", tmp_path / "second").status == 0
    assert pull(ID, "--replace").status == 0
    second = load_spec(home / "org--tiny-text")
    assert second.revision == load_spec(tmp_path / "second").revision != first.revision
    assert second.space == first.space  # the weights are the same; how they are pooled is the revision's affair
    assert [path.name for path in home.iterdir()] == ["org--tiny-text"]


def test_a_broken_download_goes_on_where_it_broke(pull: Any, hub: Any, hub_repository: Any, home: Path) -> None:
    files = sentence_transformer()
    files["onnx/model.onnx"] = big = graph()["model.onnx"] + padding(24_000_000)
    hub.repositories[ID] = hub_repository(files, cut={"onnx/model.onnx": (11_000_000, 2)})
    done = pull()
    assert done.status == 0, done.err
    ranges = [ranged for method, path, ranged in hub.requests if method == "GET" and path.endswith("onnx/model.onnx")]
    assert len(ranges) == 3
    starts = [int(ranged.removeprefix("bytes=").split("-")[0]) for ranged in ranges[1:]]
    assert 0 < starts[0] <= 11_000_000 < starts[1] <= 22_000_000
    assert (home / "org--tiny-text" / "onnx" / "model.onnx").read_bytes() == big


def padding(size: int) -> bytes:
    """More fields of an ONNX model, which change nothing: documentation."""
    return onnx.ModelProto(doc_string="x" * size).SerializeToString()


@pytest.mark.parametrize("name", ["onnx/model.onnx", "tokenizer.json"])
def test_a_file_of_another_hash_is_refused_and_removed(
    pull: Any, hub: Any, hub_repository: Any, home: Path, tmp_path: Path, name: str
) -> None:
    wrong = "0" * (64 if name.endswith(".onnx") else 40)
    repository = hub.repositories[ID] = hub_repository(sentence_transformer(), listed={name: wrong})
    done = pull()
    assert done.status == 1
    assert done.err.startswith(f"embedmesh: {name} of {ID}@{repository.commit[:12]} has the hash ")
    assert f"the Hub says {wrong}: it is not used and was removed from the cache" in done.err
    assert not home.exists() or list(home.iterdir()) == []
    blobs = [path for path in (tmp_path / "hub").rglob("*") if path.is_file() and "blobs" in path.parts]
    assert blobs
    assert all(path.read_bytes() != repository.files[name] for path in blobs)
    assert not list((tmp_path / "hub").rglob(Path(name).name))


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((403, "GatedRepo"), "is gated: ask for access at {endpoint}/org/tiny-text, then log in with `hf auth login`"),
        ((401, "RepoNotFound"), "has no model org/tiny-text, or it is private: check the spelling, or log in"),
        ((404, "RepoNotFound"), "has no model org/tiny-text, or it is private: check the spelling, or log in"),
    ],
)
def test_gated_and_missing_repositories_are_explained(
    pull: Any, hub: Any, hub_repository: Any, refusal: tuple[int, str], message: str
) -> None:
    hub.repositories[ID] = hub_repository(sentence_transformer(), refusal=refusal)
    done = pull()
    assert done.status == 1
    assert message.format(endpoint=hub.endpoint) in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_a_missing_revision_is_explained(pull: Any, hub: Any, hub_repository: Any) -> None:
    hub.repositories[ID] = hub_repository(sentence_transformer())
    done = pull(f"{ID}@v9")
    assert done.status == 1
    assert f"{ID} has no revision v9 (a branch, tag or commit)." in done.err


def test_a_hub_that_fails_is_explained(pull: Any, hub: Any, hub_repository: Any) -> None:
    hub.repositories[ID] = hub_repository(sentence_transformer(), refusal=(500, ""))
    done = pull()
    assert done.status == 3
    assert f"{ID} could not be downloaded from {hub.endpoint}" in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_offline_the_cache_is_all_there_is(
    pull: Any, hub: Any, hub_repository: Any, home: Path, tmp_path: Path
) -> None:
    repository = hub.repositories[ID] = hub_repository(sentence_transformer())
    done = pull(ID, "--offline")
    assert done.status == 3
    assert f"{ID} is not wholly in the cache {tmp_path / 'hub'}, and offline mode is on" in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert hub.requests == []
    assert pull().status == 0
    revision = load_spec(home / "org--tiny-text").revision
    hub.requests.clear()
    done = pull(ID, "--offline", "--output", tmp_path / "again")
    assert done.status == 0, done.err
    assert hub.requests == []
    assert load_spec(tmp_path / "again").revision == revision
    # A cache that lost a file is no cache.
    next((tmp_path / "hub").rglob(f"{repository.commit}/onnx/model.onnx")).unlink()
    done = pull(ID, "--offline", "--output", tmp_path / "third")
    assert done.status == 3
    assert "is not wholly in the cache" in done.err


def test_without_a_hub_the_cache_helps(cli: Any, pull: Any, hub: Any, hub_repository: Any, tmp_path: Path) -> None:
    hub.repositories[ID] = hub_repository(sentence_transformer())
    assert pull().status == 0
    words = ("models", "pull", ID, "--endpoint", "http://127.0.0.1:9", "--output", tmp_path / "again")
    done = cli(*words, "--cache-dir", tmp_path / "hub")
    assert done.status == 0, done.err
    done = cli(*words, "--cache-dir", tmp_path / "empty")
    assert done.status == 3
    assert f"{ID} could not be downloaded from http://127.0.0.1:9" in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_the_environment_variables_of_the_hub_count(hub: Any, hub_repository: Any, tmp_path: Path) -> None:
    """Endpoint, token, cache and offline mode, in a process of its own because the library reads them once."""
    hub.repositories[ID] = hub_repository(sentence_transformer(), refusal=(401, "RepoNotFound"))
    hub.token = "hf_secret"  # noqa: S105
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub.token,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "EMBEDMESH_CACHE_DIR": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-m", "embedmesh_cli", "models", "pull", ID]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cache" / "models" / "org--tiny-text" / "model.toml").is_file()
    assert "hf_secret" not in done.stdout + done.stderr
    hub.requests.clear()
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "again")],
        env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert hub.requests == []


def test_a_terminal_shows_progress(hub: Any, hub_repository: Any, tmp_path: Path) -> None:
    files = sentence_transformer()
    files["onnx/model.onnx"] += padding(12_000_000)
    hub.repositories[ID] = hub_repository(files)
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (40, 120))
    command = [sys.executable, "-m", "embedmesh_cli", "models", "pull", ID, "--endpoint", hub.endpoint]
    with subprocess.Popen(
        [*command, "--cache-dir", str(tmp_path / "hub"), "--output", str(tmp_path / "out")],
        stdout=subprocess.DEVNULL,
        stderr=end,
    ) as process:
        os.close(end)
        shown = b""
        with suppress(OSError), os.fdopen(terminal, "rb", buffering=0) as stream:  # it ends with an error
            while part := stream.read(4096):
                shown += part
        assert process.wait(timeout=60) == 0, shown
    assert b"12.0MB" in shown
    assert shown.count(b"Fetching 1 files:   0%") == 1  # the large file's; none of the many small ones


def test_prompts_and_roles(cli: Any, folder: Any, home: Path) -> None:
    from embedmesh.v1 import text_pb2
    from embedmesh_encoder.modalities import default_preparer

    files = sentence_transformer() | {"config_sentence_transformers.json": b'{"prompts": {"query": "query : "}}'}
    assert cli("models", "pull", folder(files)).status == 0
    preparer = default_preparer(load_spec(home / "tiny"))
    ids = [
        preparer.prepare(item, pb.TRUNCATION_END).data.tolist()
        for item in (TextItem("cat", text_pb2.TEXT_ROLE_QUERY), TextItem("query : cat"), TextItem("cat"))
    ]
    assert ids[0] == ids[1] != ids[2]
