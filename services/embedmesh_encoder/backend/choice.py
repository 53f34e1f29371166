"""Which backend runs a model, and at which precision: by the manifest, the settings and the machine.

Both are part of a model's revision, so replicas that answer under one name should choose alike. That is why
`auto` keeps the precision of the manifest unless it is told to choose that too, and why whoever runs
replicas on unlike machines should name the backend. services/README.md has the reasons and the figures.
"""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from embedmesh_encoder.model import BackendName, ModelError, ModelSpec, Precision

__all__ = ["Choice", "Machine", "choose", "look"]

# The library of each backend, and the extra that brings it.
_PACKAGES: Final[dict[BackendName, tuple[str, str]]] = {
    "cuda": ("onnxruntime-gpu", "gpu"),
    "tensorrt": ("onnxruntime-gpu", "gpu"),
    "openvino": ("openvino", "openvino"),
    "triton": ("tritonclient", "triton"),
}
# What each computes from a float32 graph.
_PRECISIONS: Final[dict[BackendName, tuple[Precision, ...]]] = {
    "onnxruntime": ("float32",),
    "cuda": ("float32",),
    "tensorrt": ("float32", "bfloat16", "float16"),
    "openvino": ("float32", "bfloat16"),
}
_BFLOAT16_FLAGS: Final = ("amx_bf16", "avx512_bf16")


@dataclass(frozen=True, slots=True)
class Machine:
    """What `choose` asks of a machine.

    Attributes:
        bfloat16: The CPU's instructions for products of bfloat16, "amx_bf16" or "avx512_bf16"; "" without.
        gpu: Whether an NVIDIA driver is loaded.
        packages: Those of onnxruntime-gpu, openvino and tritonclient that are installed.
    """

    bfloat16: str = ""
    gpu: bool = False
    packages: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Choice:
    """What will run a model.

    Attributes:
        spec: The model as it will be run: its `backend`, `precision` and revision are the chosen ones.
        why: Why these, for the log.
    """

    spec: ModelSpec
    why: str


def look() -> Machine:
    """Look at this machine, without importing any of the libraries."""
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        cpu = ""
    flags = set(next((line for line in cpu.splitlines() if line.startswith("flags")), "").split())
    installed = []
    for package in {package for package, _ in _PACKAGES.values()}:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        installed.append(package)
    return Machine(
        bfloat16=next((flag for flag in _BFLOAT16_FLAGS if flag in flags), ""),
        gpu=Path("/dev/nvidiactl").exists(),
        packages=frozenset(installed),
    )


def choose(
    spec: ModelSpec,
    backend: Literal["auto"] | BackendName = "auto",
    precision: Literal["model", "auto"] | Precision = "model",
    machine: Machine | None = None,
) -> Choice:
    """Choose what runs a model.

    A named backend or precision is taken or refused, never replaced. `auto` takes the manifest's
    backend, with two exceptions for models that onnxruntime runs: a GPU whose build of onnxruntime is
    installed, and openvino for bfloat16. Precision "model" is the manifest's; "auto" is bfloat16
    where openvino would run a float32 model on a CPU that has instructions for it.

    Args:
        spec: The model.
        backend: The wish of whoever runs the node.
        precision: Likewise.
        machine: This one by default.

    Raises:
        ModelError: What was asked for cannot be had; the message says why, and what to do.
    """
    machine = machine or look()
    free = backend == "auto" and spec.backend == "onnxruntime"
    cuda = free and machine.gpu and "onnxruntime-gpu" in machine.packages
    why = []
    wanted: Precision
    if precision == "model":
        wanted = spec.precision
        why.append(f"{wanted} is the model's precision")
    elif precision != "auto":
        wanted = precision
        why.append(f"{wanted} was asked for")
    elif (
        spec.precision == "float32"
        and machine.bfloat16
        and "openvino" in machine.packages
        and (backend == "openvino" or (backend == "auto" and spec.backend == "openvino") or (free and not cuda))
    ):
        wanted = "bfloat16"
        why.append(f"bfloat16 because this CPU has {machine.bfloat16} and openvino is installed")
    else:
        wanted = spec.precision
        why.append(f"{wanted} is the model's precision, and no better one can be had here")

    chosen: BackendName
    if backend != "auto":
        chosen = backend
        why.append(f"{chosen} was asked for")
    elif free and wanted == "bfloat16":
        chosen = "openvino"
        why.append("openvino computes it")
    elif cuda:
        chosen = "cuda"
        why.append("cuda because there is an NVIDIA GPU and onnxruntime-gpu is installed")
    else:
        chosen = spec.backend
        why.append(f"{chosen} is what the model was made for")
    _check(spec, chosen, wanted, machine)
    return Choice(spec.run_by(chosen, wanted), "; ".join(why))


def _check(spec: ModelSpec, backend: BackendName, precision: Precision, machine: Machine) -> None:
    """See that the backend can run the model, and at this precision."""
    model = f'model "{spec.name}"'
    local = bool(spec.graph.file)
    if "fake" in (backend, spec.backend) and backend != spec.backend:
        raise ModelError(
            f'{model} was made for backend "{spec.backend}" and cannot run on "{backend}": set the backend to "auto"'
        )
    if backend == "triton" and spec.triton is None:
        raise ModelError(f"{model} has no [triton] table that says which model of the server it is")
    if backend not in ("triton", "fake") and not local:
        raise ModelError(f'{model} has no graph of its own, only "triton" can run it')
    if backend in _PACKAGES:
        package, extra = _PACKAGES[backend]
        if package not in machine.packages:
            instead = ", in an environment without onnxruntime, which excludes it" if extra == "gpu" else ""
            raise ModelError(
                f"{model} cannot run on {json.dumps(backend)} without the package {package}: "
                f"pip install 'embedmesh[{extra}]'{instead}"
            )
    # Numbers of a graph that is stored in a lower precision cannot be had back, and a server or the fake
    # decides by itself.
    possible = _PRECISIONS.get(backend, ()) if spec.precision in ("float32", "bfloat16") else ()
    if precision not in (possible or (spec.precision,)):
        raise ModelError(
            f"{model} can run on {json.dumps(backend)} in {' or '.join(possible or (spec.precision,))}, "
            f"not in {precision}"
            + (" (`embedmesh models quantize` makes such a model)" if precision in ("float16", "int8") else "")
        )
