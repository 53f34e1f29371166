"""A Triton Inference Server as its users set one up for texts: dynamic batching before a Python model.

    python triton_server.py --model FOLDER --port N

The model tokenises a batch, fills it up to its longest text and runs the graph with onnxruntime. The graph is
exported from the published weights at the first start. The server and its Python backend are those of pytriton's
wheel, which has no onnxruntime backend; pooling and normalisation are in the graph.
"""

import argparse
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

MODEL = """
import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer


class TritonPythonModel:
    def initialize(self, args):
        folder = f"{args['model_repository']}/{args['model_version']}"
        self.tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        self.tokenizer.enable_truncation(256)
        self.tokenizer.enable_padding()
        self.session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])

    def execute(self, requests):
        given = [pb_utils.get_input_tensor_by_name(one, "text").as_numpy().ravel() for one in requests]
        tokens = self.tokenizer.encode_batch([text.decode() for texts in given for text in texts])
        feeds = {
            "input_ids": np.array([one.ids for one in tokens], np.int64),
            "attention_mask": np.array([one.attention_mask for one in tokens], np.int64),
        }
        (vectors,) = self.session.run(["embedding"], feeds)
        parts = np.split(vectors, np.cumsum([len(texts) for texts in given])[:-1])
        return [pb_utils.InferenceResponse([pb_utils.Tensor("embedding", part)]) for part in parts]
"""

# What waits when the model is free goes together, up to 32 texts.
CONFIG = """
backend: "python"
max_batch_size: 32
dynamic_batching { }
input { name: "text" data_type: TYPE_STRING dims: [1] }
output { name: "embedding" data_type: TYPE_FP32 dims: [384] }
"""


def export(model: Path, onnx: Path) -> None:
    """Write the graph: token ids and mask in, pooled and normalised vectors out."""
    import torch
    from transformers import AutoModel

    class Embedder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = AutoModel.from_pretrained(model, attn_implementation="eager").eval()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            real = attention_mask.unsqueeze(-1).float()
            return torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=1)

    ids = torch.tensor([[101, 7592, 2088, 102], [101, 7592, 102, 0]])
    axes = {0: "texts", 1: "longest"}
    torch.onnx.export(
        Embedder(),
        (ids, (ids > 0).long()),
        str(onnx),
        input_names=["input_ids", "attention_mask"],
        output_names=["embedding"],
        dynamic_axes={"input_ids": axes, "attention_mask": axes, "embedding": {0: "texts"}},
        opset_version=17,
        dynamo=False,
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    chosen = parser.parse_args()
    environment = Path(sys.prefix)
    packages = next(environment.glob("lib/python3.*/site-packages"))
    server = packages / "pytriton/tritonserver"
    served = environment / "served"
    if not served.exists():
        with tempfile.TemporaryDirectory(dir=environment) as temporary:
            work = Path(temporary) / "served"
            shutil.copytree(server / "backends", work / "backends")
            version = packages.parent.name.removeprefix("python")
            stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
            shutil.copy(stub, work / "backends/python")
            folder = work / "models/minilm/1"
            folder.mkdir(parents=True)
            export(chosen.model, folder / "model.onnx")
            shutil.copy(chosen.model / "tokenizer.json", folder)
            (folder / "model.py").write_text(MODEL)
            (folder.parent / "config.pbtxt").write_text(CONFIG)
            work.rename(served)
    # The server becomes this process, so that signals and measurements reach it.
    os.environ["LD_LIBRARY_PATH"] = str(packages / "nvidia_pytriton.libs")
    os.environ["PATH"] = f"{environment / 'bin'}:{os.environ['PATH']}"
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    binary = str(server / "bin/tritonserver")
    flags = {
        "model-repository": served / "models",
        "backend-directory": served / "backends",
        "http-address": "127.0.0.1",
        "http-port": chosen.port,
        "grpc-address": "127.0.0.1",
        "grpc-port": free_port(),
        "allow-metrics": "false",
    }
    os.execv(binary, [binary, *(f"--{name}={value}" for name, value in flags.items())])  # noqa: S606
