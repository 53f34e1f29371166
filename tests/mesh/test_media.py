"""Hostile pictures and sounds through a whole mesh: each has an outcome of its own, and nothing else suffers."""

import importlib.util
import io
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile

import embedmesh
from embedmesh.errors import InputTooLarge, UndecodableInput

MUTANTS, PART = 2_000, 100
SEED = 20261124


def borrowed(name: str) -> ModuleType:
    """Give the module of tests that knows how such files are damaged."""
    spec = importlib.util.spec_from_file_location(f"borrowed_{name}", Path(__file__).parents[1] / f"encoder/{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mutants(modality: str) -> Iterator[Any]:
    if modality == "image":
        for _, content in borrowed("test_image_decode").mutants(SEED, MUTANTS):
            yield embedmesh.Image(content)
    else:
        damage = borrowed("test_audio_fuzz")
        rng = random.Random(SEED)
        files = damage.seeds()
        for _ in range(MUTANTS):
            yield embedmesh.Audio(damage.mutated(rng, files))


def intact(modality: str) -> Any:
    """Give an input with which nothing is wrong."""
    if modality == "image":
        images = borrowed("test_image_decode")
        return embedmesh.Image(images.saved(images.scene(), "PNG"))
    return embedmesh.Audio(borrowed("test_audio_fuzz").seeds()[2])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("modality", ["image", "audio"])
async def test_two_thousand_damaged_files_hurt_only_themselves(
    start_mesh: Any, make_tower: Any, tmp_path: Path, modality: str
) -> None:
    towers = {f"{modality}_models": (make_tower(tmp_path / modality, modality),)}
    good, damaged = intact(modality), list(mutants(modality))
    outcomes: Counter[str] = Counter()
    async with start_mesh(**towers) as mesh, embedmesh.AsyncClient(mesh.address) as client:
        [expected] = (await client.embed([good])).results
        pid = mesh.pids[modality]
        encoder = psutil.Process(pid)
        for start in range(0, MUTANTS, PART):
            place = start % (PART - 1)
            inputs = damaged[start : start + PART]
            inputs.insert(place, good)
            # No request takes longer than this, or it fails.
            results = list((await client.embed(inputs, cache="bypass", timeout=60)).results)
            np.testing.assert_allclose(results.pop(place).vector, expected.vector, atol=1e-5)
            for result in results:
                if result.error is None:
                    assert np.isfinite(result.vector).all()
                    outcomes["vector"] += 1
                else:
                    assert type(result.error) in {UndecodableInput, InputTooLarge}
                    assert result.error.message
                    outcomes[result.error.reason] += 1
        # The same files a second time: what may still grow is what the C library keeps of pictures below 16 MiB.
        warm = encoder.memory_info().rss
        for start in range(0, MUTANTS, PART):
            await client.embed(damaged[start : start + PART], cache="bypass", timeout=60)
        grown = encoder.memory_info().rss - warm
        assert mesh.pids[modality] == pid
    sys.stdout.write(f"{modality}: {dict(outcomes)}, RSS grew by {grown / 2**20:.1f} MiB the second time\n")
    assert outcomes["vector"] > MUTANTS // 5
    assert outcomes["UNDECODABLE_INPUT"] > MUTANTS // 5
    assert grown < 128 << 20


async def test_limits_are_settings_that_are_published_and_named_in_errors(
    start_mesh: Any, make_tower: Any, tmp_path: Path
) -> None:
    images = borrowed("test_image_decode")
    file = io.BytesIO()
    soundfile.write(file, np.zeros(3 * 8000), 8000, format="WAV", subtype="PCM_U8")
    inputs: dict[tuple[str, str, str], Any] = {
        ("image", "pixels", "4800"): embedmesh.Image(images.saved(images.scene(80, 60), "PNG")),
        ("image", "bytes", "20001"): embedmesh.Image(bytes(20_001)),
        ("audio", "seconds", "3"): embedmesh.Audio(file.getvalue()),
        ("audio", "bytes", "100001"): embedmesh.Audio(bytes(100_001)),
    }
    options: dict[str, Any] = {
        "image": {"max_image_pixels": 4000, "max_image_bytes": 20_000},
        "audio": {"max_audio_seconds": 2, "max_audio_bytes": 100_000},
        "image_models": (make_tower(tmp_path / "image", "image"),),
        "audio_models": (make_tower(tmp_path / "audio", "audio"),),
    }
    async with start_mesh(**options) as mesh, embedmesh.AsyncClient(mesh.address) as client:
        limits = {info.modality: info.limits for info in await client.list_models()}
        assert limits["image"] == {"image_pixels": 4000, "image_bytes": 20_000}
        assert limits["audio"] == {"audio_seconds": 2, "audio_bytes": 100_000}
        results = (await client.embed(list(inputs.values()))).results
    for (modality, unit, actual), result in zip(inputs, results, strict=True):
        assert isinstance(result.error, InputTooLarge)
        limit = str(limits[modality][f"{modality}_{unit}"])
        assert result.error.metadata == {"limit": limit, "actual": actual, "unit": unit}
        assert limit in result.error.message
