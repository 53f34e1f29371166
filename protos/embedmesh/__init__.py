"""embedmesh: one gRPC address for text, image and audio embeddings.

    import embedmesh

    with embedmesh.Client("localhost:50050") as client:
        vectors = client.embed(["a cat", "a dog"]).vectors

This package is the contract (`embedmesh.v1`) and its light client: it needs grpcio, protobuf
and numpy, and loads nothing of the servers.
"""

from importlib.metadata import version

from embedmesh._channel import Tls
from embedmesh.client import AsyncClient, Client
from embedmesh.errors import (
    DeadlineExceeded,
    EmbedErrors,
    EmbedMeshError,
    EncoderUnreachable,
    InferenceFailed,
    InputTooLarge,
    InternalError,
    InvalidArgument,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    Overloaded,
    QuotaExceeded,
    Retryable,
    ServerFault,
    Unauthenticated,
    UndecodableInput,
    UnsupportedOutput,
)
from embedmesh.inputs import Audio, Image, Input, Text
from embedmesh.results import EmbedResponse, EmbedResult, ModelInfo, ModelRef, Span, SparseVector, Usage

__all__ = [
    "AsyncClient",
    "Audio",
    "Client",
    "DeadlineExceeded",
    "EmbedErrors",
    "EmbedMeshError",
    "EmbedResponse",
    "EmbedResult",
    "EncoderUnreachable",
    "Image",
    "InferenceFailed",
    "Input",
    "InputTooLarge",
    "InternalError",
    "InvalidArgument",
    "InvalidRequest",
    "ModelInfo",
    "ModelNotFound",
    "ModelRef",
    "NotReady",
    "Overloaded",
    "QuotaExceeded",
    "Retryable",
    "ServerFault",
    "Span",
    "SparseVector",
    "Text",
    "Tls",
    "Unauthenticated",
    "UndecodableInput",
    "UnsupportedOutput",
    "Usage",
    "__version__",
]

__version__ = version("embedmesh")
