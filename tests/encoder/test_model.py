import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_encoder.model import (
    ModelError,
    ModelSpec,
    find_models,
    load_spec,
    verify_files,
    write_manifest,
)

MANIFEST: dict[str, Any] = {
    "name": "org/tiny-text",
    "modality": "text",
    "space": "tiny",
    "dimensions": 8,
    "truncatable_dimensions": [2, 4],
    "normalized": True,
    "max_input_units": 16,
    "license": "Apache-2.0",
    "source": 'made\there, with "quotes", \x7f and 😀',
    "backend": "onnxruntime",
    "graph": {"file": "onnx/model.onnx", "layout": "packed"},
    "text": {"tokenizer": "tokenizer.json", "prompts": {"query": "query: "}},
}
SPARSE = {"output": "logits", "pooling": "max", "dimensions": 9}
MULTI_VECTOR = {"output": "tokens", "dimensions": 4}
TEMPLATE = {"tokenizer": "tokenizer.json", "template": "<image>{text}", "image_token": "<image>", "image_tokens": 4}
PICTURES: dict[str, Any] = {
    "modality": "image",
    "graph": {"file": "onnx/model.onnx", "layout": "padded"},
    "image": {"processor": "tokenizer.json"},
    "text": TEMPLATE,
}
# For manifests, from which `write` takes what is None.
NO_DENSE = {"kinds": ["sparse"], "dimensions": None, "normalized": None}
Write = Callable[..., ModelSpec]


def rows(**changes: Any) -> dict[str, Any]:
    only = {**NO_DENSE, "kinds": ["multi_vector"], "truncatable_dimensions": None}
    return {**only, "multi_vector": {**MULTI_VECTOR, **changes}}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(changes: Mapping[str, Any] | None = None, content: bytes = b"weights") -> ModelSpec:
        (tmp_path / "onnx").mkdir(exist_ok=True)
        (tmp_path / "onnx/model.onnx").write_bytes(content)
        (tmp_path / "tokenizer.json").write_bytes(b"{}")
        manifest = {key: value for key, value in {**MANIFEST, **(changes or {})}.items() if value is not None}
        return write_manifest(tmp_path, manifest, ["onnx/model.onnx", "tokenizer.json"])

    return write


def edit(folder: Path, old: str, new: str) -> None:
    manifest = folder / "model.toml"
    text = manifest.read_text()
    assert old in text
    manifest.write_text(text.replace(old, new))


def test_what_was_written_is_read(write: Write, tmp_path: Path) -> None:
    spec = write()
    assert spec.folder == tmp_path
    assert (spec.name, spec.family, spec.space, spec.modality) == ("org/tiny-text", "org/tiny-text", "tiny", "text")
    assert spec.kinds == (pb.EMBEDDING_KIND_DENSE,)
    assert (spec.dimensions, spec.truncatable_dimensions, spec.max_input_units) == (8, (4, 2), 16)
    assert spec.normalized
    assert spec.source == MANIFEST["source"]
    assert (spec.backend, spec.precision, spec.fake) == ("onnxruntime", "float32", None)
    assert (spec.graph.file, spec.graph.layout, spec.graph.pooling) == ("onnx/model.onnx", "packed", "graph")
    assert spec.graph.inputs == ("input_ids", "position_ids", "segment_ids")
    assert spec.graph.output == "sentence_embedding"
    assert spec.text is not None
    assert (spec.text.tokenizer, spec.text.pad_id) == ("tokenizer.json", 0)
    assert (spec.text.query_prompt, spec.text.document_prompt) == ("query: ", "")
    assert spec.ref() == pb.ModelRef(name="org/tiny-text", revision=spec.revision, space="tiny")
    verify_files(spec)


def test_a_model_may_make_several_kinds(write: Write) -> None:
    spec = write({"kinds": ["dense", "sparse", "multi_vector"], "sparse": SPARSE, "multi_vector": MULTI_VECTOR})
    assert list(spec.outputs.values()) == ["sentence_embedding", "logits", "tokens"]
    assert spec.sparse is not None
    assert spec.multi_vector is not None
    assert (spec.sparse.skip_tokens, spec.multi_vector.skip_first, spec.multi_vector.normalized) == ((), 0, True)


def test_a_model_may_make_no_dense_vectors(write: Write) -> None:
    spec = write({**NO_DENSE, "truncatable_dimensions": None, "sparse": SPARSE})
    assert (spec.dimensions, spec.normalized, list(spec.outputs.values())) == (0, False, ["logits"])


def test_what_changes_another_kind_is_another_revision(write: Write) -> None:
    kinds = {"kinds": ["dense", "sparse", "multi_vector"]}
    tables = [
        (SPARSE, MULTI_VECTOR),
        ({**SPARSE, "skip_tokens": [1]}, MULTI_VECTOR),
        (SPARSE, {**MULTI_VECTOR, "skip_first": 1}),
        (SPARSE, {**MULTI_VECTOR, "normalized": False}),
    ]
    revisions = [write({**kinds, "sparse": one, "multi_vector": other}).revision for one, other in tables]
    assert len({write().revision, *revisions}) == 5


def test_queries_may_be_filled_up(write: Write) -> None:
    plain = write(rows())
    filled = write(rows(expand_to=8, expansion_token=1, attend_to_expansion=True))
    assert filled.multi_vector
    assert (filled.multi_vector.expand_to, filled.multi_vector.query_length) == (8, 0)
    assert filled.revision != plain.revision
    assert write(rows(query_length=0, expand_to=0, attend_to_expansion=False)).revision == plain.revision


def test_the_template_and_its_picture_change_the_revision(write: Write) -> None:
    texts = [TEMPLATE, {**TEMPLATE, "template": "<image> {text}"}, {**TEMPLATE, "image_tokens": 5}]
    assert len({write({**PICTURES, "text": text}).revision for text in texts}) == 3
    plain = {"tokenizer": "tokenizer.json"}
    assert write({"text": {**plain, "template": "a {text}"}}).revision != write({"text": plain}).revision


def test_several_ways_of_pooling_are_joined(write: Write) -> None:
    spec = write({"graph": {"file": "onnx/model.onnx", "layout": "padded", "pooling": ["cls", "mean"]}})
    assert (spec.graph.pooling, spec.dimensions, spec.graph_dimensions) == (("cls", "mean"), 8, 4)


def test_padded_graphs_have_defaults_and_pooling(write: Write) -> None:
    spec = write({"graph": {"file": "onnx/model.onnx", "layout": "padded", "pooling": "mean"}})
    assert (spec.graph.file, spec.graph.layout, spec.graph.pooling) == ("onnx/model.onnx", "padded", "mean")
    assert (spec.graph.inputs, spec.graph.output) == (("input_ids", "attention_mask"), "last_hidden_state")


@pytest.mark.parametrize(
    "changes",
    [
        {"max_input_units": 17},
        {"normalized": False},
        {"text": {"tokenizer": "tokenizer.json", "prompts": {"query": "question: "}}},
        {"text": {"tokenizer": "tokenizer.json", "prompts": {"query": "query: ", "document": "passage: "}}},
        {"text": {"tokenizer": "tokenizer.json", "prompts": {"query": "query: ", "default": "passage: "}}},
        {"text": {"tokenizer": "tokenizer.json", "prompts": {"query": "query: "}, "pad": "max_input_units"}},
        {"graph": {"file": "onnx/model.onnx", "layout": "padded", "pooling": "cls"}},
        {"graph": {"file": "onnx/model.onnx", "layout": "packed", "output": "other"}},
        {"head": {"layers": [{"kind": "cut", "inputs": 9, "outputs": 8}]}},
        {"backend": "fake", "graph": {"layout": "packed"}},
        {"backend": "fake", "graph": {"layout": "packed"}, "fake": {"seed": 1}},
    ],
)
def test_the_revision_changes_with_all_that_changes_a_vector(write: Write, changes: dict[str, Any]) -> None:
    before = write().revision
    assert len(before) == 16
    assert write(changes).revision != before


@pytest.mark.parametrize(
    ("changes", "revision"),
    [
        ({}, "dcc1a10ab5943334"),
        ({"graph": {"file": "onnx/model.onnx", "layout": "padded", "pooling": "cls"}}, "194ed959da6c81b3"),
        ({"backend": "fake", "graph": {"layout": "packed"}}, "12f9a1853dc7b6f5"),
    ],
)
def test_revisions_that_callers_have_pinned_stay(write: Write, changes: dict[str, Any], revision: str) -> None:
    assert write(changes).revision == revision


def test_the_revision_is_of_what_runs_it(write: Write) -> None:
    spec = write()
    others = [
        spec.run_by("openvino", "float32"),
        spec.run_by("openvino", "bfloat16"),
        spec.run_by("cuda", "float32"),
    ]
    assert len({spec.revision, *(other.revision for other in others)}) == 4
    assert spec.run_by("onnxruntime", "float32").revision == spec.revision
    assert (others[1].backend, others[1].precision, others[1].folder) == ("openvino", "bfloat16", spec.folder)


def test_the_revision_is_of_the_servers_model(write: Write) -> None:
    one = {"backend": "triton", "graph": {"layout": "packed"}, "triton": {"model": "minilm", "version": "1"}}
    two = {**one, "triton": {"model": "minilm", "version": "2"}}
    assert write(one).revision != write(two).revision
    # Which model of a server it would be changes nothing as long as no server runs it.
    assert write({"triton": {"model": "minilm", "version": "1"}}).revision == write().revision


def test_the_revision_changes_with_the_weights(write: Write) -> None:
    assert write().revision != write(content=b"other weights").revision


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "renamed", "family": "towers", "space": "moved"},
        {"license": "MIT", "source": "elsewhere"},
        {"truncatable_dimensions": []},
    ],
)
def test_the_revision_ignores_names(write: Write, changes: dict[str, Any]) -> None:
    assert write().revision == write(changes).revision


def test_the_revision_ignores_the_fakes_speed(write: Write) -> None:
    fake = {"backend": "fake", "graph": {"layout": "packed"}}
    assert write(fake).revision == write({**fake, "fake": {"base_ms": 5}}).revision


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dimensions": "8"}, 'dimensions must be a valid integer, got "8"'),
        ({"dimensions": True}, "dimensions must be a valid integer, got true"),
        ({"name": "a@b"}, "name must match pattern '^[A-Za-z0-9][A-Za-z0-9._/-]*$', got \"a@b\""),
        ({"normalized": "yes"}, 'normalized must be a valid boolean, got "yes"'),
        ({"modality": "video"}, "modality must be 'text', 'image' or 'audio', got \"video\""),
        ({"backend": "tensorflow"}, "'openvino', 'triton' or 'fake', got \"tensorflow\""),
        ({"precision": "int4"}, "precision must be 'float32', 'bfloat16', 'float16' or 'int8', got \"int4\""),
        ({"kinds": ["dense", "bits"]}, 'kinds.1 must be "dense" or "sparse" or "multi_vector", got "bits"'),
        ({"kinds": ["dense", "sparse"]}, "sparse is missing"),
        ({"multi_vector": MULTI_VECTOR}, 'multi_vector is only for the kind "multi_vector"'),
        ({"kinds": ["sparse"], "sparse": SPARSE}, 'dimensions is only for the kind "dense"'),
        ({"kinds": ["sparse"], "sparse": SPARSE}, 'normalized is only for the kind "dense"'),
        ({"dimensions": 0}, "dimensions must be greater than 0, got 0"),
        ({**NO_DENSE, "sparse": SPARSE}, "truncatable_dimensions must all be smaller than dimensions (0)"),
        ({"kinds": ["sparse"], "sparse": {**SPARSE, "pooling": "mean"}}, "must be 'max', 'tokens' or 'graph'"),
        ({"kinds": ["sparse"], "sparse": {**SPARSE, "skip_tokens": [9]}}, "skip_tokens beyond its dimensions (9)"),
        ({"kinds": ["sparse"], "sparse": {**SPARSE, "pool": ""}}, "sparse.pool is unknown, did you mean pooling?"),
        ({"kinds": ["multi_vector"], "multi_vector": {"output": "x"}}, "multi_vector.dimensions is missing"),
        (rows(expand_to=8), "multi_vector.expansion_token is missing"),
        (rows(expansion_token=1), "expansion_token is only for queries that are filled up (expand_to)"),
        (rows(expand_to=8, expansion_token=1, query_length=4), "fill queries up to 8 tokens, but query_length = 4"),
        (rows(query_length=17), "multi_vector has queries of 17 tokens, but max_input_units = 16"),
        (rows(expand_to=8, expansion_token=1), 'the graph has no input "attention_mask"'),
        (
            {"kinds": ["dense", "multi_vector"], "multi_vector": {**MULTI_VECTOR, "query_length": 4}},
            "cannot have query_length or expand_to in a model that makes other kinds",
        ),
        ({"text": {"tokenizer": "tokenizer.json", "include_prompt": False}}, "cannot have include_prompt = false"),
        ({"backend": "fake", "kinds": ["sparse"], "sparse": SPARSE}, 'must have the pooling "tokens"'),
        ({"kinds": []}, "kinds must have at least 1 item"),
        ({"truncatable_dimensions": [4, 8]}, "must all be smaller than dimensions (8), got [4, 8]"),
        ({"truncatable_dimensions": 4}, "truncatable_dimensions must be a list, got 4"),
        ({"license": 2}, "license must be a valid string, got 2"),
        ({"normalised": True}, "normalised is unknown, did you mean normalized?"),
        ({"colour": "red"}, "colour is unknown"),
        ({"graph": "model.onnx"}, "graph must be a table"),
        ({"text": {"tokenizer": "tokenizer.json", "prompts": 1}}, "text.prompts must be a table, got 1"),
        (
            {"graph": {"file": "onnx/model.onnx", "layout": "packed", "pooling": "mean"}},
            'graph.pooling cannot be set when the layout is "packed"',
        ),
        (
            {"graph": {"file": "onnx/model.onnx", "layout": "padded", "inputs": ["ids"]}},
            "graph.inputs.0 must match",
        ),
        (
            {"graph": {"file": "onnx/model.onnx", "layout": "packed", "inputs": ["input_ids"]}},
            "graph.inputs cannot be set",
        ),
        (
            {"graph": {"file": "onnx/model.onnx", "layout": "padded", "pooling": "average"}},
            'graph.pooling must be "graph", "mean", "cls", "max", "mean_sqrt_len", "weightedmean", "last", or a list',
        ),
        (
            {"graph": {"file": "onnx/model.onnx", "layout": "padded", "pooling": ["mean", "graph"]}},
            "graph.pooling must be",
        ),
        ({"graph": {"file": "onnx/model.onnx", "layout": "padded", "pooling": []}}, "graph.pooling must be"),
        ({"head": {"layers": []}}, "head.layers must have at least 1 item"),
        ({"whitening": {"of": "tiny", "texts": 9}}, "whitening is only for models whose head ends with a dense layer"),
        ({"layers": {"kept": 0, "of": 2}}, "layers.kept must be greater than 0, got 0"),
        (
            {
                "modality": "image",
                "graph": {"file": "onnx/model.onnx", "layout": "stacked", "inputs": ["pixel_values"]},
                "head": {"layers": [{"kind": "cut", "inputs": 9, "outputs": 8}]},
            },
            'head is only for the modality "text"',
        ),
        ({"truncatable_dimensions": [0, True]}, "truncatable_dimensions.0 must be greater than 0, got 0"),
        ({"truncatable_dimensions": [0, True]}, "truncatable_dimensions.1 must be a valid integer, got true"),
        ({"folder": "elsewhere"}, "folder is unknown"),
        ({"modality": "image"}, 'text is only for the modality "text"'),
        ({**PICTURES, "graph": {**PICTURES["graph"], "layout": "stacked"}}, 'and for the layout "padded"'),
        (
            {**PICTURES, "text": {**TEMPLATE, "include_prompt": False}},
            "text cannot have a template beside include_prompt",
        ),
        ({**PICTURES, "text": None}, "text is missing"),
        ({**PICTURES, "text": {"tokenizer": "tokenizer.json"}}, "text must have a template with the image_token in it"),
        ({**PICTURES, "text": {**TEMPLATE, "template": "{text}"}}, "text must have a template with the image_token"),
        ({**PICTURES, "text": {**TEMPLATE, "template": "<image><image>{text}"}}, "text must have a template with the"),
        ({**PICTURES, "text": {**TEMPLATE, "image_tokens": 0}}, "and say how many image_tokens it is"),
        ({"text": {"tokenizer": "tokenizer.json", "template": "Q: {texts}"}}, 'a template with "{text}" in it, once'),
        ({"text": {"tokenizer": "tokenizer.json", "template": "{text}{text}"}}, 'template with "{text}" in it, once'),
        ({"text": TEMPLATE}, "text must have a template without image_token: its model reads no pictures"),
        (
            {"text": {"tokenizer": "tokenizer.json", "image_token": "<image>"}},
            "must have a template without image_token",
        ),
        ({"graph": {"file": "other.onnx", "layout": "packed"}}, 'names "other.onnx", which is not listed in [files]'),
        ({"graph": {"layout": "packed"}}, "graph names no file"),
        ({"text": {"tokeniser": "tokenizer.json"}}, "text.tokeniser is unknown, did you mean tokenizer?"),
        (
            {"text": {"tokenizer": "tokenizer.json", "pad_id": -1}},
            "text.pad_id must be greater than or equal to 0",
        ),
        ({"text": {"tokenizer": "tokenizer.json", "prompts": {"querry": ""}}}, "did you mean query?"),
        ({"fake": {"base_ms": 1}}, 'fake is only for the backend "fake"'),
        ({"backend": "openvino", "fake": {"base_ms": 1}}, 'fake is only for the backend "fake"'),
        ({"backend": "openvino", "graph": {"layout": "packed"}}, "graph names no file"),
        ({"backend": "triton", "graph": {"layout": "packed"}}, "triton is missing"),
        ({"triton": {"model": "", "version": "1"}}, "triton.model must have at least 1 character"),
        ({"triton": {"model": "m", "version": "latest"}}, "triton.version must match"),
        (
            {"backend": "fake", "graph": {"layout": "packed"}, "fake": {"base_ms": -1}},
            "fake.base_ms must be greater than or equal to 0, got -1",
        ),
        (
            {"backend": "fake", "graph": {"layout": "padded"}},
            'graph must have the layout "packed" and no file when the backend is "fake"',
        ),
    ],
)
def test_a_mistake_is_named(write: Write, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        write(changes)
    assert message in str(caught.value)


def test_several_mistakes_are_reported_together(write: Write, tmp_path: Path) -> None:
    write()
    edit(tmp_path, "format = 1", "format = 9")
    edit(tmp_path, 'space = "tiny"', "")
    edit(tmp_path, "normalized", "normalised")
    with pytest.raises(ModelError) as caught:
        load_spec(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path / 'model.toml'} has 4 problems:"
    assert "  - format must be 1, got 9" in lines
    assert "  - space is missing" in lines
    assert "  - normalized is missing" in lines
    assert "  - normalised is unknown, did you mean normalized?" in lines


def test_a_folder_without_manifest_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is not a model folder: it has no model\.toml"):
        load_spec(tmp_path)
    with pytest.raises(ModelError, match="is not a model folder"):
        load_spec(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe"])
def test_a_manifest_that_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.toml").write_bytes(content)
    with pytest.raises(ModelError, match=r"cannot read .*model\.toml"):
        load_spec(tmp_path)


def test_files_are_listed_with_hashes(write: Write, tmp_path: Path) -> None:
    write()
    text = (tmp_path / "model.toml").read_text()
    digest = tomllib.loads(text)["files"]["tokenizer.json"]
    edit(tmp_path, digest, "abc")
    with pytest.raises(ModelError, match=r"files\.\"tokenizer\.json\" must match pattern .*\{64\}"):
        load_spec(tmp_path)
    (tmp_path / "model.toml").write_text(text.split("[files]")[0])
    with pytest.raises(ModelError, match="files is missing"):
        load_spec(tmp_path)
    (tmp_path / "model.toml").write_text("files = 1\n" + text.split("[files]")[0])
    with pytest.raises(ModelError, match="files must be a table, got 1"):
        load_spec(tmp_path)


def test_missing_and_changed_files_are_found(write: Write, tmp_path: Path) -> None:
    spec = write()
    (tmp_path / "onnx/model.onnx").write_bytes(b"changed")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError) as caught:
        verify_files(spec)
    assert 'file "onnx/model.onnx" has sha256 ' in str(caught.value)
    assert 'file "tokenizer.json" cannot be read: No such file' in str(caught.value)
    with pytest.raises(ModelError, match=r'files\."tokenizer\.json" is missing from the model'):
        load_spec(tmp_path)


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "link"])
def test_paths_may_not_leave_the_folder(write: Write, tmp_path: Path, path: str) -> None:
    write()
    (tmp_path / "link").symlink_to("/etc/hostname")
    edit(tmp_path, '"tokenizer.json" =', f'"{path}" =')
    with pytest.raises(ModelError) as caught:
        load_spec(tmp_path)
    assert re.search(f'files."?{re.escape(path)}"? is outside of the model\'s folder', str(caught.value))


def test_models_are_found_in_folders(write: Write, tmp_path: Path) -> None:
    spec = write()
    broken = tmp_path / "a-broken-one"
    broken.mkdir()
    (broken / "model.toml").write_text("format = 1")
    found = find_models([tmp_path, tmp_path / "nowhere"])
    assert list(found) == [broken, tmp_path]
    assert found[tmp_path] == spec
    assert isinstance(found[broken], ModelError)
    assert tmp_path in find_models([tmp_path.parent])
    assert broken not in find_models([tmp_path.parent])
