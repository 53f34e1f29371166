"""A client in another language, with stubs of another generator, calls the real mesh."""

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import status_pb2

import embedmesh

PROTOS = Path(__file__).parents[2] / "protos"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs the TypeScript client, built in a folder of its own."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("node") / "client"
    shutil.copytree(Path(__file__).with_name("node"), folder, ignore=shutil.ignore_patterns("node_modules"))
    subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder, check=True)
    generated = folder / "gen"
    generated.mkdir()
    googleapis = Path(status_pb2.__file__).parents[2]
    generate = [
        *(sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", f"-I{googleapis}"),
        f"--plugin=protoc-gen-ts_proto={folder / 'node_modules' / '.bin' / 'protoc-gen-ts_proto'}",
        f"--ts_proto_out={generated}",
        "--ts_proto_opt=outputServices=grpc-js,esModuleInterop=true,useOptionals=messages",
        *map(str, (PROTOS / "embedmesh" / "v1").glob("*.proto")),
    ]
    subprocess.run(generate, check=True)
    subprocess.run([str(folder / "node_modules" / ".bin" / "tsc")], cwd=folder, check=True)
    return ["node", str(folder / "out" / "client.js")]


@pytest.mark.node
@pytest.mark.timeout(300)
async def test_stubs_of_another_language_call_the_gateway(client: list[str], start_mesh: Any) -> None:
    texts = ["a cat", "eine Kätzin", "poison [[fail]]", ""]
    async with start_mesh() as mesh, embedmesh.AsyncClient(mesh.address) as python:
        process = await asyncio.create_subprocess_exec(*client, mesh.address, *texts, stdout=subprocess.PIPE)
        output, _ = await asyncio.wait_for(process.communicate(), 60)
        answered = json.loads(output)
        expected = await python.embed(texts)
    for i in (0, 1, 3):
        # JSON carries each float32 exactly, as a double.
        np.testing.assert_array_equal(np.array(answered["unary"][i]["vector"], np.float32), expected.results[i].vector)
        assert answered["unary"][i]["space"] == expected.models[0].space
    assert answered["unary"][2]["code"] == grpc.StatusCode.INTERNAL.value[0]
    assert answered["unary"][2]["details"] == ["type.googleapis.com/google.rpc.ErrorInfo"]
    assert set(answered["stream"]) == {"5", "6"}
    assert answered["stream"]["5"][:2] == answered["unary"][:2]
    assert answered["models"] == [expected.models[0].name]
