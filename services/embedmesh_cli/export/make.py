"""From a repository's weights to model folders, whole or not at all."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from safetensors.torch import load_file

from embedmesh_cli.console import USAGE, UserError
from embedmesh_cli.export.check import Reference, compare
from embedmesh_cli.export.graph import OPSET, Output, Plan, write_graph
from embedmesh_cli.export.packed import FAMILIES, plan_packed
from embedmesh_cli.export.pictures import PICTURES, check_pictures, language_of, of_picture, plan_pictures
from embedmesh_cli.export.towers import TOWERS, of_tower, plan_towers
from embedmesh_cli.export.weights import Loaded, load_model
from embedmesh_cli.home import models_home
from embedmesh_cli.layers import Layers
from embedmesh_cli.pull.make import make_models
from embedmesh_cli.pull.recipe import Pipeline, Wishes, read_pipeline
from embedmesh_cli.pull.repository import Repository, WithGraphs, read_json
from embedmesh_encoder.model import ModelSpec
from embedmesh_encoder.pooling import Pooling, pool
from embedmesh_encoder.preparation import Prepared

__all__ = ["Layout", "export_models"]

Float32 = NDArray[np.float32]
Layout = Literal["auto", "packed", "padded"]

_ACTIVATIONS: Final[Mapping[str, Callable[[], Any]]] = {
    "none": torch.nn.Identity,
    "tanh": torch.nn.Tanh,
    "relu": torch.nn.ReLU,
    "sigmoid": torch.nn.Sigmoid,
}


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
                found = compare(spec, made.references[spec.modality])
            console.print(
                f"As torch: worst cosine {found.cosine:.7f} of {found.samples} inputs of {found.units[0]} to "
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
            check=check,
        )


@dataclass(frozen=True, slots=True)
class _Made:
    """What is to be written.

    Attributes:
        plans: Graphs.
        references: What torch gives, by modality.
        wishes: What is left to say of them.
        weights: Names of the files that they are made from.
        layers: What the manifest says of a choice among the layers.
    """

    plans: Sequence[Plan]
    references: Mapping[str, Reference]
    wishes: Wishes
    weights: Sequence[str]
    layers: Mapping[str, Any]


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
    console.print(f"Loading the weights of {repository.source} into torch", markup=False)
    with console.status("Loading"):
        loaded = load_model(repository, pipeline.prefix if pipeline else "", layers, library_code=library_code)
    if pictures:
        plans, found = plan_pictures(repository, loaded, wishes)
        references = {
            "image": of_picture(loaded, wishes.pooling),
            "text": _of_text(language_of(loaded), wishes.pooling, torch.nn.Identity()),
        }
        return _Made(list(plans.values()), references, found, loaded.files, loaded.layers)
    if pipeline is None:
        plans = plan_towers(repository, loaded, wishes)
        references = {modality: of_tower(plan) for modality, plan in plans.items()}
        return _Made(list(plans.values()), references, wishes, loaded.files, loaded.layers)
    head = _head(repository, pipeline)
    if layout == "packed" and loaded.kind not in FAMILIES:
        raise UserError(f"{repository.name} is a {loaded.kind}, which cannot be packed: leave --layout out.", USAGE)
    packed = layout != "padded" and loaded.kind in FAMILIES
    plan = plan_packed(loaded, pipeline.pooling, head) if packed else _plan_padded(loaded)
    # A graph that pools needs nobody to say how.
    left = dataclasses.replace(wishes, pooling=()) if packed else wishes
    weights = [*loaded.files, *(layer["file"] for layer in pipeline.layers)]
    return _Made([plan], {"text": _of_text(loaded, pipeline.pooling, head)}, left, weights, loaded.layers)


def _plan_padded(loaded: Loaded) -> Plan:
    ids = torch.arange(5, 19).reshape(2, 7)
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(7) < torch.tensor([[7], [5]])).long()}
    axes = dict.fromkeys((*inputs, "last_hidden_state"), ("texts", "longest"))
    module = Output(loaded.model, inputs, "last_hidden_state")
    return Plan("onnx/model.onnx", f"{loaded.title}, padded", module, inputs, "last_hidden_state", axes)


def _of_text(loaded: Loaded, pooling: Sequence[Pooling], head: Callable[[Any], Any]) -> Reference:
    """Give what embeds a text by the library's own forward pass, alone."""

    def embed(spec: ModelSpec, prepared: Prepared) -> Float32:
        with torch.no_grad():
            ids = torch.from_numpy(prepared.data[None])
            hidden = loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.numpy()
            vector: Float32 = head(torch.from_numpy(pool(pooling, hidden, np.array([ids.shape[1]])))).numpy()
        return vector[:, : spec.dimensions]  # the vectors of some repositories are cut in the end

    return embed


def _head(repository: Repository, pipeline: Pipeline) -> Any:
    """Make the layers after pooling, as `embedmesh_encoder.head` has them."""
    layers: list[Any] = []
    for layer in pipeline.layers:
        weights = load_file(repository.fetch([layer["file"]]) / layer["file"])
        if layer["kind"] == "layer_norm":
            module, prefix = torch.nn.LayerNorm(layer["outputs"]), "norm."
        else:
            module = torch.nn.Linear(layer["inputs"], layer["outputs"], bias="linear.bias" in weights)
            prefix = "linear."
        named = {name.removeprefix(prefix): weight.float() for name, weight in weights.items()}
        try:
            module.load_state_dict(named)
        except RuntimeError:
            raise UserError(f"{layer['file']} of {repository.name} does not fit its configuration.") from None
        layers += [module, _ACTIVATIONS[layer.get("activation", "none")]()]
    return torch.nn.Sequential(*layers).eval()
