"""Towers of real architectures, from export to vector: files through a whole mesh, against transformers with torch.

Weights are random, seeded, and of a size that lets the towers tell the files apart. The reference reads each file by
itself: the library's own processor, from the very `preprocessor_config.json` that is served, then the torch model.

    make test-torch ARGS="-k towers -s"     # prints the table of services/README.md
"""

import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from numpy.typing import NDArray
from PIL import Image, ImageOps

import embedmesh
from embedmesh_encoder.model import write_manifest

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

Float32 = NDArray[np.float32]
LEAST_COSINE = 0.9999
# No two files may be more alike to a tower; else vectors of the wrong file would pass, too.
MOST_ALIKE = 0.9995


# --- towers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tower:
    """A model of the library, made small.

    Attributes:
        name: Of the served model.
        model: Its class in transformers, by the name of the module below `models` and its own.
        config: Its configuration's class and settings.
        processor: Content of its `preprocessor_config.json`.
        output: What is exported of what it returns.
        pooling: How the output is pooled, as in the manifest.
        inputs: What the graph takes.
        free: Axes of the inputs, beside the batch, that are of any size.
        manifest: Further keys of the manifest.
    """

    name: str
    model: str
    config: tuple[str, Mapping[str, Any]]
    processor: Mapping[str, Any]
    output: str = "pooler_output"
    pooling: str = "graph"
    inputs: Sequence[str] = ("pixel_values",)
    free: Mapping[int, str] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)


VIT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
PATCHES = {"patch_size": 32, "extra_tokens": 1}
CONVNEXT = ("ConvNextConfig", {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]})
IMAGE_TOWERS = [
    Tower(
        "clip",
        "clip.modeling_clip.CLIPVisionModelWithProjection",
        ("CLIPVisionConfig", {**VIT, "image_size": 224, "patch_size": 32, "projection_dim": 48}),
        {"image_processor_type": "CLIPImageProcessor"},
        output="image_embeds",
        manifest={"max_input_units": 50, "image": PATCHES},
    ),
    Tower(
        "siglip",
        "siglip.modeling_siglip.SiglipVisionModel",
        ("SiglipVisionConfig", {**VIT, "image_size": 224, "patch_size": 32}),
        {"image_processor_type": "SiglipImageProcessor"},
        manifest={"max_input_units": 49, "image": {"patch_size": 32}},
    ),
    Tower(
        "vit-pooled",
        "vit.modeling_vit.ViTModel",
        ("ViTConfig", {**VIT, "image_size": 224, "patch_size": 32}),
        {"image_processor_type": "ViTImageProcessor"},
        manifest={"max_input_units": 50, "image": PATCHES},
    ),
    Tower(
        "vit-mean",
        "vit.modeling_vit.ViTModel",
        ("ViTConfig", {**VIT, "image_size": 96, "patch_size": 16}),
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 96, "width": 96}},
        output="last_hidden_state",
        pooling="mean",
        manifest={"max_input_units": 37, "image": {"patch_size": 16, "extra_tokens": 1}},
    ),
    Tower(
        "dinov2",
        "dinov2.modeling_dinov2.Dinov2Model",
        ("Dinov2Config", {**VIT, "image_size": 112, "patch_size": 14}),
        {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": 128},
            "crop_size": {"height": 112, "width": 112},
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
        output="last_hidden_state",
        pooling="cls",
        manifest={"max_input_units": 65, "image": {"patch_size": 14, "extra_tokens": 1}},
    ),
    Tower(
        "convnext",
        "convnext.modeling_convnext.ConvNextModel",
        CONVNEXT,
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}},
        manifest={"max_input_units": 196},
    ),
    Tower(
        "convnext-any-size",
        "convnext.modeling_convnext.ConvNextModel",
        CONVNEXT,
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 96}, "do_center_crop": False},
        free={2: "height", 3: "width"},
        manifest={"max_input_units": 1000},
    ),
]

CLAP = {
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 4, 8],
    "patch_embeds_hidden_size": 16,
    "hidden_size": 128,
    "projection_dim": 48,
}
WHISPER = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 96}
WAV2VEC2 = {**VIT, "conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
AUDIO_TOWERS = [
    Tower(
        "clap",
        "clap.modeling_clap.ClapAudioModelWithProjection",
        ("ClapAudioConfig", CLAP),
        {"feature_extractor_type": "ClapFeatureExtractor", "truncation": "rand_trunc"},
        output="audio_embeds",
        inputs=("input_features",),
        manifest={"max_input_units": 1001},
    ),
    Tower(
        "clap-fusion",
        "clap.modeling_clap.ClapAudioModelWithProjection",
        ("ClapAudioConfig", {**CLAP, "enable_fusion": True, "fusion_type": None}),
        {"feature_extractor_type": "ClapFeatureExtractor"},
        output="audio_embeds",
        inputs=("input_features", "is_longer"),
        manifest={"max_input_units": 1001},
    ),
    Tower(
        "whisper",
        "whisper.modeling_whisper.WhisperEncoder",
        ("WhisperConfig", WHISPER),
        {"feature_extractor_type": "WhisperFeatureExtractor"},
        output="last_hidden_state",
        pooling="mean",
        inputs=("input_features",),
        manifest={"max_input_units": 3000},
    ),
    Tower(
        "whisper-windows",
        "whisper.modeling_whisper.WhisperEncoder",
        ("WhisperConfig", {**WHISPER, "max_source_positions": 250}),
        {"feature_extractor_type": "WhisperFeatureExtractor", "chunk_length": 5},
        output="last_hidden_state",
        pooling="mean",
        inputs=("input_features",),
        manifest={"max_input_units": 5000, "audio": {"window_units": 500}},
    ),
    Tower(
        "ast",
        "audio_spectrogram_transformer.modeling_audio_spectrogram_transformer.ASTModel",
        ("ASTConfig", VIT),
        {"feature_extractor_type": "ASTFeatureExtractor"},
        inputs=("input_values",),
        manifest={"max_input_units": 1024},
    ),
    Tower(
        "wav2vec2",
        "wav2vec2.modeling_wav2vec2.Wav2Vec2Model",
        ("Wav2Vec2Config", {**WAV2VEC2, "feat_extract_norm": "layer", "do_stable_layer_norm": True}),
        {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "return_attention_mask": True},
        output="last_hidden_state",
        pooling="mean",
        inputs=("input_values", "attention_mask"),
        free={1: "samples"},
        manifest={"max_input_units": 600},
    ),
    Tower(
        "wav2vec2-unmasked",
        "wav2vec2.modeling_wav2vec2.Wav2Vec2Model",
        ("Wav2Vec2Config", {**WAV2VEC2, "feat_extract_norm": "group"}),
        {"feature_extractor_type": "Wav2Vec2FeatureExtractor"},
        output="last_hidden_state",
        pooling="mean",
        inputs=("input_values",),
        free={1: "samples"},
        manifest={"max_input_units": 600},
    ),
]


def build(tower: Tower) -> Any:
    """Make the torch model with random weights that keep the size of what passes through them."""
    import torch
    import transformers  # type: ignore[import-not-found]

    module, _, name = tower.model.rpartition(".")
    settings, changes = tower.config
    kind = getattr(__import__(f"transformers.models.{module}", fromlist=[name]), name)
    torch.manual_seed(20261123)
    model = kind(getattr(transformers, settings)(**changes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight[0].numel() ** -0.5)
            else:
                weight.add_(0.1 * torch.randn_like(weight))
    return model


def export(tower: Tower, model: Any, example: Mapping[str, Any], folder: Path) -> None:
    """Write the model's folder, in which its `preprocessor_config.json` already lies."""
    import torch

    class Graph(torch.nn.Module):  # type: ignore[misc]  # (torch has no types here)
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *arrays: Any) -> Any:
            return getattr(self.model(**dict(zip(tower.inputs, arrays, strict=True))), tower.output)

    graph = Graph().eval()
    arrays = tuple(
        example[name] if example[name].dtype != torch.int32 else example[name].long() for name in tower.inputs
    )
    torch.onnx.export(
        graph,
        arrays,
        str(folder / "model.onnx"),
        input_names=list(tower.inputs),
        output_names=[tower.output],
        dynamic_axes={**{name: {0: "n", **tower.free} for name in tower.inputs}, tower.output: {0: "n"}},
        opset_version=17,
        dynamo=False,  # the newer exporter needs onnxscript
    )
    modality = "image" if tower.inputs[0] == "pixel_values" else "audio"
    manifest = {
        "name": tower.name,
        "modality": modality,
        "space": tower.name,
        "dimensions": graph(*arrays).shape[-1],
        "normalized": True,
        "license": "Apache-2.0",
        "source": "made by a test",
        "backend": "onnxruntime",
        "graph": {
            "file": "model.onnx",
            "layout": "stacked",
            "inputs": list(tower.inputs),
            "output": tower.output,
            "pooling": tower.pooling,
        },
        **tower.manifest,
        modality: {"processor": "preprocessor_config.json", **tower.manifest.get(modality, {})},
    }
    write_manifest(folder, manifest, ["model.onnx", "preprocessor_config.json"])


def pooled(tower: Tower, model: Any, features: Mapping[str, Any]) -> Float32:
    """Run the torch model on one input; float32 [d]."""
    import torch

    with torch.no_grad():
        output = getattr(model(**{name: features[name] for name in tower.inputs}), tower.output)
    if tower.pooling == "mean":
        output = output.mean(1)
    elif tower.pooling == "cls":
        output = output[:, 0]
    vector: Float32 = output[0].numpy()
    return vector


# --- files ----------------------------------------------------------------------------------------


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Give smooth colours with rectangles on them, so that resizing, cropping and turning show."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    for _ in range(6):
        left, top = int(rng.integers(width)), int(rng.integers(height))
        right, bottom = left + 1 + int(rng.integers(width // 2 + 1)), top + 1 + int(rng.integers(height // 2 + 1))
        red, green, blue = map(int, rng.integers(0, 256, 3))
        image.paste((red, green, blue), (left, top, right, bottom))
    return image


def pictures() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [picture(120, 90, seed) for seed in (90, 91)]
    translucent = picture(97, 301, 3)
    translucent.putalpha(Image.linear_gradient("L").resize(translucent.size))
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (picture(640, 480, 0), "JPEG", {"quality": 90}),
        (picture(331, 257, 1), "PNG", {}),
        (picture(480, 640, 2), "JPEG", {"quality": 95, "exif": exif}),
        (translucent, "PNG", {}),
        (picture(33, 33, 4), "WEBP", {"lossless": True}),
        (picture(224, 224, 5), "WEBP", {"quality": 80}),
        (picture(1200, 800, 6), "AVIF", {}),
        (picture(200, 150, 7).convert("CMYK"), "TIFF", {}),
        (picture(90, 700, 8), "BMP", {}),
        (frames[0], "GIF", {"save_all": True, "append_images": frames[1:]}),
        (picture(150, 150, 10).convert("P"), "PNG", {}),
        (picture(331, 257, 11).convert("L"), "JPEG", {}),
        (picture(7, 5, 12), "PNG", {}),
        (picture(640, 480, 13), "PNG", {}),
    ]
    files = []
    for image, kind, options in kinds:
        file = io.BytesIO()
        image.save(file, kind, **options)
        files.append(file.getvalue())
    return files


def sounds() -> list[bytes]:
    files = []
    for seed, (kind, subtype, rate, channels, seconds) in enumerate(
        [
            ("WAV", "PCM_16", 16_000, 1, 1.0),
            ("FLAC", "PCM_16", 44_100, 2, 3.3),
            ("OGG", "VORBIS", 48_000, 2, 7.1),
            ("MP3", "MPEG_LAYER_III", 44_100, 1, 2.4),
            ("OGG", "OPUS", 48_000, 1, 1.1),
            ("WAV", "FLOAT", 8_000, 1, 5.2),
            ("FLAC", "PCM_24", 48_000, 2, 12.4),
            ("WAV", "PCM_16", 16_000, 1, 0.3),
            ("WAV", "PCM_16", 16_000, 1, 1.0),
            ("FLAC", "PCM_16", 16_000, 1, 33.0),
        ]
    ):
        rng = np.random.default_rng(seed)
        at = np.arange(round(rate * seconds))[:, None] / rate
        low, sweep, rhythm = rng.uniform(80, 1500), rng.uniform(-60, 300), rng.uniform(1, 9)
        wave = 0.4 * np.sin(2 * np.pi * (low + sweep * at / seconds + 30 * np.arange(channels)) * at)
        wave = wave * (0.6 + 0.4 * np.sin(2 * np.pi * rhythm * at)) + rng.uniform(0, 0.1) * rng.standard_normal(
            at.shape
        )
        file = io.BytesIO()
        soundfile.write(file, wave.astype(np.float32), rate, format=kind, subtype=subtype)
        files.append(file.getvalue())
    return files


# --- the reference --------------------------------------------------------------------------------


def image_features(folder: Path) -> Callable[[bytes], list[tuple[float, Any]]]:
    """Give what reads a file: shares of the whole (here one) and the model's input for each."""
    from transformers import AutoImageProcessor
    from transformers.image_transforms import convert_to_rgb  # type: ignore[import-not-found]

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    def read(content: bytes) -> list[tuple[float, Any]]:
        pixels = convert_to_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(content))), return_numpy=True)
        return [(1.0, processor(Image.fromarray(pixels), return_tensors="pt"))]

    return read


def audio_features(folder: Path, tower: Tower) -> Callable[[bytes], list[tuple[float, Any]]]:
    """Like `image_features`; a long sound in windows has several parts."""
    from transformers import AutoFeatureExtractor

    extractor = AutoFeatureExtractor.from_pretrained(folder)
    rate = extractor.sampling_rate

    def read(content: bytes) -> list[tuple[float, Any]]:
        samples, given = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
        wave = soxr.resample(samples.mean(axis=1), given, rate, quality="HQ")
        parts = [wave]
        if "audio" in tower.manifest:
            parts = [wave[at : at + 5 * rate] for at in range(0, len(wave), 5 * rate)]
        elif "samples" in tower.free.values():  # the only ones that the extractor does not cut
            parts = [wave[: tower.manifest["max_input_units"] * 320]]
        total = sum(map(len, parts))
        return [(len(part) / total, extractor(part, sampling_rate=rate, return_tensors="pt")) for part in parts]

    return read


@pytest.fixture(autouse=True)
def no_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLAP's extractor takes random windows; let them be those that ours takes."""
    monkeypatch.setattr("numpy.random.choice", lambda choices: choices[len(choices) // 2])
    monkeypatch.setattr("numpy.random.randint", lambda low, high: low)


@pytest.mark.parametrize("modality", ["image", "audio"])
async def test_served_vectors_equal_the_librarys(modality: str, start_mesh: Any, tmp_path: Path) -> None:
    towers, files = (IMAGE_TOWERS, pictures()) if modality == "image" else (AUDIO_TOWERS, sounds())
    expected: dict[str, Float32] = {}
    for tower in towers:
        folder = tmp_path / tower.name
        folder.mkdir()
        (folder / "preprocessor_config.json").write_text(json.dumps(tower.processor))
        read = image_features(folder) if modality == "image" else audio_features(folder, tower)
        model = build(tower)
        export(tower, model, read(files[0])[0][1], folder)
        vectors = np.stack(
            [np.sum([share * pooled(tower, model, part) for share, part in read(content)], axis=0) for content in files]
        )
        expected[tower.name] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    wrap = embedmesh.Image if modality == "image" else embedmesh.Audio
    models = {f"{modality}_models": tuple(tmp_path / tower.name for tower in towers)}
    rows = []
    async with start_mesh(**models) as mesh, embedmesh.AsyncClient(mesh.address) as client:
        for name, reference in expected.items():
            response = await client.embed([wrap(content) for content in files], model=name)
            alike = (reference @ reference.T)[~np.eye(len(files), dtype=bool)].max()
            cosine = np.einsum("nd,nd->n", response.vectors, reference).min()
            rows.append((name, float(cosine), float(np.abs(response.vectors - reference).max()), float(alike)))
    for name, cosine, difference, alike in rows:
        sys.stdout.write(f"| {name} | {len(files)} | {cosine:.7f} | {difference:.1e} | {alike:.4f} |\n")
    assert all(cosine >= LEAST_COSINE and alike < MOST_ALIKE for _, cosine, _, alike in rows), rows
