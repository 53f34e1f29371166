"""Load from processes of its own: calls at given times, or by so many callers.

Open loop (`Open`): the times of the calls are fixed before the first one, whatever the answers do, and
latency counts from the time a call was meant to be sent. A server that stalls for a second so answers for all
the calls that were due in that second, not for the one that happened to be waiting: no coordinated omission.
Closed loop (`Closed`): each caller calls again when it is answered, so the rate follows the server; latency counts
from the sending, and hides what an open loop shows. Use it for throughput.

    async with Generator() as generator:
        calls, seen = await generator.run([load], observe)

Decision (November 2026): the worker's event loop waits in select(2), because epoll as asyncio uses it rounds every
pause up to a millisecond, which is as long as an answer from the cache takes. Messages are bytes made
beforehand; answers are parsed, as every caller must.
"""

from __future__ import annotations

import asyncio
import gc
import pickle
import re
import selectors
import struct
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import count, cycle
from typing import Any, Final, Literal, Self, TypeAlias, TypeVar

import grpc
import grpc.aio
import numpy as np
from numpy.typing import NDArray

from embedmesh.v1 import audio_pb2, gateway_pb2, image_pb2, text_pb2

__all__ = ["Answer", "Calls", "Closed", "Generator", "Load", "Open", "Wire", "drive", "merge", "split", "work"]

# "gateway", "stream": Gateway.Embed and .EmbedStream. The others: an encoder's own call; "http": a POST.
Wire: TypeAlias = Literal["gateway", "stream", "text", "image", "audio", "http"]
Observed = TypeVar("Observed")

OK: Final = "OK"
_UNARY: Final[dict[str, tuple[str, Any]]] = {
    "gateway": ("/embedmesh.v1.Gateway/Embed", gateway_pb2.EmbedResponse),
    "text": ("/embedmesh.v1.TextEncoder/EmbedText", text_pb2.EmbedTextResponse),
    "image": ("/embedmesh.v1.ImageEncoder/EmbedImage", image_pb2.EmbedImageResponse),
    "audio": ("/embedmesh.v1.AudioEncoder/EmbedAudio", audio_pb2.EmbedAudioResponse),
}
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.max_send_message_length", 64 * 2**20),
    # What is refused must be seen, not sent again unseen.
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    # Each channel a connection of its own.
    ("grpc.use_local_subchannel_pool", 1),
)
# Between "all are connected" and the first call.
_LEAD_SECONDS: Final = 0.05
_CONNECT_SECONDS: Final = 20.0
# Of a caller whose call failed: a server that refuses is not to be measured by how fast it can be asked again.
_PAUSE_SECONDS: Final = 0.05
_LENGTH: Final = struct.Struct(">Q")


@dataclass(frozen=True, slots=True)
class Closed:
    """So many callers, each of which calls again as soon as it is answered."""

    callers: int


@dataclass(frozen=True, slots=True)
class Open:
    """Calls at times that do not depend on the answers.

    Attributes:
        rate: Calls a second.
        poisson: Independent arrivals, as of many users; otherwise one every 1 / rate seconds.
        seed: Another one gives other Poisson times.
    """

    rate: float
    poisson: bool = True
    seed: int = 0

    def times(self, seconds: float) -> NDArray[np.float64]:
        """Seconds after the start at which to call, ascending, all below `seconds`."""
        if not self.poisson:
            return np.arange(int(np.ceil(self.rate * seconds - 1e-9)), dtype=np.float64) / self.rate
        random = np.random.default_rng(self.seed)
        times = np.empty(0)
        while times.size == 0 or times[-1] < seconds:
            gaps = random.exponential(1 / self.rate, max(16, int(self.rate * seconds * 1.1)))
            times = np.concatenate([times, gaps.cumsum() + (times[-1] if times.size else 0.0)])
        return times[times < seconds]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to call, with what, and when.

    Attributes:
        wire: How.
        address: host:port.
        payloads: Serialised requests, taken in turn and begun anew when used up.
        pace: When.
        seconds: Length of the measured window.
        warm_seconds: The same load before it, not measured.
        cool_seconds: And after it, until when the calls of the window should have ended: a neighbour that stops
            early would let them end sooner.
        timeout: Seconds after which a call is given up.
        path: Of the URL; "http" only.
        units: Of each payload, where the server does not tell; "http" only.
        connections: So many, taken in turn; unary calls only.
    """

    wire: Wire
    address: str
    payloads: Sequence[bytes]
    pace: Closed | Open
    seconds: float
    warm_seconds: float = 1.0
    cool_seconds: float = 0.0
    timeout: float = 60.0
    path: str = ""
    units: Sequence[int] = ()
    connections: int = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """How a call ended: its code, the vectors it brought, how many came from a cache, failed inputs, units of all."""

    code: str
    vectors: int = 0
    cached: int = 0
    failed: int = 0
    units: int = 0


Call: TypeAlias = Callable[[bytes], Awaitable[Answer]]
# When a call was due, when it was sent, when it ended, and how.
_Row: TypeAlias = tuple[float, float, float, Answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """All calls of one load, warm-up included, a column each. Times are seconds of the machine's monotonic clock.

    Attributes:
        intended: When a call was due; for a closed loop when it was sent.
        sent: When it was sent.
        done: When it ended.
        vectors: How many it brought.
        cached: Those of them that came from a cache.
        failed: Inputs that failed alone.
        units: Tokens, patches or frames of its vectors, cached ones included.
        codes: How it ended, "OK" or the name of a gRPC code.
        start: The measured window begins.
        end: It ends.
        cores: CPU seconds a second of each generator process in the window.
        rounds: How often the payloads were used up.
        closed: Whether it was a closed loop.
    """

    intended: NDArray[np.float64]
    sent: NDArray[np.float64]
    done: NDArray[np.float64]
    vectors: NDArray[np.int64]
    cached: NDArray[np.int64]
    failed: NDArray[np.int64]
    units: NDArray[np.int64]
    codes: NDArray[np.str_]
    start: float
    end: float
    cores: Sequence[float]
    rounds: float
    closed: bool


async def drive(call: Call, load: Load, start: float) -> Calls:
    """Make the calls of `load`, the first one at `start` of the loop's clock; returns when all have ended."""
    loop = asyncio.get_running_loop()
    first, last = start + load.warm_seconds, start + load.warm_seconds + load.seconds
    log: list[_Row] = []
    turns = count()
    closed = isinstance(load.pace, Closed)

    async def one(due: float | None) -> Answer:
        turn = next(turns) % len(load.payloads)
        sent = loop.time()
        answer = await call(load.payloads[turn])
        if load.units and answer.vectors:
            answer = replace(answer, units=load.units[turn])
        log.append((sent if due is None else due, sent, loop.time(), answer))
        return answer

    async def caller() -> None:
        await asyncio.sleep(start - loop.time())
        while loop.time() < last + load.cool_seconds:
            if (await one(None)).code != OK:
                await asyncio.sleep(_PAUSE_SECONDS)

    async def pacer(group: asyncio.TaskGroup, pace: Open) -> None:
        for offset in pace.times(load.warm_seconds + load.seconds + load.cool_seconds):
            due = start + float(offset)
            # Also when late: answers must be read, or this process would be the one that stalls.
            await asyncio.sleep(max(0.0, due - loop.time()))
            group.create_task(one(due))

    used = asyncio.create_task(_cores(first, last))
    async with asyncio.TaskGroup() as group:
        if isinstance(load.pace, Closed):
            for _ in range(load.pace.callers):
                group.create_task(caller())
        else:
            group.create_task(pacer(group, load.pace))
    cores = await used
    return _columns(log, first, last, cores=[cores], rounds=next(turns) / len(load.payloads), closed=closed)


async def _cores(start: float, end: float) -> float:
    """CPU seconds a second that this process takes between two moments of the loop's clock."""
    loop = asyncio.get_running_loop()
    await asyncio.sleep(start - loop.time())
    begun = time.process_time()
    await asyncio.sleep(end - loop.time())
    return (time.process_time() - begun) / (end - start)


def _columns(log: Sequence[_Row], start: float, end: float, **changes: Any) -> Calls:
    answers = [answer for *_, answer in log]
    return Calls(
        intended=np.array([row[0] for row in log], np.float64),
        sent=np.array([row[1] for row in log], np.float64),
        done=np.array([row[2] for row in log], np.float64),
        vectors=np.array([answer.vectors for answer in answers], np.int64),
        cached=np.array([answer.cached for answer in answers], np.int64),
        failed=np.array([answer.failed for answer in answers], np.int64),
        units=np.array([answer.units for answer in answers], np.int64),
        codes=np.array([answer.code for answer in answers], np.str_),
        start=start,
        end=end,
        **changes,
    )


def split(load: Load, parts: int) -> list[Load]:
    """Cut a load into so many of the same whole, each for a process of its own."""
    loads = []
    for i in range(parts):
        pace: Closed | Open
        if isinstance(load.pace, Closed):
            callers = len(range(i, load.pace.callers, parts))
            if not callers:
                continue
            pace = Closed(callers)
        else:
            # Poisson streams add up to one; constant ones do not, but keep their rate.
            pace = replace(load.pace, rate=load.pace.rate / parts, seed=load.pace.seed * parts + i)
        mine = range(i, len(load.payloads), parts) or range(len(load.payloads))
        units = [load.units[j] for j in mine] if load.units else ()
        loads.append(replace(load, payloads=[load.payloads[j] for j in mine], units=units, pace=pace))
    return loads


def merge(parts: Sequence[Calls]) -> Calls:
    """Put the calls of one load's parts together."""

    def column(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])

    return Calls(
        **{
            name: column(name) for name in ("intended", "sent", "done", "vectors", "cached", "failed", "units", "codes")
        },
        start=parts[0].start,
        end=parts[0].end,
        cores=[cores for part in parts for cores in part.cores],
        rounds=max(part.rounds for part in parts),
        closed=parts[0].closed,
    )


class Generator:
    """Worker processes that make the calls, so that nothing else this process does delays them."""

    def __init__(self) -> None:
        self._workers: list[asyncio.subprocess.Process] = []

    def __repr__(self) -> str:
        return f"<Generator workers={len(self._workers)}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for worker in self._workers:
            # A worker ends with its input, between two loads; within one it is not waited for.
            if worker.returncode is None:
                worker.kill()
            await worker.wait()
        self._workers.clear()

    async def run(
        self, loads: Sequence[Load], observe: Callable[[float, float], Awaitable[Observed]]
    ) -> tuple[list[Calls], Observed]:
        """Make several loads at the same time, a process for each; all must have the same window.

        Args:
            loads: What to call.
            observe: Called with the begin and end of the measured window (seconds of the monotonic clock), before
                it begins; its result is given back.

        Raises:
            RuntimeError: A worker failed.
        """
        while len(self._workers) < len(loads):
            self._workers.append(
                await asyncio.create_subprocess_exec(
                    # Not `-m`: the classes that travel must be those of the imported module.
                    *(sys.executable, "-P", "-c", "from embedmesh_cli.bench.load import work; work()"),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                )
            )
        workers = self._workers[: len(loads)]
        for worker, load in zip(workers, loads, strict=True):
            await _send(worker, load)
        for worker in workers:
            await _receive(worker)  # connected
        start = asyncio.get_running_loop().time() + _LEAD_SECONDS
        for worker in workers:
            await _send(worker, start)
        first = start + loads[0].warm_seconds
        seen, *calls = await asyncio.gather(
            observe(first, first + loads[0].seconds), *(_receive(worker) for worker in workers)
        )
        return list(calls), seen


async def _send(worker: asyncio.subprocess.Process, message: object) -> None:
    assert worker.stdin  # noqa: S101  (made with a pipe)
    body = pickle.dumps(message)
    worker.stdin.write(_LENGTH.pack(len(body)) + body)
    await worker.stdin.drain()


async def _receive(worker: asyncio.subprocess.Process) -> Any:
    assert worker.stdout  # noqa: S101  (made with a pipe)
    try:
        (size,) = _LENGTH.unpack(await worker.stdout.readexactly(_LENGTH.size))
        message = pickle.loads(await worker.stdout.readexactly(size))  # noqa: S301  (our own child)
    except asyncio.IncompleteReadError:
        raise RuntimeError(f"a load generator ended with status {await worker.wait()}") from None
    if isinstance(message, str) and message:
        raise RuntimeError(f"a load generator could not work: {message}")
    return message


def work() -> None:
    """Work for a `Generator`: loads come in on standard input, calls go out on standard output."""
    inlet, outlet = sys.stdin.buffer, sys.stdout.buffer

    def receive() -> Any:
        header = inlet.read(_LENGTH.size)
        if len(header) < _LENGTH.size:
            sys.exit()
        return pickle.loads(inlet.read(_LENGTH.unpack(header)[0]))  # noqa: S301  (our own parent)

    def send(message: object) -> None:
        body = pickle.dumps(message)
        outlet.write(_LENGTH.pack(len(body)) + body)
        outlet.flush()

    async def serve(load: Load) -> Calls:
        async with AsyncExitStack() as stack:
            call = await stack.enter_async_context(_open(load))
            send("")
            return await drive(call, load, receive())

    def loop() -> asyncio.AbstractEventLoop:
        return asyncio.SelectorEventLoop(selectors.SelectSelector())

    with asyncio.Runner(loop_factory=loop) as runner:
        while True:
            load = receive()
            # A pause of the collector (20 ms) would be taken for one of the server.
            gc.collect()
            gc.freeze()
            try:
                calls = runner.run(serve(load))
            except Exception:  # noqa: BLE001  (told to the parent, which decides)
                send(traceback.format_exc())
            else:
                send(calls)


# The ways to make a call


@asynccontextmanager
async def _open(load: Load) -> AsyncIterator[Call]:
    if load.wire == "http":
        http = _Http(load)
        try:
            yield http.call
        finally:
            http.close()
        return
    async with AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(load.address, options=_OPTIONS))
            for _ in range(load.connections)
        ]
        async with asyncio.timeout(_CONNECT_SECONDS):
            for channel in channels:
                await channel.channel_ready()
        if load.wire == "stream":
            stream = _Stream(channels[0])
            try:
                yield stream.call
            finally:
                stream.close()
            return
        path, response = _UNARY[load.wire]
        stubs: Any = cycle(
            [channel.unary_unary(path, response_deserializer=response.FromString) for channel in channels]
        )

        async def call(payload: bytes) -> Answer:
            try:
                return _count(await next(stubs)(payload, timeout=load.timeout))
            except grpc.aio.AioRpcError as error:
                return Answer(error.code().name)

        yield call


def _count(response: Any) -> Answer:
    failed = sum(result.HasField("error") for result in response.results)
    usage = response.usage
    return Answer(OK, len(response.results) - failed, usage.cached_inputs, failed, usage.input_units)


class _Stream:
    """Gateway.EmbedStream as a way to make calls: each chunk is one."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stream: Any = channel.stream_stream(
            "/embedmesh.v1.Gateway/EmbedStream", response_deserializer=gateway_pb2.EmbedStreamResponse.FromString
        )()
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._numbers = count()
        self._writing = asyncio.Lock()
        self._reader = asyncio.create_task(self._read())

    async def call(self, payload: bytes) -> Answer:
        number = next(self._numbers)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        # The message as protobuf writes it: sequence is field 1, the request is field 2.
        message = gateway_pb2.EmbedStreamRequest(sequence=number).SerializeToString()
        try:
            async with self._writing:
                await self._stream.write(message + b"\x12" + _varint(len(payload)) + payload)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            self._end("UNAVAILABLE")
        return await future

    async def _read(self) -> None:
        try:
            async for message in self._stream:
                if future := self._waiting.pop(message.sequence, None):
                    failure = Answer(_code(message.error.code))
                    future.set_result(_count(message.response) if message.HasField("response") else failure)
            self._end("UNAVAILABLE")
        except grpc.aio.AioRpcError as error:
            self._end(error.code().name)

    def _end(self, code: str) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_result(Answer(code))
        self._waiting.clear()

    def close(self) -> None:
        self._reader.cancel()
        self._stream.cancel()


def _code(number: int) -> str:
    return next((code.name for code in grpc.StatusCode if code.value[0] == number), str(number))


def _varint(number: int) -> bytes:
    octets = bytearray()
    while number > 127:
        octets.append(number & 127 | 128)
        number >>= 7
    octets.append(number)
    return bytes(octets)


class _Http:
    """POST over kept connections, as many as there are calls at a time. Bodies are counted, not decoded."""

    # One for each vector in the answers of OpenAI-shaped servers; `"object": "embedding"` has no colon after it.
    _VECTOR = re.compile(rb'"embedding"\s*:')
    # The one output of a server of the KServe protocol: its first axis counts them.
    _SHAPE = re.compile(rb'"outputs".{1,200}?"shape"\s*:\s*\[(\d+)')

    def __init__(self, load: Load) -> None:
        self._host, _, port = load.address.rpartition(":")
        self._port = int(port)
        self._timeout = load.timeout
        self._head = (
            f"POST {load.path} HTTP/1.1\r\nHost: {load.address}\r\nContent-Type: application/json\r\nContent-Length: "
        ).encode()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def call(self, payload: bytes) -> Answer:
        connection = None
        try:
            async with asyncio.timeout(self._timeout):
                connection = self._idle.pop() if self._idle else await self._connect()
                status, body = await self._exchange(*connection, payload)
        except TimeoutError:
            code = "DEADLINE_EXCEEDED"
        except (OSError, asyncio.IncompleteReadError, ValueError):
            code = "UNAVAILABLE"
        else:
            self._idle.append(connection)
            if status == 200:
                shape = self._SHAPE.search(body)
                return Answer(OK, int(shape[1]) if shape else len(self._VECTOR.findall(body)))
            return Answer({429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE"}.get(status, f"HTTP_{status}"))
        if connection:
            connection[1].close()
        return Answer(code)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._host, self._port, limit=2**24)

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, payload: bytes
    ) -> tuple[int, bytes]:
        writer.write(self._head + str(len(payload)).encode() + b"\r\n\r\n" + payload)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head.split(None, 2)[1])
        if found := re.search(rb"\r\ncontent-length: *(\d+)", head):
            return status, await reader.readexactly(int(found[1]))
        body = bytearray()  # chunked
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
        return status, bytes(body)

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
