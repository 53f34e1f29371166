"""What `preprocessor_config.json` says is done to a picture, equal to `transformers` (its PIL backend, 5.23).

The order is the reference's: resize (8 bits a channel), crop, rescale, normalise. Resizing is Pillow's own, as
in the reference, and the rest is one table look-up a channel, because each of its 256 levels has one outcome,
computed with the reference's own casts. So the arrays are equal to the last bit; the exception is DINOv3, whose only
implementation resizes floats with torch: Pillow's float resampling is within 5e-5 of it.

The reference's *torchvision* backend (its default where torchvision is installed) resizes 8-bit pictures with torch,
whose rounding is another. On noise, the worst case, one value in five differs: by 1 level of 255 for bilinear and at
most 4 for bicubic resampling (torch 2.13). This module equals the PIL backend (`use_fast=False` of older versions).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from embedmesh.errors import InputTooLarge
from embedmesh_encoder.image.resample import resize_window
from embedmesh_encoder.model import ModelError

__all__ = ["ImageProcessor", "ImageSpec"]

_IMAGENET: Final = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_HALF: Final = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_CLIP: Final = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_SQUARE_224: Final = {"height": 224, "width": 224}
_CROPPED_224: Final = {"size": {"shortest_edge": 224}, "crop_size": _SQUARE_224, "do_center_crop": True}

# Defaults of the reference's classes, where they are not those of `_DEFAULTS`.
_DEFAULTS: Final[Mapping[str, Any]] = {
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
    "default_to_square": True,
    **_HALF,
}
_PROCESSORS: Final[Mapping[str, Mapping[str, Any]]] = {
    "BeitImageProcessor": {"size": _SQUARE_224, "crop_size": _SQUARE_224},
    "BitImageProcessor": {**_CLIP, **_CROPPED_224, "default_to_square": False},
    "BlipImageProcessor": {**_CLIP, "size": {"height": 384, "width": 384}},
    "CLIPImageProcessor": {**_CLIP, **_CROPPED_224, "default_to_square": False},
    "ChineseCLIPImageProcessor": {**_CLIP, **_CROPPED_224, "default_to_square": False},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 384}, "crop_pct": 224 / 256, "default_to_square": False},
    "DINOv3ViTImageProcessor": {**_IMAGENET, "size": _SQUARE_224, "resample": 2},
    "DeiTImageProcessor": {
        "size": {"height": 256, "width": 256},
        "crop_size": _SQUARE_224,
        "do_center_crop": True,
    },
    "EfficientNetImageProcessor": {
        "size": {"height": 346, "width": 346},
        "crop_size": {"height": 289, "width": 289},
        "rescale_offset": False,
        "include_top": True,
    },
    "LevitImageProcessor": {**_IMAGENET, **_CROPPED_224, "default_to_square": False},
    "MobileViTImageProcessor": {
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 256, "width": 256},
        "do_center_crop": True,
        "do_flip_channel_order": True,
        "default_to_square": False,
    },
    "PvtImageProcessor": {**_IMAGENET, "size": _SQUARE_224},
    "SiglipImageProcessor": {"size": _SQUARE_224, "default_to_square": False},
    "ViTImageProcessor": {"size": _SQUARE_224, "resample": 2},
}

# The largest side that a model may ask for; more is a mistake in its configuration.
_MAX_SIDE: Final = 8192
# Resized pictures above this are made in part (see resample.py), or refused where all of them is wanted.
_MAX_RESIZED_PIXELS: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """What is done to a picture, in this order.

    Attributes:
        size: Height and width that every picture is stretched to; None to keep its shape.
        shortest_edge: Length that the shorter side is resized to, when `size` is None; 0 not to resize.
        longest_edge: Most that the longer side may then be, the shorter one giving way; 0 for no limit.
        resample: One of `PIL.Image.Resampling`.
        float_resize: Resize unrounded values; the picture keeps fractions of a level.
        crop: Height and width cut from the centre, with black around where there is less; None not to.
        scale: Factor on the levels 0 to 255; None for none.
        offset: Added after it.
        mean: Subtracted from red, green and blue; None for none.
        std: By which they are then divided.
        std_again: Divide by `std` a second time (EfficientNet's `include_top`).
        bgr: Give the channels as blue, green, red.
    """

    size: tuple[int, int] | None = None
    shortest_edge: int = 0
    longest_edge: int = 0
    resample: int = Image.Resampling.BICUBIC
    float_resize: bool = False
    crop: tuple[int, int] | None = None
    scale: float | None = 1 / 255
    offset: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    std_again: bool = False
    bgr: bool = False

    @classmethod
    def from_preprocessor_config(cls, config: Mapping[str, Any]) -> ImageSpec:
        """Read the content of a `preprocessor_config.json`, old forms included.

        Keys that the named processor does not know are ignored, as the reference ignores them. `do_convert_rgb` is
        taken as true: where it is not, the reference fails for all but RGB pictures.

        Raises:
            ModelError: The processor is not one of those that this module equals, or an option is not supported.
        """
        name = _processor_name(config)
        if name not in _PROCESSORS:
            raise ModelError(
                f'the image processor "{name}" is not supported, only {", ".join(sorted(_PROCESSORS))}: '
                "use one of these if the model's pre-processing can be written with it"
            )
        given = {key: value for key, value in config.items() if value is not None}  # null is the default
        options = _Options(name, {**_DEFAULTS, **_PROCESSORS[name], **given})
        options.refuse("do_pad")
        size, shortest_edge, longest_edge = options.resize()
        crop = options.size("crop_size") if options.flag("do_center_crop") else None
        if name == "ConvNextImageProcessor" and (size or shortest_edge):
            if size or longest_edge or crop:
                raise ModelError(f"{name} takes a size with shortest_edge alone, and no centre crop")
            if shortest_edge < 384:
                size, crop = None, (shortest_edge, shortest_edge)
                shortest_edge = int(shortest_edge / options.number("crop_pct"))
            else:
                size, shortest_edge = (shortest_edge, shortest_edge), 0
        if name == "LevitImageProcessor":
            shortest_edge = int(256 / 224 * shortest_edge)
        float_resize = name == "DINOv3ViTImageProcessor" and options.flag("do_rescale")
        if float_resize and shortest_edge:
            raise ModelError(f"{name} takes a size with height and width")
        normalize = options.flag("do_normalize") and name != "MobileViTImageProcessor"
        efficient = name == "EfficientNetImageProcessor"
        return cls(
            size=size,
            shortest_edge=shortest_edge,
            longest_edge=longest_edge,
            resample=options.resample(),
            float_resize=float_resize,
            crop=crop,
            scale=options.number("rescale_factor") if options.flag("do_rescale") else None,
            offset=-1.0 if efficient and options.flag("rescale_offset") and options.flag("do_rescale") else 0.0,
            mean=options.channels("image_mean") if normalize else None,
            std=options.channels("image_std"),
            std_again=efficient and options.flag("include_top"),
            bgr=name == "MobileViTImageProcessor" and options.flag("do_flip_channel_order"),
        )


class ImageProcessor:
    """Does what an `ImageSpec` says. Thread-safe."""

    def __init__(self, spec: ImageSpec) -> None:
        self.spec = spec
        # float32 [3, 256]: what becomes of each level of each channel.
        levels = np.arange(256, dtype=np.uint8)
        self._levels = self._normalize(self._rescale(np.stack([levels, levels, levels])))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Give height and width of the array that a picture of this height and width becomes."""
        return self.spec.crop or self.resized_size(height, width)

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Process a picture.

        Args:
            image: Mode RGB.

        Returns:
            float32 [3, height, width].

        Raises:
            InputTooLarge: The model takes pictures of any shape, and this one would become too large.
        """
        spec = self.spec
        height, width = self.resized_size(image.height, image.width)
        if spec.float_resize:
            return self._float(image, height, width)
        if height * width <= max(_MAX_RESIZED_PIXELS, image.height * image.width):
            if (height, width) != (image.height, image.width):
                image = image.resize((width, height), Image.Resampling(spec.resample))
            pixels = np.asarray(image)
            if spec.crop:
                pixels = _center_crop(pixels, spec.crop)
        elif spec.crop:
            rows, columns = _window(height, spec.crop[0]), _window(width, spec.crop[1])
            pixels = resize_window(image, (height, width), spec.resample, rows, columns)
            pixels = _center_crop(pixels, spec.crop)
        else:
            raise InputTooLarge.over(
                f"the image, resized to {width} x {height} for this model,",
                height * width,
                _MAX_RESIZED_PIXELS,
                "pixels",
            )
        result = np.empty((3, *pixels.shape[:2]), np.float32)
        for channel, levels in enumerate(self._levels):
            np.take(levels, pixels[..., channel], out=result[2 - channel if spec.bgr else channel], mode="clip")
        return result

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Give height and width that a picture of this height and width is resized to, before it is cropped."""
        spec = self.spec
        if spec.size:
            return spec.size
        if not spec.shortest_edge:
            return height, width
        if spec.longest_edge:
            return _fit_both(height, width, spec.shortest_edge, spec.longest_edge)
        # `transformers.image_transforms.get_resize_output_image_size`
        short, long = (width, height) if width <= height else (height, width)
        longer = int(spec.shortest_edge * long / short)
        return (longer, spec.shortest_edge) if width <= height else (spec.shortest_edge, longer)

    def _float(self, image: Image.Image, height: int, width: int) -> NDArray[np.float32]:
        # Levels are resized and rescaled after, which is the same but for the last bits.
        channels = [
            np.asarray(channel.convert("F").resize((width, height), Image.Resampling(self.spec.resample)))
            for channel in image.split()
        ]
        pixels = np.stack(channels)
        if self.spec.crop:
            pixels = _center_crop(pixels.transpose(1, 2, 0), self.spec.crop).transpose(2, 0, 1)
        return np.ascontiguousarray(self._normalize(self._rescale(pixels)))

    def _rescale(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Rescale [3, ...] in float64 and round to float32, as the reference does."""
        if self.spec.scale is None:
            return values.astype(np.float32)
        return (values.astype(np.float64) * self.spec.scale).astype(np.float32) + np.float32(self.spec.offset)

    def _normalize(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Normalise [3, ...] in float32."""
        shape = (3,) + (1,) * (values.ndim - 1)
        std = np.array(self.spec.std, np.float32).reshape(shape)
        if self.spec.mean:
            values = (values - np.array(self.spec.mean, np.float32).reshape(shape)) / std
        return values / std if self.spec.std_again else values


class _Options:
    """Values of a configuration, checked as they are read."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self._name = name
        self._values = values

    def refuse(self, key: str) -> None:
        if self.flag(key):
            raise ModelError(f"{self._name}: {key} changes pixels and is not supported")

    def flag(self, key: str) -> bool:
        value = self._values.get(key, False)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def number(self, key: str) -> float:
        value = self._values[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise self._wrong(key, "a positive number")
        return float(value)

    def channels(self, key: str) -> tuple[float, ...]:
        """Read a mean or a deviation: three numbers, or one for all channels."""
        value = self._values[key]
        values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * 3
        right = len(values) == 3 and all(isinstance(x, int | float) and math.isfinite(x) for x in values)
        if not right or (key == "image_std" and 0 in values):
            raise self._wrong(key, "three numbers" + (" other than 0" if key == "image_std" else ""))
        return tuple(map(float, values))

    def resample(self) -> int:
        value = self._values["resample"]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 5:
            raise self._wrong("resample", "one of 0 nearest, 1 lanczos, 2 bilinear, 3 bicubic, 4 box, 5 hamming")
        return value

    def resize(self) -> tuple[tuple[int, int] | None, int, int]:
        """Give size, shortest and longest edge, as in `ImageSpec`."""
        if not self.flag("do_resize"):
            return None, 0, 0
        value = self._values["size"]
        if isinstance(value, int) and not self.flag("default_to_square"):
            value = {"shortest_edge": value}
        if isinstance(value, Mapping) and {"shortest_edge"} <= set(value) <= {"shortest_edge", "longest_edge"}:
            longest = value.get("longest_edge")
            return None, self._side("size", value["shortest_edge"]), self._side("size", longest) if longest else 0
        return self.size("size"), 0, 0

    def size(self, key: str) -> tuple[int, int]:
        """Read a height and a width."""
        value = self._values.get(key)
        if isinstance(value, Mapping) and set(value) == {"height", "width"}:
            return self._side(key, value["height"]), self._side(key, value["width"])
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
            return self._side(key, value[0]), self._side(key, value[1])
        if isinstance(value, int):
            return self._side(key, value), self._side(key, value)
        raise self._wrong(key, "height and width" + (", or shortest_edge" if key == "size" else ""))

    def _side(self, key: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_SIDE:
            raise self._wrong(key, f"numbers of pixels from 1 to {_MAX_SIDE}")
        return value

    def _wrong(self, key: str, must: str) -> ModelError:
        return ModelError(f"{self._name}: {key} must be {must}, got {self._values.get(key)!r}")


def _processor_name(config: Mapping[str, Any]) -> str:
    """Give the processor's name as of transformers 5, for the names of all times."""
    name = config.get("image_processor_type") or config.get("feature_extractor_type")
    if not isinstance(name, str):
        raise ModelError('the pre-processor configuration names no "image_processor_type": add the model\'s')
    return name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")


def _fit_both(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """Resize the shorter side, or the longer one where it would be too long.

    `transformers.image_transforms.get_size_with_aspect_ratio`, whose rounding this keeps.
    """
    exact = float(shortest)
    if max(height, width) / min(height, width) * shortest > longest:
        exact = longest * float(min(height, width)) / float(max(height, width))
        shortest = round(exact)
    if min(height, width) == shortest:
        return height, width
    if width < height:
        return max(1, int(exact * height / width)), max(1, shortest)
    return max(1, shortest), max(1, int(exact * width / height))


def _window(size: int, crop: int) -> tuple[int, int]:
    """Give first and last (exclusive) of the rows or columns that a centre crop keeps."""
    start = max(0, (size - crop) // 2)
    return start, min(size, start + crop)


def _center_crop(pixels: NDArray[Any], crop: tuple[int, int]) -> NDArray[Any]:
    """Cut the centre out of [height, width, 3], black where there is nothing.

    `transformers.image_transforms.center_crop`, whose rounding this keeps: the odd pixel of a margin is at the top
    and left when the picture is cropped, and at the top and left again when it is padded.
    """
    rows, columns = (_window(size, want) for size, want in zip(pixels.shape, crop, strict=False))
    cut = pixels[slice(*rows), slice(*columns)]
    if cut.shape[:2] == crop:
        return cut
    result = np.zeros((*crop, pixels.shape[2]), pixels.dtype)
    top, left = (math.ceil((want - size) / 2) for want, size in zip(crop, cut.shape, strict=False))
    result[top : top + cut.shape[0], left : left + cut.shape[1]] = cut
    return result
