"""Pictures of the concepts in several styles."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import pyvips
import uharfbuzz
from fontTools.ttLib import TTFont
from numpy.typing import NDArray
from PIL import Image

from starter.concepts import Concept, concepts
from starter.material import BUILD, material
from starter.scenes import SIDE

__all__ = ["STYLES", "styles"]

NOTO: Final = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
STYLES: Final = ("noto", "twemoji", "fluent", "emojione", "fxemoji", "openmoji")


def styles() -> dict[str, dict[str, NDArray[np.uint8]]]:
    """Draw, or read back, every concept in every style that has it: style -> name -> uint8 [72, 72, 4], RGBA."""
    drawn: dict[str, dict[str, NDArray[np.uint8]]] = {}
    for style in STYLES:
        file = BUILD / f"{style}-{SIDE}.npz"
        if not file.is_file():
            draw = _SOURCES[style]()
            pictures = {c.name: array for c in concepts() if (array := draw(c)) is not None}
            np.savez(file, names=np.array(list(pictures)), pictures=np.stack(list(pictures.values())))
        with np.load(file) as saved:
            drawn[style] = dict(zip(saved["names"].tolist(), saved["pictures"], strict=True))
    return drawn


def _noto() -> Callable[[Concept], NDArray[np.uint8] | None]:
    """Shape each emoji with the font's own rules and take the bitmap of the one glyph that it becomes."""
    font = TTFont(NOTO)
    bitmaps = font["CBDT"].strikeData[0]
    shaper = uharfbuzz.Font(uharfbuzz.Face(uharfbuzz.Blob.from_file_path(NOTO)))

    def draw(concept: Concept) -> NDArray[np.uint8] | None:
        buffer = uharfbuzz.Buffer()
        buffer.add_str(concept.text)
        buffer.guess_segment_properties()
        uharfbuzz.shape(shaper, buffer)
        glyphs = [font.getGlyphName(info.codepoint) for info in buffer.glyph_infos]
        glyphs = [glyph for glyph in glyphs if glyph in bitmaps]
        return _square(Image.open(io.BytesIO(bitmaps[glyphs[0]].imageData))) if len(glyphs) == 1 else None

    return draw


def _files(package: str, folder: str, *, upper: bool) -> Callable[[], Callable[[Concept], NDArray[np.uint8] | None]]:
    """SVG files that are named after code points, with or without the variation selector."""

    def source() -> Callable[[Concept], NDArray[np.uint8] | None]:
        home = material(package) / folder

        def draw(concept: Concept) -> NDArray[np.uint8] | None:
            for text in (concept.text, concept.text.replace("\ufe0f", "")):
                name = "-".join(f"{ord(c):04x}" if not upper else f"{ord(c):04X}" for c in text)
                if (file := home / f"{name}.svg").is_file():
                    return _vector(file.read_bytes())
            return None

        return draw

    return source


def _icons(package: str) -> Callable[[], Callable[[Concept], NDArray[np.uint8] | None]]:
    """Iconify's collections: SVG bodies by a slug of the name."""

    def source() -> Callable[[Concept], NDArray[np.uint8] | None]:
        table = json.loads((material(package) / "icons.json").read_text(encoding="utf-8"))
        icons = {re.sub("[^a-z0-9]", "", slug): icon for slug, icon in table["icons"].items()}
        width, height = table.get("width", 16), table.get("height", 16)

        def draw(concept: Concept) -> NDArray[np.uint8] | None:
            for name in (concept.name, *concept.aliases):
                if icon := icons.get(re.sub("[^a-z0-9]", "", name.lower())):
                    box = f"0 0 {icon.get('width', width)} {icon.get('height', height)}"
                    links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
                    return _vector(f'<svg {links} viewBox="{box}">{icon["body"]}</svg>'.encode())
            return None

        return draw

    return source


_SOURCES: Final[Mapping[str, Callable[[], Callable[[Concept], NDArray[np.uint8] | None]]]] = {
    "noto": _noto,
    "twemoji": _files("@twemoji/svg", ".", upper=False),
    "fluent": _icons("@iconify-json/fluent-emoji-flat"),
    "emojione": _icons("@iconify-json/emojione"),
    "fxemoji": _icons("@iconify-json/fxemoji"),
    "openmoji": _files("openmoji", "color/svg", upper=True),
}


def _vector(svg: bytes) -> NDArray[np.uint8]:
    image = pyvips.Image.thumbnail_buffer(svg, 4 * SIDE)
    array = image.colourspace("srgb").numpy()
    if array.shape[2] == 3:
        array = np.dstack([array, np.full(array.shape[:2], 255, np.uint8)])
    return _square(Image.fromarray(array[..., :4]))


def _square(image: Image.Image) -> NDArray[np.uint8]:
    """Cut the transparent margin off, centre on a square, and bring it to the side that is kept."""
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
