"""What sets one modality apart: from a model's manifest to its preparer, inputs to warm it up with, and settings."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import Image

from embedmesh_encoder.audio import AudioItem, AudioLimits, AudioPreparer, AudioSpec
from embedmesh_encoder.image import ImageItem, ImagePreparer, ImageSpec
from embedmesh_encoder.model import ModelError, ModelSpec
from embedmesh_encoder.preparation import Preparer
from embedmesh_encoder.settings import AudioSettings, EncoderSettings, ImageSettings, TextSettings
from embedmesh_encoder.text import TextItem, TextPreparer

__all__ = [
    "MODALITIES",
    "Modality",
    "audio_preparer",
    "default_preparer",
    "image_preparer",
    "text_preparer",
    "warm_audio",
    "warm_images",
    "warm_texts",
]

# What suits a backend; the figures are in services/README.md. A GPU's are of the design, not measured yet.
_ROW_WIDTHS: Final[Mapping[str, int]] = {"cuda": 512, "tensorrt": 512}
_ROW_MULTIPLES: Final[Mapping[str, int]] = {"openvino": 16, "cuda": 64, "tensorrt": 64}
_WARM_ROWS: Final = 32
_SPECIAL_TOKENS: Final = 4


def text_preparer(spec: ModelSpec, settings: TextSettings) -> TextPreparer:
    """Make the preparer of a text model; raises ModelError."""
    return TextPreparer(
        spec,
        settings.max_text_bytes,
        row_width=settings.row_width or _ROW_WIDTHS.get(spec.backend, 0),
        row_multiple=_row_multiple(spec, settings),
    )


def warm_texts(spec: ModelSpec, settings: TextSettings) -> list[TextItem]:
    """Give a short text, one as long as the model reads, and for a backend of few shapes one of every length."""
    words = [1, spec.max_input_units]
    multiple = _row_multiple(spec, settings)
    if multiple > 1:
        # A little shorter than a row, for the special tokens. Of long rows not every one is worth its time.
        step = -(-spec.max_input_units // multiple // _WARM_ROWS) * multiple
        words += [max(1, width - _SPECIAL_TOKENS) for width in range(step, spec.max_input_units, step)]
    return [TextItem(("warm " * count)[: settings.max_text_bytes]) for count in words]


def _row_multiple(spec: ModelSpec, settings: TextSettings) -> int:
    return settings.row_multiple or _ROW_MULTIPLES.get(spec.backend, 1)


def image_preparer(spec: ModelSpec, settings: ImageSettings) -> ImagePreparer:
    """Make the preparer of an image model; raises ModelError."""
    table = spec.image
    if table is None:
        raise ModelError(f'model "{spec.name}" is for {spec.modality}, not for images')
    return ImagePreparer(
        ImageSpec.from_preprocessor_config(_config(spec, table.processor)),
        output=spec.graph.output,
        pooling=spec.graph.pooling,
        input_name="pixel_values" if spec.text else spec.graph.inputs[0],
        patch_size=table.patch_size,
        extra_tokens=table.extra_tokens,
        max_input_units=spec.max_input_units,
        max_bytes=settings.max_image_bytes,
        max_pixels=settings.max_image_pixels,
        texts=TextPreparer(spec, row_multiple=_ROW_MULTIPLES.get(spec.backend, 1)) if spec.text else None,
    )


def warm_images(spec: ModelSpec, settings: ImageSettings) -> list[ImageItem]:
    """Give one small grey picture, and where texts are read with pictures another with a word."""
    del settings
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (128, 128, 128)).save(file, "PNG")
    return [ImageItem(file.getvalue(), text) for text in (("", "warm") if spec.text else ("",))]


def audio_preparer(spec: ModelSpec, settings: AudioSettings) -> AudioPreparer:
    """Make the preparer of an audio model; raises ModelError."""
    table = spec.audio
    if table is None:
        raise ModelError(f'model "{spec.name}" is for {spec.modality}, not for sounds')
    return AudioPreparer(
        AudioSpec.from_preprocessor_config(_config(spec, table.processor)),
        max_input_units=spec.max_input_units,
        output=spec.graph.output,
        inputs=spec.graph.inputs,
        pooling=spec.graph.pooling,
        window_units=table.window_units,
        limits=AudioLimits(bytes=settings.max_audio_bytes, seconds=settings.max_audio_seconds),
    )


def warm_audio(spec: ModelSpec, settings: AudioSettings) -> list[AudioItem]:
    """Give a second of a quiet tone."""
    del spec, settings
    wave = 0.1 * np.sin(np.arange(16_000, dtype=np.float32) * np.float32(2 * np.pi * 440 / 16_000))
    return [AudioItem(samples=wave.astype(np.float32), rate=16_000)]


@dataclass(frozen=True, slots=True)
class Modality:
    """What is made for inputs of one modality.

    Attributes:
        settings: Of a node.
        preparer: Makes the preparer of a model under such settings; raises ModelError.
        warm: Gives inputs to warm the model up with.
        item: Makes an input of a text, or of the bytes of a file.
    """

    settings: type[EncoderSettings]
    preparer: Callable[[ModelSpec, Any], Preparer]
    warm: Callable[[ModelSpec, Any], Sequence[Any]]
    item: Callable[[Any], Any]

    def defaults(self, spec: ModelSpec) -> EncoderSettings:
        """Give the settings of a node that serves `spec` and was told nothing else."""
        return self.settings.model_validate({"model": (spec.folder,)})


MODALITIES: Final[Mapping[str, Modality]] = {
    "text": Modality(TextSettings, text_preparer, warm_texts, TextItem),
    "image": Modality(ImageSettings, image_preparer, warm_images, ImageItem),
    "audio": Modality(AudioSettings, audio_preparer, warm_audio, AudioItem),
}


def default_preparer(spec: ModelSpec) -> Preparer:
    """Make the preparer that a node uses which was told nothing else; raises ModelError."""
    modality = MODALITIES[spec.modality]
    return modality.preparer(spec, modality.defaults(spec))


def _config(spec: ModelSpec, file: str) -> dict[str, Any]:
    try:
        config = json.loads(spec.path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {spec.path(file)}: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{spec.path(file)} is not a preprocessor_config.json: it holds no object")
    # In a processor_config.json it stands beside what is known of texts.
    nested = config.get("image_processor")
    return nested if isinstance(nested, dict) else config
