"""From one channel of samples to what a model reads, equal to transformers' feature extractors, with numpy alone.

`AudioSpec.from_preprocessor_config` reads the `preprocessor_config.json` of Whisper, AST, CLAP and wav2vec2 models
(and of all that use their extractors: HuBERT, WavLM, data2vec), and of our own `LogMelSpec`. Calculations are in
float64 and rounded to complex64 and float32 where `transformers.audio_utils.spectrogram` does it.

Three things differ from transformers on purpose:

* CLAP takes a random window of a long sound ("rand_trunc"), or three random ones next to the shrunk whole
  ("fusion"). Here the same sound gives the same vector: the first window (the last under truncation START, or
  all of them averaged, see `preparer.py`), and the windows in the middle of the front, middle and back thirds.
* A sound too short for a single frame is filled up with silence; transformers fails.
* CLAP "fusion" marks one random sound of a batch as long when none is. Here, as for a batch of one there, every
  short sound is marked, so that a vector does not depend on its company.
"""

# ruff: noqa: D102  (methods are described by AudioSpec)
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray

from embedmesh_encoder.model import ModelError

__all__ = ["AstSpec", "AudioSpec", "ClapSpec", "LogMelSpec", "RawSpec", "WhisperSpec", "mel_filters"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
MelScale = Literal["htk", "slaney", "kaldi"]

# Frames that are transformed together: enough for numpy to be fast, few enough for the cache.
_BLOCK_FRAMES: Final = 256
# Keys of preprocessor_config.json that change no number: what the library writes besides the settings,
# what it derives from them anew, and what only its callers may ask for.
_IGNORED: Final = frozenset(
    {
        "feature_extractor_type", "processor_class", "transformers_version", "auto_map", "_processor_class",
        "return_attention_mask", "model_input_names", "device", "return_tensors",
    }
)  # fmt: skip


class AudioSpec(ABC):
    """How a model wants its sound.

    Attributes:
        type_name: The `feature_extractor_type` it is known by.
        input_name: Name of the features among the feeds of `features`.
        sampling_rate: In hertz.
    """

    type_name: ClassVar[str]
    input_name: ClassVar[str]
    ignored: ClassVar[frozenset[str]] = frozenset()
    # Settings that are read only to see that they have the one value that is implemented.
    fixed_settings: ClassVar[Mapping[str, Any]] = {"padding_value": 0.0, "padding_side": "right", "dither": 0.0}

    sampling_rate: int

    @staticmethod
    def from_preprocessor_config(config: Mapping[str, Any]) -> AudioSpec:
        """Read a `preprocessor_config.json`; what it leaves out is as the extractor's class has it.

        Raises:
            ModelError: An unknown extractor, a setting that is unknown (it may change the numbers) or out of range.
        """
        name = config.get("feature_extractor_type")
        spec = _SPECS.get(name) if isinstance(name, str) else None
        if spec is None:
            known = ", ".join(sorted(_SPECS))
            raise ModelError(f"feature_extractor_type {name!r} is not supported; these are: {known}")
        kinds = {field.name: _KINDS[str(field.type)] for field in fields(spec)}  # type: ignore[arg-type]  # (dataclasses)
        problems = [problem for key, value in config.items() if (problem := _problem(spec, kinds, key, value))]
        if problems:
            raise ModelError("the audio pre-processing cannot be reproduced: " + "; ".join(problems))
        try:
            return spec(**{key: value for key, value in config.items() if key in kinds})
        except ValueError as error:
            raise ModelError(f"the audio pre-processing cannot be reproduced: {error}") from None

    def to_preprocessor_config(self) -> dict[str, Any]:
        """Write what `from_preprocessor_config` reads."""
        return {"feature_extractor_type": self.type_name, **asdict(self)}  # type: ignore[call-overload]  # (dataclass)

    @property
    def fixed_units(self) -> int:
        """Units of the one length that the model reads; 0 when it reads any length."""
        return 0

    @property
    def reads_all(self) -> bool:
        """Whether a sound of any length is brought to the one length without cutting it."""
        return False

    @property
    @abstractmethod
    def unit_samples(self) -> int:
        """Samples from one unit to the next."""

    @property
    def overlap_units(self) -> int:
        """Units that two windows share which lie end to end."""
        return 0

    def samples(self, units: int) -> int:
        """Give the fewest samples that fill so many units."""
        return units * self.unit_samples

    def units(self, samples: int) -> int:
        """Count the units of a sound; more than n exactly if it has more samples than n units can take."""
        return max(1, -(-samples // self.unit_samples))

    def hidden_units(self, units: NDArray[np.int64], hidden: int) -> NDArray[np.int64]:
        """Say how many of a graph's hidden states are about each sound.

        Args:
            units: What each sound fills of the feeds, along their padded axis, int64 [n].
            hidden: Hidden states that the graph gave for the longest.
        """
        longest = int(units.max())
        return np.clip(-(-units * hidden // longest), 1, hidden)

    @abstractmethod
    def features(self, samples: Float32) -> dict[str, NDArray[Any]]:
        """Give what the model reads of a sound that is no longer than it can read, without the batch's axis.

        Args:
            samples: float32 [n] at `sampling_rate`, n >= 1, finite.
        """


@dataclass(frozen=True)
class WhisperSpec(AudioSpec):
    """`WhisperFeatureExtractor`: 30 seconds of log-mel, float32 [feature_size, frames]. A unit is a frame."""

    type_name = "WhisperFeatureExtractor"
    input_name = "input_features"
    ignored = frozenset({"n_samples", "nb_max_frames", "mel_filters", "do_normalize"})

    feature_size: int = 80
    sampling_rate: int = 16_000
    hop_length: int = 160
    chunk_length: int = 30
    n_fft: int = 400

    def __post_init__(self) -> None:
        _positive(self, "feature_size", "sampling_rate", "hop_length", "chunk_length", "n_fft")
        if self._window_samples % self.hop_length:
            raise ValueError("hop_length must divide chunk_length * sampling_rate")

    @property
    def fixed_units(self) -> int:
        return self._window_samples // self.hop_length

    @property
    def unit_samples(self) -> int:
        return self.hop_length

    def features(self, samples: Float32) -> dict[str, NDArray[Any]]:
        wave = _padded(samples[: self._window_samples], self._window_samples)
        wave = np.pad(wave, self.n_fft // 2, mode="reflect")
        # The last frame begins where the sound ends and is left out.
        mel = _spectrogram(wave, _hann(self.n_fft), self.hop_length, self.n_fft, self._filters)[:-1]
        log: Float32 = np.log10(np.maximum(mel, 1e-10)).T.astype(np.float32)
        log = (np.maximum(log, log.max() - np.float32(8)) + np.float32(4)) / np.float32(4)
        return {self.input_name: np.ascontiguousarray(log)}

    @property
    def _window_samples(self) -> int:
        return self.chunk_length * self.sampling_rate

    @cached_property
    def _filters(self) -> Float64:
        return mel_filters(
            1 + self.n_fft // 2, self.feature_size, 0.0, 8000.0, self.sampling_rate, scale="slaney", slaney_norm=True
        )


@dataclass(frozen=True)
class AstSpec(AudioSpec):
    """`ASTFeatureExtractor` without torchaudio: Kaldi's filter bank, float32 [max_length, num_mel_bins].

    Frames of 25 ms every 10 ms at 16 kHz (400 and 160 samples at any rate, as in the reference). A unit is a frame.
    """

    type_name = "ASTFeatureExtractor"
    input_name = "input_values"
    ignored = frozenset({"feature_size", "mel_filters", "window"})

    sampling_rate: int = 16_000
    num_mel_bins: int = 128
    max_length: int = 1024
    do_normalize: bool = True
    mean: float = -4.2677393
    std: float = 4.5689974

    def __post_init__(self) -> None:
        _positive(self, "sampling_rate", "num_mel_bins", "max_length", "std")

    @property
    def fixed_units(self) -> int:
        return self.max_length

    @property
    def unit_samples(self) -> int:
        return 160

    def samples(self, units: int) -> int:
        return 400 + (units - 1) * 160

    def units(self, samples: int) -> int:
        return 1 + max(0, samples - 400) // 160

    def features(self, samples: Float32) -> dict[str, NDArray[Any]]:
        wave = _padded(samples[: self.samples(self.max_length)], 400)
        mel = _spectrogram(wave, np.hanning(400), 160, 512, self._filters, prepare=_kaldi)
        log = np.zeros((self.max_length, self.num_mel_bins), np.float32)
        log[: len(mel)] = np.log(np.maximum(mel, 1.192092955078125e-07))
        if self.do_normalize:
            log = (log - np.float32(self.mean)) / np.float32(self.std * 2)
        return {self.input_name: log}

    @cached_property
    def _filters(self) -> Float64:
        return mel_filters(
            257, self.num_mel_bins, 20.0, self.sampling_rate // 2, self.sampling_rate, scale="kaldi", in_mel_space=True
        )


@dataclass(frozen=True)
class ClapSpec(AudioSpec):
    """`ClapFeatureExtractor`: 10 seconds of log-mel, float32 [1, frames, feature_size].

    A unit is a frame; ten seconds at 48 kHz have 1,001. For "fusion" the features are [4, frames, feature_size],
    and next to them there is `is_longer`, bool [1].
    """

    type_name = "ClapFeatureExtractor"
    input_name = "input_features"
    # top_db is stored and never used by the reference.
    ignored = frozenset({"nb_frequency_bins", "nb_max_samples", "top_db", "mel_filters", "mel_filters_slaney"})

    feature_size: int = 64
    sampling_rate: int = 48_000
    hop_length: int = 480
    max_length_s: int = 10
    fft_window_size: int = 1024
    frequency_min: float = 0.0
    frequency_max: float = 14_000.0
    truncation: str = "fusion"
    padding: str = "repeatpad"

    def __post_init__(self) -> None:
        _positive(self, "feature_size", "sampling_rate", "hop_length", "max_length_s", "fft_window_size")
        _one_of(self, "truncation", "fusion", "rand_trunc")
        _one_of(self, "padding", "repeatpad", "repeat", "pad")
        if self.reads_all and self.feature_size != 64:
            raise ValueError('feature_size must be 64 when truncation is "fusion"')
        if self._window_samples % self.hop_length:
            raise ValueError("hop_length must divide max_length_s * sampling_rate")

    @property
    def fixed_units(self) -> int:
        return self._window_samples // self.hop_length + 1

    @property
    def reads_all(self) -> bool:
        return self.truncation == "fusion"

    @property
    def unit_samples(self) -> int:
        return self.hop_length

    @property
    def overlap_units(self) -> int:
        return 1  # the frame around the last sample of one is the frame around the first of the next

    def samples(self, units: int) -> int:
        return (units - 1) * self.hop_length

    def units(self, samples: int) -> int:
        return -(-samples // self.hop_length) + 1

    def features(self, samples: Float32) -> dict[str, NDArray[Any]]:
        if self.reads_all:
            return self._fused(samples)
        mel = self._log_mel(self._filled(samples[: self._window_samples]))
        return {self.input_name: mel[None]}

    def _fused(self, samples: Float32) -> dict[str, NDArray[Any]]:
        frames = self.fixed_units
        mel = self._log_mel(self._filled(samples))
        longer = np.array([True])  # every sound, see the module
        if len(mel) == frames:
            return {self.input_name: np.stack([mel] * 4), "is_longer": longer}
        starts = [part[len(part) // 2] if len(part) else 0 for part in np.array_split(range(len(mel) - frames + 1), 3)]
        crops = [mel[start : start + frames] for start in starts]
        return {self.input_name: np.stack([_shrunk(mel, frames), *crops]), "is_longer": longer}

    def _filled(self, samples: Float32) -> Float32:
        length = self._window_samples
        if len(samples) >= length:
            return samples
        if self.padding == "repeat":
            return np.resize(samples, length)
        if self.padding == "repeatpad":
            samples = np.tile(samples, length // len(samples))
        return _padded(samples, length)

    def _log_mel(self, wave: Float32) -> Float32:
        wave = np.pad(wave, self.fft_window_size // 2, mode="reflect")
        size = self.fft_window_size
        mel = _spectrogram(wave, _hann(size), self.hop_length, size, self._filters)
        log: Float32 = (10.0 * np.log10(np.maximum(mel, 1e-10))).astype(np.float32)
        return log

    @property
    def _window_samples(self) -> int:
        return self.max_length_s * self.sampling_rate

    @cached_property
    def _filters(self) -> Float64:
        return mel_filters(
            1 + self.fft_window_size // 2,
            self.feature_size,
            self.frequency_min,
            self.frequency_max,
            self.sampling_rate,
            scale="htk" if self.reads_all else "slaney",
            slaney_norm=not self.reads_all,
        )


@dataclass(frozen=True)
class RawSpec(AudioSpec):
    """`Wav2Vec2FeatureExtractor`: the samples themselves, float32 [n], with mean 0 and variance 1.

    A unit is 320 samples, what one hidden state of these models stands for.
    """

    type_name = "Wav2Vec2FeatureExtractor"
    input_name = "input_values"
    ignored = frozenset({"feature_size"})

    sampling_rate: int = 16_000
    do_normalize: bool = True

    # Kernels and strides of the convolutions in front of wav2vec2, HuBERT, WavLM and data2vec.
    _CONVOLUTIONS: ClassVar = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
    _SHORTEST: ClassVar = 400  # gives the convolutions one hidden state

    def __post_init__(self) -> None:
        _positive(self, "sampling_rate")

    @property
    def unit_samples(self) -> int:
        return 320

    def hidden_units(self, units: NDArray[np.int64], hidden: int) -> NDArray[np.int64]:
        for kernel, stride in self._CONVOLUTIONS:
            units = (units - kernel) // stride + 1
        return np.clip(units, 1, hidden)

    def features(self, samples: Float32) -> dict[str, NDArray[Any]]:
        if self.do_normalize:
            # A constant sound has no variance: it becomes silence, as in the reference. float64 inside, so that no
            # finite sound overflows.
            wide = samples.astype(np.float64)
            samples = ((wide - wide.mean()) / np.sqrt(wide.var() + 1e-7)).astype(np.float32)
        return {self.input_name: _padded(samples, self._SHORTEST)}


@dataclass(frozen=True)
class LogMelSpec(AudioSpec):
    """Our own front end: log power in mel bands of a sound of any length, float32 [frames, num_mels].

    The sound is brought to a root mean square of 1 (silence stays silence), cut into frames of `window_length`
    samples every `hop_length`, without centring; each is weighed by a periodic Hann window and transformed. What
    comes out is `(log(power + log_floor) - mean) / std`. A unit is a frame. Training imports this class, so what is
    trained on and what is served cannot drift apart.
    """

    type_name = "EmbedMeshLogMel"
    input_name = "input_features"
    fixed_settings: ClassVar[Mapping[str, Any]] = {}

    sampling_rate: int = 16_000
    window_length: int = 400
    hop_length: int = 160
    n_fft: int = 512
    num_mels: int = 64
    frequency_min: float = 50.0
    frequency_max: float = 7800.0
    mel_scale: str = "htk"
    rms_normalize: bool = True
    log_floor: float = 1e-6
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "sampling_rate", "window_length", "hop_length", "n_fft", "num_mels", "log_floor", "std")
        _one_of(self, "mel_scale", "htk", "slaney", "kaldi")
        if self.n_fft < self.window_length:
            raise ValueError("n_fft must not be smaller than window_length")
        if not 0 <= self.frequency_min < self.frequency_max <= self.sampling_rate / 2:
            raise ValueError("frequency_min and frequency_max must lie, in this order, between 0 and half the rate")

    @property
    def unit_samples(self) -> int:
        return self.hop_length

    def samples(self, units: int) -> int:
        return self.window_length + (units - 1) * self.hop_length

    def units(self, samples: int) -> int:
        return 1 + max(0, samples - self.window_length) // self.hop_length

    def features(self, samples: Float32) -> dict[str, NDArray[Any]]:
        wave = _padded(samples, self.window_length).astype(np.float64)
        if self.rms_normalize:
            rms = np.sqrt(np.mean(np.square(samples, dtype=np.float64)))
            wave /= max(rms, 1e-5)  # -100 dB: below it there is nothing but noise to be raised
        mel = _spectrogram(wave, _hann(self.window_length), self.hop_length, self.n_fft, self._filters)
        return {self.input_name: ((np.log(mel + self.log_floor) - self.mean) / self.std).astype(np.float32)}

    @cached_property
    def _filters(self) -> Float64:
        return mel_filters(
            1 + self.n_fft // 2,
            self.num_mels,
            self.frequency_min,
            self.frequency_max,
            self.sampling_rate,
            scale=self.mel_scale,  # type: ignore[arg-type]  # (checked above)
        )


_SPECS: Final[dict[str, type[AudioSpec]]] = {
    spec.type_name: spec for spec in (WhisperSpec, AstSpec, ClapSpec, RawSpec, LogMelSpec)
}
_KINDS: Final[dict[str, Any]] = {"int": int, "float": int | float, "bool": bool, "str": str}


def _problem(spec: type[AudioSpec], kinds: Mapping[str, Any], key: str, value: Any) -> str | None:
    """Say what is wrong with one setting of a `preprocessor_config.json`."""
    if key in kinds:
        fits = isinstance(value, kinds[key]) and (kinds[key] is bool or not isinstance(value, bool))
        return None if fits else f"{key} = {value!r} is of the wrong type"
    if key in spec.fixed_settings:
        only = spec.fixed_settings[key]
        return None if value == only else f"{key} = {value!r} is not supported, only {only!r}"
    return None if key in _IGNORED | spec.ignored else f"{key} = {value!r} is unknown for {spec.type_name}"


def mel_filters(
    bins: int,
    filters: int,
    lowest: float,
    highest: float,
    sampling_rate: int,
    *,
    scale: MelScale,
    slaney_norm: bool = False,
    in_mel_space: bool = False,
) -> Float64:
    """Triangular filters, equally spaced and half overlapping on a mel scale, as `transformers.audio_utils`.

    Args:
        bins: Frequency bins, from 0 to half the sampling rate.
        filters: How many filters.
        lowest: Where the first filter begins, in hertz.
        highest: Where the last filter ends, in hertz.
        sampling_rate: In hertz.
        scale: "htk" (2595 log10(1 + f/700)), "kaldi" (1127 ln(1 + f/700)) or "slaney" (linear below 1 kHz).
        slaney_norm: Divide each filter by half its width in hertz.
        in_mel_space: Draw the triangles over mels, not over hertz, as Kaldi does.

    Returns:
        float64 [bins, filters].
    """
    to_mel, to_hertz = _MEL_SCALES[scale]
    mels = np.linspace(
        to_mel(np.array([lowest], np.float64))[0], to_mel(np.array([highest], np.float64))[0], filters + 2
    )
    corners = to_hertz(mels)
    if in_mel_space:
        at = to_mel(sampling_rate / ((bins - 1) * 2) * np.arange(bins, dtype=np.float64))
        edges = mels
    else:
        at = np.linspace(0, sampling_rate // 2, bins)
        edges = corners
    slopes = edges[None, :] - at[:, None]
    widths = np.diff(edges)
    bank: Float64 = np.maximum(0.0, np.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]))
    if slaney_norm:
        bank *= 2.0 / (corners[2:] - corners[:-2])
    return bank


def _slaney_to_mel(hertz: Float64) -> Float64:
    above: Float64 = 15.0 + np.log(np.maximum(hertz, 1000.0) / 1000.0) * (27.0 / np.log(6.4))
    return np.where(hertz >= 1000.0, above, 3.0 * hertz / 200.0)


def _slaney_to_hertz(mels: Float64) -> Float64:
    above: Float64 = 1000.0 * np.exp((np.log(6.4) / 27.0) * (mels - 15.0))
    return np.where(mels >= 15.0, above, 200.0 * mels / 3.0)


_MEL_SCALES: Final[dict[MelScale, tuple[Callable[[Float64], Float64], Callable[[Float64], Float64]]]] = {
    "htk": (
        lambda hertz: 2595.0 * np.log10(1.0 + hertz / 700.0),
        lambda mels: 700.0 * (np.power(10.0, mels / 2595.0) - 1.0),
    ),
    "kaldi": (
        lambda hertz: 1127.0 * np.log(1.0 + hertz / 700.0),
        lambda mels: 700.0 * (np.exp(mels / 1127.0) - 1.0),
    ),
    "slaney": (_slaney_to_mel, _slaney_to_hertz),
}


def _spectrogram(
    wave: NDArray[np.floating[Any]],
    window: Float64,
    hop: int,
    n_fft: int,
    filters: Float64,
    *,
    prepare: Callable[[Float64], Float64] | None = None,
) -> Float64:
    """Give the mel power of each whole frame: float64 [frames, filters].

    Args:
        wave: The samples, at least as many as the window has.
        window: float64 [frame length].
        hop: Samples from frame to frame.
        n_fft: Length of the transform; frames are filled up with zeros.
        filters: float64 [n_fft // 2 + 1, filters].
        prepare: Applied to frames, float64 [n, frame length], before the window.
    """
    frames = np.lib.stride_tricks.sliding_window_view(wave, len(window))[::hop]
    mel = np.empty((len(frames), filters.shape[1]))
    for start in range(0, len(frames), _BLOCK_FRAMES):
        block = frames[start : start + _BLOCK_FRAMES].astype(np.float64)
        if prepare is not None:
            block = prepare(block)
        spectrum = np.fft.rfft(block * window, n_fft).astype(np.complex64)  # rounded as in the reference
        power = np.square(spectrum.real, dtype=np.float64) + np.square(spectrum.imag, dtype=np.float64)
        np.matmul(power, filters, out=mel[start : start + _BLOCK_FRAMES])
    return mel


def _kaldi(frames: Float64) -> Float64:
    """Remove each frame's mean and raise its high frequencies by 0.97."""
    frames = frames - frames.mean(axis=1, keepdims=True)
    raised = frames.copy()
    raised[:, 1:] -= 0.97 * frames[:, :-1]
    raised[:, 0] *= 1 - 0.97
    return raised


def _hann(length: int) -> Float64:
    """Periodic, for spectra."""
    return np.hanning(length + 1)[:-1]


def _padded(samples: Float32, length: int) -> Float32:
    """Fill up with silence to at least so many samples."""
    return np.pad(samples, (0, length - len(samples))) if len(samples) < length else samples


def _shrunk(mel: Float32, frames: int) -> Float32:
    """Interpolate between frames, as torch's bilinear `interpolate` without aligned corners; the mel axis stays."""
    # Positions are rounded to float32 as there, where they come from a fused multiply and add: else they would be off
    # by 1e-4 of a frame after a minute, and steep slopes by hundredths of a decibel.
    scale = float(np.float32(len(mel)) / np.float32(frames))
    at = np.maximum((np.arange(frames) + 0.5) * scale - 0.5, 0.0).astype(np.float32)
    low = np.minimum(at.astype(np.int64), len(mel) - 1)
    high = np.minimum(low + 1, len(mel) - 1)
    share = (at - low.astype(np.float32))[:, None]
    shrunk: Float32 = mel[low] * (np.float32(1) - share) + mel[high] * share
    return shrunk


def _positive(spec: AudioSpec, *names: str) -> None:
    for name in names:
        if not 0 < getattr(spec, name) < np.inf:
            raise ValueError(f"{name} must be greater than 0, got {getattr(spec, name)}")


def _one_of(spec: AudioSpec, name: str, *values: str) -> None:
    if getattr(spec, name) not in values:
        raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(spec, name)!r}")
