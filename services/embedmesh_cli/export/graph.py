"""From a torch model to an ONNX file.

The exporter is torch's older one, which traces: the newer one needs onnxscript besides. Opset 20 has Gelu as one
operator, and onnxruntime and OpenVINO both read it.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import onnx
import torch

from embedmesh_cli.console import UserError

__all__ = ["OPSET", "Output", "Plan", "write_graph"]

OPSET: Final = 20
# Protobuf ends at 2 GiB.
_LARGE: Final = 1_900_000_000


@dataclass(frozen=True, slots=True)
class Plan:
    """A graph to write.

    Attributes:
        file: Its name in the repository.
        what: For people.
        module: Of torch; takes the inputs in order, and gives one array, or as many as there are outputs.
        inputs: Arrays to trace with, by name.
        outputs: Names of the outputs.
        axes: Of the inputs and the outputs, by name: names of those that are of any size, "" for others; trailing
            ones may be left out.
    """

    file: str
    what: str
    module: Any
    inputs: Mapping[str, Any]
    outputs: Sequence[str]
    axes: Mapping[str, Sequence[str]]


class Output(torch.nn.Module):
    """One output of a model, or of one of its methods."""

    def __init__(self, model: Any, inputs: Iterable[str], output: str, method: str = "forward") -> None:
        """Name the inputs in order."""
        super().__init__()
        self.model = model
        self._inputs = tuple(inputs)
        self._output = output
        self._call = getattr(model, method)

    def forward(self, *arrays: Any) -> Any:
        """Give the output."""
        return getattr(self._call(**dict(zip(self._inputs, arrays, strict=True))), self._output)


def write_graph(plan: Plan, folder: Path) -> None:
    """Trace a module and write its graph below `folder`; the weights lie in it, or beside it if they are large.

    Raises:
        UserError: The exporter cannot express the model.
    """
    path = folder / plan.file
    # A large model is traced into a file for each weight: here, where they are in nobody's way.
    traced = path.with_name("traced")
    traced.mkdir(parents=True)
    plan.module.eval()  # of the whole: the exporter puts its parts back into the mode that it finds the whole in
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, about what vectors will tell
            given = plan.module(*plan.inputs.values())
            sizes = [array.shape for array in ([given] if isinstance(given, torch.Tensor) else given)]
            torch.onnx.export(
                plan.module,
                tuple(plan.inputs.values()),
                str(traced / "model.onnx"),
                input_names=list(plan.inputs),
                output_names=list(plan.outputs),
                dynamic_axes={
                    name: {at: axis for at, axis in enumerate(axes) if axis} for name, axes in plan.axes.items()
                },
                opset_version=OPSET,
                dynamo=False,
            )
    except Exception as error:  # noqa: BLE001  (an exporter may fail in any way)
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"torch cannot export {plan.what} ({type(error).__name__}: {line}).") from None
    model = onnx.load(str(traced / "model.onnx"))
    for port, size in zip(model.graph.output, sizes, strict=True):
        _name_sizes(port, size, plan.axes[port.name])
    large = sum(len(weight.raw_data) for weight in model.graph.initializer) > _LARGE
    onnx.save(model, str(path), save_as_external_data=large, location=f"{path.name}_data")
    shutil.rmtree(traced)


def _name_sizes(port: Any, sizes: Sequence[int], axes: Sequence[str]) -> None:
    """Say of each axis of an output how large it is, or its name."""
    shape = port.type.tensor_type.shape
    del shape.dim[:]
    for size, axis in zip_longest(sizes, axes, fillvalue=""):
        if axis:
            shape.dim.add().dim_param = axis
        else:
            shape.dim.add().dim_value = size
