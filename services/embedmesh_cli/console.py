"""How the command speaks to people."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import grpc
from rich.console import Console

from embedmesh.errors import EmbedMeshError
from embedmesh_cli.starter import StarterError, ensure_starter, starter_tower
from embedmesh_encoder.model import ModelError

__all__ = [
    "FAILED",
    "UNREACHABLE",
    "USAGE",
    "UserError",
    "command_name",
    "explain",
    "explained",
    "plain_console",
    "read_kinds",
    "starter_model",
]

# How gRPC puts it when certificates are the reason.
_DISTRUST: Final = re.compile("handshake|certificate|verification", re.IGNORECASE)
FAILED = 1
USAGE = 2
UNREACHABLE = 3
_KINDS: Final = ("dense", "sparse", "multi_vector")


class UserError(Exception):
    """Something that the user can put right: one sentence, and the status to end with."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status


def command_name() -> str:
    """How to type this command here: by its name, or by its path where it is not on PATH."""
    found = shutil.which("embedmesh")
    beside = Path(sys.executable).with_name("embedmesh")
    if found and Path(found).resolve() == beside.resolve():
        return "embedmesh"
    if not beside.exists():
        return "embedmesh"
    here = Path.cwd()
    return str(beside.relative_to(here) if beside.is_relative_to(here) and here != Path("/") else beside)


def explain(error: EmbedMeshError, address: str) -> UserError:
    """Turn the failure of a whole call into a sentence and a status."""
    unreachable = error.code is grpc.StatusCode.UNAVAILABLE and not error.reason
    if unreachable and _DISTRUST.search(error.message):
        return UserError(f"{address} answers, but there is no trust by TLS: {error.message}", UNREACHABLE)
    if unreachable:
        return UserError(
            f"no mesh answers at {address}: start one with `{command_name()} up`, or name yours with --address.",
            UNREACHABLE,
        )
    status = UNREACHABLE if error.code is grpc.StatusCode.UNAVAILABLE else FAILED
    pause = f" (try again in {error.retry_after:.1f} s)" if error.retry_after else ""
    return UserError(f"{error.message}{pause} [{error.reason or error.code.name}]", status)


def plain_console() -> Console:
    """Where a command tells what it does; lines are only broken on a terminal."""
    return Console(width=None if Console().is_terminal else 1000, highlight=False)


@contextmanager
def explained(where: str | Path) -> Iterator[None]:
    """Turn what is wrong with a model, or with the file `where` unless the error names one, into a sentence."""
    try:
        yield
    except ModelError as error:
        raise UserError(f"{str(error).strip().rstrip('.')}.") from None  # onnxruntime ends its lines
    except OSError as error:
        raise UserError(f"{error.filename or where}: {error.strerror or error}.") from None


def starter_model(modality: str, console: Console) -> Path:
    """Give the starter model of a modality; the first time the one for text is made, and that is shown."""

    def progress(line: str) -> None:
        # On a terminal a spinner moves beside the step; elsewhere each step is a line.
        if console.is_terminal:
            status.update(line)
            status.start()
        else:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    status = console.status("")
    try:
        return ensure_starter(progress) if modality == "text" else starter_tower(modality)
    except StarterError as error:
        raise UserError(f"{error}.") from None
    finally:
        status.stop()


def read_kinds(text: str) -> tuple[str, ...]:
    """Read kinds of vector, with commas between them.

    Raises:
        UserError: One is unknown.
    """
    kinds = tuple(dict.fromkeys(text.split(",")))
    if unknown := [kind for kind in kinds if kind not in _KINDS]:
        raise UserError(f"--kinds {text}: {unknown[0]!r} is none of {', '.join(_KINDS)}.", USAGE)
    return kinds
