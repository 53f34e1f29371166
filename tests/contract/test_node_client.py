"""A client in another language, with stubs of another generator, understands the contract."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2

from embedmesh import errors
from embedmesh.v1 import catalog_pb2, catalog_pb2_grpc, embedding_pb2, gateway_pb2, gateway_pb2_grpc

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "protos"
MODEL = embedding_pb2.ModelRef(name="fake", revision="r1", space="fake-space")


class SmallGateway(gateway_pb2_grpc.GatewayServicer, catalog_pb2_grpc.ModelCatalogServicer):
    """Answers a text with its length and 0.5; the empty one with an error."""

    def Embed(self, request: gateway_pb2.EmbedRequest, context: Any) -> gateway_pb2.EmbedResponse:
        response = gateway_pb2.EmbedResponse(models=[MODEL])
        for item in request.inputs:
            result = response.results.add()
            if item.text.text:
                dense = result.embedding.dense
                dense.dtype, dense.data = embedding_pb2.DTYPE_FLOAT32, struct.pack("<2f", len(item.text.text), 0.5)
                dense.shape.append(2)
            else:
                result.error.CopyFrom(errors.to_status(errors.InvalidRequest("empty", field="inputs[0].text")))
        return response

    def EmbedStream(self, request_iterator: Any, context: Any) -> Iterator[gateway_pb2.EmbedStreamResponse]:
        for chunk in request_iterator:
            yield gateway_pb2.EmbedStreamResponse(sequence=chunk.sequence, response=self.Embed(chunk.request, context))

    def ListModels(self, request: catalog_pb2.ListModelsRequest, context: Any) -> catalog_pb2.ListModelsResponse:
        return catalog_pb2.ListModelsResponse(models=[catalog_pb2.ModelInfo(model=MODEL)])


@pytest.fixture
def address() -> Iterator[str]:
    """A gateway: that of EMBEDMESH_TEST_ADDRESS, else a small one in this process."""
    given = os.environ.get("EMBEDMESH_TEST_ADDRESS")
    if given:
        yield given
        return
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        gateway_pb2_grpc.add_GatewayServicer_to_server(SmallGateway(), server)
        catalog_pb2_grpc.add_ModelCatalogServicer_to_server(SmallGateway(), server)
        port = server.add_insecure_port("localhost:0")
        server.start()
        yield f"localhost:{port}"
        server.stop(0).wait()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs the client, built in a folder of its own."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("node") / "client"
    shutil.copytree(
        Path(__file__).with_name("node"), folder, ignore=shutil.ignore_patterns("node_modules", "gen", "out")
    )
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
def test_stubs_of_another_language_can_call_a_gateway(client: list[str], address: str) -> None:
    texts = ["a cat", "eine Kätzin"]
    run = subprocess.run([*client, address, *texts], capture_output=True, text=True, check=True, timeout=60)
    answered = json.loads(run.stdout)
    assert len(answered["unary"]) == len(texts)
    assert all(outcome["vector"] and outcome["space"] for outcome in answered["unary"])
    assert answered["stream"] == {"5": answered["unary"], "6": answered["unary"]}
    assert answered["models"]


@pytest.mark.node
@pytest.mark.timeout(300)
@pytest.mark.skipif("EMBEDMESH_TEST_ADDRESS" in os.environ, reason='a real gateway gives "" a vector')
def test_numbers_and_errors_arrive_as_they_were_sent(client: list[str], address: str) -> None:
    run = subprocess.run([*client, address, "abc", ""], capture_output=True, text=True, check=True, timeout=60)
    good, bad = json.loads(run.stdout)["unary"]
    assert good == {"vector": [3, 0.5], "space": "fake-space"}
    assert bad["code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert bad["details"] == [
        "type.googleapis.com/google.rpc.ErrorInfo",
        "type.googleapis.com/google.rpc.BadRequest",
    ]
