"""What a caller may choose of a model, and what not, through a whole mesh."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embedmesh
from embedmesh.errors import UnsupportedOutput
from embedmesh_encoder.backend.fake import write_model
from embedmesh_encoder.model import load_spec


async def test_only_the_widths_that_a_model_lists(start_mesh: Any) -> None:
    texts = ["one", "two, and some more", "three"]
    async with start_mesh() as mesh, embedmesh.AsyncClient(mesh.address) as client:
        (info,) = [each for each in await client.list_models() if each.is_default]
        assert (info.dimensions, info.truncatable_dimensions) == (16, (8,))
        full = (await client.embed(texts)).vectors
        cut = (await client.embed(texts, dimensions=8)).vectors
        expected = full[:, :8] / np.linalg.norm(full[:, :8], axis=1, keepdims=True)
        np.testing.assert_allclose(cut, expected, atol=1e-6)
        for width in (4, 12, 17):
            with pytest.raises(UnsupportedOutput, match=f"gives 8, 16 dimensions, not {width}"):
                await client.embed(texts, dimensions=width)


async def test_a_whitened_model_beside_its_original(
    start_mesh: Any, run: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "tiny", name="tiny", dimensions=40)
    texts = [f"text {i} of {'so ' * (i % 30)}many" for i in range(120)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    assert run("models", "whiten", tmp_path / "tiny", "--file", tmp_path / "texts.txt") == 0, capfd.readouterr()
    folders = (tmp_path / "tiny", tmp_path / "tiny-whitened")
    async with start_mesh(text_models=folders) as mesh, embedmesh.AsyncClient(mesh.address) as client:
        raw = (await client.embed(texts, model="tiny", normalize=False)).vectors.astype(np.float64)
        answer = await client.embed(texts, model="tiny-whitened")
        assert answer.models[0].space == load_spec(folders[1]).space != load_spec(folders[0]).space
        u, s, _ = np.linalg.svd(np.cov(raw.T))
        expected = (raw - raw.mean(axis=0)) @ (u / np.sqrt(s))
        expected *= np.sign((expected * answer.vectors).sum(axis=0))  # which a decomposition leaves open
        short = (await client.embed(texts, model="tiny-whitened", dimensions=32)).vectors
        for ours, theirs in ((answer.vectors, expected), (short, expected[:, :32])):
            unit = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
            assert (ours * unit).sum(axis=1).min() >= 0.9999
