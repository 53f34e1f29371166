"""From the bytes of a sound, or from samples, to one channel of float32, in bounded memory and time.

What a file says about itself is believed only where it costs nothing: reading goes in blocks, keeps the part
that is wanted and stops where nothing more is needed. Files are read by libsndfile from memory.
"""

from __future__ import annotations

import io
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from embedmesh.errors import InputTooLarge, InvalidRequest, UndecodableInput

__all__ = ["AudioLimits", "Sound", "decode", "from_pcm", "resample"]

Float32 = NDArray[np.float32]

# What libsndfile may make of the bytes, by its own names; it knows more, older and less trodden formats.
_FORMATS: Final = frozenset({"WAV", "WAVEX", "RF64", "AIFF", "FLAC", "OGG", "MP3"})
# How many bytes to decode at a time.
_BLOCK_BYTES: Final = 1 << 18
# Beyond any scale in use (int32 samples written as floats), and so large that energies overflow.
_LOUDEST: Final = np.float32(2.0**31)
# What is read besides a part that is wanted, so that its resampled edge does not know that it is one: several times
# the length of soxr's filter, which grows with the longer of the two sampling periods.
_EDGE_PERIODS: Final = 512
# Up to here a sound may be as long as the limit says; of a higher rate it may have as many samples. (Ten minutes at
# 384 kHz, 0.8 MB of silence in FLAC, took 1.8 GB.)
_ORDINARY_RATE: Final = 96_000
# libsndfile's "unknown" is 2**63 - 1; nobody has a thousand years of sound.
_UNKNOWN: Final = 1 << 55


@dataclass(frozen=True, slots=True)
class AudioLimits:
    """What one sound may cost.

    Attributes:
        bytes: Most bytes of a file, or of samples.
        seconds: Most seconds of the whole sound, wanted or not. What is wanted of it may have as many samples as
            that takes at 96 kHz.
        channels: Most channels.
        lowest_rate: Lowest sampling rate, in hertz.
        highest_rate: Highest sampling rate, in hertz.
    """

    bytes: int = 50 << 20
    seconds: int = 600
    channels: int = 32
    lowest_rate: int = 1_000
    highest_rate: int = 384_000


@dataclass(frozen=True, slots=True)
class Sound:
    """One channel of a sound, or the part of it that was wanted.

    Attributes:
        samples: float32 [n], n >= 1, finite.
        rate: Sampling rate in hertz.
        start: Index of the first of `samples` in the whole sound.
        total: Samples of the whole sound; at least `start + n`. Where reading stopped early it is what the file
            declares.
    """

    samples: Float32 = field(repr=False)
    rate: int
    start: int
    total: int


def decode(content: bytes, limits: AudioLimits, *, seconds: float = math.inf, keep_end: bool = False) -> Sound:
    """Decode a WAV, AIFF, FLAC, OGG (Vorbis, Opus) or MP3 file; the format is found by content.

    A file that ends too early or is damaged gives what its decoder makes of it, where the decoder does not give up.

    Args:
        content: The file.
        limits: What it may cost.
        seconds: How much of it is wanted; a little more is given, for the resampler.
        keep_end: Want the last seconds, not the first.

    Raises:
        UndecodableInput: Not such a file, damaged beyond reading, without samples, or with samples that are no sound.
        InputTooLarge: Over one of the limits.
    """
    if len(content) > limits.bytes:
        raise InputTooLarge.over("the sound", len(content), limits.bytes, "bytes")
    if not content:
        raise UndecodableInput("the sound is empty: it has no bytes")
    if not _looks_like_sound(content):
        raise UndecodableInput("the bytes are not a sound in WAV, AIFF, FLAC, OGG or MP3 format")
    try:
        file = _File(_Content(content))
    except (soundfile.SoundFileError, OSError, ValueError, TypeError):
        raise UndecodableInput("the sound is damaged, or in a variant of its format that is not supported") from None
    with file:
        if file.format not in _FORMATS:
            raise UndecodableInput("the bytes are not a sound in WAV, AIFF, FLAC, OGG or MP3 format")
        declared = file.frames if 0 < file.frames < _UNKNOWN else 0
        return _collect(_blocks(file), _Header(file.samplerate, file.channels, declared), limits, seconds, keep_end)


def from_pcm(
    samples: NDArray[Any], rate: int, limits: AudioLimits, *, seconds: float = math.inf, keep_end: bool = False
) -> Sound:
    """Take samples as they come.

    Args:
        samples: float32 [n] or [n, channels].
        rate: Sampling rate in hertz.
        limits: See `decode`; so are `seconds` and `keep_end`.
        seconds: How much is wanted.
        keep_end: Want the last seconds.

    Raises:
        InvalidRequest: Another dtype or shape.
        UndecodableInput: No samples, or samples that are no sound.
        InputTooLarge: Over one of the limits.
    """
    if samples.dtype != np.float32 or samples.ndim not in (1, 2):
        raise InvalidRequest(
            f"samples must be FLOAT32 of shape [samples] or [samples, channels], "
            f"got {samples.dtype} of shape {list(samples.shape)}",
            field="pcm.samples",
        )
    if samples.nbytes > limits.bytes:
        raise InputTooLarge.over("the sound", samples.nbytes, limits.bytes, "bytes", field="pcm.samples")
    if not samples.size:
        raise UndecodableInput("the sound has no samples", field="pcm.samples")
    planes = samples if samples.ndim == 2 else samples[:, None]
    step = max(1, _BLOCK_BYTES // (4 * planes.shape[1]))
    blocks = (planes[i : i + step] for i in range(0, len(planes), step))
    return _collect(blocks, _Header(rate, planes.shape[1], len(planes)), limits, seconds, keep_end)


def resample(sound: Sound, rate: int) -> tuple[Float32, int, int]:
    """Resample with soxr's HQ filter.

    Returns:
        Samples float32 [m], m >= 1, the index of the first of them in the whole sound, and the samples of the whole
        sound, all at the new rate. Where `sound` is a part, its first and last few samples differ from those of the
        whole sound, which is why `decode` gives more than was wanted.
    """
    if sound.rate == rate:
        return sound.samples, sound.start, sound.total
    # `start` is a multiple of the samples after which both rates meet again, so old and new samples stay aligned.
    start = sound.start * rate // sound.rate
    total = start + max(1, _rescaled(sound.total - sound.start, sound.rate, rate))
    wanted = max(1, _rescaled(len(sound.samples), sound.rate, rate))
    samples: Float32 = soxr.resample(sound.samples, sound.rate, rate, quality="HQ")
    if len(samples) < wanted:  # a handful of samples may leave nothing behind the filter
        samples = np.pad(samples, (0, wanted - len(samples)))
    return samples[:wanted], start, total


def _rescaled(samples: int, old: int, new: int) -> int:
    """Round half up, in integers."""
    return (2 * samples * new + old) // (2 * old)


class _Content(io.RawIOBase):
    """A file in memory that damaged headers cannot lead in circles: what is read of it is limited.

    A plain `BytesIO` would raise inside of libsndfile's callbacks, which can only print that.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self._view = memoryview(content)
        self._position = 0
        # A file is read about once, or twice where it is scanned first.
        self._budget = 16 * len(content) + (4 << 20)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._view[self._position : self._position + len(buffer)]
        self._budget -= len(part) + 64
        if self._budget < 0:
            return 0
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}.get(whence, len(self._view))
        self._position = min(max(base + offset, 0), len(self._view))
        return self._position

    def tell(self) -> int:
        return self._position


class _File(soundfile.SoundFile):  # type: ignore[misc]  # (soundfile has no types)
    """A file that is read from front to end.

    Told that it can seek, soundfile seeks after each block to where it already is, which makes some codecs decode
    again, or differently, and ends where the header says the end is.
    """

    def seekable(self) -> bool:
        return False


def _looks_like_sound(content: bytes) -> bool:
    """Look at the first bytes, before any parser does."""
    head = content[:12]
    return (
        (head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:12] == b"WAVE")
        or (head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"))
        or head[:4] in (b"fLaC", b"OggS")
        or head[:3] == b"ID3"
        or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0)
    )


def _blocks(file: soundfile.SoundFile) -> Iterator[Float32]:
    frames = max(1, _BLOCK_BYTES // (4 * max(1, file.channels)))
    while True:
        try:
            block: Float32 = file.read(frames, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, OSError, ValueError, TypeError):
            raise UndecodableInput("the sound is damaged: it cannot be decoded to its end") from None
        if not len(block):
            return
        yield block


@dataclass(frozen=True, slots=True)
class _Header:
    """What is known before the first sample.

    Attributes:
        rate: Sampling rate in hertz.
        channels: Channels, as many as each block has.
        declared: Samples of the whole sound, 0 when unknown.
    """

    rate: int
    channels: int
    declared: int

    def check(self, limits: AudioLimits) -> None:
        if self.channels > limits.channels:
            raise InputTooLarge.over("the sound", self.channels, limits.channels, "channels")
        if not limits.lowest_rate <= self.rate <= limits.highest_rate:
            raise UndecodableInput(
                f"the sound has a sampling rate of {self.rate} Hz; rates from {limits.lowest_rate} to "
                f"{limits.highest_rate} Hz are supported"
            )


def _collect(blocks: Iterable[Float32], header: _Header, limits: AudioLimits, seconds: float, keep_end: bool) -> Sound:
    """Average the channels of what is wanted, and count the rest as far as must be.

    Args:
        blocks: float32 [n, channels] each.
        header: What comes before them.
        limits: What it may cost.
        seconds: How much is wanted.
        keep_end: Want the last seconds.
    """
    header.check(limits)
    rate = header.rate
    longest = limits.seconds * rate
    most_held = limits.seconds * _ORDINARY_RATE
    wanted = longest + 1 if math.isinf(seconds) else math.ceil(seconds * rate) + max(_EDGE_PERIODS, rate // 16)
    kept: deque[Float32] = deque()
    held = read = 0
    for block in blocks:
        read += len(block)
        # There is more than is wanted: it is only counted, and a header that tells how much it is, is believed.
        more = held >= wanted and not keep_end
        if read > longest or (more and header.declared > read):
            total = max(read, header.declared)
            break
        if not more:
            kept.append(_mono(block))
            held += len(block)
            if held > most_held and rate > _ORDINARY_RATE:
                raise InputTooLarge.over("the sound", max(read, header.declared), most_held, "samples")
            while keep_end and held - len(kept[0]) >= wanted + rate:  # a second more, see below
                held -= len(kept.popleft())
    else:
        total = read
    if total > longest:
        raise InputTooLarge.over("the sound", math.ceil(total / rate), limits.seconds, "seconds")
    if not held:
        raise UndecodableInput("the sound has no samples")
    samples = np.concatenate(kept) if len(kept) > 1 else kept[0]
    if not keep_end:
        return Sound(samples[:wanted], rate, 0, total)
    # A part begins at a whole second: there the samples of all rates coincide.
    start = max(0, read - wanted) // rate * rate
    return Sound(samples[held - (read - start) :], rate, start, read)


def _mono(block: Float32) -> Float32:
    """Average the channels of a block [n, channels] and see that it is sound."""
    # NaN is smaller than nothing and greater than nothing.
    if not (np.abs(block).max() <= _LOUDEST):
        what = "far outside of [-1, 1]" if np.isfinite(block).all() else "not finite (NaN or infinity)"
        raise UndecodableInput(f"the sound holds samples that are {what}")
    return np.ascontiguousarray(block[:, 0]) if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)
