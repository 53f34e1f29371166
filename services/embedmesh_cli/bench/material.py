"""What is embedded: texts with the lengths of real life, pictures and sounds; and requests made of them."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from embedmesh.v1 import audio_pb2, embedding_pb2, gateway_pb2, image_pb2, text_pb2
from embedmesh_cli.console import FAILED, USAGE, UserError
from embedmesh_cli.local import demo_texts

__all__ = ["Cache", "Material", "pictures", "requests", "sounds", "texts", "unseen"]

Cache = Literal["read_write", "refresh", "bypass"]

FORTUNES: Final = Path("/usr/share/games/fortunes")
_PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tiff", ".avif")
_SOUNDS: Final = (".wav", ".flac", ".ogg", ".mp3", ".aiff")
_MOST_FILES: Final = 1000


@dataclass(frozen=True, slots=True)
class Material:
    """Inputs of one modality, in a fixed order that mixes them.

    Attributes:
        modality: "text", "image" or "audio".
        source: Where they come from, for the report.
        inputs: str, or the bytes of files.
    """

    modality: str
    source: str
    inputs: Sequence[Any]

    def about(self) -> str:
        """Say in a line what it is."""
        sizes = np.array([len(each) for each in self.inputs])
        unit = {"text": "characters"}.get(self.modality, "bytes")
        p50, p90, p99 = np.percentile(sizes, (50, 90, 99))
        return (
            f"{len(sizes)} {self.modality} inputs from {self.source}; {unit}: mean {sizes.mean():.0f}, p50 {p50:.0f}, "
            f"p90 {p90:.0f}, p99 {p99:.0f}, longest {sizes.max()}"
        )


def texts(file: Path | None, count: int) -> Material:
    """Texts: the lines of a file, else Debian's fortunes where they are installed, else the demo's definitions.

    Raises:
        UserError: The file cannot be read, or is empty.
    """
    if file:
        try:
            found = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--texts {file}: cannot be read: {error}.", USAGE) from None
        source = str(file.name)
    elif found := _fortunes():
        source = "Debian's fortunes"
    else:
        found = demo_texts()
        source = "the demo's WordNet definitions, which are short and alike (Debian's fortunes are not installed)"
    if not found:
        raise UserError(f"--texts {file}: holds no text.", USAGE)
    return Material("text", source, _mixed(found, count))


def _fortunes() -> list[str]:
    found: list[str] = []
    for file in sorted(FORTUNES.glob("*")) if FORTUNES.is_dir() else ():
        if file.is_file() and not file.suffix:  # .dat and .u8 are indexes and links
            entries = file.read_text(encoding="utf-8", errors="replace").split("\n%\n")
            found += [entry.strip() for entry in entries if entry.strip()]
    return found


def pictures(folder: Path | None, count: int) -> Material:
    """Pictures of a folder, else those of the demo; raises UserError where there are none."""
    return _files("image", folder, count, flag="--images", demo="pictures", suffixes=_PICTURES)


def sounds(folder: Path | None, count: int) -> Material:
    """Sounds of a folder, else those of the demo; raises UserError where there are none."""
    return _files("audio", folder, count, flag="--sounds", demo="speech", suffixes=_SOUNDS)


def _files(
    modality: str, folder: Path | None, count: int, *, flag: str, demo: str, suffixes: tuple[str, ...]
) -> Material:
    root = folder or Path(str(resources.files("embedmesh_cli.demo"))) / demo
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in suffixes)[:_MOST_FILES]
    if not paths:
        status = USAGE if folder else FAILED
        where = f"in {folder}" if folder else "in this version of the demo"
        raise UserError(
            f"no files for {modality} {where}: name a folder of {', '.join(suffixes)} with {flag} DIR.", status
        )
    source = f"{folder.name}/" if folder else f"the demo's {demo}"
    return Material(modality, source, _mixed([path.read_bytes() for path in paths], count))


def _mixed(found: Sequence[Any], count: int) -> list[Any]:
    """Take `count` of them at random, always the same ones."""
    order = np.random.default_rng(0).permutation(len(found))[:count]
    return [found[i] for i in order]


def unseen(material: Sequence[str], seed: int) -> Iterator[str]:
    """Endlessly many texts that no cache has seen, with the words, and so the lengths, of the given ones."""
    chance = random.Random(seed)  # noqa: S311  (reproducible, hides nothing)
    while True:
        for text in material:
            words = text.split()
            chance.shuffle(words)
            # A number makes it new where there are too few words for that.
            yield " ".join(words) if len(words) > 8 else f"{' '.join(words)} {chance.randrange(10**6)}"


def requests(
    wire: str,
    inputs: Sequence[Any],
    size: int,
    *,
    modality: str = "text",
    model: str = "",
    cache: Cache = "bypass",
    priority: Literal["", "interactive", "bulk"] = "",
) -> list[bytes]:
    """Serialise requests of `size` inputs each, the last one filled up from the beginning.

    Args:
        wire: "gateway", "stream" or an encoder's modality; see `load.Wire`.
        inputs: Texts, or the bytes of files.
        size: Inputs of one request.
        modality: Of the inputs.
        model: Of the request; "" is the default one.
        cache: For the gateway.
        priority: "" leaves it to the server.
    """
    rank = embedding_pb2.Priority.Value(f"PRIORITY_{priority.upper() or 'UNSPECIFIED'}")
    made = []
    for chunk in chunks(inputs, size):
        if wire in ("gateway", "stream"):
            request: Any = gateway_pb2.EmbedRequest(
                model=model, cache=gateway_pb2.CachePolicy.Value(f"CACHE_POLICY_{cache.upper()}"), priority=rank
            )
            for each in chunk:
                _WRITE[modality](getattr(request.inputs.add(), modality), each)
        else:
            request = _ENCODER[wire](model=model, priority=rank)
            for each in chunk:
                _WRITE[wire](request.inputs.add(), each)
        made.append(request.SerializeToString())
    return made


def json_requests(inputs: Sequence[str], size: int, body: Mapping[str, Any], key: str) -> list[bytes]:
    """Serialise requests as servers of the OpenAI shape take them: `body`, with the texts under `key`."""
    return [json.dumps({**body, key: list(chunk)}).encode() for chunk in chunks(inputs, size)]


def kserve_requests(inputs: Sequence[str], size: int, body: Mapping[str, Any], name: str) -> list[bytes]:
    """Serialise requests as servers of the KServe protocol (v2) take them: `body`, with the texts as input `name`."""
    shape = {"name": name, "datatype": "BYTES", "shape": [size, 1]}
    return [json.dumps({**body, "inputs": [{**shape, "data": list(chunk)}]}).encode() for chunk in chunks(inputs, size)]


def chunks(inputs: Sequence[Any], size: int) -> list[list[Any]]:
    """Cut into lists of exactly `size`, the last one filled up from the beginning."""
    whole = -(-len(inputs) // size)
    return [[inputs[(i * size + j) % len(inputs)] for j in range(size)] for i in range(whole)]


def json_vectors(body: bytes) -> Any:
    """Vectors of an answer of the OpenAI shape, as numbers or as base64 of float32: float32 [n, d]."""
    rows = sorted(json.loads(body)["data"], key=lambda row: row["index"])
    found = [row["embedding"] for row in rows]
    return np.array(
        [np.frombuffer(base64.b64decode(v), "<f4") if isinstance(v, str) else np.array(v, np.float32) for v in found]
    )


def kserve_vectors(body: bytes, header_length: int) -> Any:
    """Vectors of an answer of the KServe protocol with one binary output: float32 [n, d].

    Args:
        body: JSON, then the numbers.
        header_length: Bytes of JSON, from the header Inference-Header-Content-Length.
    """
    (output,) = json.loads(body[:header_length])["outputs"]
    return np.frombuffer(body, "<f4", offset=header_length).reshape(output["shape"])


def _write_text(message: Any, text: str) -> None:
    message.text = text


def _write_content(message: Any, content: bytes) -> None:
    message.content = content


_WRITE: Final[dict[str, Callable[[Any, Any], None]]] = {
    "text": _write_text,
    "image": _write_content,
    "audio": _write_content,
}
_ENCODER: Final[dict[str, Any]] = {
    "text": text_pb2.EmbedTextRequest,
    "image": image_pb2.EmbedImageRequest,
    "audio": audio_pb2.EmbedAudioRequest,
}
