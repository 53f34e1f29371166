"""How many pixels an AVIF file makes its decoder make.

Only the coded pictures tell: a file of 1 KiB that declares 10 x 10 pixels and holds AV1 data of 12,000 x 12,000 is
decoded in full, with 3 GB, and then scaled down. The decoder's own limit is 268 million pixels and cannot be set.

Boxes are those of ISO/IEC 14496-12 and 23008-12, sequence headers those of the AV1 bitstream specification, 5.5.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from embedmesh.errors import UndecodableInput

__all__ = ["coded_pixels", "without_track"]

_MAX_BOXES: Final = 4096
_MAX_UNITS: Final = 4096
_SEQUENCE_HEADER: Final = 1
# Frames may be larger than the header says, as large as its numbers can be. Common encoders take as few bits as
# they need, so this is less than four times as many pixels.
_MAX_ROOM: Final = 1 << 20


def without_track(content: bytes) -> bytes:
    """Hide an animation's track, which leaves its still picture."""
    patched = bytearray(content)
    for name, start, end in _top_boxes(content):
        if name == b"moov":
            patched[start - 4 : start] = b"free"
        elif name == b"ftyp":
            patched[start:end] = patched[start:end].replace(b"avis", b"avif")
    return bytes(patched)


def coded_pixels(content: bytes) -> int:
    """Give the pixels of the largest coded picture, or a third of all of them (colour, alpha, thumbnail) if more.

    Raises:
        struct.error: A box or number does not fit into the file.
        UndecodableInput: The file is built to waste time.
    """
    metas = [(start, end) for name, start, end in _top_boxes(content) if name == b"meta"]
    if len(metas) != 1:
        raise UndecodableInput("the AVIF image does not have one description")
    meta = {name: (start, end) for name, start, end in _boxes(content, metas[0][0] + 4, metas[0][1])}
    idat = meta.get(b"idat", (0, 0))[0]
    coded = _coded_items(content, *meta.get(b"iinf", (0, 0)))
    pixels = []
    read = 0
    for item, extents in _locations(content, *meta.get(b"iloc", (0, 0)), idat):
        read += sum(length for _, length in extents)
        if read > len(content):
            raise UndecodableInput("the AVIF image has parts that overlap")
        if item in coded:
            pixels.append(_largest_frame(b"".join(content[at : at + length] for at, length in extents)))
    return max([*pixels, sum(pixels) // 3], default=0)


def _top_boxes(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Give the boxes of the file up to the first that does not fit: what follows a picture may be anything."""
    try:
        yield from _boxes(content, 0, len(content))
    except struct.error:
        return


def _boxes(content: bytes, position: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Give type, start and end of the content of each box."""
    for _ in range(_MAX_BOXES):
        if position + 8 > end:
            return
        size, name = struct.unpack_from(">L4s", content, position)
        start = position + 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", content, start)
            start += 8
        stop = position + size if size else end
        if not start <= stop <= end:
            raise struct.error
        yield name, start, stop
        position = stop
    raise UndecodableInput(f"the AVIF image has more than {_MAX_BOXES} boxes")


def _coded_items(content: bytes, start: int, end: int) -> set[int]:
    """Read which items are AV1 pictures, from the box `iinf`."""
    items = set()
    first = start + (6 if content[start] == 0 else 8)
    for name, at, _ in _boxes(content, first, end):
        wide = content[at] >= 3  # version
        if name == b"infe" and content[at + (10 if wide else 8) :][:4] == b"av01":
            items.add(struct.unpack_from(">L" if wide else ">H", content, at + 4)[0])
    return items


def _locations(content: bytes, start: int, end: int, idat: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Read where each item lies, as (start, length) of its parts, from the box `iloc`."""
    bits = _Bits(content[start:end])
    version = bits.read(8)
    bits.read(24)
    offset_size, length_size, base_size, index_size = (8 * bits.read(4) for _ in range(4))
    number = 32 if version == 2 else 16
    for _ in range(bits.read(number)):
        item = bits.read(number)
        inside = bits.read(16) & 15 == 1 if version else False  # in the box `idat`
        bits.read(16)
        base = bits.read(base_size) + (idat if inside else 0)
        extents = []
        for _ in range(bits.read(16)):
            if version:
                bits.read(index_size)
            offset = bits.read(offset_size)
            extents.append((base + offset, bits.read(length_size) or len(content)))
        yield item, extents


def _largest_frame(data: bytes) -> int:
    """Read the sequence headers among the units of AV1 data."""
    position, largest = 0, 0
    for _ in range(_MAX_UNITS):
        if position >= len(data):
            return largest
        head = data[position]
        position += 2 if head & 4 else 1
        size = len(data) - position
        if head & 2:
            size = shift = 0
            while True:  # little-endian base 128
                byte = data[position]
                position += 1
                size |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80 or shift > 56:
                    break
        if head >> 3 & 15 == _SEQUENCE_HEADER:
            largest = max(largest, _frame_pixels(_Bits(data[position : position + size])))
        position += size
    raise UndecodableInput(f"the AVIF image has more than {_MAX_UNITS} units")


def _frame_pixels(bits: _Bits) -> int:
    bits.read(4)  # profile, still picture
    reduced = bits.read(1)
    if reduced:
        bits.read(5)
    else:
        _skip_operating_points(bits)
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    pixels = (bits.read(width_bits) + 1) * (bits.read(height_bits) + 1)
    if not reduced and 1 << (width_bits + height_bits) > max(_MAX_ROOM, 4 * pixels):
        raise UndecodableInput("the AVIF image leaves room for frames many times larger than itself")
    return pixels


def _skip_operating_points(bits: _Bits) -> None:
    delay_bits = 0
    if bits.read(1):  # timing
        bits.read(64)
        if bits.read(1):
            bits.skip_uvlc()
        if bits.read(1):  # decoder model
            delay_bits = bits.read(5) + 1
            bits.read(42)
    delays = bits.read(1)
    for _ in range(bits.read(5) + 1):
        bits.read(12)
        if bits.read(5) > 7:
            bits.read(1)
        if delay_bits and bits.read(1):
            bits.read(2 * delay_bits + 1)
        if delays and bits.read(1):
            bits.read(4)


class _Bits:
    """Reads big-endian numbers of any width."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def read(self, count: int) -> int:
        start, self._position = self._position, self._position + count
        if self._position > 8 * len(self._data):
            raise struct.error
        part = self._data[start // 8 : -(-self._position // 8)]
        return int.from_bytes(part, "big") >> (-self._position % 8) & ((1 << count) - 1)

    def skip_uvlc(self) -> None:
        zeros = 0
        while not self.read(1):
            zeros += 1
        if zeros < 32:
            self.read(zeros)
