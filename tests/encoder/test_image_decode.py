import io
import random
import re
import struct
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image, ImageCms

from embedmesh.errors import EmbedMeshError, InputTooLarge, UndecodableInput
from embedmesh_encoder.image.avif import _largest_frame, coded_pixels
from embedmesh_encoder.image.container import orientation, read_container
from embedmesh_encoder.image.decode import decode

# Pillow warns of odd TIFF tags; the node that serves silences that.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

RED = (255, 0, 0)


def scene(width: int = 40, height: int = 30) -> Image.Image:
    """Give a smooth picture that is not symmetric, which all formats can write nearly as it is."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 96)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + name + data + struct.pack(">L", zlib.crc32(name + data))


def png(width: int, height: int, *, depth: int = 8, colour: int = 0, data: bytes = b"", extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def tiff(*tags: tuple[int, int, int, int], data: bytes = b"") -> bytes:
    """Write tags of (tag, type, count, value or offset), little-endian, of 32 bits; `data` lies at offset 8."""
    entries = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<L", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def exif(turn: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = turn
    return block


def close(image: Image.Image, expected: Image.Image, tolerance: float = 0) -> bool:
    difference = np.abs(np.asarray(image, int) - np.asarray(expected.convert("RGB"), int))
    return image.size == expected.size and bool(difference.mean() <= tolerance)


FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("PNG", {}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("WEBP", {"lossless": True}),
]
LOSSY: list[tuple[str, dict[str, Any]]] = [
    ("JPEG", {"quality": 95}),
    ("JPEG", {"progressive": True}),
    ("WEBP", {}),
    ("AVIF", {}),
    ("GIF", {}),
]


@pytest.mark.parametrize(("kind", "options"), FORMATS + LOSSY)
def test_every_format_is_known_by_its_content(kind: str, options: dict[str, Any]) -> None:
    image = decode(saved(scene(), kind, **options))
    assert image.mode == "RGB"
    assert close(image, scene(), 0 if (kind, options) in FORMATS else 6)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_are_turned_upright(kind: str, turn: int) -> None:
    transposed = scene()
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what undoes the turn, as `Image.Transpose`
    if turn != 1:
        transposed = transposed.transpose(Image.Transpose(back[turn]))
    image = decode(saved(transposed, kind, exif=exif(turn)))
    assert close(image, scene(), 6)


def test_orientation_may_be_in_xmp_only_and_exif_goes_before_it() -> None:
    packet = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for kind in ("JPEG", "WEBP"):
        assert decode(saved(scene(), kind, xmp=packet)).size == (30, 40)
        assert decode(saved(scene(), kind, xmp=packet, exif=exif(3))).size == (40, 30)
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet)
    assert decode(png(2, 1, data=bytes(3), extra=text)).size == (1, 2)


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"Exif\0\0",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff",
        b"MM\0*\0\0\0\x08\0\x01\x01\x12",
    ],
)
def test_broken_exif_means_upright(block: bytes) -> None:
    assert orientation(block) == 1
    assert decode(saved(scene(), "PNG", exif=b"Exif\0\0" + block)).size == (40, 30)


def test_orientations_that_do_not_exist_mean_upright() -> None:
    assert orientation(exif(9).tobytes()) == 1
    assert orientation(exif(0).tobytes()) == 1


def test_transparency_lies_over_white() -> None:
    half = Image.new("RGBA", (3, 2), (255, 0, 0, 128))
    for kind in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        assert decode(saved(half, kind, **options)).getpixel((0, 0)) == (255, 127, 127)
    assert decode(saved(Image.new("RGBA", (1, 1)), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert decode(saved(Image.new("LA", (1, 1), (0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_palettes_with_and_without_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        pixels = decode(saved(image, kind, transparency=1))
        assert [pixels.getpixel((x, 0)) for x in (0, 1)] == [RED, (255, 255, 255)]
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        pixels = decode(saved(image, kind))
        assert [pixels.getpixel((x, 0)) for x in (0, 1)] == [RED, (0, 0, 255)]


def test_grey_one_bit_and_declared_transparent_colours() -> None:
    assert decode(saved(Image.new("1", (9, 9), 1), "PNG")).getpixel((8, 8)) == (255, 255, 255)
    assert decode(saved(Image.new("1", (9, 9)), "BMP")).getpixel((8, 8)) == (0, 0, 0)
    assert decode(saved(Image.new("L", (9, 9), 77), "JPEG")).getpixel((8, 8)) == (77, 77, 77)
    assert decode(saved(Image.new("L", (9, 9), 77), "PNG", transparency=77)).getpixel((8, 8)) == (255, 255, 255)
    assert decode(saved(Image.new("RGB", (9, 9), RED), "PNG", transparency=RED)).getpixel((8, 8)) == (255, 255, 255)


def test_of_16_bits_the_upper_8_are_kept() -> None:
    levels = np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16)
    for kind in ("PNG", "TIFF"):
        pixels = np.asarray(decode(saved(Image.fromarray(levels), kind)))
        assert pixels[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    big_endian = Image.frombytes("I;16B", (2, 1), b"\x80\x00\x12\xff")
    assert np.asarray(decode(saved(big_endian, "TIFF")))[0, :, 0].tolist() == [128, 0x12]
    rgb = png(1, 1, depth=16, colour=2, data=b"\0" + struct.pack(">HHH", 0x8000, 0x00FF, 0xFFFF))
    assert decode(rgb).getpixel((0, 0)) == (128, 0, 255)
    clear = png(2, 1, depth=16, data=b"\0\x12\x34\x12\x35", extra=chunk(b"tRNS", b"\x12\x34"))
    assert np.asarray(decode(clear))[0, :, 0].tolist() == [255, 0x12]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_samples_without_a_white_are_refused(mode: str) -> None:
    with pytest.raises(UndecodableInput, match="nothing says which value is white"):
        decode(saved(Image.new(mode, (2, 2)), "TIFF"))


def test_cmyk_becomes_rgb_as_in_the_reference() -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for kind in ("JPEG", "TIFF"):
        assert close(decode(saved(cmyk, kind)), Image.new("RGB", (16, 16), RED), 2)


def test_profiles_are_ignored_and_broken_ones_do_no_harm() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    for kind, options in [*FORMATS, LOSSY[0], LOSSY[3]]:
        if kind == "BMP":
            continue
        plain = decode(saved(scene(), kind, **options))
        assert close(decode(saved(scene(), kind, icc_profile=profile, **options)), plain)
        assert close(decode(saved(scene(), kind, icc_profile=b"\xff" * 200, **options)), plain)


def test_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 255, 0), (0, 0, 255))]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        content = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
        assert close(decode(content), frames[0], 2), kind


def test_a_first_frame_smaller_than_the_screen_leaves_the_rest_as_it_is() -> None:
    content = bytearray(saved(Image.new("P", (8, 8), 1), "GIF", transparency=0))
    content[6:10] = struct.pack("<HH", 16, 16)
    assert decode(bytes(content)).size == (16, 16)


def test_metadata_of_any_size_and_kind_breaks_no_png() -> None:
    plain = scene(8, 8)
    bomb = zlib.compress(bytes(100 << 20))
    content = saved(plain, "PNG")
    for extra in (
        chunk(b"zTXt", b"a\0\0" + bomb),
        chunk(b"iTXt", b"a\0\1\0\0\0" + bomb),
        chunk(b"iCCP", b"a\0\0" + bomb),
        chunk(b"iCCP", b"a\0\7garbage"),
        chunk(b"tEXt", b"a\0" + bytes(5 << 20)),
        chunk(b"gAMA", b""),
        chunk(b"acTL", b""),
        chunk(b"quAx", b"\0" * 99)[:-1] + b"?",  # wrong checksum
    ):
        assert close(decode(content[:33] + extra + content[33:]), plain)


def test_what_follows_a_picture_and_lies_before_it_does_no_harm() -> None:
    for kind, options in FORMATS + LOSSY:
        content = saved(scene(), kind, **options)
        assert close(decode(content + b"PK\x03\x04" + b"<script>" * 999), scene(), 6)
    comment = b"\xff\xfe" + struct.pack(">H", 4002) + b"%PDF-1.7" * 500
    jpeg = saved(scene(), "JPEG")
    assert close(decode(jpeg[:2] + comment + jpeg[2:]), scene(), 6)


@pytest.mark.parametrize(
    "content",
    [
        b"\0",
        b"%PDF-1.7 " + saved(scene(), "JPEG"),
        b"PK\x03\x04" + saved(scene(), "PNG"),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        saved(scene(), "PPM"),
        saved(scene(), "ICO"),
        saved(scene(), "JPEG2000"),
        b"RIFF\x24\0\0\0WAVEfmt ",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
    ],
)
def test_other_formats_and_polyglots_are_told_what_is_known(content: bytes) -> None:
    with pytest.raises(UndecodableInput) as error:
        decode(content)
    assert "no image of a known format (AVIF, BMP, GIF, JPEG, PNG, TIFF, WebP)" in error.value.message


def test_nothing_and_too_many_bytes() -> None:
    with pytest.raises(UndecodableInput, match="the image is empty"):
        decode(b"")
    with pytest.raises(InputTooLarge) as error:
        decode(bytes(101), max_bytes=100)
    assert error.value.metadata == {"limit": "100", "actual": "101", "unit": "bytes"}


def lie(content: bytes, width: int, height: int) -> bytes:  # noqa: C901  (one branch a format)
    """Declare another size where the header of an undamaged file does."""
    lying = bytearray(content)
    if content.startswith(b"\x89PNG"):
        lying[16:24] = struct.pack(">LL", width, height)
        lying[29:33] = struct.pack(">L", zlib.crc32(lying[12:29]))
    elif content.startswith(b"BM"):
        lying[18:26] = struct.pack("<ll", width, height)
    elif content.startswith(b"GIF8"):
        lying[6:10] = struct.pack("<HH", min(width, 0xFFFF), min(height, 0xFFFF))
    elif content.startswith(b"II*\0"):
        (start,) = struct.unpack_from("<L", content, 4)
        for at in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", content, start)[0], 12):
            tag = struct.unpack_from("<H", content, at)[0]
            if tag in {256, 257}:
                lying[at + 2 : at + 12] = struct.pack("<HLL", 4, 1, width if tag == 256 else height)
    elif content[12:16] == b"VP8X":
        lying[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif content[12:16] == b"VP8L":
        size = min(width - 1, 0x3FFF) | min(height - 1, 0x3FFF) << 14
        lying[21:25] = struct.pack("<L", struct.unpack_from("<L", content, 21)[0] & 0xF0000000 | size)
    elif content[12:16] == b"VP8 ":
        lying[26:30] = struct.pack("<HH", min(width, 0x3FFF), min(height, 0x3FFF))
    elif content[4:8] == b"ftyp":
        start = content.index(b"ispe") + 8
        lying[start : start + 8] = struct.pack(">LL", min(width, 16_384), min(height, 16_384))
    else:
        match = re.search(rb"\xff[\xc0\xc2]\0", content)
        assert match
        lying[match.end() + 2 : match.end() + 6] = struct.pack(">HH", min(height, 0xFFFF), min(width, 0xFFFF))
    return bytes(lying)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "GIF", "JPEG", "WEBP", "WEBP lossless", "AVIF"])
def test_a_declared_size_over_the_limit_is_refused_before_pixels_are_made(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP lossless" else {}
    content = lie(saved(Image.new("RGB", (8, 8)), kind.partition(" ")[0], **options), 60_000, 60_000)
    assert len(content) < 2000
    before = psutil.Process().memory_info().rss
    with pytest.raises(InputTooLarge) as error:
        decode(content)
    assert error.value.metadata["unit"] == "pixels"
    assert error.value.metadata["limit"] == "50000000"
    assert int(error.value.metadata["actual"]) >= 16_383**2
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_a_webp_canvas_of_16_million_by_256_is_measured_before_it_is_allocated() -> None:
    content = lie(saved(scene(), "WEBP", save_all=True, append_images=[scene().rotate(9)]), 1 << 24, 256)
    with pytest.raises(InputTooLarge, match="the image has 4294967296 pixels"):
        decode(content)


def test_avif_data_larger_than_it_declares_is_measured() -> None:
    for options in ({}, {"append_images": [Image.new("RGB", (8000, 7000))], "save_all": True}):
        content = saved(Image.new("RGB", (8000, 7000)), "AVIF", speed=10, **options)
        assert len(content) < 10_000
        with pytest.raises(InputTooLarge, match="the image has 56000000 pixels"):
            decode(lie(content, 10, 10))
    content = saved(scene(), "AVIF")
    assert coded_pixels(content) == 1200
    assert coded_pixels(saved(scene().convert("RGBA"), "AVIF")) == 1200
    assert coded_pixels(saved(scene(), "AVIF", save_all=True, append_images=[scene().rotate(9)])) == 1200
    with pytest.raises(UndecodableInput, match="does not have one description"):
        decode(content[: content.index(b"meta") - 4])
    with pytest.raises(UndecodableInput, match="ends within its header"):
        decode(content.replace(b"iloc", b"ilok"))


def sequence_header(*numbers: tuple[int, int]) -> bytes:
    """Write (value, bits)."""
    text = "".join(f"{value:0{bits}b}" for value, bits in numbers)
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")


def test_av1_headers_of_all_shapes_are_read() -> None:
    video = [(0, 3), (0, 1), (0, 1)]
    timing = [(1, 1), (1, 32), (25, 32), (1, 1), (0b010, 3), (1, 1), (9, 5), (1, 32), (4, 5), (4, 5)]
    points = [(1, 1), (1, 5), *([(0, 12), (8, 5), (1, 1), (1, 1), (5, 10), (5, 10), (0, 1), (1, 1), (3, 4)] * 2)]
    plain = [(0, 1), (0, 1), (0, 5), (0, 12), (5, 5)]
    size = [(5, 4), (4, 4), (39, 6), (29, 5)]
    for before in ([*timing, *points], plain):
        unit = sequence_header(*video, *before, *size)
        assert _largest_frame(b"\x12\0" + bytes([0x0A, len(unit)]) + unit) == 1200
        assert _largest_frame(b"\x0c\0" + unit) == 1200  # with an extension, without a length
    with pytest.raises(UndecodableInput, match="room for frames many times larger"):
        _largest_frame(b"\x08" + sequence_header(*video, *plain, (15, 4), (15, 4), (39, 16), (29, 16)))
    with pytest.raises(UndecodableInput, match="more than 4096 units"):
        _largest_frame(b"\x12\0" * 5000)


def test_a_frame_beyond_the_screen_counts() -> None:
    content = bytearray(saved(Image.new("P", (8, 8)), "GIF"))
    start = content.index(b",", 13)
    content[start + 5 : start + 9] = struct.pack("<HH", 60_000, 60_000)
    with pytest.raises(InputTooLarge, match="the image has 3600000000 pixels"):
        decode(bytes(content))


def test_a_limit_can_be_set() -> None:
    content = saved(scene(), "PNG")
    assert decode(content, max_pixels=1200).size == (40, 30)
    with pytest.raises(InputTooLarge, match="the image has 1200 pixels, the limit is 1199"):
        decode(content, max_pixels=1199)


def jpeg_of_scans(scans: int) -> bytes:
    content = saved(scene(), "JPEG", progressive=True)
    start = content.index(b"\xff\xda")
    length = 2 + struct.unpack(">H", content[start + 2 : start + 4])[0]
    empty = content[start : start + length]
    return content[:-2] + empty * scans + b"\xff\xd9"


def gif_of_comments(blocks: int) -> bytes:
    content = saved(Image.new("P", (8, 8)), "GIF")
    start = content.index(b",", 13)
    return content[:start] + b"!\xfe" + b"\1a" * blocks + b"\0" + content[start:]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (jpeg_of_scans(200_000), "more than 100 scans"),
        (b"\xff\xd8" + b"\xff\xfe\0\2" * 5_000_000, "more than 4096 segments"),
        (b"\xff\xd8\xff\xd9" * 4_000_000, "ends before its picture begins"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", b"") * 1_500_000, "more than 65536 chunks"),
        (gif_of_comments(9_000_000), "more than 65536 blocks"),
        (b"GIF89a\1\0\1\0\0\0\0;", "holds no picture"),
        (b"RIFF\0\0\0\0WEBPVP8 " + bytes(2_400_000), "more than 65536 chunks"),
        (tiff(*[(256, 4, 1, 1)] * 5000), "more than 4096 tags"),
        (tiff((273, 4, 5_000_000, 8), data=bytes(20_000_000)), "tag 273 of the TIFF image has more than 65536 values"),
        (tiff((700, 7, 1 << 31, 8)), "tag 700 of the TIFF image is larger than the file"),
        (
            tiff((256, 4, 1, 1), (257, 4, 1, 1), (322, 4, 1, 1 << 16), (323, 4, 1, 1 << 15)),
            "tiles many times larger than itself",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_are_built_to_waste_time_are_refused_early(content: bytes, sentence: str) -> None:
    started = time.monotonic()
    with pytest.raises(UndecodableInput, match=sentence):
        decode(content)
    assert time.monotonic() - started < 5


def test_run_length_coded_bmp_is_read_while_it_is_small() -> None:
    palette = bytes((0, 0, 0, 0, 0, 0, 255, 0))

    def bmp(width: int, height: int, rows: bytes) -> bytes:
        info = struct.pack("<LllHHLLllLL", 40, width, height, 1, 8, 1, len(rows), 0, 0, 2, 0)
        return struct.pack("<2sLLL", b"BM", 62 + len(rows), 0, 62) + info + palette + rows

    assert decode(bmp(4, 2, b"\4\1\0\0" * 2 + b"\0\1")).getpixel((3, 1)) == RED
    with pytest.raises(InputTooLarge, match="run-length coded BMP image has 3600000000 pixels"):
        decode(bmp(60_000, 60_000, b"\0\1"))


def test_truncated_files_are_refused() -> None:
    for kind, options in FORMATS + LOSSY:
        content = saved(scene(), kind, **options)
        for length in {1, 2, 4, 9, 16, 29, 33, len(content) // 2, len(content) * 3 // 4}:
            with pytest.raises(UndecodableInput):
                decode(content[:length])


def test_no_text_of_a_library_leaks_and_nothing_is_chained() -> None:
    with pytest.raises(UndecodableInput) as error:
        decode(saved(scene(), "PNG")[:80])
    assert error.value.message == ("the PNG image cannot be decoded: it is damaged, cut short, or of an unusual kind")
    assert error.value.__context__ is None
    assert error.value.field == ""


def test_large_pictures_are_converted_in_bands_that_leave_no_seam() -> None:
    image = scene(1500, 1100).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    white = Image.new("RGBA", image.size, "white")
    expected = Image.alpha_composite(white, image).convert("RGB")
    assert close(decode(saved(image, "PNG", compress_level=1)), expected)


def mutants(seed: int, count: int) -> Any:
    """Give (what was done, bytes): bit flips, truncations, splices, lies in headers, over all formats."""
    rng = random.Random(seed)
    sources = [saved(scene(), kind, **options) for kind, options in FORMATS + LOSSY]
    sources += [
        saved(scene().convert(mode), kind)
        for kind, mode in (("PNG", "P"), ("PNG", "LA"), ("TIFF", "CMYK"), ("JPEG", "CMYK"), ("BMP", "P"), ("GIF", "1"))
    ]
    sources += [
        saved(scene(), "GIF", save_all=True, append_images=[scene().rotate(40)]),
        saved(scene(), "WEBP", save_all=True, append_images=[scene().rotate(40)]),
        saved(scene(), "TIFF", compression="jpeg"),
        saved(scene(), "TIFF", compression="tiff_deflate", exif=exif(6)),
        saved(scene(), "JPEG", exif=exif(5)),
        saved(scene(), "PNG", exif=exif(8), pnginfo=None),
    ]
    for _ in range(count):
        source = rng.choice(sources)
        content = bytearray(source)
        how = rng.choice(("flip", "cut", "splice", "header", "size", "insert", "zero"))
        if how == "flip":
            for _ in range(rng.choice((1, 2, 8, 64))):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif how == "cut":
            del content[rng.randrange(len(content)) :]
        elif how == "splice":
            other = rng.choice(sources)
            at = rng.randrange(len(content))
            content[at:] = other[rng.randrange(len(other)) :]
        elif how == "header":  # where sizes, counts and offsets stand
            for _ in range(rng.choice((1, 2, 4))):
                at = rng.randrange(min(len(content), 256))
                value = rng.choice((0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFF, 0xFFFFFFFF, 0x10000, rng.getrandbits(32)))
                size = rng.choice((1, 2, 4))
                content[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, rng.choice(("big", "little")))
        elif how == "size":
            side = (1, 7, 39, 41, 64, 1000, 7000, 20_000, 60_000)
            content[:] = lie(source, rng.choice(side), rng.choice(side))
        elif how == "insert":
            at = rng.randrange(len(content))
            content[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
        else:
            at = rng.randrange(len(content))
            content[at : at + 40] = bytes(len(content[at : at + 40]))
        yield how, bytes(content)


def test_two_thousand_mutants_give_an_image_or_a_precise_error(kept_bytes: Callable[[], int]) -> None:
    process = psutil.Process()
    outcomes = {"image": 0, "UNDECODABLE_INPUT": 0, "INPUT_TOO_LARGE": 0}
    slowest = 0.0
    warm = peak = 0

    def resident() -> int:
        return process.memory_info().rss >> 20

    for number, (how, content) in enumerate(mutants(20261123, 2000)):
        if number == 500:
            warm = kept_bytes() >> 20
        started = time.monotonic()
        try:
            image = decode(content)
            assert image.mode == "RGB"
            assert 0 < image.width * image.height <= 50_000_000
            outcomes["image"] += 1
        except EmbedMeshError as error:
            assert type(error) in {UndecodableInput, InputTooLarge}, (number, how)
            outcomes[error.reason] += 1
        slowest = max(slowest, time.monotonic() - started)
        peak = max(peak, resident())
    assert outcomes["image"] > 300, outcomes
    assert outcomes["UNDECODABLE_INPUT"] > 300, outcomes
    assert outcomes["INPUT_TOO_LARGE"] > 10, outcomes
    assert slowest < 5
    assert (kept_bytes() >> 20) - warm < 64
    sys.stdout.write(f"{outcomes} slowest {slowest * 1000:.0f} ms, RSS {warm} -> {resident()} MiB, peak {peak} MiB\n")


def test_the_container_of_mutants_never_raises_anything_else() -> None:
    for _, content in mutants(7, 3000):
        try:
            container = read_container(content)
        except EmbedMeshError:
            continue
        assert len(container.content) <= len(content)
        assert 1 <= container.orientation <= 8
