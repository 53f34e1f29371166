"""Repositories pulled from a hub on loopback, served by a whole mesh, against sentence-transformers.

The genuine all-MiniLM-L6-v2, and small models of several architectures with random weights, saved by the library itself
and exported to ONNX here.

    make test-torch ARGS="-k pulled -s"     # prints the table of services/embedmesh_cli/README.md
"""

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import embedmesh
from embedmesh_cli.starter import cache_folder
from embedmesh_cli.starter.minilm import original_model
from embedmesh_encoder.model import load_spec

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

LEAST_COSINE = 0.9999
# No two texts may be more alike to a model; else vectors of the wrong text would pass, too.
MOST_ALIKE = 0.9995
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PROMPTS = {"query": "represent the question: ", "document": "passage: "}


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The genuine model as its authors published it."""
    return original_model(cache_folder() / "peers", lambda line: None)


@dataclasses.dataclass(frozen=True)
class Family:
    """A small model of an architecture.

    Attributes:
        config: Its configuration's class and settings, in transformers.
        inputs: What its graph takes.
        modules: What follows the Transformer, by the library's modules.
        max_seq_length: As sentence-transformers has it.
        prompts: Likewise.
        default: Name of the prompt of texts without a role.
    """

    config: tuple[str, Mapping[str, Any]]
    modules: Callable[[Any, int], list[Any]]
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    max_seq_length: int = 48
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default: str | None = None


def pooled(*ways: str) -> Callable[[Any, int], list[Any]]:
    return lambda m, width: [m.Pooling(width, pooling_mode=ways)]


def dense(m: Any, width: int) -> list[Any]:
    import torch

    return [
        m.Pooling(width, pooling_mode=("cls", "mean")),
        m.Dense(2 * width, 40, activation_function=torch.nn.Tanh()),
        m.Dense(40, 24, bias=False, activation_function=torch.nn.Identity()),
        m.Normalize(),
    ]


def normed(m: Any, width: int) -> list[Any]:
    layer = m.LayerNorm(width)
    for weight in layer.parameters():
        weight.data.normal_()
    return [m.Pooling(width, pooling_mode="mean"), layer]


BERT = ("BertConfig", {**SMALL, "vocab_size": 30522, "max_position_embeddings": 64})
ALL = ("input_ids", "attention_mask", "token_type_ids")
FAMILIES = {
    "bert-mean-prompts": Family(BERT, pooled("mean"), ALL, prompts=PROMPTS),
    "bert-cls-default-prompt": Family(BERT, pooled("cls"), ALL, prompts=PROMPTS, default="document"),
    "bert-max": Family(BERT, pooled("max"), ALL),
    "bert-mean-sqrt-len": Family(BERT, pooled("mean_sqrt_len_tokens"), ALL),
    "bert-weighted-mean": Family(BERT, pooled("weightedmean"), ALL),
    "bert-joined-dense-normalize": Family(BERT, dense, ALL),
    "bert-layer-norm": Family(BERT, normed, ALL),
    "distilbert-mean-max": Family(
        ("DistilBertConfig", {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64}),
        pooled("mean", "max"),
    ),
    "roberta-late-positions": Family(
        ("RobertaConfig", {**SMALL, "vocab_size": 30522, "max_position_embeddings": 50, "pad_token_id": 0}),
        pooled("mean"),
        max_seq_length=49,  # all of its positions: the first is that after the id of padding
    ),
    "mpnet": Family(
        ("MPNetConfig", {**SMALL, "vocab_size": 30522, "max_position_embeddings": 64, "pad_token_id": 0}),
        pooled("mean"),
    ),
    "modernbert": Family(
        ("ModernBertConfig", {**SMALL, "vocab_size": 30522, "pad_token_id": 0, "max_position_embeddings": 64}),
        pooled("cls"),
    ),
    "t5-encoder": Family(
        ("T5Config", {"d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 30522}),
        pooled("mean"),
    ),
    "qwen2-last-token": Family(
        ("Qwen2Config", {**SMALL, "num_key_value_heads": 2, "vocab_size": 30522, "max_position_embeddings": 64}),
        pooled("lasttoken"),
    ),
}


def export(model: Any, inputs: tuple[str, ...], path: Path) -> None:
    """Write the graph of a torch model that gives `last_hidden_state`."""
    import torch

    class Graph(torch.nn.Module):  # type: ignore[misc]  # (torch has no types here)
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *arrays: Any) -> Any:
            return self.model(**dict(zip(inputs, arrays, strict=True))).last_hidden_state

    example = {name: torch.ones(2, 7, dtype=torch.long) for name in inputs}
    example["input_ids"] = torch.randint(1000, 2000, (2, 7))
    if "token_type_ids" in example:
        example["token_type_ids"] = torch.zeros(2, 7, dtype=torch.long)
    example["attention_mask"][1, 5:] = 0
    path.parent.mkdir(exist_ok=True)
    torch.onnx.export(
        Graph().eval(),
        tuple(example.values()),
        str(path),
        input_names=list(inputs),
        output_names=["last_hidden_state"],
        dynamic_axes={name: {0: "n", 1: "t"} for name in (*inputs, "last_hidden_state")},
        opset_version=17,
        dynamo=False,  # the newer exporter needs onnxscript
    )


def save(randomise: Any, family: Family, tokenizer: Path, folder: Path) -> None:
    """Save a repository of a family, by the library itself."""
    import transformers  # type: ignore[import-not-found]
    from sentence_transformers import SentenceTransformer, models  # type: ignore[import-not-found]

    kind, settings = family.config
    config = getattr(transformers, kind)(**settings)
    raw = folder.with_name(f"{folder.name}-raw")
    model_class = transformers.T5EncoderModel if kind == "T5Config" else transformers.AutoModel
    model = model_class(config) if kind == "T5Config" else model_class.from_config(config, attn_implementation="eager")
    randomise(model)
    model.eval().save_pretrained(raw)
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "unk")}
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer / "tokenizer.json"),
        model_max_length=512,
        model_input_names=list(family.inputs),
        **special,
    ).save_pretrained(raw)
    transformer = models.Transformer(str(raw), max_seq_length=family.max_seq_length)
    export(model, family.inputs, raw / "onnx" / "model.onnx")
    whole = SentenceTransformer(
        modules=[transformer, *family.modules(models, transformer.get_embedding_dimension())],
        prompts=dict(family.prompts) or None,
        default_prompt_name=family.default,
        device="cpu",
    )
    whole.save(str(folder))
    (raw / "onnx").rename(folder / "onnx")


@pytest.fixture
def texts() -> list[str]:
    """Texts from nothing to more than the models read."""
    path = Path(__file__).parents[1] / "data" / "golden_text" / "texts.jsonl"
    rows = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [text[:2000] for text in rows[::25] if text.strip()]


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def reference(folder: Path, texts: list[str], **options: Any) -> NDArray[np.float32]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    vectors: NDArray[np.float32] = model.encode(texts, batch_size=16, show_progress_bar=False, **options)
    return vectors


def likeness(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> tuple[float, float, float]:
    """Give the worst cosine, the largest relative difference of an element, and how alike the most alike texts are."""
    a, b = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (ours, theirs))
    alike = (b @ b.T)[~np.eye(len(b), dtype=bool)].max()
    return float(np.einsum("nd,nd->n", a, b).min()), float(np.abs(a - b).max()), float(alike)


async def test_the_genuine_model_from_hub_to_vector(
    run: Callable[..., int],
    start_mesh: Any, hub: Any, hub_repository: Any, minilm: Path, texts: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from transformers import AutoModel

    name = "sentence-transformers/all-MiniLM-L6-v2"
    export(AutoModel.from_pretrained(minilm, attn_implementation="eager").eval(), ALL, tmp_path / "onnx" / "model.onnx")
    files = content(minilm) | {"onnx/model.onnx": (tmp_path / "onnx" / "model.onnx").read_bytes()}
    hub.repositories[name] = hub_repository(files)
    monkeypatch.setenv("EMBEDMESH_CACHE_DIR", str(tmp_path / "cache"))
    assert run("models", "pull", name, "--endpoint", hub.endpoint, "--cache-dir", tmp_path / "hub") == 0
    assert "model.safetensors" not in hub.downloads()
    folder = tmp_path / "cache" / "models" / name.replace("/", "--")
    assert load_spec(folder).max_input_units == 256
    async with start_mesh(text_models=(folder,)) as mesh, embedmesh.AsyncClient(mesh.address) as client:
        together = await client.embed(texts, cache="bypass")
        alone = np.concatenate([(await client.embed([text], cache="bypass")).vectors for text in texts])
        assert together.models[0].name == name
        np.testing.assert_allclose(alone, together.vectors, atol=1e-5, rtol=0)
        cosine, difference, alike = likeness(together.vectors, reference(minilm, texts))
        assert cosine >= LEAST_COSINE, (cosine, difference)
        assert alike < 1
        capfd.readouterr()
        words = ("models", "verify", name, "--reference", minilm)
        assert await asyncio.to_thread(run, *words, "--address", mesh.address, "--json") == 0
        served = json.loads(capfd.readouterr().out)
        assert served["verified"]
        assert served["revision"] == together.models[0].revision
        assert served["comparisons"][0]["cosine_min"] >= LEAST_COSINE
    assert run(*words) == 0
    assert "verified" in capfd.readouterr().out.splitlines()


async def test_small_models_of_many_kinds(
    run: Callable[..., int], randomise: Any,
    start_mesh: Any, hub: Any, hub_repository: Any, minilm: Path, texts: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("EMBEDMESH_CACHE_DIR", str(tmp_path / "cache"))
    for name, family in FAMILIES.items():
        save(randomise, family, minilm, tmp_path / name)
        hub.repositories[f"small/{name}"] = hub_repository(content(tmp_path / name))
        words = ("models", "pull", f"small/{name}", "--endpoint", hub.endpoint, "--cache-dir", tmp_path / "hub")
        assert run(*words) == 0, (name, capfd.readouterr())
    rows = []
    folders = tuple(tmp_path / "cache" / "models" / f"small--{name}" for name in FAMILIES)
    async with start_mesh(text_models=folders) as mesh, embedmesh.AsyncClient(mesh.address) as client:
        for name, family in FAMILIES.items():
            calls: list[tuple[str | None, dict[str, Any]]] = [(None, {})]
            calls += [(role, {"prompt_name": role}) for role in family.prompts]
            for role, options in calls:
                ours = await client.embed(texts, model=f"small/{name}", role=role)  # type: ignore[arg-type]
                expected = reference(tmp_path / name, texts, **options)
                cosine, difference, alike = likeness(ours.vectors, expected)
                lengths = np.linalg.norm(ours.vectors, axis=1) / np.linalg.norm(expected, axis=1)
                rows.append((name, role or "", cosine, difference, alike, float(np.abs(lengths - 1).max())))
    for name, role, cosine, difference, alike, _ in rows:
        sys.stdout.write(f"| {name} | {role} | {cosine:.7f} | {difference:.1e} | {alike:.3f} |\n")
    assert all(row[2] >= LEAST_COSINE and row[4] < MOST_ALIKE and row[5] < 1e-4 for row in rows), rows


VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, "vocab_size": 30522, "pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102}
# A model of towers: its class and configuration, its graphs by inputs and output, and its pre-processing.
TOWERS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[tuple[str, ...], str]], dict[str, Any]]] = {
    "clip": (
        "CLIP",
        {
            "text_config": {**TEXT, "max_position_embeddings": 32},
            "vision_config": {**VISION, "image_size": 96, "patch_size": 32},
            "projection_dim": 40,
        },
        {
            "text": (("input_ids", "attention_mask"), "text_embeds"),
            "vision": (("pixel_values",), "image_embeds"),
        },
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 96},
            "crop_size": {"height": 96, "width": 96},
        },
    ),
    "siglip": (
        "Siglip",
        {
            "text_config": {**TEXT, "max_position_embeddings": 24, "projection_size": 64},
            "vision_config": {**VISION, "image_size": 96, "patch_size": 16},
        },
        {"text": (("input_ids",), "pooler_output"), "vision": (("pixel_values",), "pooler_output")},
        {"image_processor_type": "SiglipImageProcessor", "size": {"height": 96, "width": 96}},
    ),
    "clap": (
        "Clap",
        {
            "text_config": {**TEXT, "max_position_embeddings": 60, "projection_dim": 40},
            "audio_config": {
                "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 8], "patch_embeds_hidden_size": 16,
                "hidden_size": 128,
            },
            "projection_dim": 40,
        },
        {
            "text": (("input_ids", "attention_mask"), "text_embeds"),
            "audio": (("input_features",), "audio_embeds"),
        },
        {"feature_extractor_type": "ClapFeatureExtractor", "truncation": "rand_trunc"},
    ),
}  # fmt: skip


def save_towers(randomise: Any, kind: str, tokenizer: Path, folder: Path) -> None:
    """Save a model of towers, with graphs as published for transformers.js."""
    import torch
    import transformers

    name, settings, graphs, processor = TOWERS[kind]
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}Model")(config)
    randomise(model)
    model.eval().save_pretrained(folder)
    special = {f"{each}_token": f"[{each.upper()}]" for each in ("pad", "cls", "sep", "unk")}
    limit = settings["text_config"]["max_position_embeddings"] - (1 if kind == "clap" else 0)
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer / "tokenizer.json"), model_max_length=limit,
        model_input_names=list(graphs["text"][0]), **special,
    ).save_pretrained(folder)  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "onnx").mkdir()
    for tower, (inputs, output) in graphs.items():
        method = getattr(model, f"get_{'image' if tower == 'vision' else tower}_features")

        class Graph(torch.nn.Module):  # type: ignore[misc]  # (torch has no types here)
            def __init__(self, method: Any, inputs: tuple[str, ...]) -> None:
                super().__init__()
                self.model = model
                self.method = method
                self.inputs = inputs

            def forward(self, *arrays: Any) -> Any:
                given = self.method(**dict(zip(self.inputs, arrays, strict=True)))
                return getattr(given, "pooler_output", given)

        shapes = {
            "input_ids": torch.randint(1000, 2000, (2, limit if kind == "siglip" else 7)),
            "attention_mask": torch.ones(2, 7, dtype=torch.long),
            "pixel_values": torch.randn(2, 3, 96, 96),
            "input_features": torch.randn(2, 1, 1001, 64),
        }
        if kind == "clip":
            shapes["input_ids"][:, -1] = 102
        torch.onnx.export(
            Graph(method, inputs).eval(), tuple(shapes[each] for each in inputs),
            str(folder / "onnx" / f"{tower}_model.onnx"), input_names=list(inputs), output_names=[output],
            dynamic_axes={
                **{each: {0: "n", 1: "t"} if each in ("input_ids", "attention_mask") else {0: "n"} for each in inputs},
                output: {0: "n"},
            },
            opset_version=17, dynamo=False,
        )  # fmt: skip


@pytest.mark.parametrize("kind", TOWERS)
async def test_towers_as_published_for_the_browser(
    run: Callable[..., int], randomise: Any,
    kind: str, start_mesh: Any, minilm: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("EMBEDMESH_CACHE_DIR", str(tmp_path / "cache"))
    save_towers(randomise, kind, minilm, tmp_path / kind)
    assert run("models", "pull", tmp_path / kind) == 0, capfd.readouterr()
    modalities = ("text", "audio" if kind == "clap" else "image")
    folders = {f"{modality}_models": (tmp_path / "cache" / "models" / f"{kind}-{modality}",) for modality in modalities}
    async with start_mesh(**folders) as mesh:
        for modality in modalities:
            capfd.readouterr()
            words = ("models", "verify", f"{kind}-{modality}", "--address", mesh.address, "--json")
            status = await asyncio.to_thread(run, *words)
            captured = capfd.readouterr()
            report = json.loads(captured.out)
            assert status == 0, (report, captured.err)
            assert report["samples"] >= 20
            with capfd.disabled():
                sys.stdout.write(f"| {kind}, {modality} |  | {report['comparisons'][0]['cosine_min']:.7f} | | |\n")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('pooling = "last"', 'pooling = "mean"', "the least cosine is "),
        ("max_input_units = 48", "max_input_units = 60", "reads 60 tokens, the reference 48"),
        ("normalized = false", "normalized = true", "the lengths of vectors differ by up to"),
        ('query = "represent the question: "', 'query = "question: "', "the least cosine of role query is "),
    ],
)
def test_verify_catches_what_is_configured_wrongly(
    run: Callable[..., int], randomise: Any,
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    old: str, new: str, problem: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("EMBEDMESH_CACHE_DIR", str(tmp_path / "cache"))
    save(randomise, dataclasses.replace(FAMILIES["qwen2-last-token"], prompts=PROMPTS), minilm, tmp_path / "decoder")
    assert run("models", "pull", tmp_path / "decoder") == 0
    capfd.readouterr()
    assert run("models", "verify", "decoder") == 0, capfd.readouterr()
    manifest = tmp_path / "cache" / "models" / "decoder" / "model.toml"
    text = manifest.read_text()
    assert old in text
    manifest.write_text(text.replace(old, new))
    capfd.readouterr()
    assert run("models", "verify", "decoder") == 1
    out = capfd.readouterr().out
    assert "NOT VERIFIED" in out
    assert problem in out


def test_a_repository_that_does_not_say_how_it_pools(
    run: Callable[..., int],
    randomise: Any,
    minilm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("EMBEDMESH_CACHE_DIR", str(tmp_path / "cache"))
    save(randomise, FAMILIES["bert-max"], minilm, tmp_path / "plain")
    (tmp_path / "plain" / "modules.json").unlink()
    words = ("--pooling", "cls", "--pooling", "mean", "--normalize")
    assert run("models", "pull", tmp_path / "plain", *words) == 0, capfd.readouterr()
    assert run("models", "verify", "plain") == 0, capfd.readouterr()


def test_the_original_is_found_where_the_model_came_from(
    randomise: Any, hub: Any, hub_repository: Any, minilm: Path, tmp_path: Path
) -> None:
    """In processes of their own, because the library reads its environment variables once."""
    save(randomise, FAMILIES["bert-joined-dense-normalize"], minilm, tmp_path / "small")
    hub.repositories["small/one"] = hub_repository(content(tmp_path / "small"))
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "EMBEDMESH_CACHE_DIR": str(tmp_path / "cache"),
    }
    for words in (("pull", "small/one"), ("verify", "small/one")):
        done = subprocess.run(
            [sys.executable, "-m", "embedmesh_cli", "models", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert f"reference  small/one@{hub.repositories['small/one'].commit} by sentence-transformers" in done.stdout
    assert "model.safetensors" in hub.downloads()


def test_a_reference_that_cannot_be_had(
    run: Callable[..., int],
    minilm: Path,
    starter_model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    words = ("models", "verify", starter_model, "--reference", tmp_path / "empty")
    assert run(*words) == 2
    assert "does not say how it pools" in capfd.readouterr().err
    (tmp_path / "empty" / "modules.json").write_bytes((minilm / "modules.json").read_bytes())
    assert run(*words) == 1
    assert "cannot be loaded" in capfd.readouterr().err
    assert run("models", "verify", starter_model, "--reference", minilm) == 0, capfd.readouterr()
