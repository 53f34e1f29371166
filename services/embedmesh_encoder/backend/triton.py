"""The triton backend: the graph runs in a Triton Inference Server, over gRPC.

Inputs are prepared and batched here, as for every other backend; the server only does the arithmetic. It must
hold the model and version that the manifest's [triton] table names, with the inputs and output that [graph]
describes. Texts in packed rows want `max_batch_size: 0`, because a row holds several of them.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException, shared_memory

from embedmesh_encoder.backend.options import TritonOptions
from embedmesh_encoder.backend.signature import Port, check_signature
from embedmesh_encoder.model import MANIFEST, ModelError, ModelSpec

__all__ = ["TritonBackend"]

# Names of element types: in a model's configuration (after TYPE_) to numpy's, and numpy's to those of a request.
_CONFIGURED: Final = {"INT64": "int64", "INT32": "int32", "FP32": "float32", "FP16": "float16", "BOOL": "bool"}
_REQUESTED: Final = {"int64": "INT64", "float32": "FP32", "bool": "BOOL"}
_ASK_SECONDS: Final = 10.0


class TritonBackend:
    """Implements `Backend` with a client for each concurrent run: the library's are for one thread."""

    name = "triton"
    run_beside = None

    def __init__(self, spec: ModelSpec, options: TritonOptions, *, batch_items: int = 0) -> None:
        """Hold the server's configuration of the model against the manifest.

        Args:
            spec: The model.
            options: Where the server is, and how to speak with it.
            batch_items: Most inputs that a batch will have; 0 when that is not known.

        Raises:
            ModelError: The server cannot be asked, lacks the model, or its configuration does not fit.
        """
        if spec.triton is None:
            raise ModelError(f'model "{spec.name}" has no [triton] table that says which model of the server it is')
        self.precision: str = spec.precision
        self._spec = spec
        self._table = spec.triton
        self._options = options
        self._lock = threading.Lock()
        self._idle = [_Connection(spec, options)]
        where = f'model "{self._table.model}" version {self._table.version} of Triton at {options.url}'
        try:
            config = self._idle[0].configuration()
        except InferenceServerException as error:
            self.close()
            raise ModelError(f"cannot use {where}: {error.message()}") from None
        try:
            _check(config, spec, where, batch_items)
        except ModelError:
            self.close()
            raise

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
        """Run the graph; feeds and outputs as `embedmesh_encoder.model` describes the layouts.

        Raises:
            InferenceServerException: The server failed, went away, or did not answer in time.
        """
        with self._lock:
            connection = self._idle.pop() if self._idle else _Connection(self._spec, self._options)
        try:
            return connection.infer(feeds, outputs or list(dict.fromkeys(self._spec.outputs.values())))
        finally:
            with self._lock:
                self._idle.append(connection)

    def close(self) -> None:
        """Close the connections; memory that was shared with the server is taken back."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()


class _Connection:
    """A client, and the memory that it shares with the server."""

    def __init__(self, spec: ModelSpec, options: TritonOptions) -> None:
        assert spec.triton  # noqa: S101  (checked by the backend)
        self._model, self._version = spec.triton.model, spec.triton.version
        self._timeout = options.timeout_seconds
        secure = options.url.startswith("grpcs://")
        address = options.url.removeprefix("grpcs://").removeprefix("grpc://")
        self._client: Any = triton.InferenceServerClient(address, ssl=secure)
        self._region = _Region(self._client) if options.shared_memory else None

    def configuration(self) -> Any:
        """Ask for the model's configuration, once it is ready to run."""
        config = self._client.get_model_config(self._model, self._version, client_timeout=_ASK_SECONDS).config
        if not self._client.is_model_ready(self._model, self._version, client_timeout=_ASK_SECONDS):
            raise InferenceServerException("it is not ready")
        if self._region:
            # A server elsewhere cannot map it, and says so here rather than at the first batch.
            self._region.write({"": np.zeros(1, np.uint8)})
        return config

    def infer(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        inputs = []
        places = self._region.write(feeds) if self._region else {}
        for name, array in feeds.items():
            one = triton.InferInput(name, array.shape, _REQUESTED[array.dtype.name])
            if place := places.get(name):
                one.set_shared_memory(*place)
            else:
                one.set_data_from_numpy(np.ascontiguousarray(array))
            inputs.append(one)
        try:
            result = self._client.infer(
                self._model,
                inputs,
                model_version=self._version,
                outputs=[triton.InferRequestedOutput(name) for name in outputs],
                client_timeout=self._timeout,
            )
        except InferenceServerException:
            # A server that was started again knows nothing of what was shared with the one before.
            if self._region:
                self._region.forget()
            raise
        arrays = {}
        for name in outputs:
            arrays[name] = result.as_numpy(name)
            if arrays[name] is None:
                raise InferenceServerException(f'the answer has no output "{name}"')
        return arrays

    def close(self) -> None:
        if self._region:
            self._region.forget()
        self._client.close()


class _Region:
    """System shared memory that the server maps too; it grows to the largest inputs seen."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._name = ""
        self._handle: Any = None
        self._size = 0

    def write(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, tuple[str, int, int]]:
        """Write arrays one after the other; gives region, bytes and offset of each."""
        size = sum(array.nbytes for array in feeds.values())
        if size > self._size:
            self.forget()
            self._name = f"embedmesh-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            self._handle = shared_memory.create_shared_memory_region(self._name, f"/{self._name}", size)
            self._client.register_system_shared_memory(self._name, f"/{self._name}", size, client_timeout=_ASK_SECONDS)
            self._size = size
        places = {}
        offset = 0
        for name, array in feeds.items():
            shared_memory.set_shared_memory_region(self._handle, [np.ascontiguousarray(array)], offset)
            places[name] = (self._name, array.nbytes, offset)
            offset += array.nbytes
        return places

    def forget(self) -> None:
        """Take the memory back, on both sides as far as the server still answers."""
        if self._handle is None:
            return
        with suppress(InferenceServerException):
            self._client.unregister_system_shared_memory(self._name, client_timeout=_ASK_SECONDS)
        shared_memory.destroy_shared_memory_region(self._handle)
        self._handle, self._size = None, 0


def _check(config: Any, spec: ModelSpec, where: str, batch_items: int) -> None:
    """Compare a model's configuration with the manifest."""
    batched = config.max_batch_size > 0

    def ports(ends: Any) -> dict[str, Port]:
        found = {}
        for end in ends:
            kind = type(config).DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number[end.data_type].name
            dtype = _CONFIGURED.get(kind.removeprefix("TYPE_"), kind)
            # The configuration of a model that batches leaves the first axis out.
            dims = [-1, *end.dims] if batched else list(end.dims)
            found[end.name] = Port(dtype, ["?" if size < 0 else size for size in dims])
        return found

    needed = [one for one in config.input if one.name in spec.graph.inputs or not one.optional]
    inputs = ports(needed)
    check_signature(spec, where, inputs, ports(config.output))
    problems = []
    if batched and spec.graph.layout == "packed":
        problems.append(
            f"max_batch_size is {config.max_batch_size} and must be 0: a packed row holds several texts, "
            "and the server would join rows of unlike requests"
        )
    elif batched and batch_items > config.max_batch_size:
        problems.append(
            f"max_batch_size is {config.max_batch_size} and batches have up to {batch_items} inputs: "
            f"start this node with --batch-items {config.max_batch_size}, or raise it there"
        )
    for name in spec.graph.inputs:
        shape = list(inputs[name].shape)
        free = shape[:1] if spec.graph.layout == "stacked" else shape
        if any(isinstance(size, int) for size in free) or (spec.graph.layout != "stacked" and len(shape) != 2):
            axes = "[-1, ...]" if spec.graph.layout == "stacked" else "[-1, -1]"
            problems.append(f'input "{name}" has shape {shape}; {axes}, the batch included, was expected')
    if config.model_transaction_policy.decoupled:
        problems.append("it is decoupled: it may give any number of answers to a request")
    if problems:
        raise ModelError(f"{where} does not fit {MANIFEST}: {'; '.join(problems)}")
