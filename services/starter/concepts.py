"""What the towers are taught: the emoji, what people call them, and which of them are kept for the examination.

Names and keywords are the Unicode consortium's (CLDR annotations, English), those of the `emoji` package, and the
keywords of `emojilib`. The splits depend on a seed alone, so training and evaluation agree on them without a file
between them.
"""

from __future__ import annotations

import json
import random
import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

import emoji

from starter.material import material

__all__ = ["Concept", "concepts", "heldout_keywords", "training_captions"]

CLDR: Final = Path("/usr/share/unicode/cldr/common")
HELDOUT_CONCEPTS: Final = 250
HELDOUT_KEYWORDS: Final = 381

# The newest that all the fonts draw.
_EMOJI_VERSION: Final = 15.0
_SEED: Final = 20261125
_SKIN_TONES: Final = {chr(code) for code in range(0x1F3FB, 0x1F400)}
# What does not tell a variant of a concept from another: all with one stem are held out together.
_VARIANT: Final = re.compile(
    r"\b(?:man|woman|men|women|person|people|boy|girl|mr|mrs|mx|prince|princess|he|she|his|her|male|female|"
    r"facing right|button|face|cat|with|in|the|of|and|left|right|up|down|upper|lower|one|two|three|four|five|six|seven|"
    r"eight|nine|ten|eleven|twelve|thirty|o|clock|old|new|small|large|medium|heavy|black|white|red|orange|yellow|green|"
    r"blue|purple|brown|pink|grey|gray|light|dark|squared)\b|[^a-z ]"
)


@dataclass(frozen=True)
class Concept:
    """One emoji.

    Attributes:
        text: The emoji itself.
        name: What CLDR calls it, e.g. "grinning face".
        aliases: Other names, which mean this one alone.
        keywords: Words that fit it, and others too.
        heldout: No picture, name or alias of it is trained on.
    """

    text: str
    name: str
    aliases: tuple[str, ...] = field(repr=False)
    keywords: tuple[str, ...] = field(repr=False)
    heldout: bool


@cache
def concepts() -> tuple[Concept, ...]:
    """Give every emoji of Unicode's Emoji 15.0 without skin tones, in a fixed order."""
    names, keywords, _ = _annotations()
    rows = []
    for text, data in emoji.EMOJI_DATA.items():
        if data["status"] != emoji.STATUS["fully_qualified"] or data["E"] > _EMOJI_VERSION or _SKIN_TONES & set(text):
            continue
        plain = text.replace("\ufe0f", "")
        short = _words(data["en"])
        name = names.get(plain, short)
        aliases = {short, *map(_words, data.get("alias", ()))}
        if name.startswith("flag: "):
            country = name.removeprefix("flag: ")
            aliases |= {country, f"flag of {country}"}
        aliases = {alias for alias in aliases if alias.isascii()} - {name}
        rows.append(
            (text, name, tuple(sorted(aliases)), tuple(sorted(set(keywords.get(plain, ())) - aliases - {name})))
        )
    rows.sort()
    heldout = _heldout([name for _, name, _, _ in rows])
    return tuple(Concept(*row, heldout=row[1] in heldout) for row in rows)


@cache
def heldout_keywords() -> tuple[str, ...]:
    """Give CLDR keywords that are never trained on: each fits 2 emoji or more, one of them trained, and names none."""
    owners = defaultdict(list)
    for concept in concepts():
        for keyword in concept.keywords:
            owners[keyword].append(concept)
    named = {name for concept in concepts() for name in (concept.name, *concept.aliases)}
    fit = [
        keyword
        for keyword, those in sorted(owners.items())
        if len(those) >= 2
        and keyword in _annotations()[2]
        and keyword not in named
        and re.fullmatch("[a-z ]{3,}", keyword)
        and any(not each.heldout for each in those)
    ]
    return tuple(sorted(random.Random(_SEED + 1).sample(fit, HELDOUT_KEYWORDS)))


@cache
def training_captions() -> dict[str, tuple[str, ...]]:
    """Give what each trained emoji may be called in training, by its name; the name comes first.

    Names and aliases of concepts that are held out, and keywords that are, occur in none.
    """
    kept = {name for each in concepts() if each.heldout for name in (each.name, *each.aliases)} | set(
        heldout_keywords()
    )
    return {
        each.name: (each.name, *(caption for caption in (*each.aliases, *each.keywords) if caption not in kept))
        for each in concepts()
        if not each.heldout
    }


@cache
def _annotations() -> tuple[dict[str, str], dict[str, list[str]], set[str]]:
    """Give names, keywords, and which keywords are CLDR's; by the emoji without variation selectors."""
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = defaultdict(list)
    curated: set[str] = set()
    library = json.loads((material("emojilib") / "dist" / "emoji-en-US.json").read_text(encoding="utf-8"))
    for text, words in library.items():
        keywords[text.replace("\ufe0f", "")] += [_words(word) for word in words]
    for file in ("annotations/en.xml", "annotationsDerived/en.xml"):
        for node in ET.parse(CLDR / file).iter("annotation"):  # noqa: S314  (a file of the system)
            text, content = node.attrib["cp"].replace("\ufe0f", ""), node.text or ""
            if node.attrib.get("type") == "tts":
                names[text] = content.strip()
            else:
                words = [word.strip() for word in content.split("|") if word.strip()]
                keywords[text] += words
                curated.update(words)
    return names, keywords, curated


def _words(shortcode: str) -> str:
    return shortcode.strip(":").replace("_", " ").replace("-", " ").strip()


def stem(name: str) -> str:
    """Give what is left of a name without what tells its variants apart."""
    words = _VARIANT.sub(" ", name.lower()).split()
    return " ".join(words) or name


def _heldout(names: Iterable[str]) -> set[str]:
    groups = defaultdict(list)
    for name in names:
        groups[stem(name)].append(name)
    order = sorted(groups)
    random.Random(_SEED).shuffle(order)
    chosen: list[str] = []
    for each in order:
        if len(groups[each]) <= 6 and len(chosen) + len(groups[each]) <= HELDOUT_CONCEPTS:
            chosen += groups[each]
    return set(chosen)
