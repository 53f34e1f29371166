"""The triton backend: against a server of its contract in this process, and (marked) against a real one."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, service_pb2_grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from embedmesh.v1 import embedding_pb2, text_pb2, text_pb2_grpc
from embedmesh_encoder.backend import BackendOptions, TritonOptions, create_backend
from embedmesh_encoder.backend.fake import write_model
from embedmesh_encoder.model import GraphSpec, ModelError, ModelSpec, SparseTable, TritonTable, load_spec
from embedmesh_encoder.text import TextItem, TextPreparer

NAMES = ("input_ids", "position_ids", "segment_ids")
TABLE = TritonTable(model="minilm", version="1")
PACKED: dict[str, Any] = {
    "input": [{"name": name, "data_type": "TYPE_INT64", "dims": [-1, -1]} for name in NAMES],
    "output": [{"name": "sentence_embedding", "data_type": "TYPE_FP32", "dims": [-1, 4]}],
}
PADDED: dict[str, Any] = {
    "max_batch_size": 8,
    "input": [{"name": name, "data_type": "TYPE_INT64", "dims": [-1]} for name in ("input_ids", "attention_mask")],
    "output": [{"name": "last_hidden_state", "data_type": "TYPE_FP32", "dims": [-1, 4]}],
}


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    """A packed text model that only a server has; the answer to a text is its first token id."""
    spec = write_model(tmp_path / "model", name="tiny", dimensions=4)
    changes = {"backend": "triton", "fake": None, "triton": TABLE, "graph": GraphSpec(layout="packed")}
    return spec.model_copy(update=changes)


def padded(spec: ModelSpec, pooling: Any = "mean") -> ModelSpec:
    return spec.model_copy(update={"graph": GraphSpec(layout="padded", pooling=pooling)})


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # (made without types)
    """What of Triton's contract the backend uses."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = PACKED
        self.ready = True
        self.answers = True
        self.released = threading.Event()
        self.released.set()
        self.requests: list[Any] = []

    def ModelConfig(self, request: Any, context: grpc.ServicerContext) -> Any:
        if (request.name, request.version) != ("minilm", "1"):
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        response = pb.ModelConfigResponse()
        for key, value in self.config.items():
            if key == "decoupled":
                response.config.model_transaction_policy.decoupled = value
            elif isinstance(value, int):
                setattr(response.config, key, value)
            else:
                for one in value:
                    getattr(response.config, key).add(**one)
        return response

    def ModelReady(self, request: Any, context: grpc.ServicerContext) -> Any:
        return pb.ModelReadyResponse(ready=self.ready)

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.requests.append(request)
        self.released.wait(20)
        if not self.answers:
            return pb.ModelInferResponse()
        ids, _, segments = (np.frombuffer(raw, np.int64) for raw in request.raw_input_contents)
        first = [ids[segments == segment][0] for segment in range(segments.max() + 1)]
        vectors = np.repeat(np.array(first, np.float32)[:, None], 4, axis=1)
        weights = ids.astype(np.float32).reshape(1, -1, 1)
        response = pb.ModelInferResponse()
        for output in request.outputs:
            array = {"sentence_embedding": vectors, "token_weights": weights}[output.name]
            response.raw_output_contents.append(array.tobytes())
            response.outputs.add(name=output.name, datatype="FP32", shape=array.shape)
        return response


@pytest.fixture
def server() -> Iterator[Server]:
    servicer = Server()
    running = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, running)
    servicer.address = f"127.0.0.1:{running.add_insecure_port('127.0.0.1:0')}"
    running.start()
    yield servicer
    servicer.released.set()
    running.stop(5).wait()


def options(server: Any, *, batch_items: int = 0, **changes: Any) -> BackendOptions:
    return BackendOptions(batch_items=batch_items, triton=TritonOptions(server.address, **changes))


def feeds(*values: int) -> dict[str, np.ndarray]:
    count = len(values)
    return {
        "input_ids": np.array([values], np.int64),
        "position_ids": np.zeros((1, count), np.int64),
        "segment_ids": np.arange(count, dtype=np.int64)[None],
    }


def test_a_batch_goes_there_and_back(server: Server, spec: ModelSpec) -> None:
    backend = create_backend(spec, options(server))
    assert (backend.name, backend.precision) == ("triton", "float32")
    outputs = backend.run(feeds(7, 9))
    np.testing.assert_array_equal(outputs["sentence_embedding"], [[7] * 4, [9] * 4])
    (request,) = server.requests
    assert (request.model_name, request.model_version) == ("minilm", "1")
    assert [(one.name, one.datatype, list(one.shape)) for one in request.inputs] == [
        (name, "INT64", [1, 2]) for name in NAMES
    ]
    backend.close()


def test_only_the_outputs_asked_for_are_sent(server: Server, spec: ModelSpec) -> None:
    table = SparseTable(output="token_weights", pooling="tokens", dimensions=300, skip_tokens=())
    kinds = (embedding_pb2.EMBEDDING_KIND_DENSE, embedding_pb2.EMBEDDING_KIND_SPARSE)
    weights = {"name": "token_weights", "data_type": "TYPE_FP32", "dims": [-1, -1, 1]}
    server.config = {**PACKED, "output": [*PACKED["output"], weights]}
    backend = create_backend(spec.model_copy(update={"kinds": kinds, "sparse": table}), options(server))
    assert set(backend.run(feeds(7, 9))) == {"sentence_embedding", "token_weights"}
    found = backend.run(feeds(7, 9), ["token_weights"])
    np.testing.assert_array_equal(found.pop("token_weights"), [[[7], [9]]])
    assert found == {}
    assert [[output.name for output in request.outputs] for request in server.requests] == [
        ["sentence_embedding", "token_weights"],
        ["token_weights"],
    ]
    backend.close()


def test_several_threads_may_run_at_once(server: Server, spec: ModelSpec) -> None:
    backend = create_backend(spec, options(server))
    server.released.clear()
    with ThreadPoolExecutor(3) as threads:
        running = [threads.submit(backend.run, feeds(value)) for value in range(3)]
        end = time.monotonic() + 10
        while len(server.requests) < 3:
            assert time.monotonic() < end
            time.sleep(0.005)
        server.released.set()
        values = [future.result()["sentence_embedding"][0, 0] for future in running]
    assert values == [0, 1, 2]
    backend.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": PACKED["input"][:2]}, 'it has no input "segment_ids" (its inputs: input_ids, position_ids)'),
        (
            {"input": [*PACKED["input"], {"name": "more", "data_type": "TYPE_INT64", "dims": [1]}]},
            "it wants inputs that the manifest does not name: more",
        ),
        (
            {"input": [*PACKED["input"][:2], {**PACKED["input"][2], "data_type": "TYPE_INT32"}]},
            'input "segment_ids" is int32, not int64',
        ),
        (
            {"input": [{**PACKED["input"][0], "data_type": "TYPE_UINT8"}, *PACKED["input"][1:]]},
            'input "input_ids" is TYPE_UINT8, not int64',
        ),
        (
            {"input": [{**PACKED["input"][0], "dims": [1, 128]}, *PACKED["input"][1:]]},
            'input "input_ids" has shape [1, 128]; [-1, -1], the batch included, was expected',
        ),
        ({"output": [{**PACKED["output"][0], "name": "other"}]}, 'it has no output "sentence_embedding"'),
        (
            {"output": [{**PACKED["output"][0], "dims": [-1, 8]}]},
            "has shape ['?', 8]; the manifest says dimensions = 4",
        ),
        ({"output": [{**PACKED["output"][0], "data_type": "TYPE_FP16"}]}, "is float16, not float32"),
        (
            {
                "max_batch_size": 8,
                "input": [{**one, "dims": [-1]} for one in PACKED["input"]],
                "output": [{**PACKED["output"][0], "dims": [4]}],
            },
            "max_batch_size is 8 and must be 0: a packed row holds several texts",
        ),
        ({"decoupled": True}, "it is decoupled"),
    ],
)
def test_the_configuration_must_be_what_the_manifest_says(
    server: Server, spec: ModelSpec, changes: dict[str, Any], message: str
) -> None:
    server.config = {**PACKED, **changes}
    with pytest.raises(ModelError) as caught:
        create_backend(spec, options(server))
    assert message in str(caught.value)
    assert f'model "minilm" version 1 of Triton at {server.address} does not fit model.toml: ' in str(caught.value)


def test_an_input_that_is_optional_there_may_be_left_out(server: Server, spec: ModelSpec) -> None:
    more = {"name": "more", "data_type": "TYPE_INT64", "dims": [1], "optional": True}
    server.config = {**PACKED, "input": [*PACKED["input"], more]}
    create_backend(spec, options(server)).close()


def test_a_server_that_batches_must_take_whole_batches(server: Server, spec: ModelSpec) -> None:
    server.config = PADDED
    create_backend(padded(spec), options(server, batch_items=8)).close()
    with pytest.raises(ModelError, match=r"batches have up to 16 inputs: start this node with --batch-items 8"):
        create_backend(padded(spec), options(server, batch_items=16))
    # The first axis is the server's: [-1, -1, 4] is no pooled output.
    with pytest.raises(ModelError, match=r"has shape \['\?', '\?', 4\]; 2 axes were expected"):
        create_backend(padded(spec, "graph"), options(server, batch_items=8))


def test_a_model_that_is_not_there(server: Server, spec: ModelSpec) -> None:
    other = spec.model_copy(update={"triton": TritonTable(model="other", version="1")})
    with pytest.raises(ModelError, match=r'cannot use model "other" version 1 of Triton at .*unknown model: .other.'):
        create_backend(other, options(server))
    server.ready = False
    with pytest.raises(ModelError, match="it is not ready"):
        create_backend(spec, options(server))


def test_a_server_that_is_not_there(spec: ModelSpec) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ModelError, match=rf"cannot use model .* of Triton at {address}: .*onnect"):
        create_backend(spec, BackendOptions(triton=TritonOptions(address)))


def test_a_batch_may_not_take_for_ever(server: Server, spec: ModelSpec) -> None:
    backend = create_backend(spec, options(server, timeout_seconds=0.3))
    server.released.clear()
    started = time.monotonic()
    with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
        backend.run(feeds(1))
    assert time.monotonic() - started < 5
    server.released.set()
    assert backend.run(feeds(2))["sentence_embedding"][0, 0] == 2
    backend.close()


def test_a_server_that_shares_no_memory(server: Server, spec: ModelSpec) -> None:
    with pytest.raises(ModelError, match=r"cannot use model .*: Method not implemented"):
        create_backend(spec, options(server, shared_memory=True))
    assert not shared()


def test_an_answer_without_the_output(server: Server, spec: ModelSpec) -> None:
    backend = create_backend(spec, options(server))
    server.answers = False
    with pytest.raises(InferenceServerException, match='the answer has no output "sentence_embedding"'):
        backend.run(feeds(1))
    backend.close()


# What follows needs a real server.

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-triton"
# Runs inside the server, in Python and onnxruntime of its own.
MODEL = """
import time

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        folder = f"{args['model_repository']}/{args['model_version']}"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"]
        )

    def execute(self, requests):
        responses = []
        for request in requests:
            names = [one.name for one in self.session.get_inputs()]
            feeds = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names}
            if (feeds["input_ids"] == 4242).all():
                time.sleep(3)
            (output,) = self.session.run(["sentence_embedding"], feeds)
            tensor = pb_utils.Tensor("sentence_embedding", output)
            responses.append(pb_utils.InferenceResponse(output_tensors=[tensor]))
        return responses
"""


class Real:
    """A tritonserver with the starter model in it."""

    def __init__(self, folder: Path, onnx: Path) -> None:
        packages = next(ENVIRONMENT.glob("lib/python3.*/site-packages"))
        version = packages.parent.name.removeprefix("python")
        shutil.copytree(packages / "pytriton/tritonserver/backends", folder / "backends")
        stub = packages / f"pytriton/tritonserver/python_backend_stubs/{version}/triton_python_backend_stub"
        shutil.copy(stub, folder / "backends/python")
        model = folder / "models/minilm/1"
        model.mkdir(parents=True)
        (model / "model.py").write_text(MODEL)
        (model / "model.onnx").symlink_to(onnx)
        config = [f"input {{ name: {json.dumps(name)} data_type: TYPE_INT64 dims: [-1, -1] }}" for name in NAMES]
        config.append('output { name: "sentence_embedding" data_type: TYPE_FP32 dims: [-1, 384] }')
        (model.parent / "config.pbtxt").write_text("\n".join(['backend: "python"', "max_batch_size: 0", *config]))
        ports = [free_port() for _ in range(3)]
        self.address = f"127.0.0.1:{ports[0]}"
        self.log = folder / "log"
        libraries = packages / "nvidia_pytriton.libs"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    packages / "pytriton/tritonserver/bin/tritonserver",
                    f"--model-repository={folder / 'models'}",
                    f"--backend-directory={folder / 'backends'}",
                    f"--grpc-port={ports[0]}",
                    f"--http-port={ports[1]}",
                    f"--metrics-port={ports[2]}",
                    "--grpc-address=127.0.0.1",
                    "--http-address=127.0.0.1",
                ],
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "LD_LIBRARY_PATH": str(libraries),
                    "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}",
                    "ORT_DISABLE_TELEMETRY": "1",
                },
            )

    def wait(self, spec: ModelSpec) -> None:
        end = time.monotonic() + 90
        while True:
            try:
                create_backend(spec, options(self)).close()
            except ModelError as error:
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < end, f"{error}\n{self.log.read_text()}"
                time.sleep(0.25)
            else:
                return

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def shared() -> list[Path]:
    """What this process shares with servers now."""
    return list(Path("/dev/shm").glob(f"embedmesh-{os.getpid()}-*"))  # noqa: S108  (read only)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def real_spec(starter_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """The starter model, as one that a server runs."""
    folder = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(starter_model, folder)
    with (folder / "model.toml").open("a") as manifest:
        manifest.write('\n[triton]\nmodel = "minilm"\nversion = "1"\n')
    return load_spec(folder).run_by("triton", "float32")


@pytest.fixture(scope="module")
def real(real_spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    if not (ENVIRONMENT / "triton.stamp").exists():
        pytest.skip("no Triton server here: `make test-triton` installs one")
    running = Real(tmp_path_factory.mktemp("triton"), real_spec.path("model.onnx"))
    try:
        running.wait(real_spec)
        yield running
    finally:
        running.stop()


@pytest.mark.triton
@pytest.mark.timeout(300)
@pytest.mark.parametrize("shared_memory", [False, True])
def test_a_real_server_gives_the_same_vectors(real: Real, real_spec: ModelSpec, shared_memory: bool) -> None:
    preparer = TextPreparer(real_spec)
    here = create_backend(real_spec.run_by("onnxruntime", "float32"))
    there = create_backend(real_spec, options(real, batch_items=128, shared_memory=shared_memory))

    def work(texts: list[str]) -> float:
        batch = [preparer.prepare(TextItem(text), embedding_pb2.TRUNCATION_END) for text in texts]
        fed = preparer.collate(batch)
        ours, theirs = (backend.run(fed)["sentence_embedding"] for backend in (here, there))
        return float(np.abs(ours - theirs).max())

    batches = [["hello world"], ["", "a cat sat on the mat"], ["word " * 300, "naïve café 北京"], ["short"] * 20]
    with ThreadPoolExecutor(3) as threads:
        assert max(threads.map(work, batches * 3)) < 1e-5
    assert bool(shared()) is shared_memory
    there.close()
    here.close()
    assert not shared()


@pytest.mark.triton
@pytest.mark.timeout(300)
def test_a_real_server_is_left_in_time(real: Real, real_spec: ModelSpec) -> None:
    backend = create_backend(real_spec, options(real, timeout_seconds=0.5, shared_memory=True))
    started = time.monotonic()
    with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
        backend.run(feeds(4242))
    assert time.monotonic() - started < 2.5
    time.sleep(3)
    assert backend.run(feeds(101, 102))["sentence_embedding"].shape == (2, 384)
    backend.close()


@pytest.mark.triton
@pytest.mark.timeout(300)
def test_memory_is_shared_anew_with_a_server_that_forgot(real: Real, real_spec: ModelSpec) -> None:
    backend = create_backend(real_spec, options(real, shared_memory=True))
    backend.run(feeds(101, 102))
    with InferenceServerClient(real.address) as client:
        client.unregister_system_shared_memory()
    with pytest.raises(InferenceServerException, match="shared memory region"):
        backend.run(feeds(101, 102))
    assert backend.run(feeds(101, 102))["sentence_embedding"].shape == (2, 384)
    backend.close()


@pytest.mark.triton
@pytest.mark.timeout(300)
def test_a_real_servers_words_about_a_model_that_it_lacks(real: Real, real_spec: ModelSpec) -> None:
    for table, message in (
        (TritonTable(model="other", version="1"), "unknown model: 'other'"),
        (TritonTable(model="minilm", version="7"), "unknown model: 'minilm' version 7"),
    ):
        with pytest.raises(ModelError, match=message):
            create_backend(real_spec.model_copy(update={"triton": table}), options(real))
    with pytest.raises(ModelError, match="the manifest says dimensions = 383"):
        create_backend(real_spec.model_copy(update={"dimensions": 383}), options(real))


@pytest.mark.triton
@pytest.mark.timeout(300)
def test_an_encoder_serves_what_a_real_server_runs(
    real: Real, real_spec: ModelSpec, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ready = tmp_path / "ready.json"
    flags = [f"--model={real_spec.folder}", "--backend=triton", f"--triton-url={real.address}", "--lanes=2"]
    command = [sys.executable, "-m", "embedmesh_encoder", "text", "--port=0", "--http-port=0", f"--ready-file={ready}"]
    process = subprocess.Popen([*command, *flags], stderr=subprocess.DEVNULL)
    request.addfinalizer(process.wait)
    request.addfinalizer(process.terminate)
    end = time.monotonic() + 60
    while not ready.exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    with grpc.insecure_channel(json.loads(ready.read_text())["grpc"]) as channel:
        inputs = [text_pb2.TextInput(text=text) for text in ("hello", "world")]
        stub = text_pb2_grpc.TextEncoderStub(channel)
        response = stub.EmbedText(text_pb2.EmbedTextRequest(inputs=inputs), timeout=30)
    assert [result.HasField("embedding") for result in response.results] == [True, True]
    assert response.models[0].revision == real_spec.revision
