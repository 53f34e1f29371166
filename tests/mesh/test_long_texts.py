"""Models that read long texts, exported and served in process, against sentence-transformers; chunks by hand."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_encoder.backend import create_backend
from embedmesh_encoder.backend.fake import write_model as write_fake
from embedmesh_encoder.encoder import Encoder, EncoderOptions
from embedmesh_encoder.model import load_spec
from embedmesh_encoder.text import Chunking, LateChunking, TextItem, TextPreparer
from embedmesh_server.metrics import EncoderMetrics

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    # Of the tokenizer of bytes that the fake model has, whose special tokens come first.
    "vocab_size": 262, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3,
}  # fmt: skip
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "modernbert": ("ModernBertConfig", {**SMALL, **WINDOWS, "local_attention": 16, "max_position_embeddings": 8192}),
    "qwen3": (
        "Qwen3Config",
        {**SMALL, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 32768},
    ),
}
WORDS = [f"word{i * i} of {i}, " for i in range(2000)]


class Recorder:
    """The backend, which notes how many texts of how many tokens it was given."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.name, self.precision, self.run_beside = backend.name, backend.precision, None
        self.close = backend.close
        self.batches: list[tuple[int, int]] = []

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] = ()) -> Any:
        packed = "segment_ids" in feeds
        texts = int(feeds["segment_ids"].max()) + 1 if packed else len(feeds["input_ids"])
        self.batches.append((texts, feeds["input_ids"].shape[1]))
        return self._backend.run(feeds, outputs)


@pytest.fixture
def exported(
    run: Callable[..., int], randomise: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Export a small model; gives its reference and how to serve it."""
    import transformers  # type: ignore[import-not-found]
    from sentence_transformers import SentenceTransformer, models  # type: ignore[import-not-found]

    def export(name: str, pooling: str, *words: str) -> Any:
        kind, settings = MODELS[name]
        model = transformers.AutoModel.from_config(getattr(transformers, kind)(**settings))
        randomise(model)
        longest = settings["max_position_embeddings"]
        raw, folder = tmp_path / "raw", tmp_path / name
        model.eval().save_pretrained(raw)
        write_fake(tmp_path / "fake")
        transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "fake" / "tokenizer.json"),
            model_max_length=longest,
            model_input_names=["input_ids", "attention_mask"],
            **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "unk")},
        ).save_pretrained(raw)
        transformer = models.Transformer(str(raw), max_seq_length=longest)
        reference = SentenceTransformer(
            modules=[transformer, models.Pooling(SMALL["hidden_size"], pooling_mode=pooling), models.Normalize()],
            device="cpu",
        )
        reference.save(str(folder))
        monkeypatch.setenv("EMBEDMESH_CACHE_DIR", str(tmp_path / "cache"))
        assert run("models", "export", folder, *words) == 0

        @contextmanager
        def serve() -> Iterator[tuple[Encoder, Recorder]]:
            spec = load_spec(tmp_path / "cache" / "models" / name)
            assert spec.max_input_units == longest
            backend = Recorder(create_backend(spec))
            metrics = EncoderMetrics(CollectorRegistry())
            yield Encoder(spec, TextPreparer(spec), backend, metrics, EncoderOptions(batch_cost=256)), backend

        return reference, serve

    return export


@pytest.mark.parametrize(
    ("name", "pooling", "words", "tokens"),
    [
        ("modernbert", "mean", ("--layout", "padded"), 8192),
        ("modernbert", "cls", (), 8192),
        ("qwen3", "lasttoken", (), 9000),
    ],
)
async def test_a_long_text_rides_alone_and_is_right(
    exported: Callable[..., Any], name: str, pooling: str, words: Sequence[str], tokens: int
) -> None:
    reference, serve = exported(name, pooling, *words)
    long = "".join(WORDS)[: tokens - 2]
    texts = ["a short one", "another", long, "short again", "and the last of them"]
    theirs = np.stack([reference.encode(text) for text in texts])
    with serve() as (encoder, backend):
        got = await encoder.embed([TextItem(text) for text in texts])
        assert got[2].units == tokens
        assert not got[2].truncated
        ours = np.stack([one.vector for one in got])
        assert (ours * theirs).sum(axis=1).min() > 0.9999
        # The long text rides alone, and pads nobody.
        assert (1, tokens) in backend.batches
        assert sum(texts for texts, _ in backend.batches) == 5
        assert sum(width > 256 for _, width in backend.batches) == 1
        without = await encoder.embed([TextItem(text) for text in texts if text is not long])
        np.testing.assert_allclose(np.stack([one.vector for one in without]), np.delete(ours, 2, axis=0), atol=1e-5)
        await encoder.close(10)


async def test_chunks_and_instructions_are_the_mean_of_the_references_vectors(exported: Callable[..., Any]) -> None:
    reference, serve = exported("modernbert", "mean", "--layout", "padded")
    reference = type(reference)(modules=list(reference)[:2], device="cpu")  # before it normalises

    def mean(texts: Sequence[str], weights: Sequence[float] | None = None) -> Any:
        pooled = np.average([reference.encode(text) for text in texts], axis=0, weights=weights)
        return pooled / np.linalg.norm(pooled)

    text = "".join(WORDS)[:2500]
    chunks = [text[start : start + 998] for start in range(0, 2402, 898)]
    prompts = ("In one word: ", "The topic is ")
    with serve() as (encoder, _):
        [chunked] = await encoder.embed([TextItem(text, chunking=Chunking(1000, 100))], truncation=pb.TRUNCATION_CHUNK)
        [several] = await encoder.embed([TextItem(text, instructions=prompts)])
        await encoder.close(10)
    assert chunked.vector @ mean(chunks, [len(chunk) for chunk in chunks]) > 0.99999
    assert several.vector @ mean([prompt + text for prompt in prompts]) > 0.99999


async def test_late_chunking_is_the_mean_of_the_references_tokens(exported: Callable[..., Any]) -> None:
    reference, serve = exported("modernbert", "mean", "--layout", "padded")
    text, prompt = "".join(WORDS)[:5000], "search: "
    cuts = [0, 40, 1000, 1001, 4990, 5000]
    pairs = list(pairwise(cuts))
    hidden = reference.encode(prompt + text, output_value="token_embeddings").numpy()
    first = 1 + len(prompt)  # a token a letter, after [CLS] and the prompt
    assert len(hidden) == first + len(text) + 1
    wanted = np.stack([hidden[first + start : first + end].mean(axis=0) for start, end in pairs])
    item = TextItem(text, instruction=prompt, late_chunking=LateChunking(tuple(chain.from_iterable(pairs))))
    by_units = TextItem(text, instruction=prompt, late_chunking=LateChunking(units=1000))
    with serve() as (encoder, _):
        several = await encoder.embed([TextItem("short"), item, by_units])
        await encoder.close(10)
    theirs = np.stack([reference.encode(text) for text in ("short", prompt + text)])
    assert min(several[0].vector @ theirs[0], several[1].vector @ theirs[1]) > 0.99999
    assert several[0].others is None
    vectors, norms = several[1].others.spans
    np.testing.assert_allclose(vectors * norms[:, None], wanted, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert several[2].offsets.tolist() == [[start, start + 1000] for start in range(0, 5000, 1000)]
    apart = hidden[first + 1000 : first + 2000].mean(axis=0)
    assert several[2].others.spans[0][1] @ apart / np.linalg.norm(apart) > 0.99999
