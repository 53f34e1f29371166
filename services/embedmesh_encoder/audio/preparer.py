"""The `Preparer` of audio."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from embedmesh.errors import InputTooLarge, InvalidRequest
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_encoder.audio.decode import AudioLimits, Sound, decode, from_pcm, resample
from embedmesh_encoder.audio.features import AudioSpec
from embedmesh_encoder.model import ModelError
from embedmesh_encoder.pooling import Pooling, pool
from embedmesh_encoder.preparation import Prepared

__all__ = ["AudioData", "AudioItem", "AudioPreparer"]

Float32 = NDArray[np.float32]

_MASK: Final = "attention_mask"


@dataclass(frozen=True, slots=True)
class AudioItem:
    """One sound to embed: either a file or samples.

    Attributes:
        content: The bytes of a file (WAV, AIFF, FLAC, OGG, MP3), or None.
        samples: float32 [n] or [n, channels], or None.
        rate: Sampling rate of `samples` in hertz.
    """

    content: bytes | None = field(default=None, repr=False)
    samples: NDArray[Any] | None = field(default=None, repr=False)
    rate: int = 0


@dataclass(frozen=True, slots=True)
class AudioData:
    """What the model reads of one sound.

    Attributes:
        windows: The feeds of each window, without the batch's axis.
        weights: How much of the sound each window holds, float32 [windows], adding up to 1.
    """

    windows: tuple[dict[str, NDArray[Any]], ...]
    weights: Float32


class AudioPreparer:
    """Decodes sounds, computes features and lays them out.

    A sound longer than the model can read is cut to `max_input_units` by the caller's truncation. With
    `window_units` the model reads that many at a time instead: a sound becomes as many windows as it takes (the last
    one may be short), each a row of the graph, and its vector is their average, weighted by how much of the sound
    each holds. `max_input_units` then limits all windows together. CLAP's "fusion" cuts nothing.

    Units are frames, or 320 samples of a raw waveform. A model of one fixed length reads all of it whatever the
    sound, so that is what a sound costs. Prepared data are `AudioData`.

    `padded` is True for models of any length. Without an attention mask such a graph cannot tell silence from
    nothing: only sounds of one length then share a batch, and where a long sound becomes windows, the last one is as
    long as the others, begins earlier for it, and counts as much as what it has to itself.
    """

    def __init__(
        self,
        spec: AudioSpec,
        *,
        max_input_units: int,
        output: str,
        inputs: Sequence[str] = (),
        pooling: Literal["graph", Pooling] | tuple[Pooling, ...] = "graph",
        window_units: int = 0,
        limits: AudioLimits | None = None,
    ) -> None:
        """See what the model wants.

        Args:
            spec: How it wants its sound.
            max_input_units: Most units it may be given of one sound.
            output: Name of the graph's output.
            inputs: Names of the graph's inputs; by default the features alone.
            pooling: "graph" when the output is [n, d]; else how [n, hidden states, d] is pooled.
            window_units: Units of a window, 0 for no windows.
            limits: What one sound may cost.

        Raises:
            ModelError: These do not go together.
        """
        available = {spec.input_name, *(() if spec.fixed_units else (_MASK,))}
        if spec.fixed_units:
            available |= set(spec.features(np.zeros(1, np.float32)))
        self._inputs = tuple(inputs) or (spec.input_name,)
        if unknown := sorted(set(self._inputs) - available):
            raise ModelError(
                f"the graph's inputs {', '.join(unknown)} are not made by {spec.type_name}, which makes "
                f"{', '.join(sorted(available))}"
            )
        self._window = window_units or max_input_units
        if spec.fixed_units and self._window != spec.fixed_units:
            key = "window_units" if window_units else "max_input_units"
            raise ModelError(f"{key} is {self._window}, but the model reads exactly {spec.fixed_units} units at a time")
        if window_units and spec.reads_all:
            raise ModelError("window_units cannot be set: this model reads a sound of any length at once")
        if max_input_units < self._window:
            raise ModelError(f"window_units ({window_units}) is over max_input_units ({max_input_units})")
        self._spec = spec
        self._limits = limits or AudioLimits()
        self.limits: Mapping[str, int] = {"audio_bytes": self._limits.bytes, "audio_seconds": self._limits.seconds}
        self.padded = not spec.fixed_units
        self._one_length = self.padded and _MASK not in self._inputs
        self._output = output
        self._pooling = pooling
        self._max_units = max_input_units
        # All the units that can matter, those left over that fill no whole window not counted.
        self._stride = self._window - spec.overlap_units
        self._most_units = (max_input_units - spec.overlap_units) // self._stride * self._stride + spec.overlap_units
        self._most_samples = spec.samples(self._most_units)

    def is_quick(self, items: Sequence[Any]) -> bool:
        """A sound is always worth a thread."""
        del items
        return False

    def prepare(self, item: AudioItem, truncation: pb.Truncation.ValueType) -> Prepared:
        """Turn one sound into features.

        Args:
            item: The sound.
            truncation: START keeps the last units, REFUSE and CHUNK cut nothing, all else keeps the first.

        Raises:
            InvalidRequest: Neither a file nor samples, or samples of another type than the contract's.
            UndecodableInput: It cannot be decoded, or holds no sound.
            InputTooLarge: Over a limit, or too many units under REFUSE or CHUNK.
        """
        keep_end = truncation == pb.TRUNCATION_START
        rate = self._spec.sampling_rate
        # A unit more, to see whether there is one.
        seconds = math.inf if self._spec.reads_all else (self._most_samples + self._spec.unit_samples) / rate
        samples, start, total = resample(self._sound(item, seconds, keep_end=keep_end), rate)
        original = self._spec.units(total)
        truncated = original > self._most_units and not self._spec.reads_all
        if truncated and truncation in (pb.TRUNCATION_REFUSE, pb.TRUNCATION_CHUNK):
            raise InputTooLarge.over("the sound", original, self._most_units, "frames")
        if truncated:
            if keep_end:
                samples = samples[total - self._most_samples - start :]
            samples = samples[: self._most_samples]
        parts = [samples] if self._spec.reads_all else self._cut(samples)
        lengths = np.array([len(part) for part in parts], np.float32)
        if len(parts) > 1 and self._one_length:
            parts[-1] = samples[-len(parts[0]) :]
        data = AudioData(tuple(self._feeds(part) for part in parts), lengths / lengths.sum())
        if self._spec.fixed_units or len(parts) > 1:
            units = len(parts) * self._window
        else:
            units = self._spec.units(len(samples))
        original = max(original, units + 1) if truncated else units
        group = len(data.windows[0][self._spec.input_name]) if self._one_length else None
        return Prepared(data, units=units, original_units=original, truncated=truncated, group=group)

    def collate(self, batch: Sequence[Prepared]) -> dict[str, NDArray[Any]]:
        """Stack the windows of all sounds, float32 [rows, ...], filled up with zeros where lengths differ.

        The attention mask is int64 [rows, longest]; `is_longer` bool [rows, 1].

        Raises:
            ValueError: Lengths differ and the graph takes no attention mask.
        """
        windows = [window for prepared in batch for window in prepared.data.windows]
        if self._spec.fixed_units:
            return {name: np.stack([window[name] for window in windows]) for name in self._inputs}
        features = [window[self._spec.input_name] for window in windows]
        lengths = np.array([len(each) for each in features], np.int64)
        longest = int(lengths.max())
        if self._one_length and (lengths != longest).any():
            raise ValueError("sounds of different lengths cannot share a batch: the graph takes no attention_mask")
        rows = np.zeros((len(features), longest, *features[0].shape[1:]), np.float32)
        for row, each in zip(rows, features, strict=True):
            row[: len(each)] = each
        mask = (np.arange(longest)[None, :] < lengths[:, None]).astype(np.int64)
        feeds = {self._spec.input_name: rows, _MASK: mask}
        return {name: feeds[name] for name in self._inputs}

    def split(self, outputs: Mapping[str, NDArray[Any]], batch: Sequence[Prepared]) -> NDArray[np.float32]:
        """Give one vector a sound: float32 [n, d], as pooled, averaged over its windows, not normalised."""
        rows = self._pooled(outputs[self._output], batch)
        counts = [len(prepared.data.windows) for prepared in batch]
        if max(counts) == 1:
            return rows
        weights = np.concatenate([prepared.data.weights for prepared in batch])
        starts = np.cumsum([0, *counts[:-1]])
        averages: Float32 = np.add.reduceat(rows * weights[:, None], starts, axis=0)
        return averages

    def _pooled(self, output: NDArray[Any], batch: Sequence[Prepared]) -> Float32:
        if self._pooling == "graph":
            return output
        hidden = output.shape[1]
        if self._spec.fixed_units:  # what fills a fixed length up is read like the rest
            lengths = np.full(len(output), hidden, np.int64)
        else:
            name = self._spec.input_name
            filled = [len(window[name]) for prepared in batch for window in prepared.data.windows]
            lengths = self._spec.hidden_units(np.array(filled, np.int64), hidden)
        return pool(self._pooling, output, lengths)

    def _sound(self, item: AudioItem, seconds: float, *, keep_end: bool) -> Sound:
        if (item.content is None) == (item.samples is None):
            raise InvalidRequest("an input needs either the bytes of a sound or its samples")
        if item.content is not None:
            return decode(item.content, self._limits, seconds=seconds, keep_end=keep_end)
        assert item.samples is not None  # noqa: S101  (for the type checker; one of both is set)
        return from_pcm(item.samples, item.rate, self._limits, seconds=seconds, keep_end=keep_end)

    def _cut(self, samples: Float32) -> list[Float32]:
        """Cut a sound into windows, the last of which may be short."""
        units = self._spec.units(len(samples)) - self._spec.overlap_units
        windows = max(1, -(-units // self._stride))
        step, length = self._stride * self._spec.unit_samples, self._spec.samples(self._window)
        return [samples[i * step : i * step + length] for i in range(windows)]

    def _feeds(self, samples: Float32) -> dict[str, NDArray[Any]]:
        features = self._spec.features(samples)
        return {name: features[name] for name in self._inputs if name in features}
