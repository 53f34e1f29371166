"""Weights without a graph, exported and served by a whole mesh, against the reference library.

Small models of each architecture with random weights, saved by sentence-transformers itself.

    make export-table     # runs this and writes the table of services/embedmesh_cli/README.md
"""

import dataclasses
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from numpy.typing import NDArray
from PIL import Image

import embedmesh
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_cli.local import LocalModel, demo_files, demo_texts
from embedmesh_encoder.backend import create_backend
from embedmesh_encoder.model import ModelSpec, load_spec
from embedmesh_encoder.text import TextItem, TextPreparer

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

Float32 = NDArray[np.float32]
README = Path(__file__).parents[2] / "services" / "embedmesh_cli" / "README.md"
LEAST_COSINE = 0.9999
MOST_COMPANY = 1e-5


# --- text families --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Family:
    """A small model of an architecture.

    Attributes:
        title: In the table.
        config: Its configuration's class and settings, in transformers.
        modules: What follows the Transformer, by the library's modules.
        layout: In which it is exported.
        max_seq_length: As sentence-transformers has it.
        shard: Largest size of a file of weights.
        padding_side: Of the reference's batches.
        suffix: What `options` add to its name.
        options: Of the export.
        change: Does to the reference what they do to the export.
        truncate_dim: As sentence-transformers has it.
    """

    title: str
    config: tuple[str, Mapping[str, Any]]
    modules: Callable[[Any, int], list[Any]]
    layout: str = "packed"
    max_seq_length: int = 160
    shard: str = "5GB"
    padding_side: str = "right"
    suffix: str = ""
    options: Sequence[str] = ()
    change: Callable[[Any], Any] = lambda model: model
    truncate_dim: int | None = None


def cut(place: str, kept: int) -> dict[str, Any]:
    """Take fewer layers, as sentence-transformers' documentation of AdaptiveLayerLoss does."""

    def change(model: Any) -> Any:
        *parents, name = place.split(".")
        part = model[0].auto_model
        for parent in parents:
            part = getattr(part, parent)
        setattr(part, name, getattr(part, name)[:kept])
        return model

    return {"suffix": f"-l{kept}", "options": ("--layers", str(kept)), "change": change}


def averaged(*states: int) -> dict[str, Any]:
    """Pool a mean of transformers' hidden states."""

    def change(model: Any) -> Any:
        import torch
        from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]

        class Mean(torch.nn.Module):  # type: ignore[misc]  # (torch has no types here)
            def forward(self, features: Any) -> Any:
                chosen = [features["all_layer_embeddings"][state] for state in states]
                return features | {"token_embeddings": torch.stack(chosen).mean(0)}

        model[0].auto_model.config.output_hidden_states = True
        return SentenceTransformer(modules=[model[0], Mean(), *list(model)[1:]], device="cpu")

    words = ",".join(map(str, states))
    return {"suffix": f"-h{words.replace(',', '-')}", "options": ("--average-layers", words), "change": change}


def pooled(*ways: str) -> Callable[[Any, int], list[Any]]:
    return lambda m, width: [m.Pooling(width, pooling_mode=ways)]


def normed(m: Any, width: int) -> list[Any]:
    return [m.Pooling(width, pooling_mode="mean"), m.Normalize()]


def with_head(m: Any, width: int) -> list[Any]:
    import torch

    norm = m.LayerNorm(40)
    for weight in norm.parameters():
        weight.data.normal_()
    return [
        m.Pooling(width, pooling_mode=("max", "mean_sqrt_len_tokens")),
        m.Dense(2 * width, 40, activation_function=torch.nn.Tanh()),
        norm,
        m.Dense(40, 24, bias=False, activation_function=torch.nn.Identity()),
        m.Normalize(),
    ]


SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BERT = {**SMALL, "vocab_size": 30522, "max_position_embeddings": 180, "pad_token_id": 0}
BERT3 = {**BERT, "num_hidden_layers": 3}
DECODER = {**BERT, "num_key_value_heads": 2, "head_dim": 12, "bos_token_id": 101, "eos_token_id": 102}
T5 = {"d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 30522}
# Windows shorter than the texts, so that they show.
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LAYERS3 = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA = {**DECODER, **WINDOWS, "query_pre_attn_scalar": 12}
FAMILIES = {
    "bert": Family("BERT, mean", ("BertConfig", BERT), pooled("mean"), shard="1MB"),
    "bert-head": Family("BERT, max and mean_sqrt_len, Dense, LayerNorm, Dense", ("BertConfig", BERT), with_head),
    "distilbert": Family(
        "DistilBERT, cls and mean",
        ("DistilBertConfig", {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 30522}),
        pooled("cls", "mean"),
    ),
    "electra": Family("ELECTRA, mean", ("ElectraConfig", {**BERT, "embedding_size": 32}), pooled("mean")),
    "roberta": Family("RoBERTa, mean", ("RobertaConfig", BERT), pooled("mean")),
    "xlm-roberta": Family("XLM-R, cls", ("XLMRobertaConfig", {**BERT, "pad_token_id": 1}), pooled("cls")),
    "camembert": Family("CamemBERT, mean", ("CamembertConfig", {**BERT, "pad_token_id": 1}), pooled("mean")),
    "mpnet": Family("MPNet, mean", ("MPNetConfig", {**BERT, "pad_token_id": 1}), pooled("mean")),
    "modernbert": Family(
        "ModernBERT, windows, cls",
        ("ModernBertConfig", {**BERT, "local_attention": 8, "layer_types": WINDOWS["layer_types"]}),
        pooled("cls"),
    ),
    "nomic-bert": Family("NomicBERT, mean", ("NomicBertConfig", BERT), pooled("mean")),
    "t5": Family("T5 encoder, mean", ("T5Config", T5), pooled("mean")),
    "mt5": Family("MT5 encoder, mean", ("MT5Config", T5), pooled("mean")),
    "umt5": Family("UMT5 encoder, mean", ("UMT5Config", T5), pooled("mean")),
    "qwen2": Family("Qwen2, causal, last", ("Qwen2Config", DECODER), pooled("lasttoken")),
    "qwen2-bidirectional": Family(
        "Qwen2, bidirectional, mean", ("Qwen2Config", {**DECODER, "is_causal": False}), pooled("mean")
    ),
    "qwen3": Family(
        "Qwen3, causal, last, left padding", ("Qwen3Config", DECODER), pooled("lasttoken"), padding_side="left"
    ),
    "llama": Family("Llama, causal, weighted mean", ("LlamaConfig", DECODER), pooled("weightedmean")),
    "mistral": Family(
        "Mistral, causal, window, last", ("MistralConfig", {**DECODER, "sliding_window": 32}), pooled("lasttoken")
    ),
    "gemma": Family("Gemma, causal, mean", ("GemmaConfig", DECODER), pooled("mean")),
    "gemma2": Family("Gemma 2, causal, windows, last", ("Gemma2Config", GEMMA), pooled("lasttoken")),
    "gemma3-bidirectional": Family(
        "Gemma 3, bidirectional, windows, mean",
        ("Gemma3TextConfig", {**GEMMA, "use_bidirectional_attention": True}),
        pooled("mean"),
    ),
    "deberta": Family(
        "DeBERTa-v2, mean",
        (
            "DebertaV2Config",
            {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 32},
        ),
        pooled("mean"),
        layout="padded",
    ),
    "albert": Family("ALBERT, mean", ("AlbertConfig", {**BERT, "embedding_size": 32}), pooled("mean"), layout="padded"),
    "bert-width": Family("BERT, mean, cut to 20 of 48 numbers", ("BertConfig", BERT), normed, truncate_dim=20),
    "bert-cut": Family("BERT, 2 of 3 layers, mean", ("BertConfig", BERT3), pooled("mean"), **cut("encoder.layer", 2)),
    "distilbert-cut": Family(
        "DistilBERT, 1 of 2 layers, cls",
        ("DistilBertConfig", {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 30522}),
        pooled("cls"),
        **cut("transformer.layer", 1),
    ),
    "modernbert-cut": Family(
        "ModernBERT, windows, 2 of 3 layers, cls",
        (
            "ModernBertConfig",
            {**BERT3, "local_attention": 8, "layer_types": LAYERS3},
        ),
        pooled("cls"),
        **cut("layers", 2),
    ),
    "t5-cut": Family("T5 encoder, 1 of 2 layers, mean", ("T5Config", T5), pooled("mean"), **cut("encoder.block", 1)),
    "qwen3-cut": Family(
        "Qwen3, causal, 2 of 3 layers, last",
        ("Qwen3Config", {**DECODER, "num_hidden_layers": 3}),
        pooled("lasttoken"),
        **cut("layers", 2),
    ),
    "deberta-cut": Family(
        "DeBERTa-v2, 2 of 3 layers, mean",
        ("DebertaV2Config", {**BERT3, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
        pooled("mean"),
        layout="padded",
        **cut("encoder.layer", 2),
    ),
    "bert-mean": Family(
        "BERT, mean of hidden states 1 and 3, mean", ("BertConfig", BERT3), pooled("mean"), **averaged(1, 3)
    ),
    "mpnet-mean": Family(
        "MPNet, mean of hidden states 0 and 1, max",
        ("MPNetConfig", {**BERT, "pad_token_id": 1}),
        pooled("max"),
        **averaged(0, 1),
    ),
    "t5-mean": Family(
        "T5 encoder, mean of hidden states 1 and 2, mean", ("T5Config", T5), pooled("mean"), **averaged(1, 2)
    ),
    "llama-mean": Family(
        "Llama, causal, mean of hidden states 1, 2 and 3, weighted mean",
        ("LlamaConfig", {**DECODER, "num_hidden_layers": 3}),
        pooled("weightedmean"),
        **averaged(1, 2, 3),
    ),
    "albert-mean": Family(
        "ALBERT, mean of hidden states 1 and 2, mean",
        ("AlbertConfig", {**BERT, "embedding_size": 32}),
        pooled("mean"),
        layout="padded",
        **averaged(1, 2),
    ),
}


def save(randomise: Any, family: Family, tokenizer: Path, folder: Path) -> None:
    """Save a repository of a family, by the library itself."""
    import transformers  # type: ignore[import-not-found]
    from sentence_transformers import SentenceTransformer, models

    kind, settings = family.config
    config = getattr(transformers, kind)(**settings)
    encoder = kind.replace("Config", "EncoderModel") if "T5" in kind else None
    model = getattr(transformers, encoder)(config) if encoder else transformers.AutoModel.from_config(config)
    randomise(model)
    raw = folder.with_name(f"{folder.name}-raw")
    model.eval().save_pretrained(raw)
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer),
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        padding_side=family.padding_side,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "unk")},
    ).save_pretrained(raw)
    transformer = models.Transformer(str(raw), max_seq_length=family.max_seq_length)
    width = transformer.get_embedding_dimension()
    modules = [transformer, *family.modules(models, width)]
    SentenceTransformer(modules=modules, truncate_dim=family.truncate_dim, device="cpu").save(str(folder))
    if family.shard != "5GB":
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size=family.shard)


@pytest.fixture
def bert(randomise: Any, tokenizer: Path, tmp_path: Path) -> Path:
    save(randomise, FAMILIES["bert"], tokenizer, tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def texts() -> list[str]:
    """Texts from nothing to more than the models read."""
    path = Path(__file__).parents[1] / "data" / "golden_text" / "texts.jsonl"
    rows = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    # The token of padding is no padding where a text has it.
    return [*(text[:2000] for text in rows[::25] if text.strip()), "before [PAD] and after"]


def reference(folder: Path, texts: Sequence[str], change: Callable[[Any], Any] = lambda model: model) -> Float32:
    from sentence_transformers import SentenceTransformer

    model = change(SentenceTransformer(str(folder), device="cpu"))
    vectors: Float32 = model.encode(list(texts), batch_size=16, show_progress_bar=False)
    return vectors


def in_rows(spec: ModelSpec, texts: Sequence[str]) -> Float32:
    """Embed as OpenVINO does on many cores: several rows, filled up with padding."""
    preparer = TextPreparer(spec, row_width=64, row_multiple=16)
    batch = [preparer.prepare(TextItem(text), pb.TRUNCATION_END) for text in texts]
    backend = create_backend(spec.run_by("openvino", "float32"))
    try:
        return preparer.split(backend.run(preparer.collate(batch)), batch)
    finally:
        backend.close()


def unit(vectors: Float32) -> Float32:
    normed: Float32 = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return normed


def cosine(ours: Float32, theirs: Float32) -> float:
    return float(np.einsum("nd,nd->n", unit(ours), unit(theirs)).min())


def likeness(vectors: Float32) -> float:
    """Tell how alike the two most alike vectors are."""
    return float((unit(vectors) @ unit(vectors).T)[~np.eye(len(vectors), dtype=bool)].max())


@dataclasses.dataclass(frozen=True)
class Found:
    """A row of the table."""

    title: str
    layout: str
    worst: float
    company: float
    alike: float

    @property
    def fine(self) -> bool:
        # Far nearer to its own reference than any two inputs are to each other; else a wrong input's vector would pass.
        near = 1 - self.worst < (1 - self.alike) / 10
        return near and self.worst >= LEAST_COSINE and self.company <= MOST_COMPANY


def keep(table: str, rows: Sequence[Found]) -> None:
    """Write a table of the README if asked for it; else see that it is of the same models."""
    text = README.read_text(encoding="utf-8")
    start, end = (f"<!-- {word} of the export table: {table} -->\n" for word in ("start", "end"))
    before, _, rest = text.partition(start)
    old, _, after = rest.partition(end)
    lines = [
        "| model | layout | worst cosine | alone and in company | most alike inputs |\n",
        "| --- | --- | --- | --- | --- |\n",
        *(f"| {row.title} | {row.layout} | {row.worst:.7f} | {row.company:.1e} | {row.alike:.5f} |\n" for row in rows),
    ]
    if os.environ.get("WRITE_EXPORT_TABLE"):
        README.write_text("".join((before, start, *lines, end, after)), encoding="utf-8")
        return
    named = [line.split(" | ")[:2] for line in old.splitlines()]
    assert named == [line.split(" | ")[:2] for line in lines], "make export-table"


async def test_text_families(
    run: Callable[..., int], randomise: Any,
    start_mesh: Any, tokenizer: Path, texts: list[str], home: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, family in FAMILIES.items():
        save(randomise, family, tokenizer, tmp_path / name)
        assert run("models", "export", tmp_path / name, *family.options) == 0, (name, capfd.readouterr())
        assert "As torch: worst cosine 0.99999" in (said := capfd.readouterr().out) or "cosine 1.0000" in said, said
    rows, problems = [], []
    served = {name: f"{name}{family.suffix}" for name, family in FAMILIES.items()}
    models = tuple(home / name for name in served.values())
    async with start_mesh(text_models=models) as mesh, embedmesh.AsyncClient(mesh.address) as client:
        for key, family in FAMILIES.items():
            name = served[key]
            spec = load_spec(home / name)
            together = (await client.embed(texts, model=name, cache="bypass")).vectors
            alone = np.concatenate(
                [(await client.embed([text], model=name, cache="bypass")).vectors for text in texts[::4]]
            )
            theirs = reference(tmp_path / key, texts, family.change)
            lengths = np.linalg.norm(together, axis=1) / np.linalg.norm(theirs, axis=1)
            found = Found(
                family.title,
                spec.graph.layout,
                min(cosine(together, theirs), cosine(in_rows(spec, texts), theirs)),
                float(np.abs(unit(alone) - unit(together)[::4]).max()),
                likeness(theirs),
            )
            rows.append(found)
            if not found.fine or spec.graph.layout != family.layout or np.abs(lengths - 1).max() > 1e-4:
                problems.append((found, lengths))
    assert not problems
    keep("text", rows)


def test_from_a_hub_and_verified(
    run: Callable[..., int],
    bert: Path, hub: Any, hub_repository: Any, tmp_path: Path, home: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (bert / "pytorch_model.bin").write_bytes(b"\x80")
    (bert / "model.py").write_text("raise SystemExit")
    files = {path.relative_to(bert).as_posix(): path.read_bytes() for path in bert.rglob("*") if path.is_file()}
    hub.repositories["org/small"] = hub_repository(files)
    words = ("org/small@main", "--endpoint", hub.endpoint, "--cache-dir", tmp_path / "hub")
    assert run("models", "pull", *words) == 1
    assert "models export org/small@main` makes one of its weights" in capfd.readouterr().err
    assert run("models", "export", *words) == 0, capfd.readouterr()
    fetched = set(hub.downloads())
    assert {name for name in files if name.startswith("model-")} < fetched
    assert not {"pytorch_model.bin", "model.py"} & fetched
    assert run("models", "verify", "org/small", "--reference", bert) == 0, capfd.readouterr()
    # A second time it is the same model, and nothing is in the way.
    assert run("models", "export", *words, "--offline") == 0, capfd.readouterr()
    assert [path.name for path in home.iterdir()] == ["org--small"]


# --- towers ---------------------------------------------------------------------------------------

VISION = {**SMALL, "hidden_size": 64, "image_size": 96, "patch_size": 16}
TOWER_TEXT = {**BERT, "max_position_embeddings": 40, "bos_token_id": 101, "eos_token_id": 102}
CLAP_AUDIO = {"depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 8], "patch_embeds_hidden_size": 16}
WHISPER = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 96}
WAV2VEC2 = {**SMALL, "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
SIZES = {"size": {"shortest_edge": 96}, "crop_size": {"height": 96, "width": 96}}
SQUARE = {"size": {"height": 96, "width": 96}}


@dataclasses.dataclass(frozen=True)
class Tower:
    """A small model of towers.

    Attributes:
        title: In the table.
        name: Of its classes in transformers, without Config and Model.
        settings: Of its configuration.
        processor: Content of its `preprocessor_config.json`.
        vector: From the torch model and one input's features to its vector.
        options: For the export.
    """

    title: str
    name: str
    settings: Mapping[str, Any]
    processor: Mapping[str, Any]
    vector: Callable[[Any, Mapping[str, Any]], Any]
    options: Sequence[str] = ()


def features(model: Any, inputs: Mapping[str, Any]) -> Any:
    kind = "text" if "input_ids" in inputs else "image" if "pixel_values" in inputs else "audio"
    return getattr(model, f"get_{kind}_features")(**inputs).pooler_output


def first(model: Any, inputs: Mapping[str, Any]) -> Any:
    return model(**inputs).last_hidden_state[:, 0]


def mean(model: Any, inputs: Mapping[str, Any]) -> Any:
    return model(**inputs).last_hidden_state.mean(1)


def pooler(model: Any, inputs: Mapping[str, Any]) -> Any:
    return model(**inputs).pooler_output


TOWERS = {
    "clip": Tower(
        "CLIP",
        "CLIP",
        {"text_config": TOWER_TEXT, "vision_config": VISION, "projection_dim": 40},
        {"image_processor_type": "CLIPImageProcessor", **SIZES},
        features,
    ),
    "siglip": Tower(
        "SigLIP",
        "Siglip",
        {"text_config": {**TOWER_TEXT, "projection_size": 64}, "vision_config": VISION},
        {"image_processor_type": "SiglipImageProcessor", **SQUARE},
        features,
    ),
    "clap": Tower(
        "CLAP",
        "Clap",
        {"text_config": TOWER_TEXT, "audio_config": {**CLAP_AUDIO, "hidden_size": 128}, "projection_dim": 40},
        {"feature_extractor_type": "ClapFeatureExtractor", "truncation": "rand_trunc"},
        features,
    ),
    "vit": Tower(
        "ViT, cls", "ViT", VISION, {"image_processor_type": "ViTImageProcessor", **SQUARE}, first, ("--pooling", "cls")
    ),
    "dinov2": Tower(
        "DINOv2, mean",
        "Dinov2",
        {**VISION, "patch_size": 12},
        {"image_processor_type": "BitImageProcessor", **SIZES},
        mean,
        ("--pooling", "mean"),
    ),
    "convnext": Tower(
        "ConvNeXt",
        "ConvNext",
        {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]},
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}},
        pooler,
    ),
    "ast": Tower("AST", "AST", {**SMALL, "hidden_size": 64}, {"feature_extractor_type": "ASTFeatureExtractor"}, pooler),
    "whisper": Tower(
        "Whisper encoder, mean",
        "Whisper",
        {**WHISPER, "decoder_layers": 1, "decoder_ffn_dim": 96, "decoder_attention_heads": 4, "vocab_size": 100}
        | {f"{each}_token_id": 1 for each in ("pad", "bos", "eos", "decoder_start")},
        {"feature_extractor_type": "WhisperFeatureExtractor"},
        lambda model, inputs: mean(model.encoder, inputs),
        ("--pooling", "mean"),
    ),
    "wav2vec2": Tower(
        "wav2vec2, mean",
        "Wav2Vec2",
        {**WAV2VEC2, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
        {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "return_attention_mask": True},
        mean,
        ("--pooling", "mean", "--max-units", "900"),
    ),
}


def save_tower(randomise: Any, tower: Tower, tokenizer: Path, folder: Path) -> Any:
    """Save a repository, and give the torch model."""
    import transformers

    model = getattr(transformers, f"{tower.name}Model")(getattr(transformers, f"{tower.name}Config")(**tower.settings))
    randomise(model)
    model.eval().save_pretrained(folder)
    if "text_config" in tower.settings:
        transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer),
            model_max_length=39 if tower.name == "Clap" else 40,
            model_input_names=["input_ids"] if tower.name == "Siglip" else ["input_ids", "attention_mask"],
            **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "unk")},
        ).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(tower.processor))
    return model


def text_inputs(folder: Path, tower: Tower) -> Callable[[str], Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    padding = "max_length" if tower.name == "Siglip" else False
    return lambda text: tokenizer([text], padding=padding, truncation=True, return_tensors="pt")


def image_inputs(folder: Path) -> Callable[[bytes], Any]:
    from transformers import AutoImageProcessor
    from transformers.image_transforms import convert_to_rgb  # type: ignore[import-not-found]

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    def look(content: bytes) -> Any:
        # The library's own function: what is transparent becomes white, not whatever lies beneath.
        pixels = convert_to_rgb(Image.open(io.BytesIO(content)), return_numpy=True)
        return processor(Image.fromarray(pixels), return_tensors="pt")

    return look


def audio_inputs(folder: Path) -> Callable[[bytes], Any]:
    from transformers import AutoFeatureExtractor

    extractor = AutoFeatureExtractor.from_pretrained(folder)
    rate = extractor.sampling_rate

    def read(content: bytes) -> Any:
        samples, given = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
        wave = soxr.resample(samples.mean(axis=1), given, rate, quality="HQ")
        return extractor(wave, sampling_rate=rate, return_tensors="pt")

    return read


def inputs_of(modality: str, folder: Path, tower: Tower, texts: list[str]) -> tuple[list[Any], Callable[[Any], Any]]:
    """Give inputs, and what makes features of one."""
    if modality == "text":
        return texts, text_inputs(folder, tower)
    contents = demo_files(modality)[:12]
    return contents, image_inputs(folder) if modality == "image" else audio_inputs(folder)


async def test_towers(
    run: Callable[..., int], randomise: Any,
    start_mesh: Any, tokenizer: Path, texts: list[str], home: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import torch

    rows: list[Found] = []
    wrap = {"text": str, "image": embedmesh.Image, "audio": embedmesh.Audio}
    specs: dict[str, list[ModelSpec]] = {}
    models = {}
    for name, tower in TOWERS.items():
        models[name] = save_tower(randomise, tower, tokenizer, tmp_path / name)
        assert run("models", "export", tmp_path / name, *tower.options) == 0, (name, capfd.readouterr())
        specs[name] = [load_spec(path) for path in sorted(home.iterdir()) if path.name.split("-")[0] == name]
    by_modality = {
        modality: tuple(spec.folder for each in specs.values() for spec in each if spec.modality == modality)
        for modality in wrap
    }
    async with (
        start_mesh(**{f"{modality}_models": folders for modality, folders in by_modality.items()}) as mesh,
        embedmesh.AsyncClient(mesh.address) as client,
    ):
        for name, tower in TOWERS.items():
            for spec in specs[name]:
                given, read = inputs_of(spec.modality, tmp_path / name, tower, texts)
                with torch.no_grad():
                    theirs = np.concatenate([tower.vector(models[name], read(each)).numpy() for each in given])
                items = [wrap[spec.modality](each) for each in given]
                together = (await client.embed(items, model=spec.name, cache="bypass")).vectors
                alone = np.concatenate(
                    [(await client.embed([item], model=spec.name, cache="bypass")).vectors for item in items[::4]]
                )
                found = Found(
                    f"{tower.title}, {spec.modality}",
                    spec.graph.layout,
                    cosine(together, theirs),
                    float(np.abs(unit(alone) - unit(together)[::4]).max()),
                    likeness(theirs),
                )
                rows.append(found)
    assert not [found for found in rows if not found.fine]
    keep("towers", rows)


# --- layers ---------------------------------------------------------------------------------------


def test_several_depths_are_several_models(
    run: Callable[..., int], bert: Path, home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("models", "export", bert) == 0, capfd.readouterr()
    assert run("models", "export", bert, "--layers", "2, 1", "--average-layers", "0,1") == 0, capfd.readouterr()
    out = capfd.readouterr().out
    assert f"--text-model {home / 'small-l1-h0-1'} --text-model {home / 'small-l2-h0-1'}" in out
    specs = {path.name: load_spec(path) for path in home.iterdir()}
    assert set(specs) == {"small", "small-l1-h0-1", "small-l2-h0-1"}
    for key in ("name", "family", "space", "revision"):
        assert len({getattr(spec, key) for spec in specs.values()}) == 3
    whole, cut_one = specs["small"], specs["small-l1-h0-1"]
    assert cut_one.space == f"{whole.space}-l1-h0-1"
    assert whole.layers is None
    assert cut_one.layers is not None
    assert (cut_one.layers.kept, cut_one.layers.of, cut_one.layers.averaged) == (1, 2, (0, 1))
    sizes = {name: spec.path(spec.graph.file).stat().st_size for name, spec in specs.items()}
    # What nothing passes through is not in the graph: of both the second layer.
    assert sizes["small-l1-h0-1"] < sizes["small"]
    assert sizes["small-l2-h0-1"] == pytest.approx(sizes["small-l1-h0-1"], rel=0.01)
    assert run("models", "show", "small-l1-h0-1") == 0
    assert "layers      1 of 2; the mean of hidden states 0 and 1 is pooled\n" in capfd.readouterr().out
    assert run("models", "verify", "small-l1-h0-1") == 0, capfd.readouterr()
    assert run("models", "export", bert, "--layers", "1", "--output", tmp_path / "mine") == 0, capfd.readouterr()
    assert load_spec(tmp_path / "mine").name == "small-l1"
    # The whole model's vectors are others.
    assert run("models", "verify", "small", "--reference", bert) == 0
    manifest = tmp_path / "mine" / "model.toml"
    manifest.write_text(manifest.read_text().replace("kept = 1", "kept = 2"))
    assert run("models", "verify", tmp_path / "mine") == 1
    assert "the least cosine is" in capfd.readouterr().out


@pytest.mark.parametrize("layout", ["packed", "padded"])
async def test_a_whitened_model(
    run: Callable[..., int], randomise: Any,
    layout: str, tokenizer: Path, start_mesh: Any, texts: list[str], home: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """By the paper's own code (github.com/bojone/BERT-whitening), on sentence-transformers' vectors."""
    save(randomise, FAMILIES["bert-width"], tokenizer, tmp_path / "small")
    change(tmp_path / "small" / "config_sentence_transformers.json", truncate_dim=None)
    fitted = [f"{a} {b}" for a in demo_texts()[:20] for b in demo_texts()[20:25]]
    (tmp_path / "texts.txt").write_text("\n".join(fitted))
    assert run("models", "export", tmp_path / "small", "--layout", layout) == 0, capfd.readouterr()
    assert run("models", "whiten", "small", "--file", tmp_path / "texts.txt") == 0, capfd.readouterr()
    folder = home / "small-whitened"
    async with start_mesh(text_models=(folder,)) as mesh, embedmesh.AsyncClient(mesh.address) as client:
        ours = (await client.embed(texts, model="small-whitened", cache="bypass")).vectors
        alone = np.concatenate(
            [(await client.embed([t], model="small-whitened", cache="bypass")).vectors for t in texts]
        )

    def unnormalised(model: Any) -> Any:
        del model[2]
        return model

    vecs = reference(tmp_path / "small", fitted, unnormalised).astype(np.float64)
    mu = vecs.mean(axis=0, keepdims=True)
    u, s, _ = np.linalg.svd(np.cov(vecs.T))
    kernel = np.dot(u, np.diag(1 / np.sqrt(s)))[:, :47]  # a layer norm has taken one direction
    whitened = (reference(tmp_path / "small", texts, unnormalised) - mu).dot(kernel)
    whitened *= np.sign((whitened * ours).sum(axis=0))  # which a decomposition leaves open
    assert cosine(ours, whitened) >= LEAST_COSINE
    assert cosine(alone, whitened) >= LEAST_COSINE
    assert likeness(whitened) < 0.99
    assert run("models", "verify", "small-whitened") == 0, capfd.readouterr()
    assert "whitened by whitening.safetensors" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--layers", "3"), "small has 2 layers, of which --layers takes 1 to 2, not 3."),
        (("--layers", "1", "--average-layers", "1,2"), "small has hidden states 0 (the embeddings) to 1 then, not 2."),
        (("--average-layers", "1,3"), "small has hidden states 0 (the embeddings) to 2, not 3."),
    ],
)
def test_layers_that_do_not_exist(
    run: Callable[..., int], options: Any, sentence: str, bert: Path, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("models", "export", bert, *options) == 2
    assert capfd.readouterr().err == f"embedmesh: {sentence}\n"
    assert not list(home.glob("*"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--layers", "0"), '--layers "0" is no list of whole numbers from 1 on, such as 3,6.'),
        (("--layers", "2,"), '--layers "2," is no list of whole numbers'),
        (("--layers", ""), '--layers "" is no list of whole numbers'),
        (("--average-layers", "1,last"), '--average-layers "1,last" is no list of whole numbers from 0 on'),
        (("--average-layers", "1,²"), "is no list of whole numbers"),
    ],
)
def test_what_is_no_list_of_layers(
    run: Callable[..., int], options: Any, sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("models", "export", tmp_path, *options) == 2
    assert sentence in capfd.readouterr().err


def test_layers_that_cannot_be_cut(
    run: Callable[..., int], randomise: Any, tokenizer: Path, tmp_path: Path, home: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    save(randomise, FAMILIES["albert"], tokenizer, tmp_path / "small")
    assert run("models", "export", tmp_path / "small", "--layers", "1") == 1
    assert "small keeps no list of its 2 layers (albert), so that it cannot be cut." in capfd.readouterr().err
    save_tower(randomise, TOWERS["clip"], tokenizer, tmp_path / "clip")
    assert run("models", "export", tmp_path / "clip", "--layers", "1") == 2
    assert "only text models of one tower have layers to choose" in capfd.readouterr().err
    assert not list(home.glob("*"))


# --- pictures with texts --------------------------------------------------------------------------

READS = 160


@dataclasses.dataclass(frozen=True)
class Both:
    """A small model that reads pictures with texts.

    Attributes:
        title: In the table.
        vision: Its configuration's class and settings, in transformers.
        text: Likewise.
        config: Its own settings, which the processor shares.
        templates: Of a picture with a text, and of a text alone.
        pooling: Of all tokens, as a prompt has them.
        options: For the export.
    """

    title: str
    vision: tuple[str, Mapping[str, Any]]
    text: tuple[str, Mapping[str, Any]]
    config: Mapping[str, Any]
    templates: tuple[str, str]
    pooling: str
    options: Sequence[str] = ()


LANGUAGE = {**DECODER, "vocab_size": 30528, "max_position_embeddings": READS}
BOTH = {
    "llava": Both(
        "LLaVA: CLIP and Llama, last",
        ("CLIPVisionConfig", VISION),
        ("LlamaConfig", LANGUAGE),
        {"vision_feature_select_strategy": "default", "vision_feature_layer": -2},
        ("user: <image>\n{text} answer:", "user: {text} answer:"),
        "last",
        ("--normalize",),
    ),
    "llava-full": Both(
        "LLaVA: SigLIP, two layers, and Qwen2, mean",
        ("SiglipVisionConfig", VISION),
        ("Qwen2Config", LANGUAGE),
        {"vision_feature_select_strategy": "full", "vision_feature_layer": [-2, -1]},
        ("{text}. <image>", "{text}."),
        "mean",
    ),
}


def save_both(randomise: Any, both: Both, tokenizer: Path, folder: Path) -> tuple[Any, Any]:
    """Save a repository as its library does; give the torch model and its processor."""
    import transformers

    words = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer),
        model_max_length=100_000,
        extra_special_tokens={"image_token": "<image>"},
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "unk")},
    )
    pictures = transformers.CLIPImageProcessorPil(**SIZES)
    strategy = both.config["vision_feature_select_strategy"]
    processor = transformers.LlavaProcessor(
        pictures, words, patch_size=16, vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(strategy == "default"),
    )  # fmt: skip
    vision, text = (getattr(transformers, kind)(**settings) for kind, settings in (both.vision, both.text))
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=words.image_token_id, **both.config
    )
    model = transformers.LlavaForConditionalGeneration(config)
    randomise(model)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.model, processor


def reference_both(both: Both, model: Any, processor: Any, picture: bytes | None, text: str) -> Float32:
    """Embed one input by the library; a text that is too long is cut, but for what the template has after it."""
    import torch
    from transformers.image_transforms import convert_to_rgb

    template = both.templates[picture is None]
    prompt = template.replace("{text}", text)
    if picture is None:
        inputs = processor.tokenizer(prompt, truncation=False, return_tensors="pt")
    else:
        pixels = convert_to_rgb(Image.open(io.BytesIO(picture)), return_numpy=True)
        inputs = processor(images=Image.fromarray(pixels), text=prompt, truncation=False, return_tensors="pt")
    ids = inputs["input_ids"]
    tail = processor.tokenizer(template.partition("{text}")[2], return_tensors="pt")["input_ids"].shape[1] - 1
    tail += 35 if "<image>" in template.partition("{text}")[2] else 0
    if ids.shape[1] > READS:
        ids = torch.cat([ids[:, : READS - tail], ids[:, -tail:]], dim=1)
    given = {"pixel_values": inputs["pixel_values"]} if picture else {}
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids), **given).last_hidden_state
    found: Float32 = (hidden[:, -1] if both.pooling == "last" else hidden.mean(1)).numpy()
    return found


async def test_pictures_with_texts(
    run: Callable[..., int], randomise: Any,
    start_mesh: Any, tokenizer: Path, texts: list[str], home: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    loaded = {}
    for name, both in BOTH.items():
        loaded[name] = save_both(randomise, both, tokenizer, tmp_path / name)
        options = ("--image-template", both.templates[0], "--text-template", both.templates[1], *both.options)
        assert run("models", "export", tmp_path / name, "--pooling", both.pooling, *options) == 0, capfd.readouterr()
    pictures = demo_files("image")[:12]
    # From nothing to more than is read; the last says what stands for a picture.
    words = ["", "a", *texts[:9], " ".join(texts), "a <image> and <image>"]
    spelt = [*words[:-1], "a < image > and < image >"]
    items: list[embedmesh.Input] = [embedmesh.Image(pictures[i % 12], text) for i, text in enumerate(words)]
    items += [embedmesh.Image(pictures[0], text) for text in words[1:4]]
    rows: list[Found] = []
    models = {
        f"{modality}_models": tuple(home / f"{name}-{modality}" for name in BOTH) for modality in ("text", "image")
    }
    async with start_mesh(**models) as mesh, embedmesh.AsyncClient(mesh.address) as client:
        infos = {info.name: info for info in await client.list_models()}
        for name, both in BOTH.items():
            assert run("models", "show", f"{name}-image") == 0
            assert "tokens, 36 of them for the picture" in capfd.readouterr().out
            assert run("models", "verify", f"{name}-image", "--reference", tmp_path / name) == 2
            assert "verify knows no reference for models that read texts in a template" in capfd.readouterr().err
            assert infos[f"{name}-image"].reads_text_with_images
            assert not infos[f"{name}-text"].reads_text_with_images
            assert infos[f"{name}-image"].space == infos[f"{name}-text"].space
            spoilt = embedmesh.Image(pictures[0][:200], "a")
            # One name, one space: pictures with texts, and texts.
            answer = await client.embed([*items, spoilt, *words], model=name, cache="bypass")
            broken = answer.results[len(items)]
            assert isinstance(broken.error, embedmesh.UndecodableInput)
            assert [answer.results[i].truncated for i in (1, 11)] == [False, True]
            kept = [result.vector for result in answer.results if result.error is None]
            together = np.stack([vector for vector in kept if vector is not None])
            alone = [
                (await client.embed([item], model=name, cache="bypass")).vectors[0]
                for item in (*items[::3], *words[::3])
            ]
            places = [*range(0, len(items), 3), *range(len(items), len(items) + len(words), 3)]
            theirs = [reference_both(both, *loaded[name], pictures[i % 12], text) for i, text in enumerate(spelt)]
            theirs += [reference_both(both, *loaded[name], pictures[0], text) for text in words[1:4]]
            theirs += [reference_both(both, *loaded[name], None, text) for text in spelt]
            found = np.concatenate(theirs)
            company = float(np.abs(unit(np.stack(alone)) - unit(together)[places]).max())
            for what, part in (("image with text", slice(len(items))), ("text", slice(len(items), None))):
                layout = load_spec(home / f"{name}-{what.split()[0]}").graph.layout
                title = f"{both.title}, {what}"
                likest = likeness(found[part])
                rows.append(Found(title, layout, cosine(together[part], found[part]), company, likest))
            lengths = np.linalg.norm(together, axis=1) / np.linalg.norm(found, axis=1)
            assert np.abs(np.linalg.norm(together, axis=1) - 1 if both.options else lengths - 1).max() < 1e-4
    assert not [each for each in rows if not each.fine], rows
    keep("pictures with texts", rows)


# --- what is refused, and what else may be wished -------------------------------------------------


def change(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def only_pickles(folder: Path) -> None:
    import torch

    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def lose_a_weight(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shard = max(folder.glob("model-*.safetensors"))
    weights = load_file(shard)
    lost = next(name for name in weights if "pooler" not in name)
    save_file({name: weight for name, weight in weights.items() if name != lost}, shard, {"format": "pt"})


def make_outside(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    change(index, weight_map=dict.fromkeys(table["weight_map"], "../raw.safetensors"))


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickles only": (only_pickles, "has its weights as pickles only (pytorch_model.bin), which are never loaded"),
    "a shard is missing": (
        lambda folder: min(folder.glob("model-*.safetensors")).unlink(),
        "small has no model-00001-of-",
    ),
    "a shard lies outside": (make_outside, "small has no ../raw.safetensors"),
    "a damaged shard": (
        lambda folder: min(folder.glob("model-*.safetensors")).write_bytes(b"\xff" * 64),
        "transformers cannot load small: ",
    ),
    "a weight is missing": (lose_a_weight, "the weights of small are incomplete: "),
    "code of its own": (
        lambda folder: change(folder / "config.json", auto_map={"AutoModel": "modeling.Other"}),
        "small brings code of its own, which never runs here",
    ),
    "an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "small is an adapter: merge it"),
    "quantised": (
        lambda folder: change(folder / "config.json", quantization_config={"quant_method": "gptq"}),
        "the weights of small are quantised",
    ),
    "stretched positions": (
        lambda folder: change(folder / "config.json", rope_scaling={"type": "dynamic", "factor": 2.0}),
        "stretches its positions by the longest text of a batch (dynamic)",
    ),
    "a decoder behind": (
        lambda folder: change(folder / "config.json", model_type="bart", is_encoder_decoder=True),
        "small is an encoder with a decoder (bart)",
    ),
    "unknown": (
        lambda folder: change(folder / "config.json", model_type="yesterdays"),
        "transformers cannot load small: ",
    ),
    "pooling is not said": (
        lambda folder: (folder / "modules.json").unlink(),
        "small does not say how the vectors of tokens become one",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "small has no tokenizer.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(run: Callable[..., int], case: str, bert: Path, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spoil, sentence = REFUSED[case]
    spoil(bert)
    assert run("models", "export", bert) != 0
    assert sentence in capfd.readouterr().err
    assert not list(home.glob("*"))


LLAVA = {
    "model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}, "text_config": {"model_type": "llama"}
}  # fmt: skip
TEMPLATES = ("--image-template", "<image>{text}", "--text-template", "{text}")


@pytest.mark.parametrize(
    ("config", "options", "sentence"),
    [
        (LLAVA, (), "small reads pictures with texts, and no file says how they become one vector: name it with"),
        (
            LLAVA,
            ("--pooling", "last"),
            "--image-template such as $'USER: <image>\\n{text} ASSISTANT:', --text-template",
        ),
        (LLAVA, TEMPLATES, "--pooling (mostly last)"),
        (LLAVA, TEMPLATES[:2], "--image-template and --text-template belong together"),
        (
            {**LLAVA, "vision_config": {"model_type": "pixtral"}},
            ("--pooling", "last", *TEMPLATES),
            "small puts a pixtral and a llama together: of the former only clip_vision_model",
        ),
        (
            {**LLAVA, "model_type": "qwen2_vl"},
            (),
            "small is a qwen2_vl, which reads pictures in a way that is not known",
        ),
        ({"model_type": "bert"}, ("--pooling", "cls", *TEMPLATES), "small reads no pictures with texts: leave --image"),
    ],
)
def test_pictures_with_texts_are_refused_before_anything_is_loaded(
    run: Callable[..., int],
    config: Mapping[str, Any], options: Sequence[str], sentence: str, home: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    assert run("models", "export", tmp_path / "small", *options) != 0
    assert sentence in capfd.readouterr().err
    assert not list(home.glob("*"))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        # A mask that hides nothing: texts of a row see each other.
        ("embedmesh_cli.export.packed._FAR", "the exported graph gives other vectors than torch (worst cosine 0."),
        # Nothing is like enough.
        ("embedmesh_cli.export.check.LEAST_COSINE", "at least 1.1 is wanted): nothing was kept"),
        ("embedmesh_cli.export.check.MOST_APART", "vectors that depend on what else is in their batch"),
    ],
)
def test_a_broken_export_is_refused(
    run: Callable[..., int],
    spoil: str, sentence: str, bert: Path, home: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(
        spoil, {"_FAR": 0.0, "LEAST_COSINE": 1.1, "MOST_APART": {"dense": -1.0}}[spoil.rpartition(".")[2]]
    )
    assert run("models", "export", bert) == 1
    assert sentence in capfd.readouterr().err
    assert not list(home.glob("*"))


def test_a_family_that_cannot_be_packed_is_not(
    run: Callable[..., int],
    randomise: Any,
    tokenizer: Path,
    home: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    save(randomise, FAMILIES["deberta"], tokenizer, tmp_path / "small")
    assert run("models", "export", tmp_path / "small", "--layout", "packed") == 2
    assert "small is a deberta-v2, which cannot be packed" in capfd.readouterr().err


def test_layouts_and_large_weights_give_the_same_space(
    run: Callable[..., int],
    bert: Path,
    texts: list[str],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (bert / "modules.json").unlink()
    words = ("models", "export", bert, "--pooling", "cls", "--pooling", "max", "--normalize")
    assert run(*words, "--layout", "padded", "--name", "padded") == 0, capfd.readouterr()
    monkeypatch.setattr("embedmesh_cli.export.graph._LARGE", 1000)
    change(bert / "config.json", auto_map={"AutoModel": "modeling.Other"})
    assert run(*words, "--library-code", "--name", "packed") == 0, capfd.readouterr()
    padded, packed = load_spec(home / "padded"), load_spec(home / "packed")
    assert (padded.graph.layout, padded.graph.pooling) == ("padded", ("cls", "max"))
    assert (packed.graph.layout, packed.graph.pooling) == ("packed", "graph")
    assert "onnx/model.onnx_data" in packed.files
    assert padded.normalized
    assert packed.normalized
    assert padded.space.removeprefix("padded") == packed.space.removeprefix("packed")
    vectors = []
    for spec in (padded, packed):
        model = LocalModel(spec)
        vectors.append(np.concatenate([model.embed(batch) for batch in model.batches([TextItem(t) for t in texts])]))
        model.close()
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5, rtol=0)
