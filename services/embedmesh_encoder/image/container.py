"""What an image file says about itself, read before any decoder sees it.

Decoders are given the picture and nothing else: comments, profiles, thumbnails, further frames and
whatever follows the picture are left out where that is easy (JPEG, PNG, GIF), so that none of it
can break a picture, and refused where only a hostile file would have so many of them. What a decoder
allocates or walks over whatever size the file declares (WebP's canvas, GIF's frame, AVIF's coded pictures,
TIFF's strips and tiles, JPEG's scans) is measured here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from embedmesh.errors import InputTooLarge, UndecodableInput
from embedmesh_encoder.image.avif import coded_pixels, without_track

__all__ = ["Container", "Format", "orientation", "read_container"]

Format = Literal["AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WebP"]

# Parts (segments, chunks, sub-blocks) beside the picture's own data. Real files have hundreds at most, PNG
# thousands: one IDAT chunk for 4 or 8 KiB of data.
_MAX_PARTS: Final = 65_536
_MAX_SEGMENTS: Final = 4096
# A progressive JPEG has about ten scans, the most that common encoders write is below 40. Each costs a walk
# over the whole picture however few bytes it has.
_MAX_SCANS: Final = 100
# A picture of 50 million pixels in strips of libtiff's usual 8 KiB has 18,000.
_MAX_STRIPS: Final = 65_536
# Pillow decodes run-length coded BMP in Python, a few million pixels a second.
_MAX_RUN_LENGTH_PIXELS: Final = 4 << 20
_MAX_RUN_LENGTH_BYTES: Final = 8 << 20

_EXIF_ORIENTATION: Final = 0x0112
_XMP_ORIENTATION: Final = re.compile(rb"tiff:Orientation(?:=[\"']|>)([1-8])")
# 0xFF, fill bytes, and what is neither stuffing nor a restart marker.
_JPEG_MARKER: Final = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
_JPEG_BARE: Final = frozenset({0x01, 0xD8, 0xD9})  # no length follows
# All but comments and the segments of applications. Of these Adobe's and JFIF's say what the channels mean.
_JPEG_KEPT: Final = frozenset({*range(0x01, 0xFE), 0xE0, 0xEE} - {*range(0xE1, 0xEE), 0xEF})
_ADOBE_XMP: Final = b"http://ns.adobe.com/xap/1.0/\0"
_PNG_KEPT: Final = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_PNG_XMP: Final = b"XML:com.adobe.xmp\0\0"
# Sizes in bytes of TIFF's types 1 to 18; there are no 14 and 15.
_TIFF_SIZES: Final = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8), 1))
_TIFF_STRIPS: Final = frozenset({273, 279, 324, 325})
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT = 256, 257, 322, 323
# Smallest tile that is refused for being larger than the picture.
_MAX_LOOSE_TILE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Container:
    """One image file.

    Attributes:
        format: What it is, by its content.
        content: The file, without what the picture does not need.
        pixels: How many a decoder makes where that may be more than it says when it has opened the file, else 0.
        orientation: As EXIF counts, 1 to 8; 1 is upright, also when the decoder turns the picture.
    """

    format: Format
    content: bytes
    pixels: int = 0
    orientation: int = 1


def read_container(content: bytes) -> Container:
    """Find out what a file is.

    Raises:
        UndecodableInput: It is no image of a known format, ends before its picture begins, or is built to waste time.
        InputTooLarge: It is a run-length coded BMP of more than 4 million pixels.
    """
    for format_, is_it, read in _FORMATS:
        if is_it(content):
            try:
                return read(content)
            except (struct.error, IndexError):
                pass  # the header is not all there
            raise UndecodableInput(f"the {format_} image ends within its header")
    known = ", ".join(sorted(format_ for format_, _, _ in _FORMATS))
    raise UndecodableInput(f"the bytes are no image of a known format ({known})")


def orientation(exif: bytes, xmp: bytes = b"") -> int:
    """Read the orientation out of an EXIF block (a TIFF header and its first directory), else out of XMP.

    Returns:
        1 to 8; 1 when there is none or it cannot be read.
    """
    try:
        for tag, kind, _, value in _tiff_entries(exif.removeprefix(b"Exif\0\0"), _MAX_SEGMENTS):
            if tag == _EXIF_ORIENTATION and kind in {1, 3, 4}:
                return value if 1 <= value <= 8 else 1
    except (struct.error, UndecodableInput):
        pass
    match = _XMP_ORIENTATION.search(xmp)
    return int(match[1]) if match else 1


def _jpeg(content: bytes) -> Container:
    head = [b"\xff\xd8"]
    app1: list[bytes] = []
    first_scan, scans, end = 0, 0, len(content)
    for marker, start, stop in _jpeg_segments(content):
        if marker == 0xD9:
            end = stop
        elif marker == 0xDA:
            first_scan = first_scan or start
            scans += 1
            if scans > _MAX_SCANS:
                raise UndecodableInput(f"the JPEG image has more than {_MAX_SCANS} scans")
        elif first_scan:
            pass  # kept with the picture
        elif marker == 0xE1:
            app1.append(content[start + 4 : stop])
        elif marker in _JPEG_KEPT:
            head.append(content[start:stop])
    if not first_scan:
        raise UndecodableInput("the JPEG image ends before its picture begins")
    exif = next((data for data in app1 if data.startswith(b"Exif\0\0")), b"")
    xmp = next((data for data in app1 if data.startswith(_ADOBE_XMP)), b"")
    return Container("JPEG", b"".join([*head, content[first_scan:end]]), orientation=orientation(exif, xmp))


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Give marker, start and end of each segment, up to the end of the first picture."""
    position = 2
    for _ in range(_MAX_SEGMENTS):
        match = _JPEG_MARKER.search(content, position)
        if not match:
            return
        marker, position = match[1][0], match.end()
        if marker not in _JPEG_BARE:
            position += int.from_bytes(content[position : position + 2], "big")
        yield marker, match.end() - 2, position
        if marker == 0xD9:
            return
    raise UndecodableInput(f"the JPEG image has more than {_MAX_SEGMENTS} segments")


def _png(content: bytes) -> Container:
    kept = [content[:8]]
    exif = xmp = b""
    position = 8
    for _ in range(_MAX_PARTS):
        if position + 8 > len(content):
            break
        length, name = struct.unpack_from(">L4s", content, position)
        end = position + 12 + length
        if name in _PNG_KEPT:
            kept.append(content[position:end])
        elif name == b"eXIf":
            exif = content[position + 8 : end - 4]
        elif name == b"iTXt" and content.startswith(_PNG_XMP, position + 8):
            xmp = content[position + 8 : end - 4]
        position = end
        if name == b"IEND":
            break
    else:
        raise UndecodableInput(f"the PNG image has more than {_MAX_PARTS} chunks")
    return Container("PNG", b"".join(kept), orientation=orientation(exif, xmp))


def _gif(content: bytes) -> Container:
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    screen = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    control = b""  # of the first frame: says which colour is transparent
    position = screen
    blocks = 0
    while content[position] == 0x21:
        start = position
        position += 2
        while content[position]:
            position += content[position] + 1
            blocks += 1
            if blocks > _MAX_PARTS:
                raise UndecodableInput(f"the GIF image has more than {_MAX_PARTS} blocks before its picture")
        position += 1
        if content[start + 1] == 0xF9:
            control = content[start:position]
    if content[position] != 0x2C:
        raise UndecodableInput("the GIF image holds no picture")
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", content, position + 1)
    # Viewers, and Pillow, enlarge the screen to what the first frame needs.
    pixels = max(width, left + frame_width) * max(height, top + frame_height)
    return Container("GIF", content[:screen] + control + content[position:], pixels)


def _webp(content: bytes) -> Container:
    name = content[12:16]
    if name == b"VP8X":
        wide, wider, high, higher = struct.unpack_from("<HBHB", content, 24)
        size = (wide | wider << 16) + 1, (high | higher << 16) + 1
    elif name == b"VP8L":
        (bits,) = struct.unpack_from("<L", content, 21)
        size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        wide, high = struct.unpack_from("<HH", content, 26)
        size = wide & 0x3FFF, high & 0x3FFF
    meta = {b"EXIF": b"", b"XMP ": b""}
    position = 12
    for _ in range(_MAX_PARTS):
        if position + 8 > len(content):
            break
        name, length = struct.unpack_from("<4sL", content, position)
        if name in meta:
            meta[name] = content[position + 8 : position + 8 + length]
        position += 8 + length + (length & 1)
    else:
        raise UndecodableInput(f"the WebP image has more than {_MAX_PARTS} chunks")
    return Container("WebP", content, size[0] * size[1], orientation(meta[b"EXIF"], meta[b"XMP "]))


def _bmp(content: bytes) -> Container:
    (header,) = struct.unpack_from("<L", content, 14)
    if header >= 40:
        width, height, compression = struct.unpack_from("<ll4xL", content, 18)
        if compression in {1, 2}:
            if abs(width * height) > _MAX_RUN_LENGTH_PIXELS:
                raise InputTooLarge.over(
                    "the run-length coded BMP image", abs(width * height), _MAX_RUN_LENGTH_PIXELS, "pixels"
                )
            if len(content) > _MAX_RUN_LENGTH_BYTES:
                raise InputTooLarge.over("the run-length coded BMP image", len(content), _MAX_RUN_LENGTH_BYTES, "bytes")
    return Container("BMP", content)


def _tiff(content: bytes) -> Container:
    size = {_TIFF_WIDTH: 0, _TIFF_HEIGHT: 0, _TIFF_TILE_WIDTH: 0, _TIFF_TILE_HEIGHT: 0}
    for tag, kind, count, value in _tiff_entries(content, _MAX_SEGMENTS):
        if count * _TIFF_SIZES.get(kind, 0) > len(content):
            raise UndecodableInput(f"tag {tag} of the TIFF image is larger than the file")
        # Texts and blobs (profiles, say) may be long, lists of numbers may not: Pillow reads them one by one.
        if count > _MAX_STRIPS and (kind not in {1, 2, 6, 7} or tag in _TIFF_STRIPS):
            raise UndecodableInput(f"tag {tag} of the TIFF image has more than {_MAX_STRIPS} values")
        if tag in size:
            size[tag] = value
    tile = size[_TIFF_TILE_WIDTH] * size[_TIFF_TILE_HEIGHT]
    if tile > max(_MAX_LOOSE_TILE, 4 * size[_TIFF_WIDTH] * size[_TIFF_HEIGHT]):
        raise UndecodableInput("the TIFF image has tiles many times larger than itself")
    return Container("TIFF", content)  # Pillow turns it upright


def _avif(content: bytes) -> Container:
    content = without_track(content)
    return Container("AVIF", content, coded_pixels(content))  # Pillow gives the orientation without decoding


def _tiff_entries(content: bytes, limit: int) -> Iterator[tuple[int, int, int, int]]:
    """Give tag, type, count and (first) value of each entry of the first directory; the value is 0 when not inside.

    Raises:
        struct.error: It is not all there.
        UndecodableInput: It has more than `limit` entries.
    """
    order = "<" if content[:2] == b"II" else ">"
    (magic,) = struct.unpack_from(f"{order}H", content, 2)
    big = magic == 43
    (start,) = struct.unpack_from(f"{order}{'Q' if big else 'L'}", content, 8 if big else 4)
    if start > len(content):
        raise struct.error
    (count,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", content, start)
    if count > limit:
        raise UndecodableInput(f"the TIFF image has more than {limit} tags")
    start += 8 if big else 2
    for i in range(count):
        at = start + i * (20 if big else 12)
        tag, kind, many = struct.unpack_from(f"{order}HH{'Q' if big else 'L'}", content, at)
        code = {1: "B", 3: "H", 4: "L", 16: "Q" if big else ""}.get(kind)
        inside = code and 1 <= many * _TIFF_SIZES[kind] <= (8 if big else 4)
        (value,) = struct.unpack_from(order + (code or "B"), content, at + (12 if big else 8)) if inside else (0,)
        yield tag, kind, many, value


def _is_avif(content: bytes) -> bool:
    (length,) = struct.unpack_from(">L", content) if content[4:8] == b"ftyp" else (0,)
    brands = content[8 : min(length, 512)]
    return any(brands[i : i + 4] in {b"avif", b"avis"} for i in range(0, len(brands), 4) if i != 4)


_FORMATS: Final[tuple[tuple[Format, Callable[[bytes], bool], Callable[[bytes], Container]], ...]] = (
    ("JPEG", lambda content: content.startswith(b"\xff\xd8\xff"), _jpeg),
    ("PNG", lambda content: content.startswith(b"\x89PNG\r\n\x1a\n"), _png),
    ("WebP", lambda content: content[:4] == b"RIFF" and content[8:12] == b"WEBP", _webp),
    ("GIF", lambda content: content.startswith((b"GIF87a", b"GIF89a")), _gif),
    ("BMP", lambda content: content.startswith(b"BM"), _bmp),
    ("TIFF", lambda content: content.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")), _tiff),
    ("AVIF", _is_avif, _avif),
)
