"""What can be embedded: a text, a picture, a sound."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from embedmesh import vectors
from embedmesh.errors import InvalidRequest
from embedmesh.v1 import gateway_pb2, text_pb2

__all__ = ["Audio", "Image", "Input", "Role", "Text"]

Role: TypeAlias = Literal["query", "document"]

ROLES: dict[str, text_pb2.TextRole.ValueType] = {
    "query": text_pb2.TEXT_ROLE_QUERY,
    "document": text_pb2.TEXT_ROLE_DOCUMENT,
}


def role_value(role: str | None) -> text_pb2.TextRole.ValueType:
    """Give the value of the contract for `role`.

    Raises:
        InvalidRequest: There is no such role.
    """
    if role is None:
        return text_pb2.TEXT_ROLE_UNSPECIFIED
    if role not in ROLES:
        raise InvalidRequest(f"role is {role!r}; choose 'query', 'document' or None", field="role")
    return ROLES[role]


def instructions_value(instructions: Iterable[str], role: str | None, instruction: str) -> tuple[str, ...]:
    """Give the instructions of a text or a call, which has no role and no single instruction beside them.

    Raises:
        InvalidRequest: It has.
        TypeError: They are no strings.
    """
    if isinstance(instructions, str) or not isinstance(instructions, Iterable):
        raise TypeError(f"instructions are many, got {instructions!r}; put it into a list: [...]")
    found = tuple(instructions)
    if not all(isinstance(each, str) for each in found):
        raise TypeError("instructions are many str")
    if found and (role or instruction):
        raise InvalidRequest("give instructions, or role or instruction, not both", field="instructions")
    return found


@dataclass(frozen=True, slots=True)
class Text:
    """A text with a role or an instruction of its own; a plain `str` does where neither is needed.

    Attributes:
        text: Any Unicode text, the empty one included.
        role: "query" for a question, "document" for a text to be found; None takes the
            role given to the call.
        instruction: Free text put before it in place of the role's prompt; "" takes the
            instruction given to the call.
        instructions: Several, each put before it in a pass of its own, whose vectors are averaged; in place of
            role and instruction.
        spans: Parts of the text, as (start, end) in characters, that get a vector of their own from one reading of the
            whole (late chunking); see `EmbedResult.spans`.
        span_units: Instead: cut the text into parts of so many tokens; 0 for none.
    """

    text: str
    role: Role | None = None
    instruction: str = ""
    instructions: Iterable[str] = ()
    spans: Iterable[tuple[int, int]] = ()
    span_units: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not isinstance(self.instruction, str):
            raise TypeError("Text takes a str as text and as instruction")
        role_value(self.role)
        object.__setattr__(self, "instructions", instructions_value(self.instructions, self.role, self.instruction))
        object.__setattr__(self, "spans", tuple((int(start), int(end)) for start, end in self.spans))
        if any(not 0 <= offset < 2**32 for offset in (self.span_units, *chain.from_iterable(self.spans))):
            raise InvalidRequest("spans and span_units are counts from 0", field="spans")

    @property
    def nbytes(self) -> int:
        """Size on the wire without framing; UnicodeEncodeError where half of a surrogate pair stands alone."""
        spans = 10 * len(tuple(self.spans))  # two numbers of at most five bytes each
        return spans + sum(map(_utf8_length, (self.text, self.instruction, *self.instructions)))

    def write(self, message: gateway_pb2.Input) -> None:
        """Fill `message`."""
        message.text.SetInParent()  # "" is a text too
        message.text.text = self.text
        message.text.role = role_value(self.role)
        message.text.instruction = self.instruction
        message.text.instructions.extend(self.instructions)
        if self.spans or self.span_units:
            message.text.late_chunking.offsets.extend(chain.from_iterable(self.spans))
            message.text.late_chunking.units = self.span_units


@dataclass(frozen=True, slots=True)
class Image:
    """A picture, alone or with a text that becomes one vector with it.

    Attributes:
        content: Encoded bytes (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF); the format is found by content.
        text: Read together with the picture, by models whose `ModelInfo.reads_text_with_images` is true; others
            fail this input alone. A text without a picture is a `Text` to the same family.
        instruction: Free text put before it in place of the model's own; only where `text` is read.
    """

    content: bytes = field(repr=False)
    text: str = ""
    instruction: str = ""

    def __post_init__(self) -> None:
        _require_bytes("Image", self.content)
        if not isinstance(self.text, str) or not isinstance(self.instruction, str):
            raise TypeError("Image takes a str as text and as instruction")

    @classmethod
    def from_bytes(cls, content: bytes, text: str = "", instruction: str = "") -> Image:
        """Take the bytes of an encoded picture."""
        return cls(content, text, instruction)

    @classmethod
    def from_file(cls, path: str | PathLike[str], text: str = "", instruction: str = "") -> Image:
        """Read a file now, whole; OSError where that fails."""
        return cls(Path(path).read_bytes(), text, instruction)

    @property
    def nbytes(self) -> int:
        """Size on the wire without framing; UnicodeEncodeError where half of a surrogate pair stands alone."""
        return len(self.content) + _utf8_length(self.text) + _utf8_length(self.instruction)

    def write(self, message: gateway_pb2.Input) -> None:
        """Fill `message`."""
        message.image.SetInParent()
        message.image.content = self.content
        message.image.text = self.text
        message.image.instruction = self.instruction


@dataclass(frozen=True, slots=True, eq=False)
class Audio:
    """A sound: encoded bytes (WAV, FLAC, OGG, MP3; found by content), or samples with their rate.

    Attributes:
        content: The encoded bytes; empty when `samples` are given.
        samples: float32 in [-1, 1], [samples] or [samples, channels].
        sample_rate_hz: Rate of `samples`.
    """

    content: bytes = field(default=b"", repr=False)
    samples: NDArray[np.float32] | None = field(default=None, repr=False)
    sample_rate_hz: int = 0

    def __post_init__(self) -> None:
        _require_bytes("Audio", self.content)
        if self.samples is None:
            return
        if self.content:
            raise ValueError("Audio takes encoded bytes or samples, not both")
        if self.samples.dtype != np.float32 or self.samples.ndim not in (1, 2):
            raise ValueError("samples must be float32 [samples] or [samples, channels]; Audio.from_pcm converts others")
        if self.sample_rate_hz < 1:
            raise ValueError(f"samples need their rate in hertz, got {self.sample_rate_hz}")

    @classmethod
    def from_bytes(cls, content: bytes) -> Audio:
        """Take the bytes of an encoded sound."""
        return cls(content)

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> Audio:
        """Read a file now, whole; OSError where that fails."""
        return cls(Path(path).read_bytes())

    @classmethod
    def from_pcm(cls, samples: NDArray[Any], sample_rate_hz: int) -> Audio:
        """Take samples: floats in [-1, 1] or signed 16 or 32 bit integers, [samples] or [samples, channels].

        Raises:
            ValueError: Another element type, another number of axes, or no rate.
        """
        samples = np.asarray(samples)
        if samples.dtype in (np.int16, np.int32):
            samples = samples / np.float64(np.iinfo(samples.dtype).max + 1)
        elif samples.dtype.kind != "f":
            raise ValueError(f"samples are {samples.dtype}; give floats in [-1, 1], int16 or int32")
        return cls(samples=samples.astype(np.float32), sample_rate_hz=int(sample_rate_hz))

    @property
    def nbytes(self) -> int:
        """Size on the wire without framing."""
        return len(self.content) if self.samples is None else self.samples.nbytes

    def write(self, message: gateway_pb2.Input) -> None:
        """Fill `message`."""
        if self.samples is None:
            message.audio.content = self.content
        else:
            vectors.encode_into(message.audio.pcm.samples, self.samples)
            message.audio.pcm.sample_rate_hz = self.sample_rate_hz


Input: TypeAlias = str | Text | Image | Audio


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _require_bytes(kind: str, content: object) -> None:
    if not isinstance(content, bytes):
        raise TypeError(f"{kind} takes bytes, got {type(content).__name__}; {kind}.from_file reads a path")
