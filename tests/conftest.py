"""What tests of several packages share."""

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from embedmesh_cli.starter import ensure_starter
from embedmesh_encoder.model import write_manifest

# Of the towers below.
DIMENSIONS = 16
IMAGE_CONFIG: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
}
AUDIO_CONFIG: dict[str, Any] = {"feature_extractor_type": "EmbedMeshLogMel"}


@pytest.fixture(scope="session")
def starter_model() -> Path:
    """Folder of the real text model, made in the user's cache the first time."""
    return ensure_starter(lambda line: None)


@pytest.fixture(scope="session")
def tower_weights() -> Callable[[str], Any]:
    """The one matrix of a tower: float32 [3, 16] for images, [64, 16] for sounds."""

    def weights(modality: str) -> Any:
        rows = {"image": 3, "audio": 64}[modality]
        return np.random.default_rng(rows).normal(size=(rows, DIMENSIONS)).astype(np.float32)

    return weights


@pytest.fixture(scope="session")
def make_tower(tower_weights: Any) -> Callable[..., Path]:
    """Make the folder of a real, tiny ONNX model: the mean over pixels or frames, times a matrix.

    `masked`: sounds of all lengths share a batch, told apart by an attention mask. `busy`: every batch multiplies two
    matrices of so many rows and columns besides, which changes no vector and takes its time.
    """

    def make(folder: Path, modality: str, *, masked: bool = True, busy: int = 0, **changes: Any) -> Path:
        folder.mkdir(parents=True)
        float32, int64 = TensorProto.FLOAT, TensorProto.INT64
        weights = numpy_helper.from_array(tower_weights(modality), "weights")
        axes = numpy_helper.from_array(np.array([2, 3] if modality == "image" else [1]), "axes")
        if modality == "image":
            name, config, units = "pixel_values", IMAGE_CONFIG, 4
            inputs = [helper.make_tensor_value_info(name, float32, ["n", 3, "h", "w"])]
            nodes = [helper.make_node("ReduceMean", [name, "axes"], ["mean"], keepdims=0)]
        else:
            name, config, units = "input_features", AUDIO_CONFIG, 1000
            inputs = [helper.make_tensor_value_info(name, float32, ["n", "t", 64])]
            nodes = [helper.make_node("ReduceMean", [name, "axes"], ["mean"], keepdims=0)]
        constants = [weights, axes]
        if masked and modality == "audio":
            inputs.append(helper.make_tensor_value_info("attention_mask", int64, ["n", "t"]))
            constants.append(numpy_helper.from_array(np.array([2]), "last"))
            nodes = [
                helper.make_node("Cast", ["attention_mask"], ["mask"], to=float32),
                helper.make_node("Unsqueeze", ["mask", "last"], ["wide"]),
                helper.make_node("Mul", [name, "wide"], ["heard"]),
                helper.make_node("ReduceSum", ["heard", "axes"], ["sum"], keepdims=0),
                helper.make_node("ReduceSum", ["mask", "axes"], ["count"], keepdims=1),
                helper.make_node("Div", ["sum", "count"], ["mean"]),
            ]
        nodes.append(helper.make_node("MatMul", ["mean", "weights"], ["embeds" if not busy else "products"]))
        if busy:
            constants.append(numpy_helper.from_array(np.array([busy, busy]), "square"))
            constants.append(numpy_helper.from_array(np.zeros(1, np.float32), "nothing"))
            nodes += [
                helper.make_node("ReduceMean", ["products"], ["number"]),
                helper.make_node("Expand", ["number", "square"], ["matrix"]),
                helper.make_node("MatMul", ["matrix", "matrix"], ["product"]),
                helper.make_node("ReduceMean", ["product"], ["another"]),
                helper.make_node("Mul", ["another", "nothing"], ["zero"]),
                helper.make_node("Add", ["products", "zero"], ["embeds"]),
            ]
        outputs = [helper.make_tensor_value_info("embeds", float32, ["n", DIMENSIONS])]
        graph = helper.make_graph(nodes, "tower", inputs, outputs, constants)
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "m.onnx"
        )
        (folder / "preprocessor_config.json").write_text(json.dumps(config | changes.pop("config", {})))
        manifest = {
            "name": f"tiny-{modality}",
            "family": "tiny",
            "modality": modality,
            "space": "tiny",
            "dimensions": DIMENSIONS,
            "normalized": True,
            "max_input_units": units,
            "license": "Apache-2.0",
            "source": "made by a test",
            "backend": "onnxruntime",
            "graph": {
                "file": "m.onnx",
                "layout": "stacked",
                "inputs": [one.name for one in inputs],
                "output": "embeds",
            },
            modality: {"processor": "preprocessor_config.json"},
        }
        write_manifest(folder, manifest | changes, ["m.onnx", "preprocessor_config.json"])
        return folder

    return make


@dataclass
class HubRepository:
    """A repository of the hub below.

    Attributes:
        files: Contents by name, at its only commit.
        revisions: Branches and tags.
        refusal: X-Error-Code of every answer, with its status.
        listed: Hashes that are listed in place of the true ones.
        cut: How many bytes of a file are sent before the connection breaks, and how often that happens.
    """

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    refusal: tuple[int, str] | None = None
    listed: dict[str, str] = field(default_factory=dict)
    cut: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        parts = [name.encode() + content for name, content in sorted(self.files.items())]
        return hashlib.sha1(b"\0".join(parts), usedforsecurity=False).hexdigest()

    def entry(self, name: str) -> dict[str, Any]:
        """Describe a file as the tree of the hub does; large ones are kept by their sha256, as LFS does."""
        content = self.files[name]
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
        if name.endswith((".onnx", ".safetensors", "_data", ".bin")):
            sha256 = self.listed.get(name, hashlib.sha256(content).hexdigest())
            content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\n".encode()  # what git holds
            entry["lfs"] = {"oid": sha256, "size": entry["size"], "pointerSize": len(content)}
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        return entry | {"oid": blob if "lfs" in entry else self.listed.get(name, blob)}


class LoopbackHub:
    """The routes of the Hugging Face Hub that `huggingface_hub` uses, on loopback.

    Attributes:
        repositories: By id.
        token: What may see private repositories (those whose `refusal` is set), if anything.
        requests: Method, path and Range header of each request.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, HubRepository] = {}
        self.token = ""
        self.requests: list[tuple[str, str, str]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_GET  # noqa: N815  (the library's name)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def downloads(self) -> list[str]:
        """Names of the files that were downloaded."""
        return [path.partition("/resolve/")[2].partition("/")[2] for method, path, _ in self.requests
                if method == "GET" and "/resolve/" in path]  # fmt: skip

    def _answer(self, request: BaseHTTPRequestHandler) -> None:  # noqa: PLR0911  (a table of routes)
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
        self.requests.append((request.command, path, request.headers.get("Range", "")))
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repository = self.repositories.get("/".join(parts[:2]))
        allowed = self.token and request.headers.get("Authorization") == f"Bearer {self.token}"
        if repository is None:
            return self._refuse(request, 404, "RepoNotFound")
        if repository.refusal and not allowed:
            return self._refuse(request, *repository.refusal)
        kind, revision = parts[2:4] if len(parts) > 3 else ("revision", "main")
        if revision not in (*repository.revisions, repository.commit):
            return self._refuse(request, 404, "RevisionNotFound")
        if kind == "revision":
            siblings = [{"rfilename": name} for name in repository.files]
            return self._json(request, {"id": "/".join(parts[:2]), "sha": repository.commit, "siblings": siblings})
        if kind == "tree":
            return self._json(request, [repository.entry(name) for name in repository.files])
        name = "/".join(parts[4:])
        if name not in repository.files:
            return self._refuse(request, 404, "EntryNotFound")
        return self._file(request, repository, name)

    @staticmethod
    def _refuse(request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        request.send_response(status)
        if code:
            request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    @staticmethod
    def _json(request: BaseHTTPRequestHandler, table: Any) -> None:
        content = json.dumps(table).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    @staticmethod
    def _file(request: BaseHTTPRequestHandler, repository: HubRepository, name: str) -> None:
        content, entry = repository.files[name], repository.entry(name)
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        request.send_response(206 if start else 200)
        request.send_header("ETag", f'"{entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]}"')
        request.send_header("X-Repo-Commit", repository.commit)
        request.send_header("Accept-Ranges", "bytes")
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        if request.command == "HEAD":
            return
        size, times = repository.cut.get(name, (0, 0))
        if times:
            repository.cut[name] = (size, times - 1)
            request.wfile.write(content[start : start + size])
            request.close_connection = True
            return
        request.wfile.write(content[start:])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """Serve a hub without repositories; nothing of the caller's own settings of the Hub counts."""
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    server = LoopbackHub()
    yield server
    server.close()


@pytest.fixture
def hub_repository() -> type[HubRepository]:
    return HubRepository
