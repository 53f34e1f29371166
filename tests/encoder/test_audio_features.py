"""Features equal to transformers' feature extractors (see data/audio/make_golden.py)."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedmesh_encoder.audio.features import AudioSpec, LogMelSpec, mel_filters
from embedmesh_encoder.model import ModelError

DATA = Path(__file__).parents[1] / "data" / "audio"
GOLDEN: dict[str, NDArray[Any]] = dict(np.load(DATA / "golden.npz"))
NAMES = [name for name in GOLDEN if not name.endswith(".config")]


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    module = importlib.util.spec_from_file_location("make_golden", DATA / "make_golden.py")
    assert module
    assert module.loader
    made = importlib.util.module_from_spec(module)
    module.loader.exec_module(made)
    return made


def features(spec: AudioSpec, samples: NDArray[np.float32]) -> NDArray[np.float32]:
    made: NDArray[np.float32] = spec.features(samples)[spec.input_name]
    assert made.dtype == np.float32
    assert np.isfinite(made).all()
    return made


@pytest.mark.parametrize("name", NAMES)
def test_features_equal_the_library(name: str, maker: ModuleType) -> None:
    spec = AudioSpec.from_preprocessor_config(json.loads(str(GOLDEN[f"{name}.config"])))
    made = maker.thinned(features(spec, maker.sound(maker.CASES[name][2])), name)
    np.testing.assert_allclose(made, GOLDEN[name], atol=1e-4, rtol=0)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("WhisperFeatureExtractor", {}),
        ("WhisperFeatureExtractor", {"feature_size": 128, "chunk_length": 10}),
        ("ASTFeatureExtractor", {}),
        ("ASTFeatureExtractor", {"do_normalize": False, "num_mel_bins": 64, "max_length": 200}),
        *(
            ("ClapFeatureExtractor", {"truncation": truncation, "padding": padding})
            for truncation in ("rand_trunc", "fusion")
            for padding in ("repeatpad", "repeat", "pad")
        ),
        ("Wav2Vec2FeatureExtractor", {}),
        ("Wav2Vec2FeatureExtractor", {"do_normalize": False}),
    ],
)
def test_features_equal_the_installed_library(
    kind: str, settings: dict[str, Any], maker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    extractor = getattr(transformers, kind)(**settings)
    config = json.loads(extractor.to_json_string())
    spec = AudioSpec.from_preprocessor_config(config)
    monkeypatch.setattr("numpy.random.choice", lambda choices: choices[len(choices) // 2])
    monkeypatch.setattr("numpy.random.randint", lambda low, high: low)
    for samples in (400, 1777, 16_000, 164_079, 480_000, 480_001, 480_480, 1_200_000):
        wave = maker.sound(samples)
        expected = extractor(wave, sampling_rate=extractor.sampling_rate, return_tensors="np")
        made = spec.features(wave)
        name = extractor.model_input_names[0]
        assert spec.input_name == name
        np.testing.assert_allclose(made[name], expected[name][0], atol=1e-4, rtol=0, err_msg=f"{samples} samples")
        if "is_longer" in made:
            np.testing.assert_array_equal(made["is_longer"], expected["is_longer"][0])


def test_settings_that_would_change_the_numbers_are_refused() -> None:
    read = AudioSpec.from_preprocessor_config
    for config, words in (
        ({}, "feature_extractor_type None is not supported"),
        ({"feature_extractor_type": "EncodecFeatureExtractor"}, "'EncodecFeatureExtractor' is not supported"),
        ({"feature_extractor_type": []}, "is not supported"),
        ({"feature_extractor_type": "WhisperFeatureExtractor", "dither": 0.1}, "dither = 0.1 is not supported, only 0"),
        ({"feature_extractor_type": "ASTFeatureExtractor", "padding_side": "left"}, "padding_side = 'left'"),
        ({"feature_extractor_type": "ASTFeatureExtractor", "shine": 3}, "shine = 3 is unknown"),
        (
            {"feature_extractor_type": "ASTFeatureExtractor", "max_length": "long"},
            "max_length = 'long' is of the wrong",
        ),
        ({"feature_extractor_type": "ASTFeatureExtractor", "max_length": True}, "max_length = True is of the wrong"),
        ({"feature_extractor_type": "ASTFeatureExtractor", "std": 0.0}, "std must be greater than 0"),
        ({"feature_extractor_type": "ClapFeatureExtractor", "truncation": "none"}, "truncation must be one of"),
        ({"feature_extractor_type": "ClapFeatureExtractor", "feature_size": 80}, "feature_size must be 64"),
        ({"feature_extractor_type": "ClapFeatureExtractor", "hop_length": 481}, "hop_length must divide"),
        ({"feature_extractor_type": "EmbedMeshLogMel", "frequency_max": 9000.0}, "half the rate"),
        ({"feature_extractor_type": "EmbedMeshLogMel", "n_fft": 256}, "n_fft must not be smaller"),
    ):
        with pytest.raises(ModelError) as caught:
            read(config)
        assert words in str(caught.value), config
    with pytest.raises(ModelError, match=r"a = 1 is unknown.*b = 2 is unknown"):
        read({"feature_extractor_type": "Wav2Vec2FeatureExtractor", "a": 1, "b": 2})


def test_settings_are_written_as_they_are_read() -> None:
    spec = LogMelSpec(num_mels=40, mean=-3.0, std=2.0)
    assert AudioSpec.from_preprocessor_config(json.loads(json.dumps(spec.to_preprocessor_config()))) == spec


@pytest.mark.parametrize(
    "kind", sorted({json.loads(str(GOLDEN[f"{n}.config"]))["feature_extractor_type"] for n in NAMES})
)
@pytest.mark.parametrize(
    "wave", [np.zeros(1), np.zeros(30_000), np.ones(3), np.full(30_000, 2.0**31), np.full(700_000, 1e-30)]
)
def test_silence_and_extremes_give_finite_features(kind: str, wave: NDArray[np.float64]) -> None:
    spec = AudioSpec.from_preprocessor_config({"feature_extractor_type": kind})
    features(spec, wave.astype(np.float32))


def test_our_own_front_end() -> None:
    spec = LogMelSpec()
    at = np.arange(16_000) / 16_000
    tone = (0.2 * np.sin(2 * np.pi * 1000 * at)).astype(np.float32)
    made = features(spec, tone)
    assert made.shape == (spec.units(16_000), 64) == (98, 64)
    # The loudest band is the one around the tone.
    bank = mel_filters(257, 64, 50.0, 7800.0, 16_000, scale="htk")
    assert abs(int(made[50].argmax()) - int(bank[32].argmax())) <= 1
    # Loudness does not matter, silence stays silence, and a sound too short for a frame has one.
    np.testing.assert_allclose(features(spec, tone * 0.01), made, atol=1e-3)
    np.testing.assert_allclose(features(spec, np.zeros(999, np.float32)), np.log(1e-6), rtol=1e-6)
    assert features(spec, tone[:10]).shape == (1, 64)
    # A frame does not depend on what comes after it, but for the loudness of the whole.
    plain = LogMelSpec(rms_normalize=False, mean=-5.0, std=2.0)
    np.testing.assert_array_equal(features(plain, tone)[:20], features(plain, tone[: plain.samples(20)]))


@pytest.mark.parametrize(
    "kind",
    [
        "WhisperFeatureExtractor",
        "ASTFeatureExtractor",
        "ClapFeatureExtractor",
        "EmbedMeshLogMel",
        "Wav2Vec2FeatureExtractor",
    ],
)
def test_units_count_what_windows_take(kind: str) -> None:
    spec = AudioSpec.from_preprocessor_config({"feature_extractor_type": kind})
    for units in (2, 3, 50, 1001):
        assert spec.units(spec.samples(units)) == units
        assert spec.units(spec.samples(units) + spec.unit_samples) == units + 1
    assert spec.units(1) == 1 or kind == "ClapFeatureExtractor"
