"""Scenes of plain shapes, drawn from templates."""

from __future__ import annotations

import io
import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

__all__ = ["SIDE", "Scene", "draw_scene", "png", "scenes"]

# Side of all pictures that are kept, in pixels; towers read smaller ones.
SIDE: Final = 72
COLOURS: Final[Mapping[str, tuple[int, int, int]]] = {
    "red": (221, 46, 68), "orange": (244, 144, 12), "yellow": (253, 203, 88), "green": (62, 160, 65),
    "turquoise": (51, 190, 190), "blue": (52, 104, 220), "purple": (146, 72, 190), "pink": (244, 130, 180),
    "brown": (140, 90, 60), "black": (25, 25, 28), "white": (250, 250, 250), "gray": (140, 145, 150),
}  # fmt: skip
SHAPES: Final = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "hexagon", "ring", "crescent")
PATTERNS: Final = ("horizontal stripes", "vertical stripes", "checkerboard", "polka dots", "diagonal stripes")
COUNTS: Final = {2: "two", 3: "three", 4: "four", 5: "five"}
RELATIONS: Final = ("above", "below", "left of", "right of", "inside")
RELATED: Final = 1500
HELDOUT_PAIRS: Final = 18
HELDOUT_PATTERNS: Final = 100
_SEED: Final = 41


@dataclass(frozen=True)
class Scene:
    """Plain shapes as a template says; `heldout` when the combination is kept for the examination."""

    kind: str
    caption: str
    parts: tuple[Any, ...]
    heldout: bool


@cache
def scenes() -> tuple[Scene, ...]:
    """Give all scenes, in a fixed order. A relation is held out with either of its colour-shape pairs."""
    chance = random.Random(_SEED)
    pairs = list(itertools.product(COLOURS, SHAPES))
    kept = set(chance.sample(pairs, HELDOUT_PAIRS))
    found = [Scene(*scene, heldout=pair in kept) for pair in pairs for scene in _of_one_shape(*pair)]
    return (*found, *_patterns(chance), *_relations(chance, pairs, kept))


def _of_one_shape(colour: str, shape: str) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    yield "single", f"a {colour} {shape}", (colour, shape)
    for size in ("small", "big"):
        yield size, f"a {size} {colour} {shape}", (colour, shape)
    for ground in COLOURS:
        if ground != colour:
            yield "ground", f"a {colour} {shape} on a {ground} background", (colour, shape, ground)
    for count, word in COUNTS.items():
        yield "count", f"{word} {colour} {_plural(shape)}", (colour, shape, count)


def _patterns(chance: random.Random) -> Iterator[Scene]:
    patterns = [
        (pattern, one, two)
        for pattern in PATTERNS
        for one, two in itertools.permutations(COLOURS, 2)
        if one < two or pattern == "polka dots"
    ]
    hidden = set(chance.sample(patterns, HELDOUT_PATTERNS))
    for pattern, one, two in patterns:
        caption = f"{one} {pattern} on {two}" if pattern == "polka dots" else f"{one} and {two} {pattern}"
        yield Scene("pattern", caption, (pattern, one, two), (pattern, one, two) in hidden)


def _relations(chance: random.Random, pairs: list[tuple[str, str]], kept: set[tuple[str, str]]) -> Iterator[Scene]:
    related: set[tuple[tuple[str, str], str, tuple[str, str]]] = set()
    while len(related) < RELATED:
        one, two = chance.sample(pairs, 2)
        related.add((one, chance.choice(RELATIONS), two))
    for one, relation, two in sorted(related):
        if one[0] != two[0]:
            caption = f"a {one[0]} {one[1]} {relation} a {two[0]} {two[1]}"
            yield Scene("relation", caption, (one, relation, two), one in kept or two in kept)


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def draw_scene(scene: Scene, chance: random.Random) -> NDArray[np.uint8]:
    """Draw a scene, with sizes, places, shades and turns of the moment: uint8 [72, 72, 3], RGB."""
    scale = 3
    side = SIDE * scale
    ground = _plain_ground(scene, chance)
    image = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(image)
    if scene.kind == "pattern":
        _pattern(draw, side, chance, *scene.parts)
    elif scene.kind == "count":
        colour, shape, count = scene.parts
        for x, y in _places(count, chance):
            _shape(draw, shape, _shade(colour, chance), x * side, y * side, chance.uniform(0.13, 0.17) * side, chance)
    elif scene.kind == "relation":
        _relation(draw, side, chance, *scene.parts)
    else:
        sizes = {"small": (0.1, 0.16), "big": (0.38, 0.46)}.get(scene.kind, (0.2, 0.36))
        radius = chance.uniform(*sizes)
        room = 0.5 - min(0.5, radius * 1.1)
        x, y = (0.5 + chance.uniform(-room, room) for _ in range(2))
        _shape(draw, scene.parts[1], _shade(scene.parts[0], chance), x * side, y * side, radius * side, chance)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def _plain_ground(scene: Scene, chance: random.Random) -> tuple[int, int, int]:
    if scene.kind == "ground":
        return _shade(scene.parts[2], chance)
    colours = {part for part in _flat(scene.parts) if part in COLOURS}
    # A ground that the caption does not mention is pale, or dark for what is white.
    light = chance.randint(232, 255)
    return (60, 64, 72) if "white" in colours else (light, light, light)


def _flat(parts: tuple[Any, ...]) -> Iterator[Any]:
    for part in parts:
        if isinstance(part, tuple):
            yield from _flat(part)
        else:
            yield part


def png(array: NDArray[np.uint8]) -> bytes:
    """Write a picture as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", optimize=True)
    return file.getvalue()


def _shade(colour: str, chance: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, level + chance.randint(-14, 14))) for level in COLOURS[colour])
    return red, green, blue


def _places(count: int, chance: random.Random) -> list[tuple[float, float]]:
    """Places that keep a distance of a third of the side."""
    while True:
        places: list[tuple[float, float]] = []
        for _ in range(200):
            at = (chance.uniform(0.17, 0.83), chance.uniform(0.17, 0.83))
            if all(math.dist(at, other) > 0.33 for other in places):
                places.append(at)
                if len(places) == count:
                    return places


def _relation(
    draw: ImageDraw.ImageDraw,
    side: int,
    chance: random.Random,
    one: tuple[str, str],
    relation: str,
    two: tuple[str, str],
) -> None:
    near, far = chance.uniform(0.22, 0.28), chance.uniform(0.72, 0.78)
    aside = 0.5 + chance.uniform(-0.1, 0.1)
    first, second = {
        "above": ((aside, near), (aside, far)),
        "below": ((aside, far), (aside, near)),
        "left of": ((near, aside), (far, aside)),
        "right of": ((far, aside), (near, aside)),
        "inside": ((0.5, 0.5), (0.5, 0.5)),
    }[relation]
    radii = (0.14, 0.42) if relation == "inside" else (chance.uniform(0.17, 0.21), chance.uniform(0.17, 0.21))
    for (colour, shape), (x, y), radius in ((two, second, radii[1]), (one, first, radii[0])):
        _shape(draw, shape, _shade(colour, chance), x * side, y * side, radius * side, chance)


def _pattern(draw: ImageDraw.ImageDraw, side: int, chance: random.Random, pattern: str, one: str, two: str) -> None:
    first, second = _shade(one, chance), _shade(two, chance)
    cells = chance.randint(4, 7)
    step = side / cells
    draw.rectangle((0, 0, side, side), fill=second)
    shift = chance.choice((0, 1))
    if pattern == "polka dots":
        for i, j in itertools.product(range(cells + 1), repeat=2):
            x, y = (i + 0.5 * (j % 2)) * step, j * step
            draw.ellipse((x - 0.27 * step, y - 0.27 * step, x + 0.27 * step, y + 0.27 * step), fill=first)
        return
    for i in range(cells):
        if pattern == "checkerboard":
            for j in range(cells):
                if (i + j + shift) % 2:
                    draw.rectangle((i * step, j * step, (i + 1) * step, (j + 1) * step), fill=first)
        elif pattern == "diagonal stripes":
            x = (2 * i - cells) * step
            draw.polygon([(x, side), (x + step, side), (x + step + side, 0), (x + side, 0)], fill=first)
        elif (i + shift) % 2:
            box = (0, i * step, side, (i + 1) * step) if pattern[0] == "h" else (i * step, 0, (i + 1) * step, side)
            draw.rectangle(box, fill=first)


def _shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    colour: tuple[int, int, int],
    x: float,
    y: float,
    radius: float,
    chance: random.Random,
) -> None:
    turn = math.radians(chance.uniform(-12, 12))

    def points(outline: list[tuple[float, float]]) -> list[tuple[float, float]]:
        """Turn and place an outline given on the unit circle, y upwards."""
        sine, cosine = math.sin(turn), math.cos(turn)
        return [(x + radius * (u * cosine - v * sine), y - radius * (u * sine + v * cosine)) for u, v in outline]

    def corners(count: int, first: float, inner: float = 0.0) -> list[tuple[float, float]]:
        steps = count * (2 if inner else 1)
        radii = [inner if inner and i % 2 else 1.0 for i in range(steps)]
        angles = [math.radians(first) + 2 * math.pi * i / steps for i in range(steps)]
        return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]

    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "ring":
        draw.ellipse(box, outline=colour, width=max(2, int(radius * 0.35)))
    elif shape == "crescent":
        angles = [math.radians(50 + 260 * i / 30) for i in range(31)]
        outer = [(math.cos(a), math.sin(a)) for a in angles]
        (u, v), (_, w) = outer[0], outer[-1]
        centre, inner = u, (v - w) / 2
        back = [math.radians(270 - 180 * i / 30) for i in range(31)]
        draw.polygon(points(outer + [(centre + inner * math.cos(a), inner * math.sin(a)) for a in back]), fill=colour)
    elif shape == "heart":
        angles = [2 * math.pi * i / 40 for i in range(40)]
        outline = [
            (math.sin(a) ** 3, (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16)
            for a in angles
        ]
        draw.polygon(points(outline), fill=colour)
    elif shape == "cross":
        a, b = 0.32, 0.95
        quarter = [(a, b), (a, a), (b, a)]
        outline = [*quarter, *((u, -v) for u, v in quarter[::-1])]
        outline += [(-u, -v) for u, v in outline]
        draw.polygon(points(outline), fill=colour)
    elif shape == "diamond":
        draw.polygon(points([(0.7, 0), (0, 1), (-0.7, 0), (0, -1)]), fill=colour)
    else:
        count, first, inner = {
            "square": (4, 45.0, 0.0),
            "triangle": (3, 90.0, 0.0),
            "star": (5, 90.0, 0.42),
            "hexagon": (6, 0.0, 0.0),
        }[shape]
        draw.polygon(points(corners(count, first, inner)), fill=colour)
