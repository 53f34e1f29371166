"""A real backend without a model: deterministic vectors, settable service time and failures.

It takes the feeds of a packed text graph and gives each text a vector that depends on its own tokens and
positions alone, and where the manifest wants them each token a weight and a row that depend on it and its position
alone. `write_model` makes a complete model folder for it, with a real tokenizer, so that everything around the
backend is the normal path. Meant for tests (yours too) and for load tests of everything but the arithmetic.

Put `FAIL` into a text and every batch that holds it raises; put `NAN` into a text and its
vectors are not finite.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_encoder.model import ModelSpec, write_manifest

__all__ = ["FAIL", "NAN", "FakeBackend", "write_model"]

FAIL: Final = "[[fail]]"
NAN: Final = "[[nan]]"

# Ids of the special tokens in the tokenizer that `write_model` makes: their place in this list.
_SPECIAL: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", FAIL, NAN)
_LETTERS: Final = 256
_FAIL_ID: Final = _SPECIAL.index(FAIL)
_NAN_ID: Final = _SPECIAL.index(NAN)

# SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _numbers(hashes: NDArray[np.uint64], count: int) -> NDArray[np.float32]:
    """Give so many numbers in [-1, 1) for each hash."""
    counters = (np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)[None, :]
    bits = _mix(hashes[:, None] + counters) >> np.uint64(40)
    numbers: NDArray[np.float32] = bits.astype(np.float32) / np.float32(1 << 23) - np.float32(1)
    return numbers


class FakeBackend:
    """Implements `Backend`; takes `base_ms + ms_per_unit * units` a batch, the GIL released."""

    name = "fake"
    precision = "float32"
    run_beside = None

    def __init__(self, spec: ModelSpec) -> None:
        if spec.fake is None:
            raise ValueError(f'model "{spec.name}" has no [fake] table')
        self._fake = spec.fake
        self._spec = spec

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
        """Give float32 [texts, dimensions], weights [rows, width, 1] and rows [rows, width, d], values in [-1, 1).

        Args:
            feeds: `input_ids`, `position_ids`, `segment_ids`, int64 [rows, width].
            outputs: See `Backend.run`.

        Raises:
            RuntimeError: A text of the batch holds `FAIL`.
        """
        segments = feeds["segment_ids"].ravel()
        real = segments >= 0
        ids = feeds["input_ids"].ravel()
        pause = self._fake.base_ms + self._fake.ms_per_unit * np.count_nonzero(real)
        if pause:
            time.sleep(pause / 1000)
        if np.any(ids[real] == _FAIL_ID):
            raise RuntimeError(f"the fake model fails on batches that hold {FAIL}")
        positions = feeds["position_ids"].ravel().astype(np.uint64)
        tokens = _mix((ids.astype(np.uint64) << np.uint64(32)) + positions + _GOLDEN)
        shape = feeds["input_ids"].shape
        found: dict[str, NDArray[Any]] = {}
        for kind, name in self._spec.outputs.items():
            if outputs and name not in outputs:
                continue
            if kind == pb.EMBEDDING_KIND_DENSE:
                # A text's hash is the wrapped sum of those of its tokens: no order of summation and no neighbour
                # changes it.
                hashes = np.full(int(segments.max(initial=-1)) + 1, self._fake.seed, np.uint64)
                np.add.at(hashes, segments[real], tokens[real])
                vectors = _numbers(hashes, self._spec.graph_dimensions)
                vectors[segments[real & (ids == _NAN_ID)]] = np.nan
                found[name] = vectors
            else:
                table = self._spec.multi_vector if kind == pb.EMBEDDING_KIND_MULTI_VECTOR else None
                # Another number than the kinds give, so that a weight is no element of a row.
                numbers = _numbers(tokens + np.uint64(self._fake.seed + kind), table.dimensions if table else 1)
                numbers[ids == _NAN_ID] = np.nan
                found[name] = numbers.reshape(*shape, -1)
        return found

    def close(self) -> None:
        """Nothing is held."""


def write_model(
    folder: Path,
    *,
    name: str = "fake-text",
    family: str | None = None,
    space: str | None = None,
    kinds: Sequence[str] = ("dense",),
    dimensions: int = 384,
    multi_vector_dimensions: int = 16,
    truncatable_dimensions: Sequence[int] = (),
    normalized: bool = True,
    max_input_units: int = 256,
    prompts: Mapping[str, str] | None = None,
    base_ms: float = 0,
    ms_per_unit: float = 0,
    seed: int = 0,
) -> ModelSpec:
    """Write a complete text model for the fake backend into `folder`, made when missing.

    Its tokenizer gives [CLS], one token for each byte of UTF-8, [SEP].

    Args:
        folder: Where to.
        name: Name of the model; also its family and space unless these are given.
        family: See `embedmesh_encoder.model`.
        space: See `embedmesh_encoder.model`.
        kinds: Kinds of vector it makes. Special tokens have no weight in sparse vectors, and [CLS] and "." no row.
        dimensions: Width of the dense vectors.
        multi_vector_dimensions: Width of each row of the multi-vectors.
        truncatable_dimensions: Smaller widths that are offered.
        normalized: Whether vectors are normalised by default.
        max_input_units: Most tokens of a text that are read, [CLS] and [SEP] included.
        prompts: Prompts for "query" and "document".
        base_ms: Milliseconds that every batch takes.
        ms_per_unit: Milliseconds that every token adds.
        seed: Another seed gives other vectors and another revision.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors  # noqa: PLC0415  (only to write)

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="[UNK]"))  # noqa: S106  (no password)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    )
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    others = {
        "sparse": {
            "output": "token_weights",
            "pooling": "tokens",
            "dimensions": len(_SPECIAL) + _LETTERS,
            "skip_tokens": [_SPECIAL.index(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")],
        },
        "multi_vector": {
            "output": "token_vectors",
            "dimensions": multi_vector_dimensions,
            "skip_first": 1,
            "skip_tokens": [vocabulary["."]],
        },
    }
    dense = {
        "dimensions": dimensions,
        "truncatable_dimensions": list(truncatable_dimensions),
        "normalized": normalized,
    }
    manifest = {
        "name": name,
        "family": family or name,
        "modality": "text",
        "space": space or name,
        "kinds": list(kinds),
        **(dense if "dense" in kinds else {}),
        "max_input_units": max_input_units,
        "license": "Apache-2.0",
        "source": "made by embedmesh_encoder.backend.fake",
        "backend": "fake",
        "graph": {"layout": "packed"},
        "text": {"tokenizer": "tokenizer.json", "prompts": dict(prompts or {})},
        **{kind: table for kind, table in others.items() if kind in kinds},
        "fake": {"base_ms": base_ms, "ms_per_unit": ms_per_unit, "seed": seed},
    }
    return write_manifest(folder, manifest, ["tokenizer.json"])
