"""The `Preparer` of images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from embedmesh.errors import InputTooLarge, InvalidArgument, InvalidRequest
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_encoder.image.decode import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, decode, give_back
from embedmesh_encoder.image.processor import ImageProcessor, ImageSpec
from embedmesh_encoder.pooling import Pooling, pool
from embedmesh_encoder.preparation import Prepared
from embedmesh_encoder.text import TextItem, TextPreparer

__all__ = ["ImageItem", "ImagePreparer"]

# Of a model without patches: one unit is as much as a patch of 16 x 16.
_PIXELS_A_UNIT = 256


@dataclass(frozen=True, slots=True)
class ImageItem:
    """One image to embed.

    Attributes:
        content: An image file, see `decode`.
        text: Read with it.
        instruction: Put before the text in place of the model's own prompt, unless empty.
    """

    content: bytes = field(repr=False)
    text: str = field(default="", repr=False)
    instruction: str = field(default="", repr=False)


class ImagePreparer:
    """Decodes and processes images; those of one shape share a batch.

    Prepared data are float32 [3, height, width]; with `texts` a pair of that and the prepared text. Images are never
    truncated: whatever the request asks, one that becomes more than the model reads (which only models without a fixed
    size have) is refused. A text beside a picture is cut like any text.
    """

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
        texts: TextPreparer | None = None,
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
            texts: Prepares what is read with a picture, whose place is in its template; it pools, too. Patches and
                units are then its tokens.
        """
        self.limits: Mapping[str, int] = {"image_bytes": max_bytes, "image_pixels": max_pixels}
        if texts:
            self.limits = {**self.limits, "text_bytes": texts.limits["text_bytes"]}
        self.padded = texts is not None
        self._texts = texts
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
            truncation: Of its text: no part of an image is left out, but for what the model's own crop cuts off.

        Raises:
            InputTooLarge: It has too many bytes, pixels or patches, or its text has.
            InvalidRequest: Its text is not Unicode, or the model reads none.
            UndecodableInput: It cannot be decoded.
        """
        text = self._text(item, truncation)
        image = decode(item.content, max_bytes=self.limits["image_bytes"], max_pixels=self.limits["image_pixels"])
        units = text.units if text else self._units(*self._processor.output_size(image.height, image.width))
        if not text and self._max_units and units > self._max_units:
            raise InputTooLarge.over(
                "the image", units, self._max_units, "patches" if self._patch_size else "units of 256 pixels"
            )
        array = self._processor(image)
        largest = max(image.width * image.height, math.prod(self._processor.resized_size(image.height, image.width)))
        del image
        give_back(largest)
        if text:
            return replace(text, data=(array, text), group=array.shape)
        return Prepared(array, units=units, original_units=units, truncated=False, group=array.shape)

    def collate(self, batch: Sequence[Prepared]) -> dict[str, NDArray[Any]]:
        """Stack images of one shape: float32 [n, 3, height, width]; their texts are padded."""
        if self._texts:
            texts = self._texts.collate([text for _, text in (prepared.data for prepared in batch)])
            return {**texts, self._input_name: np.stack([prepared.data[0] for prepared in batch])}
        return {self._input_name: np.stack([prepared.data for prepared in batch])}

    def split(self, outputs: Mapping[str, NDArray[Any]], batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """Give one vector an image: float32 [n, d], as pooled, not normalised."""
        if self._texts:
            return self._texts.split(outputs, batch)
        output = outputs[self._output]
        if self._pooling != "graph":
            return pool(self._pooling, output, np.full(len(batch), output.shape[1], np.int64))
        # Convolutional networks pool to a picture of 1 x 1.
        return output.reshape(output.shape[:2]) if output.shape[2:] == (1, 1) else output

    def _text(self, item: ImageItem, truncation: pb.Truncation.ValueType) -> Prepared | None:
        try:
            if self._texts:
                return self._texts.prepare(TextItem(item.text, instruction=item.instruction), truncation)
            if item.text or item.instruction:
                raise InvalidRequest("this model reads no text with pictures")
        except InvalidArgument as error:
            error.field = "text" if item.text else "instruction"
            raise
        return None

    def _units(self, height: int, width: int) -> int:
        if self._patch_size:
            return (height // self._patch_size) * (width // self._patch_size) + self._extra_tokens
        return -(-height * width // _PIXELS_A_UNIT)
