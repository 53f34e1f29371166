"""From a repository's weights to model folders, whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from embedmesh_cli.console import USAGE, UserError, command_name
from embedmesh_cli.export.check import Reference, compare
from embedmesh_cli.export.graph import OPSET, Plan, write_graph
from embedmesh_cli.export.heads import SpladeEncoder, TokenHeads, read_layers
from embedmesh_cli.export.packed import FAMILIES, plan_packed
from embedmesh_cli.export.pictures import PICTURES, check_pictures, language_of, of_picture, plan_pictures
from embedmesh_cli.export.towers import TOWERS, of_tower, plan_towers
from embedmesh_cli.export.weights import Loaded, load_model
from embedmesh_cli.home import models_home
from embedmesh_cli.layers import Layers
from embedmesh_cli.likeness import Vectors
from embedmesh_cli.pull.make import make_models
from embedmesh_cli.pull.recipe import SPLADE_OUTPUT, Pipeline, Splade, Wishes, read_pipeline
from embedmesh_cli.pull.repository import Repository, WithGraphs, read_json
from embedmesh_encoder.model import ModelSpec
from embedmesh_encoder.pooling import lexical, nonzero, pool
from embedmesh_encoder.preparation import Prepared

__all__ = ["Layout", "export_models"]

Layout = Literal["auto", "packed", "padded"]


def export_models(
    repository: Repository,
    wishes: Wishes,
    *,
    layers: Layers,
    layout: Layout,
    library_code: bool,
    name: str,
    output: Path | None,
    replace_old: bool,
    console: Console,
) -> list[ModelSpec]:
    """Make a model folder of what a repository's weights are, and hold its vectors against torch's.

    Args:
        repository: Where the files are.
        wishes: What its caller says of it.
        layers: Which of a text model's layers to take.
        layout: Of a text model; "auto" is packed where that is exact.
        library_code: Take the library's implementation though the repository brings its own.
        name: As for `make_models`, like those that follow.
        output: Likewise.
        replace_old: Whether to take the place of a model that is there.
        console: Told what is done.

    Raises:
        UserError: It cannot be exported, served exactly or had, its place is taken, or the graph gives other vectors.
        ModelError: It does not embed.
        OSError: It cannot be written.
    """
    place = output.parent if output else models_home()
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export.", dir=place) as temporary:
        made = _make(repository, wishes, layers, layout, library_code=library_code, console=console)
        for plan in made.plans:
            console.print(f"Exporting {plan.what}, opset {OPSET}", markup=False)
            with console.status("Exporting"):
                write_graph(plan, Path(temporary))

        def check(spec: ModelSpec) -> None:
            with console.status("Comparing with torch"):
                kinds = compare(spec, made.references[spec.modality])
            for found in kinds:
                what = "" if found.kind == "dense" else f" ({found.kind})"
                console.print(
                    f"As torch{what}: worst cosine {found.cosine:.7f} of {found.samples} inputs of {found.units[0]} to "
                    f"{found.units[1]} units; {found.company:.1e} between alone and in company",
                    markup=False,
                )

        return make_models(
            WithGraphs(repository, Path(temporary)),
            made.wishes,
            name=name,
            output=output,
            replace=replace_old,
            console=console,
            weights=made.weights,
            suffix=layers.suffix,
            tables={"layers": made.layers} if made.layers else {},
            pipeline=made.pipeline,
            check=check,
        )


@dataclass(frozen=True, slots=True)
class _Made:
    """What is to be written.

    Attributes:
        plans: Graphs.
        references: What torch gives, by modality.
        wishes: What their caller says of them.
        weights: Names of the files that they are made from.
        layers: What the manifest says of a choice among the layers.
        pipeline: How a text model works.
    """

    plans: Sequence[Plan]
    references: Mapping[str, Reference]
    wishes: Wishes
    weights: Sequence[str]
    layers: Mapping[str, Any]
    pipeline: Pipeline | None = None


def _make(
    repository: Repository, wishes: Wishes, layers: Layers, layout: Layout, *, library_code: bool, console: Console
) -> _Made:
    config = read_json(repository, "config.json")
    kind = str(config.get("model_type"))
    alone = "modules.json" not in repository.files
    towers, pictures = kind in TOWERS and alone, kind in PICTURES and alone
    if "vision_config" in config and alone and not towers and not pictures:
        raise UserError(
            f"{repository.name} is a {kind}, which reads pictures in a way that is not known: of models with a "
            f"vision_config only {', '.join(sorted(PICTURES))}, clip and siglip are."
        )
    if (towers or pictures) and layers.suffix:
        raise UserError(
            f"{repository.name} is a {kind}, and only text models of one tower have layers to choose.", USAGE
        )
    # Before anything large is fetched: whether the rest is there.
    if pictures:
        check_pictures(repository, wishes)
    elif wishes.templates:
        raise UserError(f"{repository.name} reads no pictures with texts: leave --image-template out.", USAGE)
    pipeline = None if towers or pictures else read_pipeline(repository, wishes)
    if pipeline and pipeline.splade and layers.suffix:
        raise UserError(f"{repository.name} makes its sparse vectors of the last layer: leave the others in.", USAGE)
    if pipeline and pipeline.static:
        raise UserError(
            f"{repository.name} is a table of tokens: use `{command_name()} models pull {repository.given}`.",
            USAGE,
        )
    console.print(f"Loading the weights of {repository.source} into torch", markup=False)
    with console.status("Loading"):
        loaded = load_model(
            repository,
            pipeline.prefix if pipeline else "",
            layers,
            library_code=library_code,
            masked=bool(pipeline and pipeline.splade),
        )
    if pictures:
        language, texts, head = language_of(loaded), Pipeline("", wishes.pooling), torch.nn.Identity()
        heads = TokenHeads(repository, texts, language)
        plans, found = plan_pictures(repository, loaded, wishes, plan_packed(language, texts.pooling, head, heads))
        references = {"image": of_picture(loaded, wishes.pooling), "text": _of_text(language, texts, head, heads)}
        return _Made(list(plans.values()), references, found, loaded.files, loaded.layers)
    if pipeline is None:
        plans = plan_towers(repository, loaded, wishes)
        references = {modality: of_tower(plan) for modality, plan in plans.items()}
        return _Made(list(plans.values()), references, wishes, loaded.files, loaded.layers)
    return _make_text(repository, wishes, pipeline, loaded, layout)


def _make_text(repository: Repository, wishes: Wishes, pipeline: Pipeline, loaded: Loaded, layout: Layout) -> _Made:
    if pipeline.splade:
        if layout == "packed":
            raise UserError(f"{repository.name} gives sparse vectors, which are not packed: leave --layout out.", USAGE)
        module = SpladeEncoder(loaded.model, pipeline.splade)
        plan = _plan_padded(f"{loaded.title}, padded", module, {SPLADE_OUTPUT: ("texts",)})
        return _Made(
            [plan], {"text": _of_splade(loaded, pipeline.splade)}, wishes, loaded.files, loaded.layers, pipeline
        )
    head = torch.nn.Sequential(*read_layers(repository, pipeline.layers)).eval()
    heads = TokenHeads(repository, pipeline, loaded)
    hindered = _why_padded(pipeline, loaded)
    if layout == "packed" and hindered:
        raise UserError(f"{repository.name} {hindered}, which cannot be packed: leave --layout out.", USAGE)
    if layout == "padded" or hindered:
        module = _PaddedEncoder(loaded.model, heads, dense=bool(pipeline.pooling))
        plan = _plan_padded(f"{loaded.title}, padded", module, dict.fromkeys(module.names, ("texts", "longest")))
    else:
        plan = plan_packed(loaded, pipeline.pooling, head, heads)
    weights = [*loaded.files, *(layer["file"] for layer in pipeline.layers), *heads.files]
    return _Made([plan], {"text": _of_text(loaded, pipeline, head, heads)}, wishes, weights, loaded.layers, pipeline)


def _why_padded(pipeline: Pipeline, loaded: Loaded) -> str:
    """Say why texts of a model cannot be packed, or nothing."""
    if loaded.kind not in FAMILIES:
        return f"is a {loaded.kind}"
    if not pipeline.include_prompt:
        return "leaves prompts out of its pooling"
    table = pipeline.rows.table if pipeline.rows else {}
    if table.get("expand_to") and not table.get("attend_to_expansion"):
        return "fills queries up with tokens that others do not attend to"
    return ""


def _plan_padded(what: str, module: Any, outputs: Mapping[str, Sequence[str]]) -> Plan:
    ids = torch.arange(5, 19).reshape(2, 7)
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(7) < torch.tensor([[7], [5]])).long()}
    axes = {**dict.fromkeys(inputs, ("texts", "longest")), **outputs}
    return Plan("onnx/model.onnx", what, module, inputs, list(outputs), axes)


class _PaddedEncoder(torch.nn.Module):
    """A model as the library runs it: hidden states where they are pooled, and what else tokens give.

    Attributes:
        names: Of its outputs.
    """

    def __init__(self, model: Any, heads: TokenHeads, *, dense: bool) -> None:
        super().__init__()
        self.model = model
        self.heads = heads
        self._dense = dense
        self.names = [*(["last_hidden_state"] if dense else []), *heads.names]

    def forward(self, input_ids: Any, attention_mask: Any) -> tuple[Any, ...]:
        """Give float32 [texts, longest, ...] each."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        others = tuple(self.heads(hidden))
        return (hidden, *others) if self._dense else others


def _of_text(loaded: Loaded, pipeline: Pipeline, head: Callable[[Any], Any], heads: TokenHeads) -> Reference:
    """Give what embeds a text by the library's own forward pass, alone."""

    def embed(spec: ModelSpec, prepared: Prepared) -> Vectors:
        with torch.no_grad():
            ids = torch.from_numpy(prepared.data[None])
            attended = torch.arange(prepared.units)[None] < prepared.units - prepared.expansion
            hidden = loaded.model(input_ids=ids, attention_mask=attended.long()).last_hidden_state
            lengths, starts = np.array([prepared.units]), np.array([prepared.prompt])
            dense = sparse = rows = None
            if pipeline.pooling:
                pooled = pool(pipeline.pooling, hidden.numpy(), lengths, starts)
                # The vectors of some repositories are cut in the end.
                dense = head(torch.from_numpy(pooled)).numpy()[:, : spec.dimensions]
            if spec.sparse and heads.lexical is not None:
                weights = heads.lexical(hidden)[0, :, 0].numpy()
                counted = ~np.isin(prepared.data, spec.sparse.skip_tokens)
                sparse = [lexical(weights[counted], prepared.data[counted])]
            if heads.rows is not None:
                rows = [heads.rows(hidden)[0].numpy()[prepared.rows]]
        return Vectors(dense, sparse, rows)

    return embed


def _of_splade(loaded: Loaded, splade: Splade) -> Reference:
    """Give what embeds a text by the library's own forward pass, alone, pooled token by token."""

    def embed(spec: ModelSpec, prepared: Prepared) -> Vectors:
        del spec
        with torch.no_grad():
            ids = torch.from_numpy(prepared.data[None])
            weights = loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].relu().log1p()
            weights = weights.log1p() if splade.twice else weights
            pooled = (weights.amax(0) if splade.strategy == "max" else weights.sum(0)).numpy()
        return Vectors(sparse=[nonzero(np.arange(len(pooled)), pooled)])

    return embed
