"""What to send when, and what the answers mean: the part of the clients that does no I/O.

A call's inputs are cut into parts, each of which travels as one message. A `Plan` knows which
parts are to be sent now, puts the answers together, and decides what is asked again: both
clients, for `embed` and for `embed_stream`, only move messages between a plan and gRPC.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import AsyncIterable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, TypeAlias, TypeVar

import grpc
from numpy.typing import NDArray

from embedmesh import vectors
from embedmesh.errors import (
    DeadlineExceeded,
    EmbedMeshError,
    InputTooLarge,
    InternalError,
    InvalidRequest,
    from_status,
)
from embedmesh.inputs import Audio, Image, Input, Role, Text, instructions_value, role_value
from embedmesh.results import EmbedResult, ModelInfo, ModelRef, Span, SparseVector
from embedmesh.v1 import catalog_pb2, embedding_pb2, gateway_pb2

KindName: TypeAlias = Literal["dense", "sparse", "multi_vector"]
DtypeName: TypeAlias = Literal["float32", "float16", "int8", "binary"]
TruncationName: TypeAlias = Literal["end", "start", "refuse", "chunk"]
CacheName: TypeAlias = Literal["read_write", "refresh", "bypass"]
PriorityName: TypeAlias = Literal["interactive", "bulk"]

_KINDS: Final = {
    "dense": embedding_pb2.EMBEDDING_KIND_DENSE,
    "sparse": embedding_pb2.EMBEDDING_KIND_SPARSE,
    "multi_vector": embedding_pb2.EMBEDDING_KIND_MULTI_VECTOR,
}
_DTYPES: Final = {
    "float32": embedding_pb2.DTYPE_FLOAT32,
    "float16": embedding_pb2.DTYPE_FLOAT16,
    "int8": embedding_pb2.DTYPE_INT8,
    "binary": embedding_pb2.DTYPE_BINARY,
}
_TRUNCATIONS: Final = {
    "end": embedding_pb2.TRUNCATION_END,
    "start": embedding_pb2.TRUNCATION_START,
    "refuse": embedding_pb2.TRUNCATION_REFUSE,
    "chunk": embedding_pb2.TRUNCATION_CHUNK,
}
_CACHE_POLICIES: Final = {
    "read_write": gateway_pb2.CACHE_POLICY_READ_WRITE,
    "refresh": gateway_pb2.CACHE_POLICY_REFRESH,
    "bypass": gateway_pb2.CACHE_POLICY_BYPASS,
}
_PRIORITIES: Final = {
    "interactive": embedding_pb2.PRIORITY_INTERACTIVE,
    "bulk": embedding_pb2.PRIORITY_BULK,
}
_V = TypeVar("_V")

# A part is closed before it grows over this, so that no message blocks a connection for long.
PART_BYTES: Final = 16 * 2**20
# A multi-vector may have megabytes, and an answer must fit into a message.
MULTI_VECTOR_INPUTS: Final = 16
# Around the bytes of an input (tags, lengths, role), and around all inputs (the options).
_INPUT_FRAMING_BYTES: Final = 48
_FRAMING_BYTES: Final = 4 * 2**10
# The pauses of gRPC's retry and of ours where the server names none, in seconds:
# 0.2, 0.6, 1.8, 3 wait out the restart of a gateway.
BACKOFF_FIRST: Final = 0.2
BACKOFF_FACTOR: Final = 3
BACKOFF_MOST: Final = 3.0
_INDEX = re.compile(r"^inputs\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Options:
    """The validated options of one call.

    Attributes:
        template: The request without its inputs.
        role: Role of the texts that have none of their own.
        instruction: Instruction of the texts that have none of their own.
        instructions: Instructions of the texts that have none of their own, and no role and no instruction.
    """

    template: gateway_pb2.EmbedRequest
    role: Role | None
    instruction: str
    instructions: tuple[str, ...] = ()


def parse_options(
    *,
    model: str,
    kinds: Iterable[str],
    dimensions: int,
    dtype: str,
    normalize: bool | None,
    role: Role | None,
    instruction: str,
    instructions: Iterable[str],
    truncation: str,
    chunk_units: int,
    chunk_overlap: int,
    cache: str,
    priority: str,
) -> Options:
    """Turn the keywords of a call into the request's fields.

    Raises:
        InvalidRequest: A value that is not offered; `field` names the keyword.
        TypeError: A value of the wrong type.
    """
    for name, number, hint in (
        ("dimensions", dimensions, "give a width, or 0 for the full one"),
        ("chunk_units", chunk_units, "give tokens, or 0 for as many as the model reads"),
        ("chunk_overlap", chunk_overlap, "give tokens, or 0 for none"),
    ):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} is an int, got {type(number).__name__}")
        if not 0 <= number < 2**32:
            raise InvalidRequest(f"{name} is {number}; {hint}", field=name)
        if number and name != "dimensions" and truncation != "chunk":
            raise InvalidRequest(f"{name} is for truncation='chunk', not {truncation!r}", field=name)
    if normalize is not None and not isinstance(normalize, bool):
        raise TypeError(f"normalize is True, False or None, got {normalize!r}")
    role_value(role)
    several = instructions_value(instructions, role, instruction)
    for name, text in (("model", model), ("instruction", instruction), *(("instructions", each) for each in several)):
        if not isinstance(text, str):
            raise TypeError(f"{name} is a str, got {type(text).__name__}")
        if _surrogate(text):
            raise InvalidRequest(f"{name} holds half of a surrogate pair, which is no Unicode text", field=name)
    template = gateway_pb2.EmbedRequest(
        model=model,
        output=embedding_pb2.OutputOptions(
            kinds=_kinds(kinds), dimensions=dimensions, normalize=normalize, dtype=_choice("dtype", dtype, _DTYPES)
        ),
        truncation=_choice("truncation", truncation, _TRUNCATIONS),
        cache=_choice("cache", cache, _CACHE_POLICIES),
        priority=_choice("priority", priority, _PRIORITIES),
    )
    if chunk_units or chunk_overlap:
        template.chunking.units = chunk_units
        template.chunking.overlap = chunk_overlap
    return Options(template, role, instruction, several)


def _kinds(kinds: Iterable[str]) -> list[embedding_pb2.EmbeddingKind.ValueType]:
    if isinstance(kinds, str) or not isinstance(kinds, Iterable):
        raise TypeError(f"kinds are many, got {kinds!r}; put it into a list: [...]")
    found = list(dict.fromkeys(_choice("kinds", kind, _KINDS) for kind in kinds))
    if not found:
        raise InvalidRequest(f"kinds is empty; choose {', '.join(map(repr, _KINDS))}", field="kinds")
    return found


def _choice(name: str, value: str, values: dict[str, _V]) -> _V:
    if value not in values:
        raise InvalidRequest(f"{name} is {value!r}; choose {', '.join(map(repr, values))}", field=name)
    return values[value]


def _surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text) if not text.isascii() else False


def deadline(timeout: float | None, now: float) -> float:
    """Give the moment, on the clock of `now`, at which a call that may take `timeout` seconds ends.

    Raises:
        InvalidRequest: `timeout` is not above 0.
    """
    if timeout is None:
        return math.inf
    if not timeout > 0:
        raise InvalidRequest(f"timeout is {timeout}; give seconds above 0, or None for no limit", field="timeout")
    return now + timeout


_Many = TypeVar("_Many")


def iterable(inputs: _Many, *, asynchronous: bool = False) -> _Many:
    """Refuse a single input where many are expected: iterating over a str would give its letters.

    Raises:
        TypeError: `inputs` is one input, or cannot be iterated over.
    """
    if isinstance(inputs, str | Text | Image | Audio | bytes):
        raise TypeError(f"inputs are many, got a single {type(inputs).__name__}; put it into a list: [...]")
    if not isinstance(inputs, Iterable) and not (asynchronous and isinstance(inputs, AsyncIterable)):
        raise TypeError(f"inputs must be a list or an iterable, got {type(inputs).__name__}")
    return inputs


def listed(inputs: Iterable[Input]) -> list[Input]:
    """Give the inputs of one call, every one of which can be embedded.

    Raises:
        TypeError: `inputs`, or something in it, cannot.
    """
    items = list(iterable(inputs))
    for index, item in enumerate(items):
        _require_input(index, item)
    return items


def require_window(chunk_inputs: int, window: int) -> None:
    """Check how a stream is cut.

    Raises:
        InvalidRequest: A number is not above 0.
    """
    for name, number in (("chunk_inputs", chunk_inputs), ("window", window)):
        if number < 1:
            raise InvalidRequest(f"{name} is {number}; give 1 or more", field=name)


def _require_input(index: int, item: object) -> None:
    if not isinstance(item, str | Text | Image | Audio):
        hint = "; wrap bytes in Image.from_bytes or Audio.from_bytes" if isinstance(item, bytes) else ""
        raise TypeError(f"inputs[{index}] is a {type(item).__name__}; give str, Text, Image or Audio{hint}")


@dataclass(eq=False, slots=True)
class Part:
    """Neighbouring inputs that travel as one message.

    Attributes:
        number: Counts the parts of a plan; the `sequence` of a stream's chunk.
        waiting: The inputs, with their indexes, that have no final answer yet.
        results: Outcomes so far, by index.
        nbytes: Size on the wire, about.
        attempts: How often it was answered or failed.
        not_before: When to send it; None while its answer is awaited.
    """

    number: int
    waiting: list[tuple[int, Text | Image | Audio]] = field(default_factory=list)
    results: dict[int, EmbedResult] = field(default_factory=dict)
    nbytes: int = 0
    attempts: int = 0
    not_before: float | None = -math.inf


class Plan:
    """The parts of one call: which to send now, and what came back. No I/O, no clock.

    The caller pushes inputs while there is `room`, sends what is `due`, reports each outcome
    by `answer` or `fail`, and takes the results, until the plan is `done`.

    Args:
        options: Options of the call.
        max_inputs: The most inputs of a part.
        max_message_bytes: The most bytes of a message.
        retries: How often a part or an input is asked again after an error that may pass.
        window: The most parts that are open: read, but not yet taken as results.
        deadline: On the clock whose readings come as `now`.
        ordered: Results come in the order of the inputs, not as they finish.
        streaming: The parts are chunks of a stream, which fail each for itself; otherwise
            they are calls, of which the first to fail with none answered fails them all.
    """

    def __init__(
        self,
        options: Options,
        *,
        max_inputs: int,
        max_message_bytes: int,
        retries: int,
        window: int,
        deadline: float,
        ordered: bool,
        streaming: bool,
    ) -> None:
        self._options = options
        several = embedding_pb2.EMBEDDING_KIND_MULTI_VECTOR in options.template.output.kinds
        self._max_inputs = min(max_inputs, MULTI_VECTOR_INPUTS) if several else max_inputs
        self._max_input_bytes = max_message_bytes - _FRAMING_BYTES
        self._max_part_bytes = min(PART_BYTES, self._max_input_bytes)
        self._retries = retries
        self._window = window
        self._deadline = deadline
        self._ordered = ordered
        self._streaming = streaming
        self._pushed = 0
        self._parts = 0
        self._building = Part(0)
        self._open: dict[int, Part] = {}
        self._ended = False
        self._source_error: Exception | None = None
        self._answered = False
        self._refusal: EmbedMeshError | None = None
        self._breaks = 0
        self._resume = -math.inf  # when a broken stream may be opened again

    def __repr__(self) -> str:
        in_flight = sum(part.not_before is None for part in self._open.values())
        return f"<Plan pushed={self._pushed} open={len(self._open)}/{self._window} in_flight={in_flight}>"

    # Reading the caller's inputs

    @property
    def parts(self) -> int:
        """How many parts were ever ready to be sent."""
        return self._parts

    @property
    def room(self) -> bool:
        """Whether more inputs are wanted now."""
        refused = self._refusal is not None and not self._answered
        return not self._ended and not refused and len(self._open) < self._window

    def push(self, item: Input) -> None:
        """Take the next input. What can never be sent is answered on the spot, alone.

        Parts are closed when full: until then their inputs wait for their neighbours.

        Raises:
            TypeError: It is no input.
        """
        index = self._pushed
        _require_input(index, item)
        options = self._options
        if isinstance(item, str):
            item = Text(item, options.role, options.instruction, options.instructions)
        elif isinstance(item, Text) and not item.instructions:
            if options.instructions and not (item.role or item.instruction):
                item = replace(item, instructions=options.instructions)
            else:
                item = replace(
                    item, role=item.role or options.role, instruction=item.instruction or options.instruction
                )
        self._pushed += 1
        error: EmbedMeshError | None = None
        size = 0
        try:
            size = item.nbytes + _INPUT_FRAMING_BYTES
        except UnicodeEncodeError as culprit:
            name = "text" if culprit.object == getattr(item, "text", None) else "instruction"
            if culprit.object in getattr(item, "instructions", ()):
                name = "instructions"
            error = InvalidRequest(
                f"inputs[{index}].{name} holds half of a surrogate pair, which is no Unicode text",
                field=f"inputs[{index}].{name}",
            )
        if size > self._max_input_bytes:
            error = InputTooLarge.over(
                f"inputs[{index}]", size, self._max_input_bytes, "bytes", field=f"inputs[{index}]"
            )
        part = self._building
        if error is not None:
            part.results[index] = EmbedResult(index, error=error)
        else:
            if part.waiting and part.nbytes + size > self._max_part_bytes:
                self._close_part()
                part = self._building
            part.waiting.append((index, item))
            part.nbytes += size
        if len(part.waiting) + len(part.results) == self._max_inputs:
            self._close_part()

    def read(self, source: Iterator[Input]) -> None:
        """Push the next input of `source`, or end."""
        try:
            self.push(next(source))
        except StopIteration:
            self.end()
        except Exception as error:  # noqa: BLE001  (the caller's own: raised to it after the results before it)
            self.end(error)

    def end(self, error: Exception | None = None) -> None:
        """Take note that there are no more inputs, because of `error` if the caller's iterable raised one."""
        self._ended = True
        self._source_error = error
        self._close_part()

    def _close_part(self) -> None:
        part = self._building
        if part.waiting or part.results:
            self._open[part.number] = part
            self._parts += 1
            self._building = Part(self._parts)

    # Sending

    def due(self, now: float) -> list[Part]:
        """Give the parts to send now; each is then in flight until it is answered or fails.

        Past the deadline none is sent: the parts of a call fail, a stream does as a whole.

        Raises:
            DeadlineExceeded: The time of a stream is over.
        """
        if now >= self._deadline and self._streaming:
            raise DeadlineExceeded("the stream's time limit passed")
        due = [part for part, moment in self._scheduled() if moment <= now]
        for part in due:
            if now < self._deadline:
                part.not_before = None
            else:
                self.fail(part, DeadlineExceeded("the time limit passed before these inputs were sent"), now)
        return [part for part in due if part.not_before is None]

    def _scheduled(self) -> Iterator[tuple[Part, float]]:
        """Give the parts that wait to be sent, with the moment for it."""
        for part in self._open.values():
            if part.waiting and part.not_before is not None:
                yield part, max(part.not_before, self._resume)

    def request(self, part: Part) -> gateway_pb2.EmbedRequest:
        """Write the message that asks for what `part` still waits for."""
        request = gateway_pb2.EmbedRequest()
        request.CopyFrom(self._options.template)
        for _, item in part.waiting:
            item.write(request.inputs.add())
        return request

    def left(self, now: float) -> float | None:
        """Give the time limit of what is sent now, in seconds."""
        return None if self._deadline == math.inf else self._deadline - now

    def pause(self, now: float) -> float | None:
        """Give the seconds to wait for an event before `due` has more to say; None for any time.

        An event is the end of a call, or a message of a stream, or inputs read meanwhile.
        """
        if self.done or any(self._takeable()):
            return 0.0
        moments = [moment for _, moment in self._scheduled()]
        if self._streaming:
            moments.append(self._deadline)
        moment = min(moments, default=math.inf)
        return None if moment == math.inf else max(0.0, moment - now)

    # What came back

    def answer(self, part: Part, response: gateway_pb2.EmbedResponse, now: float) -> None:
        """Take the answer to a part; inputs with an error that may pass become due again."""
        self._answered = True
        self._breaks = 0
        asked = part.waiting
        if len(response.results) != len(asked):
            wrong = InternalError(f"the gateway gave {len(response.results)} results for {len(asked)} inputs")
            self._settle(part, {index: EmbedResult(index, error=wrong) for index, _ in asked}, now)
            return
        models = [_model_ref(model) for model in response.models]
        output = self._options.template.output
        kinds, dtype = frozenset(output.kinds), output.dtype
        results = {
            index: _read_result(index, outcome, models, kinds, dtype)
            for (index, _), outcome in zip(asked, response.results, strict=True)
        }
        self._settle(part, results, now)

    def fail(self, part: Part, error: EmbedMeshError, now: float) -> None:
        """Take the failure of a part as a whole. A chunk may become due again; a call was retried by gRPC."""
        if self._refusal is None and not self._streaming:
            self._refusal = error
        error.field = _reindex(error.field, [index for index, _ in part.waiting])
        results = {index: EmbedResult(index, error=error) for index, _ in part.waiting}
        self._settle(part, results, now, again=self._streaming)

    def _settle(self, part: Part, results: dict[int, EmbedResult], now: float, *, again: bool = True) -> None:
        part.attempts += 1
        part.not_before = -math.inf
        part.results.update(results)
        passing = {index: result.error for index, result in results.items() if result.error and result.error.retryable}
        if again and passing and part.attempts <= self._retries:
            moment = now + max(_pause(error, part.attempts) for error in passing.values())
            if moment < self._deadline:
                part.waiting = [(index, item) for index, item in part.waiting if index in passing]
                part.not_before = moment
                return
        part.waiting = []

    def receive(self, message: gateway_pb2.EmbedStreamResponse, now: float) -> None:
        """Take one message of a stream: the answer to a part, or its failure, which may pass.

        Raises:
            InternalError: No such part is awaited.
        """
        part = self._open.get(message.sequence)
        if part is None or part.not_before is not None:
            raise InternalError(f"the gateway answered chunk {message.sequence}, which it was not asked for")
        if message.HasField("response"):
            self.answer(part, message.response, now)
        else:
            self._breaks = 0
            self.fail(part, from_status(message.error), now)

    def interrupt(self, error: EmbedMeshError, now: float) -> None:
        """Take the end of a stream with parts in flight: they are due again on the next one.

        Raises:
            EmbedMeshError: `error`, when another stream would not help.
        """
        self._breaks += 1
        # A peer that goes away cancels its streams; that the caller cancelled never gets here. A proxy before it resets
        # them, which is INTERNAL without a reason of ours.
        reset = error.code is grpc.StatusCode.INTERNAL and not error.reason
        passing = error.retryable or reset or error.code is grpc.StatusCode.CANCELLED
        moment = now + _pause(error, self._breaks)
        if not passing or self._breaks > self._retries or moment >= self._deadline:
            raise error
        self._resume = moment
        for part in self._open.values():
            if part.not_before is None:
                part.not_before = moment

    # Handing out

    @property
    def done(self) -> bool:
        """Whether every input was read, and answered, and taken."""
        return self._ended and not self._open

    def check(self) -> None:
        """Raise what leaves nothing more to wait for.

        Raises:
            EmbedMeshError: Every part that was sent failed as a whole: the call did.
        """
        if self._refusal is not None and not self._answered and not any(p.waiting for p in self._open.values()):
            raise self._refusal

    def take(self) -> Iterator[EmbedResult]:
        """Give the results that are ready, and forget them.

        Raises:
            Exception: What the caller's iterable raised, after the results of all that came before.
        """
        for part in list(self._takeable()):
            del self._open[part.number]
            for index in sorted(part.results):
                yield part.results[index]
        if self.done and self._source_error is not None:
            raise self._source_error

    def _takeable(self) -> Iterator[Part]:
        for part in self._open.values():
            if not part.waiting:
                yield part
            elif self._ordered:
                return


def _pause(error: EmbedMeshError, attempts: int) -> float:
    """Give the seconds before the next attempt: the server's number, else growing, and jittered."""
    if error.retry_after is not None:
        return error.retry_after
    pause = min(BACKOFF_MOST, BACKOFF_FIRST * BACKOFF_FACTOR ** float(attempts - 1))
    return pause * random.uniform(0.8, 1.2)  # noqa: S311  (spreads callers out, hides nothing)


def _reindex(path: str, indexes: Sequence[int]) -> str:
    """Turn the `inputs[i]` of a message into the `inputs[i]` of the call."""
    found = _INDEX.match(path)
    if found is None or int(found[1]) >= len(indexes):
        return path
    return f"inputs[{indexes[int(found[1])]}]{path[found.end() :]}"


def _read_result(
    index: int,
    outcome: embedding_pb2.EmbedResult,
    models: Sequence[ModelRef],
    kinds: frozenset[int],
    dtype: int,
) -> EmbedResult:
    if outcome.HasField("error"):
        error = from_status(outcome.error)
        error.field = _INDEX.sub(f"inputs[{index}]", error.field)
        return EmbedResult(index, error=error, input_units=outcome.input_units)
    embedding = outcome.embedding
    vector = sparse = rows = None
    spans: tuple[Span, ...] = ()
    try:
        if embedding_pb2.EMBEDDING_KIND_DENSE in kinds:
            vector = _read(embedding.dense, dtype, axes=1)
            spans = tuple(_read_span(span, dtype) for span in embedding.spans)
        if embedding_pb2.EMBEDDING_KIND_SPARSE in kinds:
            sparse = _read_sparse(embedding.sparse, dtype)
        if embedding_pb2.EMBEDDING_KIND_MULTI_VECTOR in kinds:
            rows = _read(embedding.multi_vector, dtype, axes=2)
    except InvalidRequest as wrong:
        return EmbedResult(index, error=InternalError(f"the gateway's answer cannot be read: {wrong.message}"))
    except InternalError as wrong:
        return EmbedResult(index, error=wrong)
    if outcome.model_index >= len(models):
        return EmbedResult(index, error=_breach())
    return EmbedResult(
        index,
        model=models[outcome.model_index],
        input_units=outcome.input_units,
        original_units=outcome.original_units if outcome.truncated else outcome.input_units,
        truncated=outcome.truncated,
        cached=outcome.cached,
        scale=embedding.dense.scale or 1.0,
        spans=spans,
        _vector=vector,
        _sparse=sparse,
        _multi_vector=rows,
    )


def _breach() -> InternalError:
    return InternalError("the gateway's answer breaks the contract")


def _read(tensor: embedding_pb2.Tensor, dtype: int, *, axes: int) -> NDArray[Any]:
    array = vectors.decode(tensor)
    if tensor.dtype != dtype or array.ndim != axes:
        raise _breach()
    return array


def _read_span(span: embedding_pb2.Span, dtype: int) -> Span:
    return Span(span.start, span.end, _read(span.dense, dtype, axes=1), span.dense.scale or 1.0)


def _read_sparse(sparse: embedding_pb2.SparseVector, dtype: int) -> SparseVector:
    indices = _read(sparse.indices, embedding_pb2.DTYPE_UINT32, axes=1)
    values = _read(sparse.values, dtype, axes=1)
    if len(indices) != len(values):
        raise _breach()
    return SparseVector(indices, values, sparse.dimensions)


def _model_ref(model: embedding_pb2.ModelRef) -> ModelRef:
    return ModelRef(name=model.name, revision=model.revision, space=model.space)


def read_models(response: catalog_pb2.ListModelsResponse) -> list[ModelInfo]:
    """Turn the catalogue's message into the models it lists."""
    return [
        ModelInfo(
            name=info.model.name,
            revision=info.model.revision,
            space=info.model.space,
            family=info.family,
            modality=_enum_name(catalog_pb2.Modality, info.modality, "MODALITY_"),
            kinds=tuple(_enum_name(embedding_pb2.EmbeddingKind, kind, "EMBEDDING_KIND_") for kind in info.kinds),
            dimensions=info.dimensions,
            sparse_dimensions=info.sparse_dimensions,
            multi_vector_dimensions=info.multi_vector_dimensions,
            reads_text_with_images=info.reads_text_with_images,
            truncatable_dimensions=tuple(info.truncatable_dimensions),
            max_input_units=info.max_input_units,
            max_inputs=info.max_inputs,
            is_default=info.is_default,
            ready=info.ready,
            normalized=info.normalized,
            limits=dict(info.limits),
        )
        for info in response.models
    ]


def _enum_name(enum: Any, value: int, prefix: str) -> str:
    """Name a value as callers write it; a newer server's value by its number."""
    return enum.Name(value).removeprefix(prefix).lower() if value in enum.values() else str(value)
