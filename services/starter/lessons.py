"""Collects what is trained on. The same comes out every time: splits, drawings and speakers depend on seeds alone."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from embedmesh_encoder.audio import AudioSpec
from embedmesh_encoder.image import ImageProcessor, ImageSpec
from starter import train_audio, train_image
from starter.concepts import training_captions
from starter.material import BUILD
from starter.pictures import styles
from starter.scenes import draw_scene, scenes
from starter.sounds import SOUNDS, synthetic
from starter.speech import Espeak, Flite, phrases, spoken, training_speakers
from starter.train_audio import LONGEST, AudioLessons
from starter.train_image import STORED, ImageLessons
from starter.vectors import text_vectors

__all__ = ["audio_lessons", "image_lessons"]

Float32 = NDArray[np.float32]

_IMAGE_SEED: Final = 7
# Drawings of every scene that is trained on.
_DRAWINGS: Final = 10
# How often a picture is called by its name, where it may be called otherwise.
_NAME_SHARE: Final = 0.4
_AUDIO_SEED: Final = 11
# In the first course each phrase is spoken so often by espeak-ng, and so many phrases by each voice of flite.
_VOICES: Final = 16
_FLITE: Final = 2500
_FLITE_KIND: Final = 1
_FLITE_SHARES: Final = {1: 0.12, 2: 0.4}
# A speaker says so many phrases in turn.
_TURN: Final = 30
_SOUND_CLIPS: Final = 4000


def image_lessons() -> ImageLessons:
    """Draw and describe everything that is trained on."""
    captions_of = {name: list(captions) for name, captions in training_captions().items()}
    trained_scenes = [scene for scene in scenes() if not scene.heldout]
    captions_of |= {scene.caption: [scene.caption] for scene in trained_scenes}
    captions = sorted({caption for those in captions_of.values() for caption in those})
    place = {caption: i for i, caption in enumerate(captions)}
    vectors = text_vectors(captions)
    names = list(captions_of)
    draw = np.random.default_rng(_IMAGE_SEED)
    choices = []
    shares = np.zeros((len(names), len(captions)), np.float32)
    for row, name in zip(shares, names, strict=True):
        others = captions_of[name][1:]
        row[place[captions_of[name][0]]] = _NAME_SHARE if others else 1.0
        row[[place[caption] for caption in others]] = (1 - _NAME_SHARE) / max(1, len(others))
        choices.append(draw.choice(len(captions), 64, p=row / row.sum()))
    goals = shares @ vectors
    goals /= np.linalg.norm(goals, axis=1, keepdims=True)

    number = {name: i for i, name in enumerate(names)}
    pictures, subjects = [], []
    for style, drawn in styles().items():
        if style != "openmoji":
            for name in sorted(set(drawn) & set(captions_of)):
                pictures.append(drawn[name])
                subjects.append(number[name])
    emoji = len(pictures)
    chance = random.Random(_IMAGE_SEED)
    for scene in trained_scenes:
        for _ in range(_DRAWINGS):
            rgb = draw_scene(scene, chance)
            pictures.append(np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)]))
            subjects.append(number[scene.caption])
    processor = ImageProcessor(ImageSpec.from_preprocessor_config(train_image.PREPROCESSOR))
    clean = np.stack([processor(Image.fromarray(over_white(each))) for each in pictures])
    stacked = np.stack([_premultiplied(each) for each in pictures])
    return ImageLessons(
        pictures=torch.from_numpy(stacked.transpose(0, 3, 1, 2).copy()),
        clean=torch.from_numpy(clean),
        subjects=torch.tensor(subjects),
        scene=torch.arange(len(subjects)) >= emoji,
        captions=torch.from_numpy(vectors),
        shares=torch.from_numpy(shares),
        choices=torch.from_numpy(np.stack(choices)),
        goals=torch.from_numpy(goals),
    )


def over_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay a picture over white, as the product does: uint8 [..., 4] -> [..., 3]."""
    white = Image.new("RGBA", (rgba.shape[1], rgba.shape[0]), (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, Image.fromarray(rgba)).convert("RGB"))


def _premultiplied(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    wide = rgba.astype(np.uint16)
    wide[..., :3] = wide[..., :3] * wide[..., 3:] // 255
    return np.asarray(Image.fromarray(wide.astype(np.uint8)).resize((STORED, STORED), Image.Resampling.LANCZOS))


def audio_lessons(course: Literal[1, 2]) -> AudioLessons:
    """Speak everything, or read back what was spoken before.

    Args:
        course: The first is mostly espeak-ng, whose voices are many; the second has much more of flite, whose
            voices are built from recordings of people.
    """
    captions = [*phrases(), *SOUNDS.values()]
    first = _clips("clips", lambda: _first_course(captions))
    if course == 2:
        kept = first.select(np.flatnonzero(first.kind != _FLITE_KIND))
        clips = kept.join(_clips("clips-flite", lambda: _much_of_flite(captions)))
    else:
        clips = first
    espeak = Espeak()
    return AudioLessons(
        frames=clips.frames,
        starts=clips.starts,
        said=clips.said,
        vectors=torch.from_numpy(text_vectors(captions)),
        kind=clips.kind,
        spelled=[espeak.phonemes(spoken(phrase)) for phrase in phrases()],
        flite_share=_FLITE_SHARES[course],
    )


@dataclass(frozen=True)
class _Clips:
    """Features of clips, as in `AudioLessons`."""

    frames: NDArray[np.float16]
    starts: NDArray[np.int64]
    said: NDArray[np.int64]
    kind: NDArray[np.int64]

    def select(self, those: NDArray[np.int64]) -> _Clips:
        """Give some of the clips."""
        lengths = np.diff(self.starts)[those]
        frames = np.concatenate([self.frames[self.starts[i] : self.starts[i + 1]] for i in those])
        return _Clips(frames, np.concatenate([[0], np.cumsum(lengths)]), self.said[those], self.kind[those])

    def join(self, other: _Clips) -> _Clips:
        """Give these, and others behind them."""
        return _Clips(
            np.concatenate([self.frames, other.frames]),
            np.concatenate([self.starts, self.starts[-1] + other.starts[1:]]),
            np.concatenate([self.said, other.said]),
            np.concatenate([self.kind, other.kind]),
        )


def _clips(name: str, speak: Callable[[], Iterator[tuple[Float32, int, int]]]) -> _Clips:
    """Read clips back, or make them: `speak` gives waves, captions and kinds."""
    file = BUILD / f"{name}.npz"
    if not file.is_file():
        spec = AudioSpec.from_preprocessor_config(train_audio.PREPROCESSOR)
        frames: list[NDArray[np.float16]] = []
        said: list[int] = []
        kinds: list[int] = []
        for wave, caption, kind in speak():
            frames.append(spec.features(wave)["input_features"][:LONGEST].astype(np.float16))
            said.append(caption)
            kinds.append(kind)
            if len(frames) % 500 == 0:
                sys.stderr.write(f"\r{len(frames)} clips   ")
        starts = np.cumsum([0, *map(len, frames)])
        np.savez(file, frames=np.concatenate(frames), starts=starts, said=np.array(said), kind=np.array(kinds))
    with np.load(file) as saved:
        return _Clips(saved["frames"], saved["starts"], saved["said"], saved["kind"])


def _first_course(captions: list[str]) -> Iterator[tuple[Float32, int, int]]:
    chance = random.Random(_AUDIO_SEED)
    espeak, flite = Espeak(), Flite()
    speakers = training_speakers(chance)
    order = list(range(len(phrases())))
    for _ in range(_VOICES):
        chance.shuffle(order)
        for start in range(0, len(order), _TURN):
            speaker = next(speakers)
            for i in order[start : start + _TURN]:
                yield espeak.say(spoken(captions[i]), speaker), i, 0
    for voice in ("awb", "rms"):
        for i in chance.sample(range(len(phrases())), _FLITE):
            yield flite.say(spoken(captions[i]), voice), i, _FLITE_KIND
    for _ in range(_SOUND_CLIPS):
        name = chance.choice(list(SOUNDS))
        yield synthetic(name, chance, unseen=False), captions.index(SOUNDS[name]), 2


def _much_of_flite(captions: list[str]) -> Iterator[tuple[Float32, int, int]]:
    chance = random.Random(_AUDIO_SEED + 1)
    flite = Flite()
    for voice in ("kal", "kal", "kal", "awb", "rms"):
        for i in range(len(phrases())):
            stretch, pitch = chance.uniform(0.8, 1.25), chance.uniform(80, 160) if voice == "kal" else 0.0
            yield flite.say(spoken(captions[i]), voice, stretch=stretch, pitch=pitch), i, _FLITE_KIND
