"""`Text`, `Image` and `Audio`: what they take and what they write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embedmesh
from embedmesh import Audio, Image, Text, vectors
from embedmesh.v1 import audio_pb2, embedding_pb2, gateway_pb2, image_pb2, text_pb2


def written(item: Any) -> gateway_pb2.Input:
    message = gateway_pb2.Input()
    item.write(message)
    return message


def test_text() -> None:
    assert written(Text("a", "query", "find")) == gateway_pb2.Input(
        text=text_pb2.TextInput(text="a", role=text_pb2.TEXT_ROLE_QUERY, instruction="find")
    )
    assert written(Text("")).WhichOneof("modality") == "text"
    assert Text("aä", instruction="b").nbytes == 4


@pytest.mark.parametrize("arguments", [(b"bytes",), ("text", None, None)])
def test_text_takes_str(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError):
        Text(*arguments)


def test_text_with_several_instructions() -> None:
    item = Text("a", instructions=["b", "ä"])
    assert written(item) == gateway_pb2.Input(text=text_pb2.TextInput(text="a", instructions=["b", "ä"]))
    assert item.nbytes == 4
    with pytest.raises(embedmesh.InvalidRequest, match="not both"):
        Text("a", "query", instructions=["b"])
    with pytest.raises(TypeError, match="into a list"):
        Text("a", instructions="b")


def test_text_has_one_of_two_roles() -> None:
    role: Any = "passage"
    with pytest.raises(embedmesh.InvalidRequest, match="'query', 'document'"):
        Text("a", role)


def test_image_and_audio_from_bytes_and_files(tmp_path: Path) -> None:
    path = tmp_path / "content"
    path.write_bytes(b"abc")
    assert Image.from_file(path) == Image.from_bytes(b"abc") == Image(b"abc")
    assert written(Image(b"abc")) == gateway_pb2.Input(image=image_pb2.ImageInput(content=b"abc"))
    assert written(Image(b"")).WhichOneof("modality") == "image"
    assert Audio.from_file(str(path)).content == Audio.from_bytes(b"abc").content == b"abc"
    assert written(Audio(b"abc")) == gateway_pb2.Input(audio=audio_pb2.AudioInput(content=b"abc"))
    with pytest.raises(FileNotFoundError):
        Image.from_file(tmp_path / "absent")


def test_an_image_may_have_a_text(tmp_path: Path) -> None:
    path = tmp_path / "content"
    path.write_bytes(b"abc")
    image = Image(b"abc", text="ä", instruction="find")
    assert written(image) == gateway_pb2.Input(image=image_pb2.ImageInput(content=b"abc", text="ä", instruction="find"))
    assert image == Image.from_bytes(b"abc", "ä", "find") == Image.from_file(path, text="ä", instruction="find")
    assert image.nbytes == 9
    text: Any = None
    with pytest.raises(TypeError, match="str as text"):
        Image(b"abc", text)


@pytest.mark.parametrize("kind", [Image, Audio])
def test_a_path_is_no_content(kind: Any) -> None:
    with pytest.raises(TypeError, match="from_file reads a path"):
        kind("picture.png")


def test_content_is_not_shown() -> None:
    assert "abc" not in repr(Image(b"abc")) + repr(Audio(b"abc"))


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.array([0, 0.5, -1], np.float64), [0, 0.5, -1]),
        (np.array([0, 16384, -32768], np.int16), [0, 0.5, -1]),
        (np.array([[0, 2**30], [-(2**31), 0]], np.int32), [[0, 0.5], [-1, 0]]),
    ],
)
def test_audio_from_samples(samples: Any, expected: Any) -> None:
    pcm = written(Audio.from_pcm(samples, 16_000)).audio.pcm
    assert pcm.sample_rate_hz == 16_000
    assert pcm.samples.dtype == embedding_pb2.DTYPE_FLOAT32
    np.testing.assert_array_equal(vectors.decode(pcm.samples), np.array(expected, np.float32))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Audio.from_pcm(np.zeros(3, np.uint8), 8000), "uint8"),
        (lambda: Audio.from_pcm(np.zeros((1, 1, 1)), 8000), "must be float32"),
        (lambda: Audio(samples=np.zeros(3), sample_rate_hz=8000), "must be float32"),  # type: ignore[arg-type]
        (lambda: Audio.from_pcm(np.zeros(3), 0), "rate in hertz"),
        (lambda: Audio(b"abc", np.zeros(3, np.float32), 8000), "not both"),
    ],
)
def test_samples_that_cannot_be_a_sound(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()
