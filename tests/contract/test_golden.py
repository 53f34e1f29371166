"""Bytes written by earlier versions keep their meaning: the half of compatibility that `buf breaking` does not see."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2  # noqa: F401  (registers what errors are made of)

from embedmesh.v1 import audio_pb2, catalog_pb2, embedding_pb2, gateway_pb2, image_pb2, text_pb2

GOLDEN = Path(__file__).parent / "golden"
FILES = (audio_pb2, catalog_pb2, embedding_pb2, gateway_pb2, image_pb2, text_pb2)
MESSAGES: list[Descriptor] = [message for file in FILES for message in file.DESCRIPTOR.message_types_by_name.values()]
PATHS = sorted(GOLDEN.glob("*.binpb"))


def parse(path: Path) -> Message:
    pool = descriptor_pool.Default()  # type: ignore[no-untyped-call]
    kind = pool.FindMessageTypeByName(f"embedmesh.v1.{path.name.partition('.')[0]}")
    message: Message = message_factory.GetMessageClass(kind)()
    message.ParseFromString(path.read_bytes())
    return message


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_old_bytes_mean_what_they_meant(path: Path) -> None:
    meant = json.loads(path.with_suffix(".json").read_text())
    assert json_format.MessageToDict(parse(path), preserving_proto_field_name=True) == meant


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_what_is_written_now_is_what_was_written(path: Path) -> None:
    assert parse(path).SerializeToString(deterministic=True) == path.read_bytes()


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.name)
def test_every_field_of_every_message_has_golden_bytes(message: Descriptor) -> None:
    paths = [path for path in PATHS if path.name.partition(".")[0] == message.name]
    assert paths, "see make_golden.py"
    covered = {field.name for path in paths for field, _ in parse(path).ListFields()}
    assert covered == set(message.fields_by_name)


def test_bytes_and_their_meaning_come_in_pairs() -> None:
    assert {path.stem for path in PATHS} == {path.stem for path in GOLDEN.glob("*.json")}
