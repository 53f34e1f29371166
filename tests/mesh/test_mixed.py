"""Texts, pictures and sounds in one request, through three real encoders."""

import asyncio
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

import embedmesh
from embedmesh.errors import InputTooLarge, UndecodableInput
from embedmesh_encoder.backend.fake import write_model


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def sound(hertz: float) -> bytes:
    wave = 0.5 * np.sin(np.arange(8000) * 2 * np.pi * hertz / 16_000)
    file = io.BytesIO()
    soundfile.write(file, wave, 16_000, format="FLAC")
    return file.getvalue()


@pytest.fixture
def towers(make_tower: Any, tmp_path: Path) -> dict[str, tuple[Path, ...]]:
    return {f"{modality}_models": (make_tower(tmp_path / modality, modality),) for modality in ("image", "audio")}


async def test_a_mixed_request_keeps_its_order(
    start_mesh: Any, towers: dict[str, tuple[Path, ...]], scrape: Any, total: Any
) -> None:
    inputs: list[Any] = []
    for i in range(100):
        inputs += [f"text {i}", embedmesh.Image(picture(i)), embedmesh.Audio(sound(200 + 5 * i))]
    inputs[1] = embedmesh.Image(b"no picture")
    inputs[5] = embedmesh.Audio(sound(300)[:50])
    inputs[9] = "x" * (2**20 + 1)
    inputs[31] = inputs[34]  # the same picture twice
    bad = {1: UndecodableInput, 5: UndecodableInput, 9: InputTooLarge}

    async with start_mesh(**towers) as mesh, embedmesh.AsyncClient(mesh.address, max_inputs=300) as client:
        response = await client.embed(inputs)
        assert {i: type(result.error) for i, result in enumerate(response.results) if result.error} == bad
        names = ("fake-text", "tiny-image", "tiny-audio")
        assert [r.model.name for r in response.results if r.model] == [
            names[i % 3] for i in range(len(inputs)) if i not in bad
        ]
        assert {model.name: model.space for model in response.models} == {
            "fake-text": "fake-text",
            "tiny-image": "tiny",
            "tiny-audio": "tiny",
        }
        # Each is what it is alone, and no two pictures of one size share an entry of the cache.
        for i in (0, 4, 8, 31, 34, 200, 298):
            alone = await client.embed([inputs[i]], cache="bypass")
            np.testing.assert_allclose(alone.vectors[0], response.results[i].vector, atol=1e-5)
        pictures = {response.results[i].vector.tobytes() for i in range(1, 300, 3) if i not in bad}
        assert len(pictures) == 98

        again = await client.embed(inputs)
        assert again.usage.cached_inputs == 297
        counted = {
            role: total(await scrape(mesh.role(role).http), "embedmesh_encoder_inputs_total", outcome="ok")
            for role in ("text", "image", "audio")
        }
        # 98 different pictures; then those asked for alone, past the cache.
        assert counted == {"text": 99 + 1, "image": 98 + 4, "audio": 99 + 2}

        # Towers of one family answer under one name; a family without text says so for the texts alone.
        family = await client.embed([inputs[4], inputs[8], "text"], model="tiny")
        assert [bool(result.error) for result in family.results] == [False, False, True]
        assert {(info.name, info.family, info.modality) for info in await client.list_models()} == {
            ("fake-text", "fake-text", "text"),
            ("tiny-image", "tiny", "image"),
            ("tiny-audio", "tiny", "audio"),
        }


async def test_the_three_encoders_compute_at_once(
    start_mesh: Any, make_tower: Any, tmp_path: Path, scrape: Any, total: Any
) -> None:
    # About a second a batch each: text sleeps, the others multiply matrices with one thread.
    write_model(tmp_path / "text", base_ms=1500)
    options: dict[str, Any] = {"text_models": (tmp_path / "text",)}
    for modality in ("image", "audio"):
        options[f"{modality}_models"] = (make_tower(tmp_path / modality, modality, busy=3072),)
        options[modality] = {"threads": 1}

    async with start_mesh(**options) as mesh, embedmesh.AsyncClient(mesh.address) as client:

        async def computes(role: str) -> bool:
            """Whether a batch, here of one input, has left the queue and has not come back from the model."""
            samples = await scrape(mesh.role(role).http)
            begun, ended = (
                total(samples, "embedmesh_encoder_stage_seconds_count", stage=stage) for stage in ("queue", "infer")
            )
            return bool(begun > ended)

        seen = False
        for number in range(5):
            inputs: list[Any] = [
                f"text {number}",
                embedmesh.Image(picture(number)),
                embedmesh.Audio(sound(200 + number)),
            ]
            request = asyncio.create_task(client.embed(inputs))
            while not request.done() and not seen:
                # Each has one batch a request, so who computes at two looks did so between them: at the third look
                # all three do.
                seen = all([await computes(role) for role in ("text", "image", "audio", "image", "text")])
            assert not [result.error for result in (await request).results if result.error]
            if seen:
                break
        assert seen
