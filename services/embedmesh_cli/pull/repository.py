"""Where a model is pulled from: a repository of the Hugging Face Hub, or a folder."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sys
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from embedmesh_cli.console import FAILED, UNREACHABLE, USAGE, UserError

__all__ = ["Folder", "Hub", "Repository", "WithGraphs", "open_repository", "read_json"]

# Small files that tell what a model is; fetched first. Any one of them is enough to have the list of files.
_DESCRIPTIONS: Final = ("README.md", "config.json", "modules.json", "preprocessor_config.json", "tokenizer_config.json")
# Of the lists of files that the cache keeps.
_LISTING: Final = 1
# Of a download that takes long enough to be watched.
_LARGE: Final = 10_000_000
# Many small files would show as many bars.
_NO_BAR: Final[Any] = partial(tqdm, disable=True)
# What may hold code, or pickles, which are code: not even fetched.
_NEVER: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".py", ".so", ".h5"})


class Repository(Protocol):
    """Files of a model as its authors published them.

    Attributes:
        name: Of the model.
        given: As a command takes it.
        source: Where it lies, the commit included, for manifests.
        files: Names of all its files, with slashes.
    """

    name: str
    given: str
    source: str
    files: frozenset[str]

    def fetch(self, names: Collection[str]) -> Path:
        """Have files of the repository on this disk, unharmed; give the folder in which they lie under their names.

        Raises:
            UserError: They cannot be had, or are not what the repository says.
        """


def open_repository(source: str, *, endpoint: str | None, cache: Path | None, offline: bool) -> Folder | Hub:
    """Find what a user names: a folder, or the id of a model on the Hub with an optional @revision.

    Raises:
        UserError: It is neither.
    """
    path, (hub_id, _, revision) = Path(source).expanduser(), source.partition("@")
    if path.is_dir():
        return Folder(path)
    if source.startswith((".", "/", "~")):
        raise UserError(f"there is no folder {source}.", USAGE)
    return Hub(hub_id, revision or None, endpoint=endpoint, cache=cache, offline=offline)


def read_json(repository: Repository, name: str, *, needed: bool = False) -> dict[str, Any]:
    """Read a JSON object; an empty one if there is no such file and it is not needed."""
    if name not in repository.files and not needed:
        return {}
    try:
        table = json.loads((repository.fetch([name]) / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{name} of {repository.name} is not JSON: {error}.") from None
    if not isinstance(table, dict):
        raise UserError(f"{name} of {repository.name} holds no JSON object.")
    return table


class Folder:
    """A folder with the files of a repository."""

    def __init__(self, path: Path) -> None:
        self.name = path.resolve().name
        self.given = str(path)
        self.source = str(path.resolve())
        self._path = path
        self.files = frozenset(
            file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file() and ".git" not in file.parts
        )

    def fetch(self, names: Collection[str]) -> Path:
        """See that the files are there, and inside of the folder."""
        _refuse_code(self.name, names)
        _refuse_missing(self.name, names, self.files)
        for name in names:
            if not (self._path / name).resolve().is_relative_to(self._path.resolve()):
                raise UserError(f"{name} of {self._path} leads out of the folder: put the file itself there.")
        return self._path


class WithGraphs:
    """A repository with graphs that were made here, in place of any that it has."""

    def __init__(self, original: Repository, folder: Path) -> None:
        """Show all files of the original but its graphs, and those below `folder`, where fetched ones are linked."""
        self.name, self.given, self.source = original.name, original.given, original.source
        self._original = original
        self._folder = folder
        self._made = frozenset(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        self.files = self._made | {file for file in original.files if not file.endswith((".onnx", ".onnx_data"))}

    def fetch(self, names: Collection[str]) -> Path:
        """Fetch those that were not made here."""
        _refuse_missing(self.name, names, self.files)
        others = set(names) - self._made
        lie = self._original.fetch(others)
        for name in others:
            place = self._folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                place.symlink_to((lie / name).resolve())
        return self._folder


class Hub:
    """A repository of the Hub, through `huggingface_hub`, its cache and its environment variables.

    Its token, retries, cache and offline mode are those that every user of the Hub knows. What comes on top: each
    file is held against the hash that the Hub lists for it, because a plain HTTP download is only counted there.
    """

    def __init__(
        self, name: str, revision: str | None, *, endpoint: str | None, cache: Path | None, offline: bool
    ) -> None:
        """Find out which commit a revision is, and its files.

        Raises:
            UserError: There is no such repository or revision, it may not be read, or the Hub cannot be reached and
                nothing is cached.
        """
        self.name = name
        self.given = f"{name}@{revision}" if revision else name
        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._cache = cache or Path(constants.HF_HUB_CACHE)
        self._offline = offline or constants.is_offline_mode()
        self._verified: set[str] = set()
        self.commit = revision or constants.DEFAULT_REVISION
        self.commit = self._download(_DESCRIPTIONS, bars=False).name
        self._listed = self._list()
        self.files = frozenset(self._listed)
        self.source = f"{self._endpoint}/{name}/tree/{self.commit}"
        self._verify(self.files.intersection(_DESCRIPTIONS))

    def fetch(self, names: Collection[str]) -> Path:
        """Download what is not in the cache yet, and check it."""
        _refuse_code(self.name, names)
        _refuse_missing(f"{self.name}@{self.commit[:12]}", names, self.files)
        if self._verified.issuperset(names):
            return self._snapshot
        large = any(self._listed[name]["size"] >= _LARGE for name in names)
        folder = self._download([glob.escape(name) for name in names], bars=large and sys.stderr.isatty())
        self._verify(names)
        return folder

    @property
    def _snapshot(self) -> Path:
        return self._cached / "snapshots" / self.commit

    @property
    def _cached(self) -> Path:
        return self._cache / f"models--{self.name.replace('/', '--')}"

    def _list(self) -> dict[str, dict[str, Any]]:
        """Read the list of files that came with the download, or with an earlier one: sizes and hashes by name."""
        path = self._cached / "trees" / f"{self.commit}.json"
        try:
            listing = json.loads(path.read_text(encoding="utf-8"))
            if listing["format_version"] == _LISTING:
                files: dict[str, dict[str, Any]] = listing["files"]
                return files
        except (OSError, ValueError, KeyError):
            pass
        # The library's own function for it leaves the sha256 out.
        raise UserError(
            f"the cache {self._cache} holds no list of the files of {self.name} that this version can read: pull it "
            "with a connection and huggingface_hub 2.4, or into an empty --cache-dir."
        )

    def _download(self, patterns: Collection[str], *, bars: bool) -> Path:
        try:
            return Path(
                snapshot_download(
                    self.name,
                    revision=self.commit,
                    allow_patterns=list(patterns),
                    endpoint=self._endpoint,
                    cache_dir=self._cache,
                    local_files_only=self._offline,
                    library_name="embedmesh",
                    tqdm_class=None if bars else _NO_BAR,
                )
            )
        except HFValidationError:
            raise UserError(
                f"{self.given} is neither a folder here nor the id of a model on the Hub, such as "
                "sentence-transformers/all-MiniLM-L6-v2.",
                USAGE,
            ) from None
        except GatedRepoError:
            raise UserError(
                f"{self.name} is gated: ask for access at {self._endpoint}/{self.name}, then log in with "
                "`hf auth login` (or set HF_TOKEN) and pull again."
            ) from None
        except RepositoryNotFoundError:
            raise UserError(
                f"{self._endpoint} has no model {self.name}, or it is private: check the spelling, or log in with "
                "`hf auth login` (or set HF_TOKEN)."
            ) from None
        except RevisionNotFoundError:
            raise UserError(
                f"{self.name} has no revision {self.given.partition('@')[2]} (a branch, tag or commit)."
            ) from None
        except LocalEntryNotFoundError as error:
            if self._offline:
                raise UserError(
                    f"{self.given} is not wholly in the cache {self._cache}, and offline mode is on (--offline or "
                    "HF_HUB_OFFLINE): pull it once with a connection.",
                    UNREACHABLE,
                ) from None
            raise self._unreachable(error.__cause__ or error) from None
        except HfHubHTTPError as error:
            raise UserError(f"{self._endpoint} answered for {self.given}: {_line(error)}.") from None
        except Exception as error:  # noqa: BLE001  (what its HTTP client raises is not part of its interface)
            raise self._unreachable(error) from None

    def _unreachable(self, error: BaseException) -> UserError:
        return UserError(
            f"{self.name} could not be downloaded from {self._endpoint} ({type(error).__name__}: {_line(error)}): "
            "check the connection, HF_ENDPOINT and HTTPS_PROXY, and pull again; whole files are kept.",
            UNREACHABLE,
        )

    def _verify(self, names: Collection[str]) -> None:
        """Hold files against the hashes that the Hub lists: sha256 of large ones, git's sha1 of others."""
        for name in sorted(set(names) - self._verified):
            path = self._snapshot / name
            expected, actual = _hashes(path, self._listed[name])
            if actual != expected:
                # The blob, too: else the next pull would find it in the cache.
                path.resolve().unlink()
                path.unlink(missing_ok=True)
                raise UserError(
                    f"{name} of {self.name}@{self.commit[:12]} has the hash {actual}, the Hub says {expected}: it is "
                    "not used and was removed from the cache. Pull again; if that does not help, ask its authors.",
                    FAILED,
                )
            self._verified.add(name)


def _hashes(path: Path, listed: dict[str, Any]) -> tuple[str, str]:
    """Give the listed hash of a file, and its own."""
    with path.open("rb") as stream:
        if sha256 := listed.get("lfs_sha256"):
            return str(sha256), hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha1(b"blob %d\0" % os.fstat(stream.fileno()).st_size, usedforsecurity=False)
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return str(listed["blob_id"]), digest.hexdigest()


def _refuse_missing(name: str, files: Collection[str], there: frozenset[str]) -> None:
    if missing := sorted(set(files) - there):
        raise UserError(f"{name} has no {', '.join(missing)}.")


def _refuse_code(name: str, files: Collection[str]) -> None:
    for file in files:
        if Path(file).suffix.lower() in _NEVER:
            raise UserError(f"{name} needs {file}, which may hold pickled code: files of that kind are never loaded.")


def _line(error: BaseException) -> str:
    """Give the first line of a message, without the full stop."""
    return (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
