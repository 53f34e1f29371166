"""Spoken phrases by three engines.

Who speaks in training, and who is kept for the examination:

| engine | training | examination |
| --- | --- | --- |
| espeak-ng | six accents, most variants, many rates and pitches | two accents more, every fifth variant |
| flite | awb, kal, rms | slt |
| festival | nothing | kal (diphones), slt (HTS) |

festival's kal is made of the same recordings as flite's: the engine is new to the tower, the person is not. Its slt is
a person that the tower has never heard.
"""

from __future__ import annotations

import ctypes
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from ctypes.util import find_library
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from starter.concepts import training_captions
from starter.sounds import RATE

__all__ = [
    "ACCENTS", "TEST_ACCENTS", "Espeak", "Flite", "Speaker", "festival", "phrases", "spoken", "test_speakers",
    "training_speakers",
]  # fmt: skip

Float32 = NDArray[np.float32]

ACCENTS: Final = ("en-us", "gmw/en", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
TEST_ACCENTS: Final = ("en-gb-scotland", "en-us-nyc")
_VARIANTS: Final = Path("/usr/lib/x86_64-linux-gnu/espeak-ng-data/voices/!v")
_LONGEST_WORDS: Final = 6
_SEED: Final = 97


@dataclass(frozen=True)
class Speaker:
    """A voice of espeak-ng: accent, variant, words a minute, pitch and its range (0 to 100)."""

    accent: str
    variant: str
    rate: int
    pitch: int
    range: int

    @property
    def voice(self) -> str:
        """The name espeak-ng knows it by."""
        return f"{self.accent}+{self.variant}" if self.variant else self.accent


@cache
def phrases() -> tuple[str, ...]:
    """Give all that is spoken in training: what trained emoji are called, as far as it can be said."""
    those = {spoken(caption): caption for captions in training_captions().values() for caption in captions}
    return tuple(sorted(caption for said, caption in those.items() if said))


def spoken(caption: str) -> str:
    """Give how a caption is said, in small letters; "" when it is no words."""
    said = caption.lower().replace("flag: ", "flag of ").replace("&", "and").replace("\u2019", "'")
    said = re.sub(r"[“”!:.,()]", " ", said)
    said = " ".join(said.split())
    right = re.fullmatch(r"[a-z][a-z' -]*[a-z]", said) and len(said.split()) <= _LONGEST_WORDS and len(said) >= 3
    return said if right else ""


@cache
def _variants() -> tuple[list[str], list[str]]:
    """Give the variants of voices for training and those for the examination; those that only whisper are left out."""
    names = sorted(each.name for each in _VARIANTS.iterdir() if "whisper" not in each.name.lower())
    return [name for i, name in enumerate(names) if i % 5], names[::5]


def training_speakers(chance: random.Random) -> Iterator[Speaker]:
    """Give random speakers without end."""
    while True:
        variant = chance.choice(["", *_variants()[0]])
        yield Speaker(
            chance.choice(ACCENTS), variant, chance.randint(120, 210), chance.randint(15, 85), chance.randint(25, 75)
        )


def test_speakers(chance: random.Random, *, accents: Sequence[str]) -> Iterator[Speaker]:
    """Give random speakers with variants that were never heard, and with the accents that are wanted."""
    while True:
        variant = chance.choice(_variants()[1])
        yield Speaker(
            chance.choice(accents), variant, chance.randint(130, 200), chance.randint(20, 80), chance.randint(30, 70)
        )


class Espeak:
    """espeak-ng through its library, which is a hundred times as fast as its command. One for each process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(find_library("espeak-ng") or "libespeak-ng.so.1")
        self._rate: int = self._library.espeak_Initialize(2, 0, None, 0)  # at once, to the callback
        self._parts: list[bytes] = []
        self._voice = ""
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)

        def take(wave: int | None, count: int, _events: object) -> int:
            if wave and count:
                self._parts.append(ctypes.string_at(wave, 2 * count))
            return 0

        self._callback = kind(take)
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_TextToPhonemes.restype = ctypes.c_char_p

    def say(self, said: str, speaker: Speaker) -> Float32:
        """Speak: float32 [n] at `RATE`."""
        library = self._library
        if self._voice != speaker.voice:  # which reads files, and takes longer than to speak
            if library.espeak_SetVoiceByName(speaker.voice.encode()):
                raise ValueError(f"espeak-ng has no voice {speaker.voice}")
            self._voice = speaker.voice
        for parameter, value in ((1, speaker.rate), (3, speaker.pitch), (4, speaker.range)):
            library.espeak_SetParameter(parameter, value, 0)
        self._parts.clear()
        content = said.encode()
        library.espeak_Synth(content, len(content) + 1, 0, 1, 0, 1, None, None)
        library.espeak_Synchronize()
        return _clip(np.frombuffer(b"".join(self._parts), np.int16), self._rate)

    def phonemes(self, said: str) -> list[str]:
        """Give the phonemes of a phrase in American English, stress left out."""
        self._library.espeak_SetVoiceByName(b"en-us")
        self._voice = "en-us"
        text = ctypes.c_char_p(said.encode())
        found: list[str] = []
        while text.value:
            separated = (ord("_") << 8) | 0x02
            part = self._library.espeak_TextToPhonemes(ctypes.byref(text), 1, separated)
            found += re.split(r"[_ \n]+", (part or b"").decode())
        cleaned = (re.sub("[ˈˌ\u200d]", "", each) for each in found)
        return [each for each in cleaned if each]


class Flite:
    """flite through its library. Voices: awb, kal, rms, slt."""

    class _Wave(ctypes.Structure):
        _fields_ = (
            ("type", ctypes.c_char_p),
            ("sample_rate", ctypes.c_int),
            ("num_samples", ctypes.c_int),
            ("num_channels", ctypes.c_int),
            ("samples", ctypes.POINTER(ctypes.c_short)),
        )

    def __init__(self) -> None:
        for name in ("flite", "flite_usenglish", "flite_cmulex"):
            library = ctypes.CDLL(f"lib{name}.so.1", mode=ctypes.RTLD_GLOBAL)
            if name == "flite":
                self._library = library
        self._library.flite_init()
        self._library.flite_text_to_wave.restype = ctypes.POINTER(self._Wave)
        self._library.flite_text_to_wave.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
        self._library.delete_wave.argtypes = (ctypes.c_void_p,)
        self._library.flite_feat_set_float.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float)
        self._voices: dict[str, Any] = {}

    def say(self, said: str, voice: str, *, stretch: float = 1.0, pitch: float = 0.0) -> Float32:
        """Speak: float32 [n] at `RATE`.

        Args:
            said: The words.
            voice: Who speaks.
            stretch: How many times as long as the voice's own speech.
            pitch: In hertz, for kal alone; 0 for its own.
        """
        if voice not in self._voices:
            library = ctypes.CDLL(f"libflite_cmu_us_{voice}.so.1", mode=ctypes.RTLD_GLOBAL)
            register = getattr(library, f"register_cmu_us_{voice}")
            register.restype = ctypes.c_void_p
            self._voices[voice] = register(None)
        # The second member of `cst_voice` are its features.
        features = ctypes.cast(self._voices[voice], ctypes.POINTER(ctypes.c_void_p))[1]
        self._library.flite_feat_set_float(features, b"duration_stretch", stretch)
        if pitch:
            self._library.flite_feat_set_float(features, b"int_f0_target_mean", pitch)
        wave = self._library.flite_text_to_wave(said.encode(), self._voices[voice])
        samples = np.ctypeslib.as_array(wave.contents.samples, (wave.contents.num_samples,)).copy()
        rate = wave.contents.sample_rate
        self._library.delete_wave(wave)
        return _clip(samples, rate)


def festival(said: Sequence[str], voice: str) -> list[Float32]:
    """Speak phrases with festival, all in one process. Voices: kal_diphone, cmu_us_slt_arctic_hts."""
    with tempfile.TemporaryDirectory() as folder:
        lines = [f"(voice_{voice})"]
        for i, each in enumerate(said):
            lines.append(f'(utt.save.wave (utt.synth (Utterance Text "{each}")) "{folder}/{i}.wav" \'riff)')
        script = Path(folder) / "say.scm"
        script.write_text("\n".join(lines), encoding="utf-8")
        subprocess.run(["festival", "-b", str(script)], check=True, capture_output=True, timeout=3600)  # noqa: S603, S607
        clips = []
        for i in range(len(said)):
            samples, rate = soundfile.read(f"{folder}/{i}.wav", dtype="int16")
            clips.append(_clip(samples, rate))
    return clips


def _clip(samples: NDArray[np.int16], rate: int) -> Float32:
    """Bring to `RATE`, and cut silence off both ends but for a tenth of a second."""
    wave = samples.astype(np.float32) / 32768
    if rate != RATE:
        wave = soxr.resample(wave, rate, RATE)
    loud = np.flatnonzero(np.abs(wave) > 0.01 * max(1e-6, float(np.abs(wave).max())))
    if not len(loud):
        return np.zeros(RATE // 10, np.float32)
    edge = RATE // 10
    return wave[max(0, loud[0] - edge) : loud[-1] + edge].astype(np.float32)
