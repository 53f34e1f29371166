"""Damaged and hostile files: each gives features or a precise error, in bounded time and memory."""

import io
import random
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import soundfile

from embedmesh.errors import EmbedMeshError, InputTooLarge, UndecodableInput
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_encoder.audio import AudioItem, AudioLimits, AudioPreparer
from embedmesh_encoder.audio.features import LogMelSpec

FILES = 2_000
SEED = 20261123
FORMATS = [
    ("WAV", "PCM_U8"), ("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "PCM_32"), ("WAV", "FLOAT"), ("WAV", "DOUBLE"),
    ("WAV", "ULAW"), ("WAV", "IMA_ADPCM"), ("WAV", "MS_ADPCM"), ("WAVEX", "PCM_16"), ("RF64", "PCM_16"),
    ("AIFF", "PCM_16"), ("AIFF", "FLOAT"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]  # fmt: skip
# What may be said of such a file; none of it is a library's text.
SENTENCES = (
    "the sound is empty: it has no bytes",
    "the bytes are not a sound in WAV, AIFF, FLAC, OGG or MP3 format",
    "the sound is damaged, or in a variant of its format that is not supported",
    "the sound is damaged: it cannot be decoded to its end",
    "the sound has no samples",
    "the sound holds samples that are ",
    "the sound has a sampling rate of ",
)


def seeds() -> list[bytes]:
    files = []
    at = np.arange(24_000) / 48_000
    for kind, subtype in FORMATS:
        for channels in (1, 2):
            wave = np.stack([0.4 * np.sin(2 * np.pi * (300 + 900 * at + c) * at) for c in range(channels)], axis=1)
            file = io.BytesIO()
            soundfile.write(file, wave.astype(np.float32), 48_000, format=kind, subtype=subtype)
            files.append(file.getvalue())
    return files


def flip(data: bytearray, rng: random.Random, _: list[bytes]) -> None:
    for __ in range(rng.randint(1, 40)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def lie(data: bytearray, rng: random.Random, _: list[bytes]) -> None:
    """Write big, small and random numbers into the header."""
    for __ in range(rng.randint(1, 4)):
        start = rng.randrange(min(len(data), 120))
        numbers = (b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", rng.randbytes(4))
        data[start : start + 4] = rng.choice(numbers)


def cut(data: bytearray, rng: random.Random, _: list[bytes]) -> None:
    del data[rng.randrange(len(data)) :]


def splice(data: bytearray, rng: random.Random, files: list[bytes]) -> None:
    """Put the end of another file in place of its own."""
    other = rng.choice(files)
    data[rng.randrange(len(data)) :] = other[rng.randrange(len(other)) :]


def repeat(data: bytearray, rng: random.Random, _: list[bytes]) -> None:
    """Take a piece away, or let it be there several times."""
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.randint(1, 4_000))
    data[start:end] = bytes(data[start:end] * rng.choice((0, 2, 5)))


def scramble(data: bytearray, rng: random.Random, _: list[bytes]) -> None:
    start = rng.randrange(len(data))
    data[start : start + 512] = rng.randbytes(min(512, len(data) - start))


def mutated(rng: random.Random, files: list[bytes]) -> bytes:
    data = bytearray(rng.choice(files))
    for _ in range(rng.randint(1, 3)):
        if data:
            rng.choice((flip, lie, cut, splice, repeat, scramble))(data, rng, files)
    return bytes(data)


@pytest.mark.timeout(600)
def test_mutated_files_give_features_or_a_precise_error(
    capfd: pytest.CaptureFixture[str], kept_bytes: Callable[[], int]
) -> None:
    preparer = AudioPreparer(
        LogMelSpec(), max_input_units=998, output="out", limits=AudioLimits(bytes=1 << 20, seconds=120)
    )
    rng = random.Random(SEED)
    files = seeds()
    outcomes: Counter[str] = Counter()
    slowest, rss = 0.0, 0
    truncations = (pb.TRUNCATION_END, pb.TRUNCATION_START, pb.TRUNCATION_REFUSE)
    for index in range(FILES):
        if index == FILES // 4:  # caches and arenas have their size by now
            rss = kept_bytes()
        content = mutated(rng, files)
        started = time.perf_counter()
        try:
            prepared = preparer.prepare(AudioItem(content), rng.choice(truncations))
        except UndecodableInput as error:
            assert error.message.startswith(SENTENCES), error.message
            outcomes[next(each for each in SENTENCES if error.message.startswith(each))] += 1
        except InputTooLarge as error:
            assert int(error.metadata["actual"]) > int(error.metadata["limit"])
            outcomes[f"too many {error.metadata['unit']}"] += 1
        except EmbedMeshError as error:
            raise AssertionError(f"file {index}: {error!r}") from error
        else:
            features = prepared.data.windows[0]["input_features"]
            assert np.isfinite(features).all()
            assert 1 <= len(features) == prepared.units <= 998
            outcomes["features"] += 1
        slowest = max(slowest, time.perf_counter() - started)
    grown = kept_bytes() - rss
    captured = capfd.readouterr()
    # Callbacks could only print what goes wrong in them; mpg123 prints notes to stderr, which cannot be turned off.
    assert "Traceback" not in captured.err
    assert len(captured.err) < 1 << 20
    assert slowest < 10
    assert grown < 64 << 20
    assert outcomes["features"] > FILES // 5
    assert outcomes["features"] < FILES * 4 // 5
    print(f"\nslowest {slowest:.3f} s, RSS grew by {grown / 2**20:.1f} MiB", *outcomes.most_common(), sep="\n  ")  # noqa: T201  (figures, with -s)
