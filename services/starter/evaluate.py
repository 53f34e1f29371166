"""The examination of the starter towers, as they are served: recalls beside gates, chance and simple baselines.

Uses the product's own decoding, pre-processing and backend on files in memory, and no torch. `FIGURES` keeps the
outcome.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from embedmesh_encoder.audio import AudioSpec
from embedmesh_encoder.image.decode import decode
from starter.concepts import concepts, heldout_keywords
from starter.exam import clips, noto, openmoji, scene_pictures, unlike_training
from starter.material import ROOT
from starter.served import Tower
from starter.sounds import SOUNDS
from starter.speech import Espeak, Speaker, phrases, spoken
from starter.vectors import ranks, recalls, text_vectors

__all__ = ["FIGURES", "Figure", "evaluate", "save", "table"]

MODELS: Final = ROOT / "services" / "starter" / "models"
FIGURES: Final = ROOT / "services" / "starter" / "figures.json"

# Parts of the examination that are told apart: title, clips, gate.
_VOICES: Final[dict[str, tuple[tuple[str, slice, dict[str, float]], ...]]] = {
    "festival": (
        ("of these kal, whose recordings flite has too", slice(None, 150), {}),
        ("of these slt, a voice never heard either", slice(150, None), {}),
    ),
}
# Between these a README holds the table.
_BEGIN: Final = "<!-- figures -->"
_END: Final = "<!-- /figures -->"

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Figure:
    """The outcome of one test.

    Attributes:
        test: What was asked.
        tower: "image", "audio" or "both".
        queries: How many questions.
        gallery: Among how many the answer was sought.
        recall: R@1, R@5 and R@10 in percent.
        gate: Lowest value that is accepted, by recall; from the project's study of what such towers can do.
        chance: R@1 of guessing, in percent.
        baseline: What a simple method reaches, by its name: R@1 in percent.
    """

    test: str
    tower: str
    queries: int
    gallery: int
    recall: dict[str, float]
    gate: dict[str, float]
    chance: float
    baseline: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether every gate is cleared."""
        return all(self.recall[name] >= least for name, least in self.gate.items())


def evaluate(models: Path = MODELS) -> list[Figure]:
    """Examine both towers."""
    return [*_images(Tower(models / "image")), *_sounds(Tower(models / "audio"), Tower(models / "image"))]


def _images(tower: Tower) -> list[Figure]:
    names = [concept.name for concept in concepts()]
    heldout = np.array([concept.heldout for concept in concepts()])
    files = noto()
    plain, words = tower(list(files.values())), text_vectors(names)
    everything = np.arange(len(names))
    found = [
        _figure(
            "text -> image: trained concepts, Noto",
            "image",
            ranks(words[~heldout], plain, everything[~heldout]),
            len(names),
            gate={"R@1": 80.0, "R@5": 95.0},
        )
    ]
    seen = [name for name, hidden in zip(names, heldout, strict=True) if not hidden]
    changed = list(plain)
    changed_files = unlike_training(seen)
    for row, vector in zip(everything[~heldout], tower(changed_files), strict=True):
        changed[row] = vector
    clean = [files[name] for name in names]
    found.append(
        _figure(
            "text -> image: the same, changed as never in training",
            "image",
            ranks(words[~heldout], np.stack(changed), everything[~heldout]),
            len(names),
            gate={"R@1": 50.0},
            baseline={
                "colour histogram, picture to picture": _nearest(
                    changed_files, clean, everything[~heldout], _histogram
                ),
                "8 x 8 thumbnail, picture to picture": _nearest(changed_files, clean, everything[~heldout], _thumbnail),
            },
        )
    )
    found.append(
        _figure(
            "text -> image: concepts never seen, among themselves, Noto",
            "image",
            ranks(words[heldout], plain[heldout], np.arange(heldout.sum())),
            int(heldout.sum()),
            gate={"R@5": 35.0},
        )
    )
    other = openmoji()
    right = np.array([name in other and not hidden for name, hidden in zip(names, heldout, strict=True)])
    strange_files = [other[name] for name, use in zip(names, right, strict=True) if use]
    strange = tower(strange_files)
    found.append(
        _figure(
            "text -> image: trained concepts, OpenMoji (a style never seen)",
            "image",
            ranks(words[right], strange, np.arange(right.sum())),
            int(right.sum()),
        )
    )
    thumbnail = _nearest(strange_files, clean, everything[right], _thumbnail)
    found.append(
        _figure(
            "image -> image: OpenMoji's picture to Noto's",
            "image",
            ranks(strange, plain, everything[right]),
            len(names),
            gate={"R@1": thumbnail},
            baseline={"8 x 8 thumbnail": thumbnail},
        )
    )
    keywords = heldout_keywords()
    fitting = np.array([[keyword in concept.keywords for concept in concepts()] for keyword in keywords])
    asked = text_vectors(list(keywords))
    ceiling = recalls(ranks(asked, words, fitting))
    found.append(
        _figure(
            "text -> image: words never trained on, a right one among five",
            "image",
            ranks(asked, plain, fitting),
            len(names),
            gate={"R@5": 60.0},
            baseline={"the emoji's names in place of pictures, R@5": ceiling["R@5"]},
            chance=float(fitting.mean()) * 100,
        )
    )
    drawn, rows, captions = scene_pictures()
    found.append(
        _figure(
            "image -> text: scenes of combinations never seen",
            "image",
            ranks(tower(drawn), text_vectors(captions), rows),
            len(captions),
            gate={"R@5": 45.0},
        )
    )
    return found


def _sounds(tower: Tower, image: Tower) -> list[Figure]:
    said = [*phrases()]
    row = {phrase: i for i, phrase in enumerate(said)}
    words = text_vectors(said)
    templates = _templates(said)
    found = []
    for kind, title, gate in (
        ("espeak", "speech -> text: espeak-ng, voices never heard", {"R@1": 85.0}),
        ("flite", "speech -> text: flite, a voice never heard", {}),
        ("festival", "speech -> text: festival, an engine never heard", {"R@1": 35.0}),
    ):
        part = clips(kind)
        right = np.array([row[word] for word in part.words])
        those, simple = ranks(tower(part.waves), words, right), ranks(_stretched(part.waves), templates, right)
        for name, some, least in ((title, slice(None), gate), *_VOICES.get(kind, ())):
            base = {"nearest mel template": recalls(simple[some])["R@1"]}
            found.append(_figure(name, "audio", those[some], len(said), gate=least, baseline=base))
    names = [concept.name for concept in concepts()]
    part = clips("names")
    found.append(
        _figure(
            "speech -> image: voices never heard, Noto",
            "both",
            ranks(
                tower(part.waves), image(list(noto().values())), np.array([names.index(each) for each in part.words])
            ),
            len(names),
            gate={"R@5": 30.0},
        )
    )
    part = clips("sounds")
    kinds = list(SOUNDS.values())
    found.append(
        _figure(
            "sound -> text: plain sounds, among their kinds",
            "audio",
            ranks(tower(part.waves), text_vectors(kinds), np.array([kinds.index(each) for each in part.words])),
            len(kinds),
            gate={"R@1": 90.0},
        )
    )
    return found


def _figure(
    test: str,
    tower: str,
    those: NDArray[np.int64],
    gallery: int,
    *,
    gate: dict[str, float] | None = None,
    baseline: dict[str, float] | None = None,
    chance: float | None = None,
) -> Figure:
    chance = 100 / gallery if chance is None else chance
    return Figure(test, tower, len(those), gallery, recalls(those), gate or {}, round(chance, 2), baseline or {})


def _nearest(queries: Sequence[bytes], gallery: Sequence[bytes], right: NDArray[np.int64], look: Any) -> float:
    def rows(files: Sequence[bytes]) -> Float32:
        found = np.stack([look(decode(file)) for file in files]).astype(np.float32)
        found -= found.mean(axis=1, keepdims=True)
        unit: Float32 = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6)
        return unit

    return recalls(ranks(rows(queries), rows(gallery), right))["R@1"]


def _thumbnail(image: Image.Image) -> NDArray[Any]:
    return np.asarray(image.resize((8, 8), Image.Resampling.BOX)).ravel()


def _histogram(image: Image.Image) -> NDArray[Any]:
    levels = np.asarray(image).reshape(-1, 3) // 64
    return np.bincount(levels @ np.array([16, 4, 1]), minlength=64)


def _templates(said: Sequence[str]) -> Float32:
    """Every phrase by one plain voice."""
    espeak, speaker = Espeak(), Speaker("en-us", "", 165, 50, 50)
    return _stretched([espeak.say(spoken(each), speaker) for each in said])


def _stretched(waves: Sequence[Float32]) -> Float32:
    """Log-mel of each sound brought to 24 frames, of mean 0 and length 1."""
    spec = AudioSpec.from_preprocessor_config(json.loads((MODELS / "audio" / "preprocessor_config.json").read_text()))
    rows = []
    for wave in waves:
        mel = spec.features(wave)["input_features"]
        parts = np.array_split(np.arange(max(24, len(mel))) * len(mel) // max(24, len(mel)), 24)
        row = np.stack([mel[part].mean(axis=0) for part in parts]).ravel()
        rows.append((row - row.mean()) / (np.linalg.norm(row - row.mean()) + 1e-6))
    return np.stack(rows).astype(np.float32)


def table(figures: Sequence[Figure]) -> str:
    """Give the figures as a table of Markdown."""
    lines = [
        "| test | questions, gallery | R@1 | R@5 | R@10 | gate | chance | baseline |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in figures:
        gates = ", ".join(f"{name} >= {least:g}" for name, least in each.gate.items())
        verdict = f"{gates}: {'met' if each.passed else 'MISSED'}" if gates else ""
        base = "; ".join(f"{name} {value:g}" for name, value in each.baseline.items())
        recall = " | ".join(f"{each.recall[name]:g}" for name in ("R@1", "R@5", "R@10"))
        lines.append(
            f"| {each.test} | {each.queries}, {each.gallery} | {recall} | {verdict} | {each.chance:g} | {base} |"
        )
    return "\n".join(lines)


def save(figures: Sequence[Figure]) -> None:
    """Keep the figures beside the models, and write them into the README and the model cards."""
    FIGURES.write_text(json.dumps([asdict(each) for each in figures], indent=1) + "\n", encoding="utf-8")
    for readme, tower in ((FIGURES.parent, ""), (MODELS / "image", "image"), (MODELS / "audio", "audio")):
        path = readme / "README.md"
        before, _, rest = path.read_text(encoding="utf-8").partition(_BEGIN)
        _, _, after = rest.partition(_END)
        shown = [each for each in figures if tower in ("", each.tower) or each.tower == "both"]
        path.write_text(f"{before}{_BEGIN}\n{table(shown)}\n{_END}{after}", encoding="utf-8")
