"""Names of vectors in the cache."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

from google.protobuf.message import Message

from embedmesh.v1 import audio_pb2, image_pb2, text_pb2
from embedmesh.v1 import embedding_pb2 as pb

__all__ = ["cache_key", "cache_keys"]

# Hashing more than this would hold the event loop for too long (blake2b: about 1 ms a MiB).
_INLINE_BYTES: Final = 256 * 1024
_WHOLE: Final = pb.Chunking()


def cache_key(
    model: pb.ModelRef,
    modality: str,
    truncation: pb.Truncation.ValueType,
    item: Message,
    chunking: pb.Chunking = _WHOLE,
) -> bytes:
    """Name the full-width vector of one input: all that changes it, and nothing else.

    Args:
        model: Revision and space count, the name does not.
        modality: "text", "image" or "audio".
        truncation: As applied, never unspecified.
        item: TextInput, ImageInput or AudioInput.
        chunking: Counts where texts are cut into chunks.

    Returns:
        "em1:" and 16 bytes of BLAKE2b over the parts, each preceded by its length, so that no
        two different lists of parts run together into the same bytes.
    """
    return _key(_prefix(model, modality, truncation, chunking), item)


async def cache_keys(
    model: pb.ModelRef,
    modality: str,
    truncation: pb.Truncation.ValueType,
    items: Sequence[Message],
    chunking: pb.Chunking = _WHOLE,
) -> list[bytes]:
    """Give the `cache_key` of every input of a request, without holding up the event loop."""
    prefix = _prefix(model, modality, truncation, chunking)

    def hashed() -> list[bytes]:
        return [_key(prefix, item) for item in items]

    # Cheap for texts; a request full of pictures would take long, and hashlib lets other threads run.
    if modality == "text" or sum(item.ByteSize() for item in items) <= _INLINE_BYTES:
        return hashed()
    return await asyncio.to_thread(hashed)


def _prefix(model: pb.ModelRef, modality: str, truncation: pb.Truncation.ValueType, chunking: pb.Chunking) -> Any:
    cut = str(truncation)
    if truncation == pb.TRUNCATION_CHUNK and modality == "text":
        cut += f" {chunking.units} {chunking.overlap}"
    parts = (model.revision, model.space, modality, cut)
    return hashlib.blake2b(_joined(*(part.encode() for part in parts)), digest_size=16)


def _key(prefix: Any, item: Any) -> bytes:
    if isinstance(item, text_pb2.TextInput):
        # Written out, because it is done for every text that the cache answers.
        instruction, text = item.instruction.encode(), item.text.encode()
        parts = b"".join(
            (
                _joined_role(item.role),
                len(instruction).to_bytes(8, "little"),
                instruction,
                len(text).to_bytes(8, "little"),
                text,
            )
        )
        if item.instructions:  # keys of texts without are those of earlier versions
            parts += _joined(b"instructions", *(each.encode() for each in item.instructions))
        if item.HasField("late_chunking"):
            parts += _joined(b"late_chunking", item.late_chunking.SerializeToString(deterministic=True))
    elif isinstance(item, audio_pb2.AudioInput) and item.WhichOneof("source") == "pcm":
        samples = item.pcm.samples
        shape = ",".join(map(str, samples.shape))
        form = f"pcm {item.pcm.sample_rate_hz} {samples.dtype} {samples.scale} {shape}"
        parts = _joined(form.encode(), samples.data)
    else:
        parts = _joined(item.content)
        if isinstance(item, image_pb2.ImageInput) and (item.text or item.instruction):
            parts += _joined(item.instruction.encode(), item.text.encode())
    digest = prefix.copy()
    digest.update(parts)
    return b"em1:" + bytes(digest.digest())


@lru_cache(16)  # any number may stand in a request
def _joined_role(role: int) -> bytes:
    return _joined(b"%d" % role)


def _joined(*parts: bytes) -> bytes:
    return b"".join([piece for part in parts for piece in (len(part).to_bytes(8, "little"), part)])
