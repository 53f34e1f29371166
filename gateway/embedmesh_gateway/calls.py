"""When an encoder is called: at once, together with others, or not, because it just said that it is full.

The decisions, and what they gain, stand in README.md: "small calls share a call to the encoder", "a refusal speaks
for those that follow".
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from google.protobuf.message import Message

from embedmesh.errors import DeadlineExceeded, Overloaded
from embedmesh_gateway.upstream import Answer, Terms, Upstream
from embedmesh_server.interceptor import new_request_id
from embedmesh_server.metrics import GatewayMetrics
from embedmesh_server.tracing import NO_TRACING, Tracing

__all__ = ["EncoderCalls"]

# The largest call that is put together with others, and the most that a joint one carries.
_SMALL_INPUTS: Final = 4
_SMALL_BYTES: Final = 8192
_JOINT_INPUTS: Final = 32
# A call is held for this part of the time that it would wait at the encoder anyway; less than half a millisecond is
# not worth it.
_SHARE: Final = 1 / 8
_SHORTEST_SECONDS: Final = 0.0005
# How long a refusal speaks for the calls after it, unless an answer says that there is room again; and that it does
# so only where more than this part of the calls that were sent lately were refused: of two encoders one may be full,
# which refuses a half.
_REFUSED_SECONDS: Final = 0.05
_REFUSED_SHARE: Final = 0.6
# Weight of the newest call in that part.
_NEWEST: Final = 1 / 16
# How long after a refusal nothing is held: whoever may be refused is to know at once.
_HURRY_SECONDS: Final = 1.0


@dataclass(eq=False, slots=True)
class _Joint:
    """Calls that go out as one: the inputs of each, and the answers that each waits for."""

    full: asyncio.Future[None]
    deadline: float
    task: asyncio.Task[None] = field(init=False)  # sends it
    inputs: list[Sequence[Message]] = field(default_factory=list)
    answers: list[asyncio.Future[list[Answer]]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(map(len, self.inputs))

    @property
    def wanted(self) -> bool:
        """Whether any of the callers still waits."""
        return not all(answer.cancelled() for answer in self.answers)


@dataclass(slots=True)
class _Refusal:
    """An encoder had no room for so many inputs."""

    message: str
    retry_after: float | None
    inputs: int
    until: float


@dataclass(eq=False, slots=True)
class _Queue:
    """What is known of the queues that inputs of one model and priority wait in."""

    flying: int = 0
    refusal: _Refusal | None = None
    refused_share: float = 0.0
    hurry_until: float = -math.inf
    # What may still be joined, by what its parts have in common.
    held: dict[Hashable, _Joint] = field(default_factory=dict)


class EncoderCalls:
    """Calls the encoders of one modality.

    Small calls that would wait at a busy encoder go out together. Where most calls are refused, a refusal speaks for
    those that follow.

    Args:
        upstream: Makes the calls.
        metrics: Counts the inputs that are refused here.
        longest_hold: The most seconds that a call is held for others to join it; 0 sends each by itself.
        tracing: Calls that are recorded go by themselves, so that a trace tells of its own call only.
    """

    def __init__(
        self, upstream: Upstream, metrics: GatewayMetrics, *, longest_hold: float, tracing: Tracing = NO_TRACING
    ) -> None:
        self._upstream = upstream
        self._metrics = metrics
        self._longest_hold = longest_hold
        self._tracing = tracing
        self._queues: dict[Hashable, _Queue] = {}

    def __repr__(self) -> str:
        return f"<EncoderCalls flying={sum(queue.flying for queue in self._queues.values())} {self._upstream!r}>"

    async def embed(self, inputs: Sequence[Message], terms: Terms, *, most: int, deadline: float) -> list[Answer]:
        """Have inputs embedded, as `Upstream.embed` does.

        Args:
            inputs: As there.
            terms: As there; only calls of equal terms share one.
            most: How many inputs a call may carry.
            deadline: As there. A joint call gets the latest of its parts' deadlines; each part ends at its own.

        Raises:
            EmbedMeshError: As there. All parts of a joint call that fails raise the same error.
        """
        queue = self._queues.get(terms.queue)
        if queue is None:
            queue = self._queues[terms.queue] = _Queue()
        self._refuse(queue, len(inputs))
        pause = self._pause(queue, inputs, terms)
        if not pause:
            return await self._call(queue, inputs, terms, deadline)
        loop = asyncio.get_running_loop()
        left = deadline - loop.time()
        # Less than a factor of two apart, so that little is computed for callers whose time is up.
        alike = math.frexp(left)[1] if 0 < left < math.inf else left
        key = (terms, most, alike)
        joint = queue.held.get(key)
        if joint is not None and joint.size + len(inputs) > min(most, _JOINT_INPUTS):
            joint.full.set_result(None)
            joint = None
        if joint is None:
            joint = queue.held[key] = _Joint(loop.create_future(), deadline)
            joint.task = loop.create_task(self._share(queue, joint, key, terms, pause))
        answer: asyncio.Future[list[Answer]] = loop.create_future()
        joint.inputs.append(inputs)
        joint.answers.append(answer)
        joint.deadline = max(joint.deadline, deadline)
        try:
            async with asyncio.timeout_at(deadline if math.isfinite(deadline) else None):
                return await answer
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the encoder answered") from None
        finally:
            if not joint.wanted:
                _close(queue, joint, key)
                joint.task.cancel()

    def _refuse(self, queue: _Queue, inputs: int) -> None:
        """Refuse what an encoder would refuse, too."""
        refusal = queue.refusal
        if (
            refusal is not None
            and asyncio.get_running_loop().time() < refusal.until
            and inputs >= refusal.inputs
            and queue.refused_share > _REFUSED_SHARE
        ):
            self._metrics.refused_inputs.inc(inputs)
            raise Overloaded(refusal.message, retry_after=refusal.retry_after)

    def _pause(self, queue: _Queue, inputs: Sequence[Message], terms: Terms) -> float:
        """Give the seconds for which a call is held, so that others may join it; 0 for not at all."""
        pause = min(self._upstream.waiting.get(terms.queue, 0.0) * _SHARE, self._longest_hold)
        alone = (
            pause < _SHORTEST_SECONDS
            or not queue.flying  # what was waited once says nothing when nobody else is there
            or asyncio.get_running_loop().time() < queue.hurry_until
            or len(inputs) > _SMALL_INPUTS
            or sum(item.ByteSize() for item in inputs) > _SMALL_BYTES
            or (self._tracing.on and self._tracing.current() is not None)
        )
        return 0.0 if alone else pause

    async def _share(self, queue: _Queue, joint: _Joint, key: Hashable, terms: Terms, pause: float) -> None:
        """Make a joint call when it is full or the pause is over, and give each part its answers."""
        await asyncio.wait({joint.full}, timeout=pause)
        _close(queue, joint, key)
        # The encoder's log and its errors name the call; that is not to be by the id of one of the callers.
        new_request_id()
        parts = [part for part in zip(joint.inputs, joint.answers, strict=True) if not part[1].done()]
        if not parts:  # all have just left, and will say so in a moment
            return
        try:
            inputs = [item for own, _ in parts for item in own]
            found = iter(await self._call(queue, inputs, terms, joint.deadline))
            for own, answer in parts:
                answers = list(islice(found, len(own)))
                if not answer.done():
                    answer.set_result(answers)
        except Exception as error:  # noqa: BLE001  (raised by those who wait)
            for _, answer in parts:
                if not answer.done():
                    answer.set_exception(error)
        finally:
            # None may wait for ever: a channel that closes cancels its calls.
            for _, answer in parts:
                answer.cancel()

    async def _call(self, queue: _Queue, inputs: Sequence[Message], terms: Terms, deadline: float) -> list[Answer]:
        queue.flying += 1
        try:
            answers = await self._upstream.embed(inputs, terms, deadline=deadline)
        except Overloaded as error:
            now = asyncio.get_running_loop().time()
            until = now + min(error.retry_after or math.inf, _REFUSED_SECONDS)
            queue.refusal = _Refusal(error.message, error.retry_after, len(inputs), until)
            queue.refused_share += (1 - queue.refused_share) * _NEWEST
            queue.hurry_until = now + _HURRY_SECONDS
            raise
        finally:
            queue.flying -= 1
        queue.refusal = None
        queue.refused_share -= queue.refused_share * _NEWEST
        return answers


def _close(queue: _Queue, joint: _Joint, key: Hashable) -> None:
    """Let nobody join any more."""
    if queue.held.get(key) is joint:  # else it was full, and this is the next one
        del queue.held[key]
