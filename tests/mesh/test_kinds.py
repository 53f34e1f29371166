"""Dense, sparse and multi-vectors of one text from one call, through client, gateway, cache and encoder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embedmesh
from embedmesh.muvera import Muvera, max_sim
from embedmesh_encoder.backend.fake import write_model


async def test_all_kinds_of_one_call_and_again_from_the_cache(start_mesh: Any, tmp_path: Path) -> None:
    folder = tmp_path / "kinds"
    write_model(folder, kinds=("dense", "sparse", "multi_vector"), dimensions=8, multi_vector_dimensions=4)
    texts = ["a heavy coat", "a coat. heavy.", ""]
    async with start_mesh(text_models=(folder,)) as mesh, embedmesh.AsyncClient(mesh.address) as client:
        dense = await client.embed(texts)
        sparse = await client.embed(texts, kinds=["sparse"])
        whole = await client.embed(texts, kinds=["multi_vector", "sparse", "dense"])
        again = await client.embed(texts, kinds=["sparse", "multi_vector"], dtype="float16")
        assert [[result.cached for result in response.results] for response in (dense, sparse, whole, again)] == [
            [False] * 3,
            [False] * 3,
            [False] * 3,
            [True] * 3,
        ]
        np.testing.assert_array_equal(whole.vectors, dense.vectors)
        for one, other, half in zip(whole.results, sparse.results, again.results, strict=True):
            np.testing.assert_array_equal(one.sparse.indices, other.sparse.indices)
            np.testing.assert_array_equal(one.sparse.values, other.sparse.values)
            np.testing.assert_allclose(half.sparse.values, one.sparse.values, rtol=1e-3)
            np.testing.assert_allclose(half.multi_vector, one.multi_vector, atol=1e-3)
        # Without [CLS] and full stops, and with [SEP].
        assert [len(result.multi_vector) for result in whole.results] == [13, 13, 1]
        scores = max_sim(whole.results[0].multi_vector, [result.multi_vector for result in whole.results])
        assert scores[0] == pytest.approx(13, abs=1e-4)
        assert scores.argmax() == 0
        encoder = Muvera(4, simhash_bits=3, repetitions=4)
        assert encoder.encode_document(whole.results[0].multi_vector).shape == (encoder.width,)
        with pytest.raises(embedmesh.UnsupportedOutput, match="FLOAT32 or FLOAT16"):
            await client.embed(texts, kinds=["sparse"], dtype="int8")
        (info,) = [model for model in await client.list_models() if model.name == "fake-text"]
        assert (info.kinds, info.sparse_dimensions, info.multi_vector_dimensions) == (
            ("dense", "sparse", "multi_vector"),
            262,
            4,
        )
