"""From the bytes of an image file to RGB pixels, within bounded memory and time.

Decisions (November 2026), all as `transformers` 5 does it unless they say otherwise:

* Transparency is laid over white (`transformers.image_transforms.convert_to_rgb`; versions before 5 dropped
  the alpha channel). The same for palettes and colours declared transparent.
* Colour profiles are ignored, as the reference ignores them: models were trained on raw values. A broken one
  cannot fail an image, because it is not read.
* CMYK, YCbCr and grey become RGB by Pillow's plain formulas.
* Samples of 16 bits keep their upper 8, as Pillow reads 16-bit RGB. (The reference clips 16-bit grey at 255,
  which turns nearly all of such a picture white.) Samples of 32 bits and floats are refused: nothing says
  which value is white.
* Of an animation the first frame counts. Pictures are turned upright by their EXIF (else XMP) orientation, as
  `transformers.image_utils.load_image` does.
* JPEG is decoded in full: the decoder's own scaling is faster and not what the reference sees.

Memory and time at 49 million pixels, the most by default: 0.4 to 0.5 GB and below 1 s, but for AVIF (1 GB), LZW in
TIFF (2 s) and a JPEG of 100 scans, the most that is read (2.7 s). The C library keeps what large pictures took for
itself, in every thread (900 MB after 2,000 damaged files in two of them, 200 in use), until it is told to give it
back: see `give_back`.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any, Final

import numpy as np
from PIL import Image, ImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from embedmesh.errors import EmbedMeshError, InputTooLarge, UndecodableInput
from embedmesh_encoder.image.container import Format, orientation, read_container
from embedmesh_encoder.memory import trim

__all__ = ["MAX_IMAGE_BYTES", "MAX_IMAGE_PIXELS", "decode", "give_back"]

MAX_IMAGE_BYTES: Final = 20 << 20
MAX_IMAGE_PIXELS: Final = 50_000_000

# Named directly, not by `Image.open`: nothing that is registered elsewhere takes part.
_PLUGINS: Final[dict[Format, type[ImageFile.ImageFile]]] = {
    "AVIF": AvifImageFile,
    "BMP": BmpImageFile,
    "GIF": GifImageFile,
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "TIFF": TiffImageFile,
    "WebP": WebPImageFile,
}
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Large pictures are converted a band at a time, so that conversions in several steps keep few copies.
_BAND_PIXELS: Final = 1 << 20
_TIFF_BITS: Final = 258
# Smaller pictures than this (16 MiB as Pillow keeps them) leave little behind.
_LARGE_PIXELS: Final = 1 << 22


def decode(content: bytes, *, max_bytes: int = MAX_IMAGE_BYTES, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode one image file. Thread-safe; the decoders release the GIL.

    Args:
        content: A JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file; its content decides which.
        max_bytes: Most bytes of the file.
        max_pixels: Most pixels, checked before any are decoded.

    Returns:
        The upright picture, mode RGB.

    Raises:
        InputTooLarge: It is over a limit.
        UndecodableInput: It is no image, damaged, cut short, or of a kind that is not supported.
    """
    if not content:
        raise UndecodableInput("the image is empty")
    if len(content) > max_bytes:
        raise InputTooLarge.over("the image", len(content), max_bytes, "bytes")
    container = read_container(content)
    _check(container.pixels, max_pixels)
    image = picture = None
    pixels = container.pixels
    # Decoders of hostile bytes raise nearly anything. What they say stays here, and is not chained either:
    # it would keep the pixels in its frames alive for as long as the error travels.
    try:
        with _PLUGINS[container.format](BytesIO(container.content)) as image:
            pixels = image.width * image.height
            _check(pixels, max_pixels)
            image.load()
            turn = container.orientation
            if container.format == "AVIF":
                turn = orientation(image.info.get("exif", b""))
            picture = _to_rgb(image)
            if turn != 1:
                picture = picture.transpose(_UPRIGHT[turn])
    except EmbedMeshError:
        raise
    except Exception:  # noqa: BLE001, S110  (see above; it is raised below)
        pass
    if picture is None:
        image = None  # it holds what was decoded before it failed
        give_back(pixels)
        raise UndecodableInput(
            f"the {container.format} image cannot be decoded: it is damaged, cut short, or of an unusual kind"
        )
    return picture


def give_back(pixels: int) -> None:
    """Let the system have the memory of a picture that is gone; does something for large ones only."""
    if pixels >= _LARGE_PIXELS:
        trim()


def _check(pixels: int, max_pixels: int) -> None:
    if pixels > max_pixels:
        raise InputTooLarge.over("the image", pixels, max_pixels, "pixels")


def _to_rgb(image: ImageFile.ImageFile) -> Image.Image:
    if image.mode in {"I", "F"}:
        raise UndecodableInput("the image has samples of 32 bits or floats; nothing says which value is white")
    if image.mode.startswith("I;16"):
        return _from_16_bits(image)
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if image.mode == "RGB" and not transparent:
        return image
    width, height = image.size
    rows = max(1, _BAND_PIXELS // width)
    if rows >= height:
        return _band_to_rgb(image, transparent=transparent)
    picture = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height)))
        picture.paste(_band_to_rgb(band, transparent=transparent), (0, top))
    return picture


def _band_to_rgb(band: Image.Image, *, transparent: bool) -> Image.Image:
    if not transparent:
        return band.convert("RGB")
    white = Image.new("RGBA", band.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, band.convert("RGBA")).convert("RGB")


def _from_16_bits(image: ImageFile.ImageFile) -> Image.Image:
    values = np.asarray(image)
    bits: Any = (16,)
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2.get(_TIFF_BITS, bits)
    grey = (values >> (bits[0] - 8)).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey).convert("RGB")
