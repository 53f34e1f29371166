"""Settings of an encoder process."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from embedmesh_encoder.audio.decode import AudioLimits
from embedmesh_encoder.image.decode import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from embedmesh_server.settings import NodeSettings

__all__ = ["AudioSettings", "EncoderSettings", "ImageSettings", "TextSettings"]


class EncoderSettings(NodeSettings):
    """What the encoders of all modalities can be told."""

    model: tuple[Path, ...] = Field(
        (),
        description="Folder of a model (it holds a model.toml). Repeat it to serve several; the first one answers "
        "requests that name none, the last one of a name those that name no revision. Required, unless there is "
        "--models.",
    )
    models: tuple[Path, ...] = Field(
        (),
        validate_default=True,
        description="Folder of models: every folder in it with a model.toml of this modality is served. Both are "
        "followed: models are loaded and let go as folders come, change and go, at once on SIGHUP, and no call fails "
        "by it. Of several revisions of a name the one written last answers requests that name no revision.",
    )
    default_model: str = Field(
        "",
        description="Name of the model that answers requests that name none; without it the first --model, or where "
        "there is none the first name in alphabetical order.",
    )
    backend: Literal["auto", "onnxruntime", "cuda", "tensorrt", "openvino", "triton", "fake"] = Field(
        "auto",
        description="What runs the models. auto takes what each was made for; in place of onnxruntime it takes cuda "
        "where there is a GPU, and openvino for bfloat16. Part of a model's revision: replicas should agree.",
    )
    precision: Literal["model", "auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "model",
        description="Precision of the arithmetic: the model's own, or bfloat16 wherever the CPU has instructions "
        "for it (auto), or this one or none. Part of a model's revision: replicas should agree.",
    )
    threads: int = Field(0, ge=0, description="Threads that one batch may use; 0 takes one for each core.")
    lanes: int = Field(
        0,
        ge=0,
        description="Batches of a model that run at the same time, each with its part of the cores; 0 is right for "
        "most: 2 on a CPU of 2 cores or more, else 1. A batch that is alone has all cores all the same, for which "
        "models of up to 256 MiB are loaded twice; with larger ones 0 means 1 lane for onnxruntime, and for openvino "
        "that each batch has a lane's part.",
    )
    compile_cache: Path | None = Field(
        None, description="Folder to keep compiled models in between starts (openvino, tensorrt); none by default."
    )
    cuda_graphs: bool = Field(
        False, description="Backend cuda: record the work of each shape once and replay it; not for packed texts."
    )
    triton_url: str = Field(
        "localhost:8001", description="Backend triton: host:port of the server's gRPC; grpcs:// before it asks for TLS."
    )
    triton_timeout_seconds: float = Field(30.0, gt=0, description="Backend triton: how long a batch may take there.")
    triton_shared_memory: bool = Field(
        False, description="Backend triton: hand inputs over in memory shared with a server on the same machine."
    )
    batch_cost: int = Field(
        256, ge=1, description="Most units (tokens, padding included) in a batch; a longer input goes alone."
    )
    batch_items: int = Field(128, ge=1, description="Most inputs in a batch.")
    max_queue_cost: int = Field(
        65_536,
        ge=1,
        description="Most units that wait for a model, interactive and bulk each; over it requests are refused.",
    )
    max_inputs: int = Field(256, ge=1, description="Most inputs in one request.")
    aging_seconds: float = Field(
        5.0, ge=0, description="Age from which waiting bulk work leads every fourth batch, whatever else waits."
    )
    stall_seconds: float = Field(
        60.0,
        gt=0,
        description="A batch that holds a model's last lane for so long makes the node NOT_SERVING until it ends.",
    )
    prepare_threads: int = Field(2, ge=1, description="Threads that turn inputs into the model's arrays.")

    @field_validator("models")
    @classmethod
    def _some_model(cls, value: tuple[Path, ...], info: ValidationInfo) -> tuple[Path, ...]:
        if not (value or info.data.get("model", True)):
            raise PydanticCustomError(
                "no_model", "name the folder of at least one model with --model, or one of models"
            )
        return value


class TextSettings(EncoderSettings):
    """Serve text embedding models: EmbedText over gRPC, metrics and health over HTTP."""

    port: int = Field(50051, ge=0, le=65535, description="Port of the gRPC service; 0 takes any free one.")
    http_port: int = Field(
        9051, ge=0, le=65535, description="Port of /metrics, /healthz and /readyz; 0 takes any free one."
    )
    row_width: int = Field(
        0,
        ge=0,
        description="Packed texts: most tokens of a row; 0 is right for the backend: one row on a CPU, 512 on a GPU.",
    )
    row_multiple: int = Field(
        0,
        ge=0,
        description="Rows are filled up to a multiple of this; 0 is right for the backend: 1 for onnxruntime, which "
        "takes any shape, 16 for openvino, 64 on a GPU.",
    )
    max_text_bytes: int = Field(1_048_576, ge=1, description="Longest text, in bytes of UTF-8, instruction included.")


class ImageSettings(EncoderSettings):
    """Serve image embedding models: EmbedImage over gRPC, metrics and health over HTTP."""

    port: int = Field(50052, ge=0, le=65535, description="Port of the gRPC service; 0 takes any free one.")
    http_port: int = Field(
        9052, ge=0, le=65535, description="Port of /metrics, /healthz and /readyz; 0 takes any free one."
    )
    batch_cost: int = Field(1024, ge=1, description="Most units (patches) in a batch; a larger image goes alone.")
    max_image_bytes: int = Field(MAX_IMAGE_BYTES, ge=1, description="Longest image file, in bytes.")
    max_image_pixels: int = Field(
        MAX_IMAGE_PIXELS,
        ge=1,
        le=89_000_000,  # above it Pillow's own limit, which is global, would interfere
        description="Largest image before it is resized, in pixels.",
    )


class AudioSettings(EncoderSettings):
    """Serve audio embedding models: EmbedAudio over gRPC, metrics and health over HTTP."""

    port: int = Field(50053, ge=0, le=65535, description="Port of the gRPC service; 0 takes any free one.")
    http_port: int = Field(
        9053, ge=0, le=65535, description="Port of /metrics, /healthz and /readyz; 0 takes any free one."
    )
    batch_cost: int = Field(1024, ge=1, description="Most units (frames) in a batch; a longer sound goes alone.")
    max_audio_bytes: int = Field(AudioLimits().bytes, ge=1, description="Longest sound file, in bytes.")
    max_audio_seconds: int = Field(int(AudioLimits().seconds), ge=1, description="Longest sound, in seconds.")
