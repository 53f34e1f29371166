"""What the demo embeds: definitions, pictures and spoken words that come with the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from typing import Final

__all__ = ["Clip", "Definition", "Material", "Picture", "load"]

_FOLDER: Final = resources.files("embedmesh_cli.demo")


@dataclass(frozen=True)
class Definition:
    """An entry of a dictionary (WordNet)."""

    name: str
    gloss: str


@dataclass(frozen=True)
class Picture:
    """An emoji (Noto Color Emoji) as a PNG file."""

    name: str
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class Clip:
    """A few spoken words as an OGG file."""

    name: str
    voice: str
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class Material:
    """All of it, in the order of its tables."""

    definitions: tuple[Definition, ...]
    pictures: tuple[Picture, ...]
    clips: tuple[Clip, ...]


def load() -> Material:
    """Read it from the package."""
    return Material(
        definitions=tuple(Definition(*row) for row in _rows("wordnet.tsv")),
        pictures=tuple(Picture(caption, _read("pictures", file)) for file, caption in _rows("pictures.tsv")),
        clips=tuple(Clip(words, voice, _read("speech", file)) for file, words, voice in _rows("speech.tsv")),
    )


def _rows(table: str) -> Iterator[list[str]]:
    for line in (_FOLDER / table).read_text(encoding="utf-8").splitlines():
        yield line.split("\t")


def _read(folder: str, file: str) -> bytes:
    return (_FOLDER / folder / file).read_bytes()
