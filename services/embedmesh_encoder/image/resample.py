"""A part of a resized picture, without making the rest of it.

The reference resizes a picture so that its shorter side fits and then crops the centre. For a strip of 3 x 5,000
pixels that is a picture of 224 x 373,333 of which 224 x 224 are kept, for 1 x 50,000,000 one that no memory
holds. What is kept depends on a few pixels only.

`resize_window` is Pillow's resampling (`src/libImaging/Resample.c`, 8 bits per channel) for chosen rows and
columns, bit by bit the same: weights in double precision, rounded to 22 fractional bits, the horizontal pass first
and rounded to 8 bits, then the vertical one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["resize_window"]

_PRECISION: Final = 22


def _box(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return ((x > -0.5) & (x <= 0.5)).astype(np.float64)


def _bilinear(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(0.0, 1.0 - np.abs(x))


def _hamming(x: NDArray[np.float64]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = np.sinc(x) * (0.54 + 0.46 * np.cos(np.pi * x))
    return np.where(np.abs(x) < 1.0, values, 0.0)


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _lanczos(x: NDArray[np.float64]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = np.sinc(x) * np.sinc(x / 3)
    return np.where((x >= -3.0) & (x < 3.0), values, 0.0)


_FILTERS: Final[dict[int, tuple[Callable[[NDArray[np.float64]], NDArray[np.float64]], float]]] = {
    Image.Resampling.BOX: (_box, 0.5),
    Image.Resampling.BILINEAR: (_bilinear, 1.0),
    Image.Resampling.HAMMING: (_hamming, 1.0),
    Image.Resampling.BICUBIC: (_bicubic, 2.0),
    Image.Resampling.LANCZOS: (_lanczos, 3.0),
}


def resize_window(
    image: Image.Image, size: tuple[int, int], resample: int, rows: tuple[int, int], columns: tuple[int, int]
) -> NDArray[np.uint8]:
    """Resize a picture and give some of its rows and columns.

    Args:
        image: Mode RGB.
        size: Height and width to resize to.
        resample: One of `PIL.Image.Resampling`. NEAREST may choose the other neighbour where two are equally near.
        rows: First row, and the one behind the last.
        columns: First column, and the one behind the last.

    Returns:
        uint8 [rows, columns, 3].
    """
    wide = np.arange(*columns)
    high = np.arange(*rows)
    if resample == Image.Resampling.NEAREST:
        across = ((wide + 0.5) * (image.width / size[1])).astype(np.int64)
        down = ((high + 0.5) * (image.height / size[0])).astype(np.int64)
        return _crop(image, across, down)[np.ix_(down - down.min(), across - across.min())]
    across, across_weights = _taps(wide, image.width, size[1], resample)
    down, down_weights = _taps(high, image.height, size[0], resample)
    source = _crop(image, across, down)
    across -= across.min()
    down -= down.min()
    narrow = _pass(source.transpose(1, 0, 2), across, across_weights).transpose(1, 0, 2)
    return _pass(narrow, down, down_weights)


def _crop(image: Image.Image, across: NDArray[np.int64], down: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Give what lies between the first and last of the source's columns and rows."""
    box = (int(across.min()), int(down.min()), int(across.max()) + 1, int(down.max()) + 1)
    return np.asarray(image.crop(box))


def _taps(
    wanted: NDArray[np.int64], source: int, target: int, resample: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give which source pixels make each of the wanted ones, and with which weights: both int64 [wanted, taps]."""
    function, support = _FILTERS[resample]
    scale = source / target
    stretch = max(scale, 1.0)
    support *= stretch
    center = (wanted + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    last = np.minimum((center + support + 0.5).astype(np.int64), source)
    index = first[:, None] + np.arange(math.ceil(support) * 2 + 1)
    weights = function((index - center[:, None] + 0.5) * (1.0 / stretch))
    weights[index >= last[:, None]] = 0.0
    total = np.zeros(len(wanted))
    for tap in weights.T:  # one after the other, as the C code adds them
        total += tap
    weights /= total[:, None]
    fixed = np.trunc(weights * (1 << _PRECISION) + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)
    return np.minimum(index, last[:, None] - 1), fixed


def _pass(source: NDArray[np.uint8], index: NDArray[np.int64], weights: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Weigh along the first axis: uint8 [source, n, 3] to uint8 [wanted, n, 3]."""
    total = np.full((len(index), *source.shape[1:]), 1 << (_PRECISION - 1), np.int64)
    for tap in range(index.shape[1]):
        total += source[index[:, tap]] * weights[:, tap, None, None]
    levels: NDArray[np.uint8] = np.clip(total >> _PRECISION, 0, 255).astype(np.uint8)
    return levels
