"""From files and samples to one channel, within limits."""

import io
import struct
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
from numpy.typing import NDArray

from embedmesh.errors import EmbedMeshError, InputTooLarge, InvalidRequest, UndecodableInput
from embedmesh_encoder.audio.decode import AudioLimits, decode, from_pcm, resample

LIMITS = AudioLimits()
LOSSLESS = [
    ("WAV", "PCM_U8", 8), ("WAV", "PCM_16", 16), ("WAV", "PCM_24", 24), ("WAV", "PCM_32", 32), ("WAV", "FLOAT", 24),
    ("WAV", "DOUBLE", 24), ("WAVEX", "PCM_16", 16), ("RF64", "PCM_16", 16), ("AIFF", "PCM_16", 16),
    ("FLAC", "PCM_16", 16), ("FLAC", "PCM_24", 24),
]  # fmt: skip
LOSSY = [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("WAV", "ULAW"), ("WAV", "IMA_ADPCM")]


def wave(seconds: float = 1.0, rate: int = 16_000, channels: int = 2) -> NDArray[np.float32]:
    at = np.arange(round(seconds * rate)) / rate
    tones = [0.4 / (c + 1) * np.sin(2 * np.pi * (220 + 110 * c + 20 * at) * at) for c in range(channels)]
    return np.stack(tones, axis=1).astype(np.float32)


def encoded(samples: NDArray[np.float32], rate: int, kind: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "subtype", "bits"), LOSSLESS)
def test_lossless_formats_give_the_samples_averaged_over_channels(kind: str, subtype: str, bits: int) -> None:
    samples = wave(3.3, 44_100)
    sound = decode(encoded(samples, 44_100, kind, subtype), LIMITS)
    assert (sound.rate, sound.start, sound.total) == (44_100, 0, len(samples))
    assert sound.samples.dtype == np.float32
    np.testing.assert_allclose(sound.samples, samples.mean(axis=1), atol=2.0 ** (1 - min(bits, 23)), rtol=0)


@pytest.mark.parametrize(("kind", "subtype"), LOSSY)
def test_lossy_formats_sound_alike(kind: str, subtype: str) -> None:
    samples = wave(2.0, 48_000)
    sound = decode(encoded(samples, 48_000, kind, subtype), LIMITS)
    assert sound.rate == 48_000
    assert abs(len(sound.samples) - len(samples)) < 4096  # a block of the codec
    mono = samples.mean(axis=1)
    common = min(len(mono), len(sound.samples))
    assert np.corrcoef(sound.samples[:common], mono[:common])[0, 1] > 0.99


@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), *LOSSY])
def test_a_part_is_the_same_as_that_part_of_the_whole(kind: str, subtype: str) -> None:
    content = encoded(wave(40, 48_000), 48_000, kind, subtype)
    whole = decode(content, LIMITS)
    first = decode(content, LIMITS, seconds=2)
    last = decode(content, LIMITS, seconds=2, keep_end=True)
    assert first.total == last.total == whole.total
    assert 2 * 48_000 < len(first.samples) < 3 * 48_000
    np.testing.assert_array_equal(first.samples, whole.samples[: len(first.samples)])
    assert last.start % 48_000 == 0
    assert last.start + len(last.samples) == whole.total
    assert 2 * 48_000 < len(last.samples) < 4 * 48_000
    np.testing.assert_array_equal(last.samples, whole.samples[last.start :])


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 384_000])
@pytest.mark.parametrize("target", [16_000, 48_000])
def test_a_resampled_part_is_the_same_as_that_part_of_the_whole(rate: int, target: int) -> None:
    samples = np.random.default_rng(3).standard_normal(6 * rate + 77).astype(np.float32) / 4
    whole, _, total = resample(from_pcm(samples, rate, LIMITS), target)
    assert total == len(whole)
    assert abs(total - (6 + 77 / rate) * target) <= 0.5
    first, start, first_total = resample(from_pcm(samples, rate, LIMITS, seconds=2), target)
    assert (start, first_total) == (0, total)
    np.testing.assert_allclose(first[: 2 * target], whole[: 2 * target], atol=1e-6, rtol=0)
    last, start, last_total = resample(from_pcm(samples, rate, LIMITS, seconds=2, keep_end=True), target)
    assert last_total == total == start + len(last)
    np.testing.assert_allclose(last[-2 * target :], whole[-2 * target :], atol=1e-6, rtol=0)


def test_a_resampled_tone_stays_the_tone() -> None:
    at = np.arange(44_100) / 44_100
    tone = np.sin(2 * np.pi * 1000 * at).astype(np.float32)
    samples, _, _ = resample(from_pcm(tone, 44_100, LIMITS), 16_000)
    expected = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000)
    np.testing.assert_allclose(samples[500:-500], expected[500:-500], atol=1e-4)


@pytest.mark.parametrize("rate", [1000, 16_000, 48_000, 384_000])
def test_a_single_sample_stays_a_sound(rate: int) -> None:
    samples, start, total = resample(from_pcm(np.ones(1, np.float32), rate, LIMITS), 16_000)
    assert start == 0
    assert len(samples) == total >= 1
    assert np.isfinite(samples).all()


def test_samples_are_taken_as_they_come() -> None:
    samples = wave(0.5, 16_000, 3)
    np.testing.assert_allclose(from_pcm(samples, 16_000, LIMITS).samples, samples.mean(axis=1), atol=1e-7)
    np.testing.assert_array_equal(from_pcm(samples[:, 0], 16_000, LIMITS).samples, samples[:, 0])


def failure(call: Any) -> EmbedMeshError:
    with pytest.raises(EmbedMeshError) as caught:
        call()
    return caught.value


def test_what_is_no_sound_is_refused_with_a_sentence() -> None:
    for content in (b"\x89PNG\r\n\x1a\n" + bytes(100), b"hello", b"RIFF\x00\x00\x00\x00AVI ", b"\x00" * 64):
        error = failure(lambda content=content: decode(content, LIMITS))
        assert isinstance(error, UndecodableInput)
        assert error.message == "the bytes are not a sound in WAV, AIFF, FLAC, OGG or MP3 format"
    assert failure(lambda: decode(b"", LIMITS)).message == "the sound is empty: it has no bytes"


@pytest.mark.parametrize(
    "head", [b"RIFF\x00\x00\x00\x00WAVE", b"FORM\x00\x00\x00\x00AIFF", b"fLaC", b"OggS", b"ID3", b"\xff\xfb"]
)
def test_a_beginning_alone_is_a_damaged_sound(head: bytes) -> None:
    for tail in (b"", b"\xff" * 5000, bytes(5000)):
        error = failure(lambda tail=tail: decode(head + tail, LIMITS))
        assert isinstance(error, UndecodableInput)
        assert error.message.startswith("the sound ")
        assert "sndfile" not in error.message.lower()


@pytest.mark.parametrize("kind", ["WAV", "AIFF"])
def test_a_sound_without_samples(kind: str) -> None:
    error = failure(lambda: decode(encoded(np.zeros((0, 2), np.float32), 16_000, kind), LIMITS))
    assert isinstance(error, UndecodableInput)
    assert error.message == "the sound has no samples"
    assert failure(lambda: from_pcm(np.zeros((0, 2), np.float32), 16_000, LIMITS)).message == "the sound has no samples"
    assert failure(lambda: from_pcm(np.zeros((3, 0), np.float32), 16_000, LIMITS)).message == "the sound has no samples"


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "not finite"), (np.inf, "not finite"), (-np.inf, "not finite"), (1e30, "far outside")]
)
def test_samples_that_are_no_sound(value: float, words: str) -> None:
    samples = wave(30)
    samples[400_000, 1] = value
    for call in (
        lambda: decode(encoded(samples, 16_000, "WAV", "FLOAT"), LIMITS),
        lambda: from_pcm(samples, 16_000, LIMITS),
    ):
        error = failure(call)
        assert isinstance(error, UndecodableInput)
        assert words in error.message


@pytest.mark.parametrize(
    "samples", [np.zeros(9, np.float64), np.zeros(9, np.int16), np.zeros((2, 2, 2), np.float32), np.float32(1)]
)
def test_samples_of_another_type_break_the_contract(samples: NDArray[Any]) -> None:
    error = failure(lambda: from_pcm(np.asarray(samples), 16_000, LIMITS))
    assert isinstance(error, InvalidRequest)
    assert error.field == "pcm.samples"


def test_limits_are_named() -> None:
    limits = AudioLimits(bytes=200_000, seconds=2, channels=2)
    cases = {
        "bytes": encoded(wave(3.5), 16_000, "WAV"),
        "seconds": encoded(wave(3.5), 16_000, "OGG"),
        "channels": encoded(wave(0.5, channels=3), 16_000, "WAV"),
    }
    for unit, content in cases.items():
        error = failure(lambda content=content: decode(content, limits))
        assert isinstance(error, InputTooLarge)
        assert error.metadata["unit"] == unit
        assert int(error.metadata["actual"]) > int(error.metadata["limit"]) == getattr(limits, unit)
    for samples, unit in (
        (wave(3.5), "bytes"),
        (wave(2.5, channels=1), "seconds"),
        (wave(0.5, channels=3), "channels"),
    ):
        assert failure(lambda samples=samples: from_pcm(samples, 16_000, limits)).metadata["unit"] == unit
    fast = wave(1.9, 384_000, channels=1)
    for call in (
        lambda: from_pcm(fast, 384_000, AudioLimits(seconds=2)),
        lambda: decode(encoded(fast, 384_000, "FLAC"), AudioLimits(seconds=2)),
    ):
        assert failure(call).metadata == {"limit": "192000", "actual": str(len(fast)), "unit": "samples"}
    assert len(from_pcm(fast, 384_000, AudioLimits(seconds=2), seconds=0.1).samples) < 100_000
    assert "900 Hz" in failure(lambda: from_pcm(wave(), 900, LIMITS)).message
    assert "400000 Hz" in failure(lambda: from_pcm(wave(), 400_000, LIMITS)).message
    assert isinstance(failure(lambda: from_pcm(wave(), 0, LIMITS)), UndecodableInput)
    assert len(decode(encoded(wave(2.0), 16_000, "OGG"), limits).samples) == 32_000


@pytest.mark.parametrize(
    ("kind", "subtype", "minutes"),
    [("FLAC", "PCM_16", 240), ("WAV", "PCM_U8", 60), ("OGG", "VORBIS", 11), ("OGG", "OPUS", 11), ("MP3", None, 11)],
)
def test_hours_of_silence_cost_little(kind: str, subtype: str | None, minutes: int) -> None:
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 8000, 1, subtype, format=kind) as sound:
        for _ in range(minutes):
            sound.write(np.zeros(60 * 8000, np.int16))
    content = file.getvalue()
    assert len(content) < 30 << 20
    before = psutil.Process().memory_info().rss
    for seconds in (1, float("inf")):
        error = failure(lambda seconds=seconds: decode(content, LIMITS, seconds=seconds))
        assert isinstance(error, InputTooLarge)
        assert error.metadata["unit"] == "seconds"
        # Nothing is decoded beyond the limit: where no header tells how long it is, it is longer than that.
        assert 600 < int(error.metadata["actual"]) <= minutes * 60 + 1
    # Ten minutes of samples, as much as is kept of any sound, and some blocks.
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_what_lies_around_a_sound_does_no_harm() -> None:
    samples = wave(1.0)
    expected = decode(encoded(samples, 16_000, "WAV"), LIMITS).samples
    tail = b"PK\x03\x04" + b"<script>" * 999
    picture = b"\x89PNG\r\n\x1a\n" + bytes(50_000)
    wav = encoded(samples, 16_000, "WAV")
    chunk = b"LIST" + struct.pack("<I", len(picture)) + picture
    for content in (wav + tail, wav[:12] + chunk + wav[12:]):
        np.testing.assert_array_equal(decode(content, LIMITS).samples, expected)
    mp3 = encoded(samples, 16_000, "MP3")
    size = len(picture) + 10
    # A tag of ID3 with a picture in it goes before the sound, as players are used to.
    tag = b"ID3\x03\0\0" + bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    tag += b"APIC" + struct.pack(">IH", len(picture), 0) + picture
    np.testing.assert_allclose(decode(tag + mp3 + tail, LIMITS).samples[:16_000], decode(mp3, LIMITS).samples[:16_000])
    for content in (picture + wav, b"%PDF-1.7 " + mp3, b"PK\x03\x04" + encoded(samples, 16_000, "FLAC")):
        assert failure(lambda content=content: decode(content, LIMITS)).message.startswith("the bytes are not a sound")


@pytest.mark.parametrize("declared", [0, 20_000, (1 << 36) - 1])
@pytest.mark.parametrize("keep_end", [False, True])
def test_a_flac_header_that_lies_about_length_changes_no_sample(declared: int, keep_end: bool) -> None:
    samples = wave(1.0)
    honest = encoded(samples, 16_000, "FLAC")
    # STREAMINFO: 36 bits of total samples end 16 bytes (the MD5 sum) before its own end at byte 42.
    field = int.from_bytes(honest[18:26], "big")
    lying = honest[:18] + ((field >> 36 << 36) | declared).to_bytes(8, "big") + honest[26:]
    sound = decode(lying, LIMITS, keep_end=keep_end)
    assert sound.total == len(samples)
    np.testing.assert_array_equal(sound.samples, decode(honest, LIMITS).samples)
    part = decode(lying, LIMITS, seconds=0.5, keep_end=keep_end)
    assert part.total == len(samples)


@pytest.mark.parametrize("size", [0, 10, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_wav_header_that_lies_about_length_gives_what_is_there(size: int) -> None:
    samples = wave(1.0)
    honest = encoded(samples, 16_000, "WAV")
    at = honest.index(b"data") + 4
    lying = honest[:at] + struct.pack("<I", size) + honest[at + 4 :]
    try:
        sound = decode(lying, LIMITS)
    except UndecodableInput:
        assert size == 0
    else:
        assert 1 <= sound.total <= len(samples)
        assert sound.total == len(sound.samples)


@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "PCM_16"), ("AIFF", "PCM_16"), *LOSSY])
def test_a_truncated_file_gives_what_can_be_decoded(kind: str, subtype: str) -> None:
    samples = wave(4.0, 48_000)
    content = encoded(samples, 48_000, kind, subtype)
    whole = decode(content, LIMITS)
    part = decode(content[: len(content) // 2], LIMITS)
    assert 40_000 < len(part.samples) == part.total < len(samples)
    np.testing.assert_allclose(part.samples[:40_000], whole.samples[:40_000], atol=1e-4)


def test_a_truncated_flac_is_refused_where_it_is_read_to_its_end() -> None:
    content = encoded(wave(20.0, 48_000), 48_000, "FLAC")
    part = content[: len(content) // 2]
    assert failure(lambda: decode(part, LIMITS)).message == "the sound is damaged: it cannot be decoded to its end"
    sound = decode(part, LIMITS, seconds=2)
    assert len(sound.samples) > 2 * 48_000
    assert sound.total == 20 * 48_000
