"""Sparse and multi-vector models from repositories to vectors of a whole mesh, against sentence-transformers.

Small models with random weights in each layout: SPLADE, BGE-M3's heads, ColBERT of sentence-transformers, PyLate and
Stanford, and plain hidden states.

    make export-table     # runs this, too, and writes its table of services/embedmesh_cli/README.md
"""

import json
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embedmesh
from embedmesh_cli.likeness import LEAST_COSINE, MOST_APART, Vectors, compare
from embedmesh_cli.verify.reference import load_reference
from embedmesh_encoder.model import load_spec, write_manifest

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

SMALL = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "vocab_size": 30524, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
README = Path(__file__).parents[2] / "services" / "embedmesh_cli" / "README.md"
END = "[SEP]"
PROMPTS = {"query": "question: ", "document": "passage: "}


@pytest.fixture
def texts() -> list[str]:
    """Texts from nothing to more than the models read, with punctuation and words that are in no vocabulary."""
    path = Path(__file__).parents[1] / "data" / "golden_text" / "texts.jsonl"
    rows = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    return ["", "?!", "a, b; (c) \U0001f9ec", *(text[:1000] for text in rows[::50] if text.strip())]


def raw(randomise: Any, tokenizer: Path, folder: Path, name: str, extra: Sequence[str] = (), **changes: Any) -> Path:
    """Save a model of transformers and its tokenizer; gives the folder."""
    import transformers  # type: ignore[import-not-found]

    kind = name.removesuffix("ForMaskedLM").removesuffix("Model")
    config = getattr(transformers, f"{kind}Config")(**(SMALL | changes))
    model = getattr(transformers, name)(config)
    randomise(model)
    model.eval().save_pretrained(folder)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer), model_max_length=96, model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "unk", "mask")},
        eos_token=END,
    )  # fmt: skip
    made.add_tokens(list(extra))
    made.save_pretrained(folder)
    return folder


def splade(randomise: Any, tokenizer: Path, folder: Path, **pooling: Any) -> None:
    from sentence_transformers import SparseEncoder  # type: ignore[import-not-found]
    from sentence_transformers.base.modules import Transformer  # type: ignore[import-not-found]
    from sentence_transformers.sparse_encoder.modules import SpladePooling  # type: ignore[import-not-found]

    plain = raw(randomise, tokenizer, folder.with_name(f"{folder.name}-raw"), "BertForMaskedLM")
    transformer = Transformer(str(plain), transformer_task="fill-mask")
    SparseEncoder(modules=[transformer, SpladePooling(**pooling)], device="cpu", prompts=PROMPTS).save(str(folder))


def splade_old(randomise: Any, tokenizer: Path, folder: Path) -> None:
    """As older versions of the library saved it."""
    splade(randomise, tokenizer, folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "sentence_transformers.sparse_encoder.models.MLMTransformer"
    modules[1]["type"] = "sentence_transformers.sparse_encoder.models.SpladePooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    settings = json.loads((folder / "sentence_bert_config.json").read_text())
    kept = {key: settings[key] for key in ("max_seq_length", "do_lower_case") if key in settings}
    (folder / "sentence_bert_config.json").write_text(json.dumps(kept))


def splade_plain(randomise: Any, tokenizer: Path, folder: Path) -> None:
    raw(randomise, tokenizer, folder, "BertForMaskedLM")


def colbert(
    randomise: Any, tokenizer: Path, folder: Path, expansion: Mapping[str, Any] | None = None, kind: str = "BertModel",
    bias: bool = False, tasks: Sequence[str] = ("document",), **limits: int,
) -> None:  # fmt: skip
    """As sentence-transformers saves it."""
    import torch
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask  # type: ignore[import-not-found]

    plain = raw(randomise, tokenizer, folder.with_name(f"{folder.name}-raw"), kind)
    transformer = Transformer(str(plain), query_expansion=expansion, **limits)
    place = {"module_input_name": "token_embeddings"}
    layers = [
        Dense(48, 32, bias=bias, activation_function=torch.nn.Identity(), **place),
        Dense(32, 16, bias=False, activation_function=torch.nn.Tanh(), **place),
    ]
    # One of these is no word of the vocabulary.
    mask = MultiVectorMask([*"!?.,;:()", "unheardof"], skiplist_tasks=list(tasks))
    modules = [transformer, *layers, mask, Normalize(**place)]
    MultiVectorEncoder(modules=modules, device="cpu", prompts=PROMPTS).save(str(folder))


MARKERS = ("[Q] ", "[D] ")
PYLATE: dict[str, Any] = {
    "model_type": "ColBERT",
    "prompts": {},
    "default_prompt_name": None,
    "similarity_fn_name": "MaxSim",
    "query_prefix": "[Q] ",
    "document_prefix": "[D] ",
    "query_length": 24,
    "document_length": 80,
    "attend_to_expansion_tokens": False,
    "skiplist_words": list("!?.,;:()"),
    "do_query_expansion": True,
}


def pylate(randomise: Any, tokenizer: Path, folder: Path, **changes: Any) -> None:
    """As PyLate 1 saves it."""
    import torch
    from safetensors.torch import save_file

    raw(randomise, tokenizer, folder, "BertModel", extra=MARKERS)
    modules = {"": "sentence_transformers.models.Transformer", "1_Dense": "pylate.models.Dense.Dense"}
    listed = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules.items())]
    dense: dict[str, Any] = {"in_features": 48, "out_features": 16, "bias": False}
    dense["activation_function"] = "torch.nn.modules.linear.Identity"
    (folder / "1_Dense").mkdir()
    for file, content in (
        ("modules.json", listed),
        ("1_Dense/config.json", dense),
        ("config_sentence_transformers.json", PYLATE | changes),
        # Of whatever was embedded last.
        ("sentence_bert_config.json", {"max_seq_length": 23, "do_lower_case": False}),
    ):
        (folder / file).write_text(json.dumps(content))
    save_file({"linear.weight": torch.randn(16, 48)}, folder / "1_Dense" / "model.safetensors")


def stanford(randomise: Any, tokenizer: Path, folder: Path) -> None:
    """As Stanford's own library saves it."""
    import torch
    from safetensors.torch import load_file, save_file

    raw(randomise, tokenizer, folder, "BertModel")
    weights = {f"bert.{name}": weight for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights | {"linear.weight": torch.randn(16, 48)}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["HF_ColBERT"]}
    (folder / "config.json").write_text(json.dumps(config))
    metadata = {"query_token_id": "[unused0]", "doc_token_id": "[unused1]", "query_maxlen": 32, "doc_maxlen": 90}
    (folder / "artifact.metadata").write_text(json.dumps(metadata))


def dense(
    randomise: Any, tokenizer: Path, folder: Path, kind: str = "BertModel", ways: Sequence[str] = ("cls",),
    include_prompt: bool = True, **changes: Any,
) -> None:  # fmt: skip
    from sentence_transformers import SentenceTransformer, models

    plain = raw(randomise, tokenizer, folder.with_name(f"{folder.name}-raw"), kind, **changes)
    transformer = models.Transformer(str(plain))
    pooling = models.Pooling(48, pooling_mode=tuple(ways), include_prompt=include_prompt)
    modules = [transformer, pooling, models.Normalize()]
    SentenceTransformer(modules=modules, device="cpu", prompts=PROMPTS).save(str(folder))


def bge(randomise: Any, tokenizer: Path, folder: Path, width: int = 48) -> None:
    import torch
    from safetensors.torch import save_file

    dense(randomise, tokenizer, folder, "XLMRobertaModel")
    for name, outputs in (("sparse", 1), ("colbert", 48)):
        layer = torch.nn.Linear(width if name == "colbert" else 48, outputs)
        save_file(dict(layer.state_dict()), folder / f"{name}_linear.safetensors")
        torch.save(layer.state_dict(), folder / f"{name}_linear.pt")


def pickled(randomise: Any, tokenizer: Path, folder: Path) -> None:
    bge(randomise, tokenizer, folder)
    for file in folder.glob("*_linear.safetensors"):
        file.unlink()


@dataclass(frozen=True)
class Model:
    """A repository, and how it is exported.

    Attributes:
        title: In the table.
        save: Writes it.
        kinds: It makes.
        layout: In which it is exported.
        options: Of the command.
    """

    title: str
    save: Callable[..., None]
    kinds: tuple[str, ...]
    layout: str
    options: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


MODELS = {
    "splade": Model("BERT, SPLADE", splade, ("sparse",), "padded"),
    "splade-sum": Model(
        "BERT, SPLADE by sums of logarithms of logarithms", splade, ("sparse",), "padded",
        settings={"pooling_strategy": "sum", "activation_function": "log1p_relu"},
    ),
    "splade-old": Model("BERT, SPLADE as MLMTransformer", splade_old, ("sparse",), "padded"),
    "colbert": Model(
        "BERT, ColBERT without expansion", colbert, ("multi_vector",), "packed",
        settings={"query_length": 20, "document_length": 70, "tasks": ["query", "document"]},
    ),
    "colbert-attends": Model(
        "ModernBERT, ColBERT, attended expansion", colbert, ("multi_vector",), "packed",
        settings={"kind": "ModernBertModel", "expansion": {"strategy": "fixed", "length": 32, "attend": True}},
    ),
    "colbert-min": Model(
        "RoBERTa, ColBERT, expansion of short queries", colbert, ("multi_vector",), "padded",
        settings={"kind": "RobertaModel", "expansion": {"strategy": "min", "length": 12}, "bias": True},
    ),
    "pylate": Model("BERT, PyLate", pylate, ("multi_vector",), "padded"),
    "pylate-all": Model(
        "BERT, PyLate, no expansion, punctuation of its own", pylate, ("multi_vector",), "packed",
        settings={"do_query_expansion": False, "skiplist_words": None},
    ),
    "stanford": Model("BERT, Stanford ColBERT", stanford, ("multi_vector",), "padded"),
    "bge": Model("XLM-R, BGE-M3's heads", bge, ("dense", "sparse", "multi_vector"), "packed"),
    "bge-padded": Model(
        "XLM-R, BGE-M3's heads", bge, ("dense", "sparse", "multi_vector"), "padded", ("--layout", "padded")
    ),
    "states": Model(
        "DeBERTa-v2, mean, last hidden states",
        dense, ("dense", "multi_vector"), "padded", ("--kinds", "dense,multi_vector"),
        settings={"kind": "DebertaV2Model", "ways": ("mean",)},
    ),
    "states-packed": Model(
        "BERT, last hidden states", dense, ("multi_vector",), "packed", ("--kinds", "multi_vector"),
    ),
    "instructor": Model(
        "BERT, mean and max without prompts", dense, ("dense",), "padded",
        settings={"include_prompt": False, "ways": ("mean", "max")},
    ),
    "instructor-ways": Model(
        "BERT, cls, weighted mean, last and mean_sqrt_len without prompts", dense, ("dense",), "padded",
        settings={"include_prompt": False, "ways": ("cls", "weightedmean", "lasttoken", "mean_sqrt_len_tokens")},
    ),
    "splade-plain": Model("BERT for masked tokens", splade_plain, ("sparse",), "padded", ("--pooling", "splade")),
}  # fmt: skip


def ours(results: Sequence[Any], kinds: Sequence[str]) -> Vectors:
    return Vectors(
        np.array([one.vector for one in results]) if "dense" in kinds else None,
        [(one.sparse.indices, one.sparse.values) for one in results] if "sparse" in kinds else None,
        [one.multi_vector for one in results] if "multi_vector" in kinds else None,
    )


@pytest.mark.parametrize("name", MODELS)
async def test_a_repository_to_vectors(
    run: Callable[..., int], randomise: Any, name: str,
    start_mesh: Any, tokenizer: Path, texts: list[str], home: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = MODELS[name]
    model.save(randomise, tokenizer, tmp_path / name, **model.settings)
    assert run("models", "export", tmp_path / name, *model.options) == 0, capfd.readouterr()
    spec = load_spec(home / name)
    assert (spec.kind_names, spec.graph.layout) == (model.kinds, model.layout)
    reference = load_reference(spec, None)
    worst: dict[str, float] = {}
    weights = 0.0
    async with start_mesh(text_models=(home / name,)) as mesh, embedmesh.AsyncClient(mesh.address) as client:
        kinds: Any = model.kinds
        for role in reference.roles:
            options: dict[str, Any] = {"kinds": kinds, "role": None if role == "none" else role, "cache": "bypass"}
            together = ours((await client.embed(texts, **options)).results, kinds)
            alone = ours([(await client.embed([text], **options)).results[0] for text in texts[::3]], kinds)
            theirs = reference.embed(texts, role)
            found = list(compare(together, theirs))
            assert [one.kind for one in found] == list(kinds)
            for one in found:
                assert not one.problem
                worst[one.kind] = min(worst.get(one.kind, 1.0), float(one.cosines.min()))
                if one.kind == "sparse":
                    weights = max(weights, one.apart)
                assert one.cosines.min() >= LEAST_COSINE
                assert one.norms <= 1e-4
                assert one.kind != "sparse" or one.apart <= 1e-4
            for one in compare(alone, every_third(together)):
                assert not one.problem
                assert one.apart <= MOST_APART[one.kind]
    capfd.readouterr()
    assert run("models", "verify", name) == 0, capfd.readouterr()
    row = f"| {model.title} | {model.layout} | {', '.join(kinds)} | {min(worst.values()):.7f} |"
    keep(row, f" {weights:.1e} |" if "sparse" in kinds else " |")


def keep(row: str, figure: str) -> None:
    """Write a row into the table of the README if asked for it; else see that it is there, whatever its figures."""
    text = README.read_text(encoding="utf-8")
    start = row.rpartition("|")[0].rpartition("|")[0]
    old = next((line for line in text.splitlines() if line.startswith(start)), None)
    if not os.environ.get("WRITE_EXPORT_TABLE"):
        assert old, "make export-table"
        return
    end = "<!-- end of the export table: kinds -->"
    new = f"{row}{figure}"
    README.write_text(text.replace(old, new) if old else text.replace(end, f"{new}\n{end}"), encoding="utf-8")


def every_third(vectors: Vectors) -> Vectors:
    dense, sparse, rows = vectors.dense, vectors.sparse, vectors.multi_vector
    return Vectors(
        None if dense is None else dense[::3],
        None if sparse is None else sparse[::3],
        None if rows is None else rows[::3],
    )


def static(folder: Path, tokenizer: Path, **weights: Any) -> None:
    from safetensors.numpy import save_file
    from sentence_transformers import SentenceTransformer, models
    from tokenizers import Tokenizer

    table = np.random.default_rng(3).normal(size=(30522, 24)).astype(np.float32)
    embedding = models.StaticEmbedding(Tokenizer.from_file(str(tokenizer)), embedding_weights=table)
    SentenceTransformer(modules=[embedding, models.Normalize()], device="cpu", prompts=PROMPTS).save(str(folder))
    if weights:
        # As model2vec saves it.
        made = {"embeddings": table[:500], **weights}
        save_file(made, next(folder.rglob("model.safetensors")))


@pytest.mark.parametrize("shared", [False, True])
async def test_a_static_embedding_to_vectors(
    run: Callable[..., int], shared: bool, start_mesh: Any, tokenizer: Path, texts: list[str], home: Path,
    tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ids = np.arange(30522)
    static(
        tmp_path / "static", tokenizer,
        **({"mapping": ids % 500, "weights": (1 / (1 + ids % 7)).astype(np.float32)} if shared else {}),
    )  # fmt: skip
    assert run("models", "pull", tmp_path / "static") == 0, capfd.readouterr()
    texts = [text for text in texts if text]
    reference = load_reference(load_spec(home / "static"), None)
    async with start_mesh(text_models=(home / "static",)) as mesh, embedmesh.AsyncClient(mesh.address) as client:
        for role in reference.roles:
            options: dict[str, Any] = {"role": None if role == "none" else role, "cache": "bypass"}
            together = ours((await client.embed(texts, **options)).results, ["dense"])
            (found,) = compare(together, reference.embed(texts, role))
            assert (found.problem, found.cosines.min() >= LEAST_COSINE, found.norms < 1e-4) == ("", True, True)
    assert run("models", "verify", "static") == 0, capfd.readouterr()
    capfd.readouterr()
    assert run("models", "export", tmp_path / "static") == 2
    assert "static is a table of tokens: use `" in capfd.readouterr().err


def rows(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["multi_vector"].update(changes)


def no_marker(manifest: dict[str, Any]) -> None:
    del manifest["text"]["extra_special_tokens"]


def with_prompts(manifest: dict[str, Any]) -> None:
    manifest["text"]["include_prompt"] = True


def no_special(manifest: dict[str, Any]) -> None:
    manifest["sparse"]["skip_tokens"] = []


def other_pooling(manifest: dict[str, Any]) -> None:
    manifest["graph"]["pooling"] = "mean"


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("pylate", rows(skip_tokens=[999]), "rows of 16, the reference"),
        ("pylate", rows(expansion_token=104), "the least cosine of multi-vectors of role query is"),
        ("stanford", no_marker, "the reference"),
        ("bge", rows(skip_first=0), "rows of 48, the reference"),
        ("bge", no_special, "the weights of sparse vectors"),
        ("instructor-ways", with_prompts, "the least cosine of role query is"),
        ("states", other_pooling, None),
    ],
)
def test_verify_catches_what_is_configured_wrongly(
    run: Callable[..., int], randomise: Any, tokenizer: Path, home: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str], name: str, change: Callable[[dict[str, Any]], None], problem: str | None,
) -> None:  # fmt: skip
    model = MODELS[name]
    model.save(randomise, tokenizer, tmp_path / name, **model.settings)
    assert run("models", "export", tmp_path / name, *model.options) == 0, capfd.readouterr()
    manifest = tomllib.loads((home / name / "model.toml").read_text())
    files = manifest.pop("files")
    del manifest["format"]
    change(manifest)
    write_manifest(home / name, manifest, files)
    capfd.readouterr()
    assert run("models", "verify", name) == (1 if problem else 0)
    out = capfd.readouterr().out
    assert ("NOT VERIFIED" in out) == bool(problem)
    assert (problem or "verified") in out


@pytest.mark.parametrize(
    ("save", "options", "message"),
    [
        (bge, {"width": 40}, "colbert_linear.safetensors of hostile does not fit the model, whose tokens have 48"),
        (pickled, {}, "has sparse_linear.pt and colbert_linear.pt as pickles only, which are never loaded: where you"),
        (dense, {}, "has no sparse_linear.safetensors, which gives tokens their weights: leave sparse out"),
        (splade, {}, "makes sparse vectors only: leave --kinds out"),
    ],
)
def test_kinds_that_cannot_be_had(
    run: Callable[..., int], randomise: Any, tokenizer: Path, home: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str], save: Callable[..., None], options: Mapping[str, Any], message: str,
) -> None:  # fmt: skip
    save(randomise, tokenizer, tmp_path / "hostile", **options)
    assert run("models", "export", tmp_path / "hostile", "--kinds", "dense,sparse,multi_vector") in {1, 2}
    err = capfd.readouterr().err
    assert message in err, err
    assert not (home / "hostile").exists()


def test_heads_as_pickles_are_left_out(
    run: Callable[..., int], randomise: Any, tokenizer: Path, home: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pickled(randomise, tokenizer, tmp_path / "small")
    assert run("models", "export", tmp_path / "small") == 0, capfd.readouterr()
    assert "left out: sparse_linear.pt and colbert_linear.pt, pickles" in capfd.readouterr().out
    assert load_spec(home / "small").kind_names == ("dense",)
