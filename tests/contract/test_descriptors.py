"""The contract as a document and as a promise: comments, prefixes, and no field that moves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "protos"
BUF = Path(sys.executable).with_name("buf")
# One line a field, enum value and method of the contract. Lines are added with what they name, in
# the same change; they are never edited or removed.
PINNED = Path(__file__).with_name("contract.txt")

FieldProto = descriptor_pb2.FieldDescriptorProto


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The descriptor set of the .proto files as they are."""
    path = tmp_path_factory.mktemp("contract") / "now.binpb"
    generate = [sys.executable, str(PROTOS / "generate.py"), "--descriptor-set", str(path)]
    subprocess.run(generate, check=True)
    return path


@pytest.fixture(scope="module")
def files(written: Path) -> list[descriptor_pb2.FileDescriptorProto]:
    parsed = descriptor_pb2.FileDescriptorSet.FromString(written.read_bytes())
    return [file for file in parsed.file if file.package.startswith("embedmesh.")]


def buf(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [BUF, *arguments, "--config", PROTOS / "buf.yaml"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def breaking(contract: Path) -> subprocess.CompletedProcess[str]:
    return buf("breaking", contract, "--against", PROTOS / "v1.binpb", "--exclude-imports")


def lines(files: list[descriptor_pb2.FileDescriptorProto]) -> Iterator[str]:
    for file in files:
        for message in file.message_type:
            for field in message.field:
                kind = field.type_name.removeprefix(".") or FieldProto.Type.Name(field.type)[5:].lower()
                label = "repeated " if field.label == FieldProto.LABEL_REPEATED else ""
                yield f"{file.package}.{message.name}.{field.name} = {field.number}: {label}{kind}"
        for enum in file.enum_type:
            for value in enum.value:
                yield f"{file.package}.{enum.name}.{value.name} = {value.number}"
        for service in file.service:
            for method in service.method:
                question = f"{'stream ' * method.client_streaming}{method.input_type.removeprefix('.')}"
                reply = f"{'stream ' * method.server_streaming}{method.output_type.removeprefix('.')}"
                yield f"{file.package}.{service.name}.{method.name}: {question} -> {reply}"


def test_no_field_value_or_method_was_moved_retyped_or_removed(files: Any) -> None:
    pinned = PINNED.read_text().splitlines()
    assert sorted(lines(files)) == pinned


def test_enums_begin_with_unspecified_and_carry_their_prefix(files: Any) -> None:
    for enum in (enum for file in files for enum in file.enum_type):
        prefix = "".join(f"_{letter}" if letter.isupper() else letter.upper() for letter in enum.name)[1:]
        assert (enum.value[0].name, enum.value[0].number) == (f"{prefix}_UNSPECIFIED", 0)
        assert all(value.name.startswith(f"{prefix}_") for value in enum.value)


def test_every_service_method_and_enum_is_commented(files: Any) -> None:
    for file in files:
        commented = {tuple(location.path) for location in file.source_code_info.location if location.leading_comments}
        for i, service in enumerate(file.service):
            assert (6, i) in commented, service.name
            for j, method in enumerate(service.method):
                assert (6, i, 2, j) in commented, method.name


def test_the_stubs_are_those_of_the_proto_files() -> None:
    subprocess.run([sys.executable, str(PROTOS / "generate.py"), "--check"], check=True)


@pytest.mark.parametrize("name", sorted(path.stem for path in (PROTOS / "embedmesh" / "v1").glob("*_pb2*.py")))
def test_stubs_load_without_a_warning(name: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", f"import embedmesh.v1.{name}"], check=True)


def test_buf_finds_nothing(written: Path) -> None:
    found = buf("lint", written, "--exclude-path", "google")
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    found = breaking(written)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def retype(field: FieldProto) -> None:
    field.type = FieldProto.TYPE_STRING


def renumber(field: FieldProto) -> None:
    field.number = 77


def rename(field: FieldProto) -> None:
    field.name = field.json_name = "another"


@pytest.mark.parametrize("change", [retype, renumber, rename])
def test_buf_catches_a_field_that_changed(written: Path, tmp_path: Path, change: Any) -> None:
    contract = descriptor_pb2.FileDescriptorSet.FromString(written.read_bytes())
    (file,) = (file for file in contract.file if file.name == "embedmesh/v1/embedding.proto")
    (message,) = (message for message in file.message_type if message.name == "OutputOptions")
    (field,) = (field for field in message.field if field.name == "dimensions")
    change(field)
    broken = tmp_path / "broken.binpb"
    broken.write_bytes(contract.SerializeToString())
    found = breaking(broken)
    assert found.returncode == 100
    assert "OutputOptions" in found.stdout


def test_only_a_release_moves_the_baseline(tmp_path: Path) -> None:
    protos = tmp_path / "protos"
    (protos / "embedmesh" / "v1").mkdir(parents=True)
    for path in [PROTOS / "generate.py", *(PROTOS / "embedmesh" / "v1").glob("*.proto")]:
        (protos / path.relative_to(PROTOS)).write_bytes(path.read_bytes())

    def generate(*options: str) -> bytes:
        subprocess.run([sys.executable, str(protos / "generate.py"), *options], check=True)
        return (protos / "v1.binpb").read_bytes()

    first = generate()
    assert descriptor_pb2.FileDescriptorSet.FromString(first).file
    assert (protos / "embedmesh" / "v1" / "gateway_pb2.py").read_bytes() == (
        PROTOS / "embedmesh" / "v1" / "gateway_pb2.py"
    ).read_bytes()
    (protos / "v1.binpb").write_bytes(b"released")
    assert generate() == b"released"
    assert generate("--release") == first

    stale = protos / "embedmesh" / "v1" / "text_pb2.py"
    stale.write_text("edited by hand")
    check = subprocess.run(
        [sys.executable, str(protos / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert check.returncode == 1
    assert check.stderr.endswith("stale stubs, run `make proto`: embedmesh/v1/text_pb2.py\n")
