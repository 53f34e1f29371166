"""Sparse and multi-vector models with random weights, exported here and served by a whole mesh, against transformers.

make test-torch ARGS="-k kinds_torch -s"     # prints the table of services/README.md
"""

import asyncio
import string
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import embedmesh
from embedmesh_encoder.backend.fake import write_model as write_fake
from embedmesh_encoder.model import write_manifest

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
# Of the tokenizer of bytes that the fake model has, whose special tokens come first.
VOCABULARY = 262
SPECIAL = [0, 1, 2, 3]
LONGEST = 48
TEXTS = [
    *("a", "", "aa bb aa, bb; aa!", "...", "The quick brown fox (of old) jumps."),
    *(f"{word * count} {count}." for count, word in enumerate(("x", "yes, ", "zebra ", "no; ") * 6)),
    "far more than it reads, " * 9,
]
INPUTS = ("input_ids", "attention_mask")


def randomise(model: Any) -> Any:
    """Give weights that keep the size of what passes through them, so that tokens can be told apart."""
    import torch

    torch.manual_seed(20261125)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1.0 if "embeddings" in name else weight[0].numel() ** -0.5)
            else:
                weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


def build(kind: str) -> tuple[Any, dict[str, Any]]:
    """Give a module from ids and mask to outputs, and what the manifest says of them."""
    import torch
    import transformers  # type: ignore[import-not-found]

    class Graph(torch.nn.Module):  # type: ignore[misc]  # (torch has no types here)
        def __init__(self) -> None:
            super().__init__()
            if kind == "splade":
                config = transformers.BertConfig(**SMALL, vocab_size=VOCABULARY, attn_implementation="eager")
                self.body = transformers.BertForMaskedLM(config)
            elif kind == "bge-m3":
                config = transformers.XLMRobertaConfig(
                    **SMALL, vocab_size=VOCABULARY, pad_token_id=0, attn_implementation="eager"
                )
                self.body = transformers.XLMRobertaModel(config, add_pooling_layer=False)
                self.sparse_linear = torch.nn.Linear(48, 1)
                self.colbert_linear = torch.nn.Linear(48, 48)
            else:
                config = transformers.BertConfig(**SMALL, vocab_size=VOCABULARY, attn_implementation="eager")
                self.body = transformers.BertModel(config, add_pooling_layer=False)
                self.linear = torch.nn.Linear(48, 16, bias=False)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            found = self.body(input_ids=input_ids, attention_mask=attention_mask)
            if kind == "splade":
                return found.logits
            if kind == "bge-m3":
                hidden = found.last_hidden_state
                return hidden[:, 0], torch.relu(self.sparse_linear(hidden)), self.colbert_linear(hidden)
            return self.linear(found.last_hidden_state)

    graph = randomise(Graph())
    punctuation = [VOCABULARY_OF[letter] for letter in string.punctuation]
    manifests: dict[str, dict[str, Any]] = {
        "splade": {
            "kinds": ["sparse"],
            "sparse": {"output": "logits", "pooling": "max", "dimensions": VOCABULARY},
        },
        "bge-m3": {
            "kinds": ["dense", "sparse", "multi_vector"],
            "dimensions": 48,
            "normalized": True,
            "sparse": {"output": "weights", "pooling": "tokens", "dimensions": VOCABULARY, "skip_tokens": SPECIAL},
            "multi_vector": {"output": "rows", "dimensions": 48, "skip_first": 1},
        },
        "colbert": {
            "kinds": ["multi_vector"],
            "multi_vector": {"output": "rows", "dimensions": 16, "skip_tokens": punctuation},
        },
    }
    return graph, manifests[kind]


VOCABULARY_OF: dict[str, int] = {}
OUTPUTS = {"splade": ["logits"], "bge-m3": ["sentence", "weights", "rows"], "colbert": ["rows"]}


def write_model(kind: str, folder: Path) -> Any:
    """Write a model folder; gives the module."""
    import torch
    from tokenizers import Tokenizer

    write_fake(folder)  # for its tokenizer
    VOCABULARY_OF.update(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab())
    graph, manifest = build(kind)
    example = (torch.randint(4, VOCABULARY, (2, 7)), torch.tensor([[1] * 7, [1] * 5 + [0] * 2]))
    axes = {name: {0: "n", 1: "t"} for name in (*INPUTS, "logits", "weights", "rows")} | {"sentence": {0: "n"}}
    torch.onnx.export(
        graph,
        example,
        str(folder / "model.onnx"),
        input_names=list(INPUTS),
        output_names=OUTPUTS[kind],
        dynamic_axes={name: axes[name] for name in (*INPUTS, *OUTPUTS[kind])},
        opset_version=17,
        dynamo=False,  # the newer exporter needs onnxscript
    )
    entries = {
        "name": kind,
        "modality": "text",
        "space": kind,
        "max_input_units": LONGEST,
        "license": "Apache-2.0",
        "source": "this test",
        "backend": "onnxruntime",
        "graph": {"file": "model.onnx", "layout": "padded", "output": "sentence"},
        "text": {"tokenizer": "tokenizer.json", "prompts": {"query": "", "document": ""}},
        **manifest,
    }
    write_manifest(folder, entries, ["model.onnx", "tokenizer.json"])
    return graph


class Reference:
    """What the models' own libraries make of one text, alone, in torch."""

    def __init__(self, kind: str, graph: Any, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.kind, self.graph = kind, graph
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def __call__(self, text: str, *, query: bool) -> Mapping[str, Any]:
        import torch

        ids = self.tokenizer.encode(text).ids
        ids = ids if len(ids) <= LONGEST else [*ids[: LONGEST - 1], ids[-1]]
        with torch.no_grad():
            found = self.graph(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
        if self.kind == "splade":
            # Of naver/splade: torch.max(torch.log(1 + torch.relu(logits)) * attention_mask.unsqueeze(-1), dim=1)
            return {"sparse": torch.log(1 + torch.relu(found[0])).max(dim=0).values.numpy()}
        normalize = torch.nn.functional.normalize
        if self.kind == "bge-m3":
            sentence, weights, rows = (each[0] for each in found)
            sparse = np.zeros(VOCABULARY, np.float32)
            for token, weight in zip(ids, weights[:, 0].tolist(), strict=True):
                if token not in SPECIAL:
                    sparse[token] = max(sparse[token], weight)
            return {
                "dense": normalize(sentence, dim=0).numpy(),
                "sparse": sparse,
                "rows": normalize(rows[1:], dim=-1).numpy(),
            }
        letters = {VOCABULARY_OF[letter] for letter in string.punctuation}
        kept = [i for i, token in enumerate(ids) if query or token not in letters]
        return {"rows": normalize(found[0], dim=-1).numpy()[kept]}


def cosines(one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return np.asarray((one * other).sum(axis=-1) / norms)


@pytest.mark.parametrize("kind", ["splade", "bge-m3", "colbert"])
@pytest.mark.parametrize("role", ["query", "document"])
async def test_a_model_served_by_a_mesh_is_its_reference(start_mesh: Any, tmp_path: Path, kind: str, role: Any) -> None:
    folder = tmp_path / kind
    graph = await asyncio.to_thread(write_model, kind, folder)
    reference = Reference(kind, graph, folder)
    worst, difference, rows = 1.0, 0.0, 0
    async with start_mesh(text_models=(folder,)) as mesh, embedmesh.AsyncClient(mesh.address) as client:
        (info,) = [model for model in await client.list_models() if model.name == kind]
        kinds: Any = info.kinds
        whole = await client.embed(TEXTS, kinds=kinds, role=role, cache="bypass")
        alone = [await client.embed([text], kinds=kinds, role=role, cache="bypass") for text in TEXTS]
        for text, *results in zip(TEXTS, whole.results, (one.results[0] for one in alone), strict=True):
            wanted = reference(text, query=role == "query")
            for result in results:
                if "dense" in wanted:
                    worst = min(worst, float(cosines(result.vector, wanted["dense"])))
                if "sparse" in wanted:
                    (support,) = np.nonzero(wanted["sparse"])
                    np.testing.assert_array_equal(result.sparse.indices, support)
                    apart = np.abs(result.sparse.values - wanted["sparse"][support]).max(initial=0)
                    difference = max(difference, float(apart))
                if "rows" in wanted:
                    assert result.multi_vector.shape == wanted["rows"].shape
                    worst = min(worst, float(cosines(result.multi_vector, wanted["rows"]).min(initial=1)))
                    rows += len(result.multi_vector)
            # Company changes nothing.
            one, other = results
            for name in set(wanted) - {"sparse"}:
                read = {"dense": "vector", "rows": "multi_vector"}[name]
                np.testing.assert_allclose(getattr(one, read), getattr(other, read), atol=1e-5)
            if "sparse" in wanted:
                np.testing.assert_allclose(one.sparse.values, other.sparse.values, atol=1e-5)
    sys.stdout.write(f"| {kind} | {role} | {', '.join(kinds)} | {worst:.7f} | {difference:.1e} | {rows} |\n")
    assert worst >= 0.9999
    assert difference <= 1e-4
