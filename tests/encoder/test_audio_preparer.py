"""From sounds to the feeds of a graph, and back to one vector a sound."""

import io
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from embedmesh.errors import InputTooLarge, InvalidRequest, UndecodableInput
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_encoder.audio import AudioItem, AudioLimits, AudioPreparer
from embedmesh_encoder.audio.features import AstSpec, AudioSpec, ClapSpec, LogMelSpec, RawSpec, WhisperSpec
from embedmesh_encoder.model import ModelError
from embedmesh_encoder.preparation import Prepared

END, START, REFUSE = pb.TRUNCATION_END, pb.TRUNCATION_START, pb.TRUNCATION_REFUSE
CLAP = ClapSpec(truncation="rand_trunc")
MASKED = ("input_values", "attention_mask")


def noise(samples: int, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(samples) / 5).astype(np.float32)


def item(samples: NDArray[np.float32], rate: int = 16_000) -> AudioItem:
    return AudioItem(samples=samples, rate=rate)


def preparer(spec: AudioSpec, max_input_units: int = 0, **options: Any) -> AudioPreparer:
    return AudioPreparer(spec, max_input_units=max_input_units or spec.fixed_units or 1000, output="out", **options)


def only(prepared: Prepared, name: str) -> NDArray[np.float32]:
    (window,) = prepared.data.windows
    feature: NDArray[np.float32] = window[name]
    return feature


def test_a_file_and_its_samples_give_the_same() -> None:
    wave = np.round(noise(16_000) * 2**15) / np.float32(2**15)
    file = io.BytesIO()
    soundfile.write(file, wave, 16_000, format="FLAC", subtype="PCM_16")
    made = preparer(WhisperSpec())
    np.testing.assert_array_equal(
        only(made.prepare(AudioItem(file.getvalue()), END), "input_features"),
        only(made.prepare(item(wave), END), "input_features"),
    )


@pytest.mark.parametrize(
    ("spec", "units", "long_samples", "long_units"),
    [(WhisperSpec(), 3000, 480_001, 3001), (AstSpec(), 1024, 164_240, 1025), (CLAP, 1001, 480_001, 1002)],
)
def test_a_fixed_length_is_read_whole(spec: AudioSpec, units: int, long_samples: int, long_units: int) -> None:
    made = preparer(spec)
    assert not made.padded
    rate = spec.sampling_rate
    for samples in (1, 1000, long_samples - spec.unit_samples):
        prepared = made.prepare(item(noise(samples), rate), REFUSE)
        assert (prepared.units, prepared.original_units, prepared.truncated) == (units, units, False)
    wave = noise(long_samples)
    name = spec.input_name
    for truncation, part in ((END, wave[: spec.samples(units)]), (START, wave[-spec.samples(units) :])):
        prepared = made.prepare(item(wave, rate), truncation)
        assert (prepared.units, prepared.original_units, prepared.truncated) == (units, long_units, True)
        np.testing.assert_array_equal(only(prepared, name), spec.features(part)[name])
    with pytest.raises(InputTooLarge) as caught:
        made.prepare(item(wave, rate), REFUSE)
    assert caught.value.metadata == {"limit": str(units), "actual": str(long_units), "unit": "frames"}
    batch = [made.prepare(item(noise(n), rate), END) for n in (50, 5000)]
    (feed,) = made.collate(batch).values()
    assert feed.shape == (2, *only(batch[0], name).shape)
    assert feed.dtype == np.float32


@pytest.mark.parametrize("spec", [LogMelSpec(), RawSpec()])
def test_any_length_is_cut_and_padded_with_a_mask(spec: AudioSpec) -> None:
    name = spec.input_name
    made = preparer(spec, 50, inputs=(name, "attention_mask"))
    assert made.padded
    waves = [noise(spec.samples(n), n) for n in (10, 50, 31)]
    batch = [made.prepare(item(wave), REFUSE) for wave in waves]
    assert [each.units for each in batch] == [10, 50, 31]
    feeds = made.collate(batch)
    assert feeds["attention_mask"].dtype == np.int64
    for row, mask, wave in zip(feeds[name], feeds["attention_mask"], waves, strict=True):
        expected = spec.features(wave)[name]
        np.testing.assert_array_equal(row[: len(expected)], expected)
        assert not row[len(expected) :].any()
        assert mask.sum() == mask[: len(expected)].sum() == len(expected)
    long = noise(spec.samples(51))
    with pytest.raises(InputTooLarge):
        made.prepare(item(long), REFUSE)
    for truncation, part in ((END, long[: spec.samples(50)]), (START, long[-spec.samples(50) :])):
        prepared = made.prepare(item(long), truncation)
        assert (prepared.units, prepared.original_units, prepared.truncated) == (50, 51, True)
        np.testing.assert_array_equal(only(prepared, name), spec.features(part)[name])


def test_without_a_mask_lengths_do_not_mix() -> None:
    made = preparer(LogMelSpec())
    same = [made.prepare(item(noise(8000, seed)), END) for seed in (1, 2)]
    assert made.collate(same)["input_features"].shape == (2, 48, 64)
    longer = made.prepare(item(noise(9000)), END)
    assert same[0].group == same[1].group != longer.group
    with pytest.raises(ValueError, match="different lengths"):
        made.collate([*same, longer])
    for spec, inputs in ((LogMelSpec(), ("input_features", "attention_mask")), (AstSpec(), ())):
        groups = {preparer(spec, inputs=inputs).prepare(item(noise(n)), END).group for n in (8000, 9000)}
        assert groups == {None}


def test_long_sounds_are_cut_after_resampling_as_the_whole_would_be() -> None:
    wave = noise(48_000 * 40 + 240)  # ends with a whole frame
    spec = LogMelSpec(rms_normalize=False)
    whole = preparer(spec, 10_000).prepare(item(wave, 48_000), REFUSE)
    assert whole.units == 3999
    features = only(whole, "input_features")
    for truncation, expected in ((END, features[:500]), (START, features[-500:])):
        cut = preparer(spec, 500).prepare(item(wave, 48_000), truncation)
        assert cut.original_units == 3999
        np.testing.assert_allclose(only(cut, "input_features"), expected, atol=1e-3)


class TestWindows:
    """Longer sounds as several rows whose vectors are averaged."""

    def test_windows_lie_end_to_end(self) -> None:
        for spec, rate in ((WhisperSpec(), 16_000), (AstSpec(), 16_000), (CLAP, 48_000)):
            units = spec.fixed_units
            stride = units - spec.overlap_units
            step = stride * spec.unit_samples
            made = preparer(spec, stride * 3 + spec.overlap_units, window_units=units)
            one = made.prepare(item(noise(spec.samples(units)), rate), END)
            assert (len(one.data.windows), one.units) == (1, units)
            wave = noise(2 * step + step // 2)
            three = made.prepare(item(wave, rate), REFUSE)
            assert (three.units, three.original_units, three.truncated) == (3 * units, 3 * units, False)
            for k, window in enumerate(three.data.windows):
                part = wave[k * step : k * step + spec.samples(units)]
                np.testing.assert_array_equal(window[spec.input_name], spec.features(part)[spec.input_name])
            np.testing.assert_allclose(three.data.weights, [0.4, 0.4, 0.2], atol=1e-3)
            cut = made.prepare(item(noise(4 * step), rate), END)
            assert (len(cut.data.windows), cut.units, cut.truncated) == (3, 3 * units, True)
            assert cut.original_units > cut.units
            with pytest.raises(InputTooLarge):
                made.prepare(item(noise(4 * step), rate), REFUSE)

    def test_vectors_are_averaged_by_share(self) -> None:
        made = preparer(AstSpec(), 4096, window_units=1024)
        step = 1024 * 160
        batch = [made.prepare(item(noise(n)), END) for n in (1000, 2 * step + step // 2, step)]
        feeds = made.collate(batch)
        assert feeds["input_values"].shape == (5, 1024, 128)
        rows = noise(5 * 8).reshape(5, 8)
        weights = batch[1].data.weights[:, None]
        expected = np.stack([rows[0], (rows[1:4] * weights).sum(axis=0), rows[4]])
        np.testing.assert_allclose(made.split({"out": rows}, batch), expected, atol=1e-6)
        alone = np.concatenate(
            [
                made.split({"out": rows[a:b]}, [each])
                for each, (a, b) in zip(batch, [(0, 1), (1, 4), (4, 5)], strict=True)
            ]
        )
        np.testing.assert_array_equal(made.split({"out": rows}, batch), alone)

    def test_windows_of_any_length(self) -> None:
        spec = RawSpec()
        made = preparer(spec, 200, window_units=50, inputs=MASKED)
        short, long = (made.prepare(item(noise(n)), END) for n in (3200, 320 * 120))
        assert (short.units, long.units) == (10, 150)
        feeds = made.collate([short, long])
        assert feeds["attention_mask"].sum(axis=1).tolist() == [3200, 16_000, 16_000, 6400]
        hidden = noise(4 * 49 * 6).reshape(4, 49, 6)
        pooling = preparer(spec, 200, window_units=50, inputs=MASKED, pooling="mean")
        rows = np.stack([hidden[0, :9].mean(0), hidden[1].mean(0), hidden[2].mean(0), hidden[3, :19].mean(0)])
        expected = np.stack([rows[0], (rows[1:] * long.data.weights[:, None]).sum(axis=0)])
        np.testing.assert_allclose(pooling.split({"out": hidden}, [short, long]), expected, atol=1e-5)

    def test_without_a_mask_windows_are_of_one_length(self) -> None:
        spec = RawSpec(do_normalize=False)
        made = preparer(spec, 200, window_units=50)
        wave = noise(320 * 120)
        three, one, full = (made.prepare(item(part), REFUSE) for part in (wave, wave[:9600], wave[:16_000]))
        assert (three.units, three.truncated) == (150, False)
        rows = made.collate([three, full])["input_values"]
        expected = np.stack([wave[:16_000], wave[16_000:32_000], wave[-16_000:], wave[:16_000]])
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_allclose(three.data.weights, [50 / 120, 50 / 120, 20 / 120], atol=1e-6)
        assert three.group == full.group == 16_000
        assert (len(one.data.windows), one.units, one.group) == (1, 30, 9600)


def test_clap_fusion_reads_all() -> None:
    made = preparer(ClapSpec(), inputs=("input_features", "is_longer"))
    batch = [made.prepare(item(noise(n), 48_000), REFUSE) for n in (48_000, 1_200_000)]
    assert [(each.units, each.original_units, each.truncated) for each in batch] == [(1001, 1001, False)] * 2
    feeds = made.collate(batch)
    assert feeds["input_features"].shape == (2, 4, 1001, 64)
    np.testing.assert_array_equal(feeds["is_longer"], [[True], [True]])
    assert feeds["is_longer"].dtype == np.bool_


def test_a_graph_may_leave_pooling_to_us() -> None:
    made = preparer(AstSpec(), pooling="mean")
    batch = [made.prepare(item(noise(n)), END) for n in (1000, 50_000)]
    hidden = noise(2 * 7 * 3).reshape(2, 7, 3)
    np.testing.assert_allclose(made.split({"out": hidden}, batch), hidden.mean(axis=1), atol=1e-6)


def test_limits_are_published_and_kept() -> None:
    assert preparer(AstSpec()).limits == {"audio_bytes": 50 << 20, "audio_seconds": 600}
    made = preparer(AstSpec(), limits=AudioLimits(bytes=100_000, seconds=1))
    assert made.limits == {"audio_bytes": 100_000, "audio_seconds": 1}
    with pytest.raises(InputTooLarge) as caught:
        made.prepare(AudioItem(bytes(100_001)), END)
    assert caught.value.metadata == {"limit": "100000", "actual": "100001", "unit": "bytes"}
    with pytest.raises(InputTooLarge) as caught:
        made.prepare(item(noise(16_001)), END)
    assert caught.value.metadata == {"limit": "1", "actual": "2", "unit": "seconds"}


def test_items_that_are_nothing() -> None:
    made = preparer(AstSpec())
    for nothing in (AudioItem(), AudioItem(b"x", samples=noise(9), rate=16_000)):
        with pytest.raises(InvalidRequest, match="either the bytes of a sound or its samples"):
            made.prepare(nothing, END)
    with pytest.raises(UndecodableInput):
        made.prepare(AudioItem(b""), END)


def test_what_does_not_go_together_is_refused() -> None:
    cases: list[tuple[Callable[[], AudioPreparer], str]] = [
        (lambda: preparer(AstSpec(), 500), "max_input_units is 500, but the model reads exactly 1024 units"),
        (lambda: preparer(AstSpec(), 4096, window_units=512), "window_units is 512, but the model reads exactly 1024"),
        (lambda: preparer(AstSpec(), 512, window_units=1024), "window_units .1024. is over max_input_units .512."),
        (lambda: preparer(ClapSpec(), window_units=1001), "reads a sound of any length at once"),
        (lambda: preparer(AstSpec(), inputs=("pixel_values",)), "pixel_values are not made by ASTFeatureExtractor"),
        (lambda: preparer(AstSpec(), inputs=("input_values", "attention_mask")), "attention_mask are not made"),
    ]
    for make, words in cases:
        with pytest.raises(ModelError, match=words):
            make()


def test_many_threads_get_what_one_gets() -> None:
    made = preparer(LogMelSpec(), 2000)
    file = io.BytesIO()
    soundfile.write(file, noise(48_000), 48_000, format="OGG")
    contents = [file.getvalue(), b"OggS" + bytes(999), file.getvalue()[:5000]]

    def outcome(content: bytes) -> bytes:
        try:
            return only(made.prepare(AudioItem(content), END), "input_features").tobytes()
        except UndecodableInput as error:
            return error.message.encode()

    expected = [outcome(content) for content in contents]
    found: list[list[bytes]] = []
    threads = [
        threading.Thread(target=lambda: found.extend([outcome(c) for c in contents] for _ in range(5)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [expected] * 40
