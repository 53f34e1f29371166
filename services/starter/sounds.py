"""Plain sounds, made by formula."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["RATE", "SOUNDS", "synthetic"]

Float32 = NDArray[np.float32]

# Of all clips, in hertz.
RATE: Final = 16_000
# What each kind of sound is called.
SOUNDS: Final[Mapping[str, str]] = {
    "sine": "a steady tone",
    "rise": "a rising whistle",
    "fall": "a falling whistle",
    "siren": "a wailing siren",
    "noise": "static noise",
    "clicks": "rapid clicking",
    "chord": "a musical chord",
    "pulses": "a beeping alarm",
}


def synthetic(kind: str, chance: random.Random, *, unseen: bool) -> Float32:
    """Make a sound of one of `SOUNDS`: float32 [n] at `RATE`.

    Pitches and speeds of the examination (`unseen`) lie between those of training, in gaps that training leaves out.
    """

    def between(low: float, high: float) -> float:
        """Logarithmic; odd tenths of the range are kept for the examination."""
        while True:
            place = chance.random()
            if (int(place * 10) % 2 == 1) == unseen:
                return float(low * (high / low) ** place)

    seconds = chance.uniform(0.7, 1.8)
    t = np.arange(int(seconds * RATE)) / RATE
    if kind == "noise":
        wave = np.random.default_rng(chance.getrandbits(32)).standard_normal(len(t))
        keep = between(0.05, 1.0)  # a one-pole low pass; 1 leaves it white
        wave = _smoothed(wave, keep)
    elif kind == "clicks":
        wave = np.zeros(len(t))
        for start in np.arange(0.02, seconds, 1 / between(5, 25)):
            length = int(RATE * chance.uniform(0.002, 0.006))
            at = int(start * RATE)
            click = np.exp(-np.arange(length) / (length / 4)) * np.sign(np.sin(np.arange(length) * between(0.5, 2)))
            wave[at : at + length] += click[: max(0, len(wave) - at)]
    elif kind == "chord":
        root = between(130, 520)
        intervals = chance.choice(((0, 4, 7), (0, 3, 7), (0, 4, 7, 12), (0, 5, 9)))
        tones = [np.sin(2 * np.pi * root * 2 ** (i / 12) * t) / n for i in intervals for n in (1, 2)]
        wave = np.sum(tones, axis=0)
    elif kind == "pulses":
        on = np.sin(2 * np.pi * between(2, 6) * t) > 0
        wave = np.sin(2 * np.pi * between(600, 2500) * t) * on
    else:
        if kind == "sine":
            frequency = np.full(len(t), between(150, 3000))
        elif kind == "siren":
            frequency = between(500, 1100) * 2 ** (0.6 * np.sin(2 * np.pi * between(1.2, 4) * t))
        else:
            frequency = between(150, 700) * between(3, 8) ** (t / seconds if kind == "rise" else 1 - t / seconds)
        wave = np.sin(2 * np.pi * np.cumsum(frequency) / RATE)
    wave = np.asarray(wave, np.float32)
    fade = np.minimum(1, np.minimum(np.arange(len(wave)), np.arange(len(wave))[::-1]) / 160)
    return (0.3 * wave * fade / max(1e-6, float(np.abs(wave).max()))).astype(np.float32)


def _smoothed(wave: NDArray[np.float64], keep: float) -> NDArray[np.float64]:
    spectrum = np.fft.rfft(wave)
    turn = 2 * math.pi * np.arange(len(spectrum)) / len(wave)
    return np.fft.irfft(spectrum * keep / np.abs(1 - (1 - keep) * np.exp(-1j * turn)), len(wave))
