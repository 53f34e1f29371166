"""The page that shows the demo's answers: one HTML file with all its pictures and sounds inside."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from embedmesh_cli.demo.material import Clip, Definition, Picture

__all__ = ["Answer", "Hit", "Kind", "render"]

Kind: TypeAlias = Literal["typed", "spoken", "shown", "asked"]

# Kind of query, heading, and what to know about it.
_SECTIONS: Final[dict[Kind, tuple[str, str]]] = {
    "typed": (
        "Type words, see pictures",
        "The text encoder reads the words, the image encoder saw nothing but pixels; the nearest vectors come first.",
    ),
    "spoken": (
        "Say words, see pictures",
        "From sound to picture directly: nothing is written down on the way. Press play to hear what was asked.",
    ),
    "shown": ("Show a picture, get words", "The nearest of 1,000 definitions from the WordNet dictionary."),
    "asked": ("Ask for a word by its meaning", "No question shares a word with its answer."),
}


@dataclass(frozen=True)
class Hit:
    """Something that was found, with its cosine."""

    score: float
    item: Picture | Definition

    @property
    def described(self) -> str:
        """What it is called, and what that means where it says so."""
        return f"{self.item.name}: {self.item.gloss}" if isinstance(self.item, Definition) else self.item.name


@dataclass(frozen=True, eq=False)
class Answer:
    """What was asked, its vector, and what was found, the nearest first; with a note where there is more to say."""

    kind: Kind
    query: str | Clip | Picture
    vector: NDArray[np.float32]
    hits: Sequence[Hit]
    note: str = ""


def render(
    answers: Sequence[Answer],
    pictures: Sequence[Picture],
    vectors: NDArray[np.float32],
    *,
    facts: Iterable[str],
    tallies: Mapping[Kind, str],
) -> str:
    """Write the page.

    Args:
        answers: What was asked, in order.
        pictures: All of them.
        vectors: Of the pictures, float32 [pictures, d].
        facts: A few words each about the run.
        tallies: How often the right thing was found, by kind of query.
    """
    sections = []
    for kind, (heading, note) in _SECTIONS.items():
        cards = "".join(_card(answer) for answer in answers if answer.kind == kind)
        notes = f"{note} {escape(tallies.get(kind, ''))}".rstrip()
        sections.append(
            f'<section class="{kind}">\n<h2>{heading}</h2>\n<p class="note">{notes}</p>\n{cards}</section>\n'
        )
    gallery = (
        f'<li><button data-vector="{_packed(vector)}" title="{escape(picture.name)}">{_image(picture)}</button></li>\n'
        for picture, vector in zip(pictures, vectors, strict=True)
    )
    template = (resources.files("embedmesh_cli.demo") / "page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        facts="".join(f"<li>{escape(fact)}</li>" for fact in facts),
        sections="".join(sections),
        count=len(pictures),
        chips=_chips(answers),
        gallery="".join(gallery),
    )


def _chips(answers: Sequence[Answer]) -> str:
    """Give a button for each query that finds pictures; one that was spoken plays its sound, too."""
    chips, sounds = [], 0
    for answer in answers:
        name, sound = answer.query, ""
        if isinstance(answer.query, Clip):
            name, sound = f"\N{SPEAKER WITH ONE SOUND WAVE} {answer.query.name}", f' data-sound="{sounds}"'
            sounds += 1
        if answer.kind in {"typed", "spoken"}:
            chips.append(f'<button data-vector="{_packed(answer.vector)}"{sound}>{escape(str(name))}</button>\n')
    return "".join(chips)


def _packed(vector: NDArray[np.float32]) -> str:
    """Give a vector, but for its length, as 8 bit integers in base64."""
    return b64encode(np.round(vector * (127 / np.abs(vector).max())).astype(np.int8).tobytes()).decode()


def _card(answer: Answer) -> str:
    own = answer.query.name if isinstance(answer.query, Clip) else ""
    hits = "".join(_hit(hit, own=hit.item.name == own) for hit in answer.hits)
    note = f"<small>{escape(answer.note)}</small>" if answer.note else ""
    return f'<article>\n<div class="query">{_query(answer.query)}{note}</div>\n<ol>{hits}</ol>\n</article>\n'


def _query(query: str | Clip | Picture) -> str:
    if isinstance(query, str):
        return f"<q>{escape(query)}</q>"
    if isinstance(query, Clip):
        sound = _data("audio/ogg", query.content)
        return f'<q>{escape(query.name)}</q><small>{escape(query.voice)}</small><audio controls src="{sound}"></audio>'
    return f"{_image(query)}<small>{escape(query.name)}</small>"


def _hit(hit: Hit, *, own: bool) -> str:
    item, score = hit.item, f"<i>{hit.score:.2f}</i>"
    if isinstance(item, Picture):
        shown = f"{_image(item)}{score}<b>{escape(item.name)}</b>"
    else:
        shown = f"{score}<b>{escape(item.name)}</b><span>{escape(item.gloss)}</span>"
    mark = ' class="own"' if own else ""
    return f'<li{mark} style="--score:{max(0.0, hit.score):.3f}">{shown}</li>'


def _image(picture: Picture) -> str:
    return f'<img alt="{escape(picture.name)}" src="{_data("image/png", picture.content)}">'


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{b64encode(content).decode()}"
