"""The `Preparer` of images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from embedmesh.errors import InputTooLarge
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_encoder.image.decode import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, decode, give_back
from embedmesh_encoder.image.processor import ImageProcessor, ImageSpec
from embedmesh_encoder.pooling import Pooling, pool
from embedmesh_encoder.preparation import Prepared

__all__ = ["ImageItem", "ImagePreparer"]

# Of a model without patches: one unit is as much as a patch of 16 x 16.
_PIXELS_A_UNIT = 256


@dataclass(frozen=True, slots=True)
class ImageItem:
    """One image to embed.

    Attributes:
        content: An image file, see `decode`.
    """

    content: bytes = field(repr=False)


class ImagePreparer:
    """Decodes and processes images; those of one shape share a batch.

    Prepared data are float32 [3, height, width]. Images are never truncated: whatever the request asks, one that
    becomes more than the model reads (which only models without a fixed size have) is refused.
    """

    padded = False

    def __init__(
        self,
        spec: ImageSpec,
        *,
        output: str,
        pooling: Literal["graph"] | Pooling | tuple[Pooling, ...] = "graph",
        input_name: str = "pixel_values",
        patch_size: int = 0,
        extra_tokens: int = 0,
        max_input_units: int = 0,
        max_bytes: int = MAX_IMAGE_BYTES,
        max_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        """Take what is known of the model.

        Args:
            spec: Its pre-processing.
            output: Name of the output with the vectors: float32 [n, d], or [n, tokens, d] when it is pooled here.
            pooling: "graph" when the graph pools, else how tokens become one vector.
            input_name: Name of the float32 input.
            patch_size: Side of a patch in pixels; 0 for models without patches, whose unit is 256 pixels.
            extra_tokens: Tokens beside the patches (class token, registers).
            max_input_units: Most units of an image; 0 for no limit but what fits in memory.
            max_bytes: Most bytes of a file.
            max_pixels: Most pixels of a picture before it is processed.
        """
        self.limits: Mapping[str, int] = {"image_bytes": max_bytes, "image_pixels": max_pixels}
        self._processor = ImageProcessor(spec)
        self._output = output
        self._pooling = pooling
        self._input_name = input_name
        self._patch_size = patch_size
        self._extra_tokens = extra_tokens
        self._max_units = max_input_units

    def is_quick(self, items: Sequence[Any]) -> bool:
        """A picture is always worth a thread."""
        del items
        return False

    def prepare(self, item: ImageItem, truncation: pb.Truncation.ValueType) -> Prepared:
        """Decode and process one image.

        Args:
            item: The image.
            truncation: Changes nothing: no part of an image is left out, but for what the model's own crop cuts off.

        Raises:
            InputTooLarge: It has too many bytes, pixels or patches.
            UndecodableInput: It cannot be decoded.
        """
        del truncation
        image = decode(item.content, max_bytes=self.limits["image_bytes"], max_pixels=self.limits["image_pixels"])
        units = self._units(*self._processor.output_size(image.height, image.width))
        if self._max_units and units > self._max_units:
            raise InputTooLarge.over(
                "the image", units, self._max_units, "patches" if self._patch_size else "units of 256 pixels"
            )
        array = self._processor(image)
        largest = max(image.width * image.height, math.prod(self._processor.resized_size(image.height, image.width)))
        del image
        give_back(largest)
        return Prepared(array, units=units, original_units=units, truncated=False, group=array.shape)

    def collate(self, batch: Sequence[Prepared]) -> dict[str, NDArray[Any]]:
        """Stack images of one shape: float32 [n, 3, height, width]."""
        return {self._input_name: np.stack([prepared.data for prepared in batch])}

    def split(self, outputs: Mapping[str, NDArray[Any]], batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """Give one vector an image: float32 [n, d], as pooled, not normalised."""
        output = outputs[self._output]
        if self._pooling != "graph":
            return pool(self._pooling, output, np.full(len(batch), output.shape[1], np.int64))
        # Convolutional networks pool to a picture of 1 x 1.
        return output.reshape(output.shape[:2]) if output.shape[2:] == (1, 1) else output

    def _units(self, height: int, width: int) -> int:
        if self._patch_size:
            return (height // self._patch_size) * (width // self._patch_size) + self._extra_tokens
        return -(-height * width // _PIXELS_A_UNIT)
