"""`Client` and `AsyncClient`: vectors of texts, pictures and sounds from a mesh, as numpy arrays.

    with embedmesh.Client("mesh.example:50050", tls=True) as client:
        response = client.embed(["a cat", "a dog"], role="document")
        response.vectors            # float32 [2, d]

Both do the same with the same words; what they share without I/O is in `_plan.py`. Failures
of calls and of single inputs are exceptions of `embedmesh.errors`. A mistake in the calling
code (a wrong type, a closed client) is a TypeError, ValueError or RuntimeError.
"""

from __future__ import annotations

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Final, Self, TypeAlias, TypeVar

import grpc
import grpc.aio

from embedmesh import _plan
from embedmesh._channel import Tls, endpoint, trace_metadata
from embedmesh._plan import CacheName, DtypeName, KindName, Options, Part, Plan, PriorityName, TruncationName
from embedmesh.errors import EmbedMeshError, NotReady, from_rpc_error
from embedmesh.inputs import Input, Role
from embedmesh.results import EmbedResponse, EmbedResult, ModelInfo
from embedmesh.v1 import catalog_pb2, catalog_pb2_grpc, gateway_pb2, gateway_pb2_grpc

__all__ = ["AsyncClient", "Client"]

_T = TypeVar("_T")
_Metadata: TypeAlias = tuple[tuple[str, str], ...]
# What a stream reports: an answer, or why it ended.
_Event: TypeAlias = gateway_pb2.EmbedStreamResponse | EmbedMeshError

# How long a fully answered stream may take to end, before it is cancelled.
_GOODBYE_SECONDS: Final = 5.0


class _Base(ABC):
    """The options of the two clients, and what follows from them alone."""

    def __init__(
        self,
        address: str | None = None,
        *,
        tls: bool | Tls = False,
        token: str | None = None,
        allow_insecure_token: bool = False,
        max_inputs: int = 256,
        concurrency: int = 4,
        retries: int = 4,
        max_message_bytes: int = 64 * 2**20,
    ) -> None:
        """Check the options; nothing is sent yet.

        Args:
            address: "host:port", or a target of gRPC ("dns:///...", "ipv4:...", "unix:..."). Calls
                are spread over all addresses of a name. None takes EMBEDMESH_ADDRESS from the
                environment, else localhost:50050.
            tls: True, or the files of a `Tls`.
            token: Sent as `authorization: Bearer ...` with every call.
            allow_insecure_token: Send the token to another machine without TLS, too.
            max_inputs: The most inputs of one request; `embed` splits longer lists.
            concurrency: The most requests of one `embed` that are in flight at once.
            retries: How often a request, or an input, that failed for a reason that may pass
                (overload, a restart) is sent again, within the time limit of its call. 0 switches
                all retries off; gRPC allows no more than 4.
            max_message_bytes: The most bytes of a message, either way.

        Raises:
            ValueError: An option that cannot work.
            OSError: A file of `tls` cannot be read.
        """
        for name, number in (("max_inputs", max_inputs), ("concurrency", concurrency)):
            if number < 1:
                raise ValueError(f"{name} is {number}; give 1 or more")
        self._endpoint = endpoint(
            address,
            tls=tls,
            token=token,
            allow_insecure_token=allow_insecure_token,
            retries=retries,
            max_message_bytes=max_message_bytes,
        )
        self._max_inputs = max_inputs
        self._concurrency = concurrency
        self._retries = retries
        self._max_message_bytes = max_message_bytes
        self._calls = 0
        self._closed = False
        self._lock = threading.Lock()
        self._connect()

    @abstractmethod
    def _connect(self) -> None:
        """Prepare what the calls need."""

    @property
    def _metadata(self) -> _Metadata:
        """What is sent with the next call."""
        return (*self._endpoint.metadata, *trace_metadata())

    def __repr__(self) -> str:
        tls = "on" if self._endpoint.credentials else "off"
        state = "closed" if self._closed else f"calls={self._calls}"
        return f"<{type(self).__name__} {self._endpoint.target} tls={tls} {state}>"

    def _plan(
        self,
        options: Options,
        timeout: float | None,
        *,
        max_inputs: int | None = None,
        window: int | None = None,
        ordered: bool = False,
    ) -> Plan:
        self._require_open()
        return Plan(
            options,
            max_inputs=self._max_inputs if max_inputs is None else max_inputs,
            max_message_bytes=self._max_message_bytes,
            retries=self._retries,
            window=self._concurrency if window is None else window,
            deadline=_plan.deadline(timeout, time.monotonic()),
            ordered=ordered,
            streaming=window is not None,
        )

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"this {type(self).__name__} is closed")

    @contextmanager
    def _sending(self) -> Iterator[None]:
        """Send something during a call, in the course of which the client may be closed."""
        if self._closed:
            raise _cancelled()
        try:
            yield
        except ValueError:  # how gRPC tells of a channel that another thread closed just now
            if not self._closed:
                raise
            raise _cancelled() from None

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Show a call in `repr` while it runs."""
        with self._lock:
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1


class Client(_Base):
    """The mesh for ordinary code. Threads may share one. Close it, or use it in a `with` statement."""

    def _connect(self) -> None:
        self._channel = self._endpoint.open()
        self._gateway = gateway_pb2_grpc.GatewayStub(self._channel)
        self._catalog = catalog_pb2_grpc.ModelCatalogStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; calls in flight fail. Closing twice does no harm."""
        self._closed = True
        self._channel.close()

    def list_models(self, *, timeout: float | None = 60) -> list[ModelInfo]:
        """List the models of the mesh, the not yet ready ones too.

        Raises:
            EmbedMeshError: The call failed; of `embedmesh.errors`, by cause.
        """
        _plan.deadline(timeout, 0)
        self._require_open()
        request = catalog_pb2.ListModelsRequest()
        with self._counted():
            try:
                response = self._catalog.ListModels(request, timeout=timeout, metadata=self._metadata)
            except grpc.RpcError as error:
                raise from_rpc_error(error) from None
        return _plan.read_models(response)

    def embed(
        self,
        inputs: Iterable[Input],
        *,
        model: str = "",
        kinds: Iterable[KindName] = ("dense",),
        dimensions: int = 0,
        dtype: DtypeName = "float32",
        normalize: bool | None = None,
        role: Role | None = None,
        instruction: str = "",
        instructions: Iterable[str] = (),
        truncation: TruncationName = "end",
        chunk_units: int = 0,
        chunk_overlap: int = 0,
        cache: CacheName = "read_write",
        priority: PriorityName = "interactive",
        timeout: float | None = 60,
    ) -> EmbedResponse:
        """Embed inputs; `results[i]` and `vectors[i]` answer `inputs[i]`.

        Lists longer than `max_inputs` travel as several requests, some at once. One bad input
        fails alone. The call as a whole fails only when nothing was answered.

        Args:
            inputs: Any mix of str, `Text`, `Image` and `Audio`.
            model: Name of a model or family, "name@revision" to pin it; "" takes the default of
                each modality.
            kinds: Any of "dense" (see `EmbedResult.vector`), "sparse" and "multi_vector" that the models make; the
                model runs once for all.
            dimensions: Width of the dense vectors; 0 is the full one, others must be offered by the model.
            dtype: "float32", "float16"; and where the kinds are "dense" alone "int8" (see `EmbedResult.scale`) or
                "binary" (packed bits).
            normalize: Dense vectors of L2 norm 1 (True), as pooled (False), or as the model's reference library
                does it (None).
            role: "query" or "document", for texts without a role of their own.
            instruction: Put before texts that have none of their own, in place of the role's prompt.
            instructions: Several, at most 16, in place of role and instruction: each is put before the text in a pass
                of its own, and their vectors are averaged.
            truncation: What happens to an input longer than the model reads: keep its beginning ("end"),
                its end ("start"), fail it ("refuse"), or cut a text into chunks and average their vectors ("chunk").
            chunk_units: The most tokens of a chunk, prompt and special tokens included; 0 for what the model reads.
            chunk_overlap: Tokens that a chunk has in common with the one before.
            cache: "read_write"; "refresh" computes anew and stores; "bypass" does neither.
            priority: "interactive" goes before "bulk".
            timeout: Seconds for everything, retries included; None for no limit.

        Raises:
            EmbedMeshError: Nothing was answered; of `embedmesh.errors`, by cause.
            InvalidRequest: An option that does not exist.
            TypeError: Something in `inputs` is no input.
        """
        options = _plan.parse_options(
            model=model,
            kinds=kinds,
            dimensions=dimensions,
            dtype=dtype,
            normalize=normalize,
            role=role,
            instruction=instruction,
            instructions=instructions,
            truncation=truncation,
            chunk_units=chunk_units,
            chunk_overlap=chunk_overlap,
            cache=cache,
            priority=priority,
        )
        source = iter(_plan.listed(inputs))
        plan = self._plan(options, timeout)
        with self._counted():
            return EmbedResponse(self._run(plan, source))

    def _run(self, plan: Plan, source: Iterator[Input]) -> list[EmbedResult]:
        results: list[EmbedResult] = []
        calls: dict[Part, Any] = {}
        done: SimpleQueue[Part] = SimpleQueue()
        try:
            while not plan.done:
                while plan.room:
                    plan.read(source)
                due = plan.due(now := time.monotonic())
                if len(due) == 1 and not calls:
                    # The usual call. Waiting for it here spares the thread that a future costs gRPC: 0.4 ms, not 1.0.
                    self._run_alone(plan, due.pop(), now)
                for part in due:
                    with self._sending():
                        calls[part] = self._gateway.Embed.future(
                            plan.request(part), timeout=plan.left(now), metadata=self._metadata
                        )
                    calls[part].add_done_callback(partial(_report, done.put, part))
                ended = _get(done, plan.pause(time.monotonic()))
                if ended is not None:
                    call = calls.pop(ended)
                    if call.code() is grpc.StatusCode.OK:
                        plan.answer(ended, call.result(), time.monotonic())
                    else:
                        plan.fail(ended, from_rpc_error(call), time.monotonic())
                plan.check()
                results.extend(plan.take())
        finally:
            for call in calls.values():
                call.cancel()
        return sorted(results, key=_index)

    def _run_alone(self, plan: Plan, part: Part, now: float) -> None:
        try:
            with self._sending():
                response = self._gateway.Embed(plan.request(part), timeout=plan.left(now), metadata=self._metadata)
        except grpc.RpcError as error:
            plan.fail(part, from_rpc_error(error), time.monotonic())
        else:
            plan.answer(part, response, time.monotonic())

    def embed_stream(
        self,
        inputs: Iterable[Input],
        *,
        model: str = "",
        kinds: Iterable[KindName] = ("dense",),
        dimensions: int = 0,
        dtype: DtypeName = "float32",
        normalize: bool | None = None,
        role: Role | None = None,
        instruction: str = "",
        instructions: Iterable[str] = (),
        truncation: TruncationName = "end",
        chunk_units: int = 0,
        chunk_overlap: int = 0,
        cache: CacheName = "read_write",
        priority: PriorityName = "bulk",
        timeout: float | None = None,
        chunk_inputs: int = 64,
        window: int = 8,
        ordered: bool = True,
    ) -> Generator[EmbedResult, None, None]:
        """Embed any number of inputs, in bounded memory; yields one result an input.

        `inputs` are read in the caller's thread, at most `window` chunks ahead of the results.
        Leaving the loop early, or closing the generator, ends the stream.

        A chunk is sent when it is full: a source that yields rarely wants a small `chunk_inputs`.
        A stream that breaks is resumed with the chunks not yet answered. An exception of `inputs`
        comes out after the results of all that came before it.

        Args:
            inputs: Any mix of str, `Text`, `Image` and `Audio`, endless if need be.
            model: As for `embed`, as are the others not named here.
            kinds: See `embed`.
            dimensions: See `embed`.
            dtype: See `embed`.
            normalize: See `embed`.
            role: See `embed`.
            instruction: See `embed`.
            instructions: See `embed`.
            truncation: See `embed`.
            chunk_units: See `embed`.
            chunk_overlap: See `embed`.
            cache: See `embed`.
            priority: "bulk" by default: interactive work goes first.
            timeout: Seconds for the whole stream; None for no limit.
            chunk_inputs: Inputs of one message.
            window: The most chunks that are read but not yet yielded.
            ordered: Yield in the order of the inputs; False yields as chunks finish (see `EmbedResult.index`).

        Raises:
            EmbedMeshError: The stream as a whole failed, by cause; a chunk that fails is the errors of its results.
            InvalidRequest: An option that does not exist.
            TypeError: `inputs`, or something in it, is no input.
        """
        options = _plan.parse_options(
            model=model,
            kinds=kinds,
            dimensions=dimensions,
            dtype=dtype,
            normalize=normalize,
            role=role,
            instruction=instruction,
            instructions=instructions,
            truncation=truncation,
            chunk_units=chunk_units,
            chunk_overlap=chunk_overlap,
            cache=cache,
            priority=priority,
        )
        source = iter(_plan.iterable(inputs))
        _plan.require_window(chunk_inputs, window)
        plan = self._plan(options, timeout, max_inputs=chunk_inputs, window=window, ordered=ordered)
        return self._run_stream(plan, source)

    def _run_stream(self, plan: Plan, source: Iterator[Input]) -> Generator[EmbedResult, None, None]:
        stream = _Stream(self._gateway, self._metadata)
        try:
            with self._counted():
                while not plan.done:
                    parts = plan.parts
                    while plan.room and plan.parts == parts and stream.events.empty():
                        plan.read(source)
                    for part in plan.due(now := time.monotonic()):
                        with self._sending():
                            stream.send(_chunk(plan, part), timeout=plan.left(now))
                    event = _get(stream.events, 0 if plan.room else plan.pause(now))
                    if isinstance(event, EmbedMeshError):
                        stream.close()
                        plan.interrupt(event, time.monotonic())
                    elif event is not None:
                        plan.receive(event, time.monotonic())
                    yield from plan.take()
                stream.finish()
        finally:
            stream.close()


class AsyncClient(_Base):
    """The mesh for asyncio; belongs to the loop of its first call. Close it, or use it in `async with`."""

    def _connect(self) -> None:
        # gRPC ties a channel to the running loop, and a client may be made where none runs yet.
        self._channel: grpc.aio.Channel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def _open(self) -> None:
        loop = asyncio.get_running_loop()
        if self._channel is None:
            self._channel, self._loop = self._endpoint.open_async(), loop
            self._gateway = gateway_pb2_grpc.GatewayStub(self._channel)
            self._catalog = catalog_pb2_grpc.ModelCatalogStub(self._channel)
        if self._loop is not loop:
            raise RuntimeError("this AsyncClient belongs to another event loop; make one in each")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; calls in flight fail. Closing twice does no harm."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def list_models(self, *, timeout: float | None = 60) -> list[ModelInfo]:  # noqa: ASYNC109  (gRPC keeps it, and it covers retries)
        """List the models of the mesh, the not yet ready ones too.

        Raises:
            EmbedMeshError: The call failed; of `embedmesh.errors`, by cause.
        """
        _plan.deadline(timeout, 0)
        self._require_open()
        self._open()
        request = catalog_pb2.ListModelsRequest()
        with self._counted():
            outcome = await _outcome(self._catalog.ListModels(request, timeout=timeout, metadata=self._metadata))
        if isinstance(outcome, EmbedMeshError):
            raise outcome
        return _plan.read_models(outcome)

    async def embed(
        self,
        inputs: Iterable[Input],
        *,
        model: str = "",
        kinds: Iterable[KindName] = ("dense",),
        dimensions: int = 0,
        dtype: DtypeName = "float32",
        normalize: bool | None = None,
        role: Role | None = None,
        instruction: str = "",
        instructions: Iterable[str] = (),
        truncation: TruncationName = "end",
        chunk_units: int = 0,
        chunk_overlap: int = 0,
        cache: CacheName = "read_write",
        priority: PriorityName = "interactive",
        timeout: float | None = 60,  # noqa: ASYNC109  (gRPC keeps it, and it covers retries)
    ) -> EmbedResponse:
        """Embed inputs; `results[i]` and `vectors[i]` answer `inputs[i]`.

        Lists longer than `max_inputs` travel as several requests, some at once. One bad input
        fails alone. The call as a whole fails only when nothing was answered.

        Args:
            inputs: Any mix of str, `Text`, `Image` and `Audio`.
            model: Name of a model or family, "name@revision" to pin it; "" takes the default of
                each modality.
            kinds: Any of "dense" (see `EmbedResult.vector`), "sparse" and "multi_vector" that the models make; the
                model runs once for all.
            dimensions: Width of the dense vectors; 0 is the full one, others must be offered by the model.
            dtype: "float32", "float16"; and where the kinds are "dense" alone "int8" (see `EmbedResult.scale`) or
                "binary" (packed bits).
            normalize: Dense vectors of L2 norm 1 (True), as pooled (False), or as the model's reference library
                does it (None).
            role: "query" or "document", for texts without a role of their own.
            instruction: Put before texts that have none of their own, in place of the role's prompt.
            instructions: Several, at most 16, in place of role and instruction: each is put before the text in a pass
                of its own, and their vectors are averaged.
            truncation: What happens to an input longer than the model reads: keep its beginning ("end"),
                its end ("start"), fail it ("refuse"), or cut a text into chunks and average their vectors ("chunk").
            chunk_units: The most tokens of a chunk, prompt and special tokens included; 0 for what the model reads.
            chunk_overlap: Tokens that a chunk has in common with the one before.
            cache: "read_write"; "refresh" computes anew and stores; "bypass" does neither.
            priority: "interactive" goes before "bulk".
            timeout: Seconds for everything, retries included; None for no limit.

        Raises:
            EmbedMeshError: Nothing was answered; of `embedmesh.errors`, by cause.
            InvalidRequest: An option that does not exist.
            TypeError: Something in `inputs` is no input.
        """
        options = _plan.parse_options(
            model=model,
            kinds=kinds,
            dimensions=dimensions,
            dtype=dtype,
            normalize=normalize,
            role=role,
            instruction=instruction,
            instructions=instructions,
            truncation=truncation,
            chunk_units=chunk_units,
            chunk_overlap=chunk_overlap,
            cache=cache,
            priority=priority,
        )
        source = iter(_plan.listed(inputs))
        plan = self._plan(options, timeout)
        self._open()
        with self._counted():
            return EmbedResponse(await self._run(plan, source))

    async def _run(self, plan: Plan, source: Iterator[Input]) -> list[EmbedResult]:
        results: list[EmbedResult] = []
        calls: dict[Part, Any] = {}
        done: asyncio.Queue[Part] = asyncio.Queue()
        try:
            while not plan.done:
                while plan.room:
                    plan.read(source)
                for part in plan.due(now := time.monotonic()):
                    with self._sending():
                        calls[part] = self._gateway.Embed(
                            plan.request(part), timeout=plan.left(now), metadata=self._metadata
                        )
                    calls[part].add_done_callback(partial(_report, done.put_nowait, part))
                ended = await _get_async(done, plan.pause(now))
                if ended is not None:  # pragma: no branch  (taken in tests; coverage on 3.11 loses it after a timeout)
                    outcome = await _outcome(calls.pop(ended))
                    if isinstance(outcome, EmbedMeshError):
                        plan.fail(ended, outcome, time.monotonic())
                    else:
                        plan.answer(ended, outcome, time.monotonic())
                plan.check()
                results.extend(plan.take())
        finally:
            for call in calls.values():
                call.cancel()
        return sorted(results, key=_index)

    def embed_stream(
        self,
        inputs: AsyncIterable[Input] | Iterable[Input],
        *,
        model: str = "",
        kinds: Iterable[KindName] = ("dense",),
        dimensions: int = 0,
        dtype: DtypeName = "float32",
        normalize: bool | None = None,
        role: Role | None = None,
        instruction: str = "",
        instructions: Iterable[str] = (),
        truncation: TruncationName = "end",
        chunk_units: int = 0,
        chunk_overlap: int = 0,
        cache: CacheName = "read_write",
        priority: PriorityName = "bulk",
        timeout: float | None = None,
        chunk_inputs: int = 64,
        window: int = 8,
        ordered: bool = True,
    ) -> AsyncGenerator[EmbedResult, None]:
        """Embed any number of inputs, in bounded memory; yields one result an input.

        `inputs` may be asynchronous; they are read at most `window` chunks ahead of the results. To
        end a stream early, close it: `async with contextlib.aclosing(client.embed_stream(...)) as results`.

        A chunk is sent when it is full: a source that yields rarely wants a small `chunk_inputs`.
        A stream that breaks is resumed with the chunks not yet answered. An exception of `inputs`
        comes out after the results of all that came before it.

        Args:
            inputs: Any mix of str, `Text`, `Image` and `Audio`, endless if need be.
            model: As for `embed`, as are the others not named here.
            kinds: See `embed`.
            dimensions: See `embed`.
            dtype: See `embed`.
            normalize: See `embed`.
            role: See `embed`.
            instruction: See `embed`.
            instructions: See `embed`.
            truncation: See `embed`.
            chunk_units: See `embed`.
            chunk_overlap: See `embed`.
            cache: See `embed`.
            priority: "bulk" by default: interactive work goes first.
            timeout: Seconds for the whole stream; None for no limit.
            chunk_inputs: Inputs of one message.
            window: The most chunks that are read but not yet yielded.
            ordered: Yield in the order of the inputs; False yields as chunks finish (see `EmbedResult.index`).

        Raises:
            EmbedMeshError: The stream as a whole failed, by cause; a chunk that fails is the errors of its results.
            InvalidRequest: An option that does not exist.
            TypeError: `inputs`, or something in it, is no input.
        """
        options = _plan.parse_options(
            model=model,
            kinds=kinds,
            dimensions=dimensions,
            dtype=dtype,
            normalize=normalize,
            role=role,
            instruction=instruction,
            instructions=instructions,
            truncation=truncation,
            chunk_units=chunk_units,
            chunk_overlap=chunk_overlap,
            cache=cache,
            priority=priority,
        )
        source = _aiter(_plan.iterable(inputs, asynchronous=True))
        _plan.require_window(chunk_inputs, window)
        plan = self._plan(options, timeout, max_inputs=chunk_inputs, window=window, ordered=ordered)
        return self._run_stream(plan, source)

    async def _run_stream(self, plan: Plan, source: AsyncIterator[Input]) -> AsyncGenerator[EmbedResult, None]:
        self._open()
        stream = _AsyncStream(self._gateway, self._metadata)
        reading = asyncio.create_task(_read_part(plan, source, stream.events))
        try:
            with self._counted():
                while not plan.done:
                    if plan.room and reading.done():
                        reading = asyncio.create_task(_read_part(plan, source, stream.events))
                    for part in plan.due(now := time.monotonic()):
                        with self._sending():
                            stream.send(_chunk(plan, part), timeout=plan.left(now))
                    event = await _get_async(stream.events, plan.pause(now))
                    if isinstance(event, EmbedMeshError):
                        await stream.close()
                        plan.interrupt(event, time.monotonic())
                    elif event is not None:
                        plan.receive(event, time.monotonic())
                    for result in plan.take():
                        yield result
                await stream.finish()
        finally:
            reading.cancel()
            await asyncio.wait([reading])
            await stream.close()


class _Stream:
    """EmbedStream, called when there is something to send, and again after a call ended.

    gRPC's thread sends what is queued; ours puts what comes into `events`, an error last of all.
    """

    def __init__(self, gateway: gateway_pb2_grpc.GatewayStub, metadata: _Metadata) -> None:
        self.events: SimpleQueue[_Event] = SimpleQueue()
        self._gateway = gateway
        self._metadata = metadata
        self._call: Any = None

    def send(self, request: gateway_pb2.EmbedStreamRequest, *, timeout: float | None) -> None:
        """Queue a chunk; `timeout` is for the call, should this one begin it."""
        if self._call is None:
            self._requests: SimpleQueue[gateway_pb2.EmbedStreamRequest | None] = SimpleQueue()
            requests = iter(self._requests.get, None)
            self._call = self._gateway.EmbedStream(requests, timeout=timeout, metadata=self._metadata)
            self._reader = threading.Thread(target=self._read, name="embedmesh-stream", daemon=True)
            self._reader.start()
        self._requests.put(request)

    def _read(self) -> None:
        end: EmbedMeshError = NotReady("the gateway ended the stream")
        try:
            for response in self._call:
                self.events.put(response)
        except grpc.RpcError as error:
            end = from_rpc_error(error)
        self.events.put(end)

    def finish(self) -> None:
        """Say that no more is coming, and let the gateway end the call."""
        if self._call is not None:
            self._requests.put(None)
            self._reader.join(_GOODBYE_SECONDS)

    def close(self) -> None:
        """End the call and both threads."""
        if self._call is not None:
            self._requests.put(None)
            self._call.cancel()
            self._reader.join()
            self._call = None


class _AsyncStream:
    """EmbedStream, called when there is something to send, and again after a call ended.

    gRPC's task sends what is queued; ours puts what comes into `events`, an error last of all.
    None among the events only says that inputs were read.
    """

    def __init__(self, gateway: gateway_pb2_grpc.GatewayAsyncStub, metadata: _Metadata) -> None:
        self.events: asyncio.Queue[_Event | None] = asyncio.Queue()
        self._gateway = gateway
        self._metadata = metadata
        self._call: Any = None

    def send(self, request: gateway_pb2.EmbedStreamRequest, *, timeout: float | None) -> None:
        """Queue a chunk; `timeout` is for the call, should this one begin it."""
        if self._call is None:
            self._requests: asyncio.Queue[gateway_pb2.EmbedStreamRequest | None] = asyncio.Queue()
            self._call = self._gateway.EmbedStream(
                _until_none(self._requests), timeout=timeout, metadata=self._metadata
            )
            self._reader = asyncio.create_task(self._read())
        self._requests.put_nowait(request)

    async def _read(self) -> None:
        end: EmbedMeshError = NotReady("the gateway ended the stream")
        try:
            async for response in self._call:
                self.events.put_nowait(response)
        except grpc.aio.AioRpcError as error:
            # When grpc.aio writes to a call that just ended, it says so in place of why the call ended.
            end = end if error.details() == "Internal error from Core" else from_rpc_error(error)
        except asyncio.CancelledError:  # how gRPC tells of a call that was cancelled here
            end = _cancelled()
        self.events.put_nowait(end)

    async def finish(self) -> None:
        """Say that no more is coming, and let the gateway end the call."""
        if self._call is not None:
            self._requests.put_nowait(None)
            await asyncio.wait([self._reader], timeout=_GOODBYE_SECONDS)

    async def close(self) -> None:
        """End the call and both tasks."""
        if self._call is not None:
            self._call.cancel()
            await asyncio.wait([self._reader])
            self._call = None


async def _until_none(queue: asyncio.Queue[_T | None]) -> AsyncIterator[_T]:
    while (item := await queue.get()) is not None:
        yield item


def _chunk(plan: Plan, part: Part) -> gateway_pb2.EmbedStreamRequest:
    return gateway_pb2.EmbedStreamRequest(sequence=part.number, request=plan.request(part))


def _report(put: Callable[[Part], None], part: Part, _call: object) -> None:
    put(part)


def _index(result: EmbedResult) -> int:
    return result.index


def _cancelled() -> EmbedMeshError:
    error = EmbedMeshError("the call was cancelled because its client was closed")
    error.code = grpc.StatusCode.CANCELLED
    return error


def _get(queue: SimpleQueue[_T], timeout: float | None) -> _T | None:
    """Wait for what comes next; None when nothing came in time."""
    try:
        return queue.get(timeout=timeout)
    except Empty:
        return None


async def _get_async(queue: asyncio.Queue[_T], timeout: float | None) -> _T | None:  # noqa: ASYNC109  (an answer, no error)
    """Wait for what comes next; None when nothing came in time."""
    try:
        async with asyncio.timeout(timeout):
            return await queue.get()
    except TimeoutError:
        return None


async def _outcome(call: grpc.aio.UnaryUnaryCall[Any, _T]) -> _T | EmbedMeshError:
    """Await a call: its response, or why there is none."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    except asyncio.CancelledError:
        # gRPC reports a closed channel like this, too; only that is no cancellation of our task.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return _cancelled()


async def _aiter(inputs: AsyncIterable[Input] | Iterable[Input]) -> AsyncIterator[Input]:
    if isinstance(inputs, AsyncIterable):
        async for item in inputs:
            yield item
    else:
        for item in inputs:
            yield item


async def _read_part(plan: Plan, source: AsyncIterator[Input], events: asyncio.Queue[_Event | None]) -> None:
    """Read until a part is ready to be sent, or nothing more comes."""
    parts = plan.parts
    while plan.room and plan.parts == parts:
        try:
            plan.push(await anext(source))
        except StopAsyncIteration:
            plan.end()
        except Exception as error:  # noqa: BLE001  (the caller's own: raised to it after the results before it)
            plan.end(error)
    events.put_nowait(None)
