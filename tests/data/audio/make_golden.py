"""Write golden.npz: what transformers' feature extractors make of the sounds of `sound`.

    PYTHONPATH=<folder of transformers and torch> python tests/data/audio/make_golden.py

Made with transformers 5.23.0, torch 2.13.0 and numpy 2.4.6. Every 50th value of each array is kept, from a start that
differs per array, so that the file stays small and all frames and bands are seen. CLAP's random choices are fixed as
`embedmesh_encoder.audio.features` describes them. AST is without torchaudio.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

STEP = 50
# name: extractor, settings, samples
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "whisper": ("WhisperFeatureExtractor", {}, 50_001),
    "whisper_large": ("WhisperFeatureExtractor", {"feature_size": 128}, 480_000),
    "ast": ("ASTFeatureExtractor", {}, 40_123),
    "ast_long": ("ASTFeatureExtractor", {"mean": -5.0, "std": 3.0}, 164_079),
    "clap": ("ClapFeatureExtractor", {"truncation": "rand_trunc"}, 100_001),
    "clap_pad": ("ClapFeatureExtractor", {"truncation": "rand_trunc", "padding": "pad"}, 100_001),
    "clap_fusion": ("ClapFeatureExtractor", {}, 100_001),
    "clap_fusion_long": ("ClapFeatureExtractor", {"padding": "repeat"}, 700_001),
    "wav2vec2": ("Wav2Vec2FeatureExtractor", {}, 20_003),
    "wav2vec2_bare": ("Wav2Vec2FeatureExtractor", {"do_normalize": False}, 20_003),
}


def sound(samples: int) -> NDArray[np.float32]:
    """Give a rising tone in noise that comes and goes, the same everywhere."""
    at = np.arange(samples) / 16_000
    noise = np.random.default_rng(7).standard_normal(samples)
    wave = 0.3 * np.sin(2 * np.pi * (200 + 60 * at) * at) + 0.05 * np.sin(at) ** 2 * noise + 0.01
    return wave.astype(np.float32)


def thinned(array: NDArray[Any], name: str) -> NDArray[np.float32]:
    """Give every `STEP`th value."""
    return array.reshape(-1)[len(name) % STEP :: STEP].astype(np.float32)


def main() -> None:
    transformers = import_module("transformers")  # the functions above are used where it is not installed

    golden: dict[str, Any] = {}
    for name, (kind, settings, samples) in CASES.items():
        extractor = getattr(transformers, kind)(**settings)
        with (
            mock.patch("numpy.random.choice", lambda choices: choices[len(choices) // 2]),
            mock.patch("numpy.random.randint", lambda low, high: low),
        ):
            made = extractor(sound(samples), sampling_rate=extractor.sampling_rate, return_tensors="np")
        golden[name] = thinned(made[extractor.model_input_names[0]][0], name)
        golden[f"{name}.config"] = np.array(json.dumps({"feature_extractor_type": kind, **settings}))
    np.savez_compressed(Path(__file__).with_name("golden.npz"), **golden)


if __name__ == "__main__":
    main()
