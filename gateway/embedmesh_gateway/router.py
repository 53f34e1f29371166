"""Who answers which input: the cache, a computation already under way, or an encoder.

Each modality of a request is a group that is planned and answered by itself, all at once:

    embed -> _group -> _plan        which model, can it do what is asked
                    -> _obtain      memory, else join a flight, else lead one
                       -> _lead     Redis, then encoders
                       -> _follow   wait; compute after all when the leader gave up
          -> _assemble              request order, models table, width and dtype

A *flight* is a vector on its way, known by its cache key. Whoever finds no flight to join leads one.
Nothing is awaited between looking into the memory and registering a flight, nor between keeping a vector
and ending its flight, so no vector is computed twice within one gateway.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from embedmesh.errors import (
    DeadlineExceeded,
    EmbedMeshError,
    InputTooLarge,
    InvalidRequest,
    Overloaded,
    UnsupportedOutput,
    from_status,
    to_status,
)
from embedmesh.v1 import catalog_pb2, gateway_pb2, image_pb2, text_pb2
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh.vectors import (
    DenseOutput,
    decode,
    finish_dense,
    finish_multi_vector,
    finish_sparse,
    require_shape_of_kinds,
)
from embedmesh_gateway.admission import Admission
from embedmesh_gateway.cache import VectorCache
from embedmesh_gateway.calls import EncoderCalls
from embedmesh_gateway.catalog import Catalog
from embedmesh_gateway.keys import cache_key, cache_keys
from embedmesh_gateway.tenants import Tenant
from embedmesh_gateway.upstream import Answer, Terms, Upstream, broken, is_whole
from embedmesh_server.metrics import GatewayMetrics
from embedmesh_server.tracing import NO_TRACING, Tracing

__all__ = ["Router"]

# Room in a message for what is not an input.
_MESSAGE_SLACK: Final = 64 * 1024
# Inputs a call may carry when the catalog names no limit.
_DEFAULT_MAX_INPUTS: Final = 256
_FIELDS: Final[dict[pb.EmbeddingKind.ValueType, Any]] = {
    pb.EMBEDDING_KIND_DENSE: "dense",
    pb.EMBEDDING_KIND_SPARSE: "sparse",
    pb.EMBEDDING_KIND_MULTI_VECTOR: "multi_vector",
}
# The values of options that have a meaning, looked up once.
_KNOWN: Final[dict[str, frozenset[int]]] = {
    "truncation": frozenset(pb.Truncation.values()),
    "priority": frozenset(pb.Priority.values()),
    "cache": frozenset(gateway_pb2.CachePolicy.values()),
}
_FIRST_INDEX: Final = re.compile(r"^inputs\[(\d+)\]")

_Outcome = Answer | EmbedMeshError


@dataclass(frozen=True, slots=True)
class _Plan:
    """What all inputs of one modality in one request have in common."""

    modality: str
    info: catalog_pb2.ModelInfo
    model: str  # as the encoder is asked for it
    kinds: frozenset[pb.EmbeddingKind.ValueType]  # the caller's wish
    output: DenseOutput
    untouched: bool  # the cached vector is what the caller wants
    truncation: pb.Truncation.ValueType
    chunking: pb.Chunking
    policy: gateway_pb2.CachePolicy.ValueType
    priority: pb.Priority.ValueType
    patient: bool
    deadline: float

    @property
    def fetched(self) -> frozenset[pb.EmbeddingKind.ValueType]:
        """Kinds asked of the encoder: dense comes along, so that it is never lost from the cache."""
        return self.kinds | ({pb.EMBEDDING_KIND_DENSE} & set(self.info.kinds))

    def unwanted(self) -> frozenset[pb.EmbeddingKind.ValueType]:
        """Kinds that the model makes and the caller did not ask for; the cache may hold them."""
        return frozenset(self.info.kinds) - self.kinds

    @property
    def fresh(self) -> bool:
        """Whether an answer from the cache will not do."""
        return self.policy == gateway_pb2.CACHE_POLICY_REFRESH


@dataclass(frozen=True, slots=True)
class _Flight:
    """A vector on its way. The future gives None when the leader left without an outcome."""

    plan: _Plan
    landed: asyncio.Future[_Outcome | None]

    def serves(self, plan: _Plan) -> bool:
        """Whether a caller with `plan` may wait for it.

        Nobody waits for someone less urgent, or for someone who sits overload out when he does not.
        """
        return (
            self.plan.priority <= plan.priority
            and (plan.patient or not self.plan.patient)
            and (self.plan.fresh or not plan.fresh)
            and self.plan.fetched >= plan.kinds
        )


@dataclass(slots=True)
class _Group:
    """The inputs of one modality in one request, with their places in it."""

    modality: str
    places: list[int] = field(default_factory=list)
    inputs: list[Message] = field(default_factory=list)
    plan: _Plan | None = None
    outcomes: Sequence[_Outcome] = ()


class _Models:
    """The `models` of a response, each once."""

    def __init__(self, response: gateway_pb2.EmbedResponse) -> None:
        self._table = response.models
        self._by_object: dict[int, int] = {}

    def index(self, ref: pb.ModelRef) -> int:
        """Find or add `ref`, which the caller keeps alive meanwhile."""
        found = self._by_object.get(id(ref))  # most often it is one and the same object
        if found is None:
            found = next((i for i, known in enumerate(self._table) if known == ref), len(self._table))
            if found == len(self._table):
                self._table.append(ref)
            self._by_object[id(ref)] = found
        return found


class Router:
    """Answers requests from cache and encoders.

    Args:
        catalog: Knows the models.
        upstreams: Encoders by modality.
        cache: Vectors by content.
        metrics: Counts inputs and times stages.
        max_inputs: Most inputs in one request.
        max_inflight_inputs: See `Admission`.
        max_message_bytes: The largest answer.
        longest_hold: See `EncoderCalls`.
        tracing: Records stages.
    """

    def __init__(
        self,
        catalog: Catalog,
        upstreams: Mapping[str, Upstream],
        cache: VectorCache,
        metrics: GatewayMetrics,
        *,
        max_inputs: int,
        max_inflight_inputs: int,
        max_message_bytes: int,
        longest_hold: float = 0.0,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self._tracing = tracing
        self._calls = {
            modality: EncoderCalls(upstream, metrics, longest_hold=longest_hold, tracing=tracing)
            for modality, upstream in upstreams.items()
        }
        self._catalog, self._upstreams, self._cache, self._metrics = catalog, upstreams, cache, metrics
        # Labelled once: finding a label costs more than counting.
        self._stage = functools.cache(metrics.stage_seconds.labels)
        self._looked_up = functools.cache(metrics.cache_lookups.labels)
        self._answered = functools.cache(metrics.inputs.labels)
        self._max_inputs = max_inputs
        self._answer_bytes = max_message_bytes - _MESSAGE_SLACK
        self._admission = Admission(max_inflight_inputs, self._full)
        self._flights: dict[bytes, _Flight] = {}

    def __repr__(self) -> str:
        return f"<Router flights={len(self._flights)} {self._admission!r} {self._cache!r} {self._catalog!r}>"

    async def embed(
        self,
        request: gateway_pb2.EmbedRequest,
        *,
        deadline: float,
        priority: pb.Priority.ValueType,
        patient: bool = False,
        tenant: Tenant | None = None,
    ) -> gateway_pb2.EmbedResponse:
        """Answer one request; `results[i]` of the response answers `inputs[i]`.

        Args:
            request: As it came.
            deadline: In seconds of the running loop's clock; `math.inf` for none.
            priority: What an unset priority means.
            patient: Sit overload out until the deadline instead of refusing (bulk streams).
            tenant: Whose quotas count.

        Raises:
            InvalidArgument: The request breaks the contract.
            Overloaded: The gateway is full.
            QuotaExceeded: The tenant has used its quotas up.
            EmbedMeshError: No input could be tried, all for the same reason.
        """
        if self._tracing.on:
            self._tracing.note(inputs=len(request.inputs))
        self._check(request)
        priority = request.priority or priority
        if tenant is None:
            return await self._serve(request, deadline=deadline, priority=priority, patient=patient)
        bulk = priority == pb.PRIORITY_BULK
        async with tenant.hold(len(request.inputs), bulk=bulk, patient=patient, deadline=deadline):
            return await self._serve(request, deadline=deadline, priority=priority, patient=patient)

    async def _serve(
        self, request: gateway_pb2.EmbedRequest, *, deadline: float, priority: pb.Priority.ValueType, patient: bool
    ) -> gateway_pb2.EmbedResponse:
        bulk = priority == pb.PRIORITY_BULK
        async with self._admission.hold(len(request.inputs), bulk=bulk, patient=patient, deadline=deadline):
            groups: dict[str, _Group] = {}
            for place, given in enumerate(request.inputs):
                modality = given.WhichOneof("modality")
                if modality is None:
                    continue
                group = groups.get(modality)
                if group is None:
                    group = groups[modality] = _Group(modality)
                group.places.append(place)
                group.inputs.append(getattr(given, modality))
            await self._plan(request, groups.values(), priority=priority, patient=patient, deadline=deadline)
            await _together(*(self._answer(group) for group in groups.values() if group.plan is not None))
            response = self._assemble(request, list(groups.values()))
            if self._tracing.on:
                self._tracing.note(
                    modalities=list(groups),
                    models=[model.name for model in response.models],
                    revisions=[model.revision for model in response.models],
                    units=response.usage.input_units,
                    cached=response.usage.cached_inputs,
                    failed=response.usage.failed_inputs,
                )
            return response

    def _full(self, n: int, admission: Admission, pause: float) -> Overloaded:
        self._metrics.refused_inputs.inc(n)
        return Overloaded(f"{admission.inputs} inputs are in service, {n} more do not fit", retry_after=pause)

    def _check(self, request: gateway_pb2.EmbedRequest) -> None:
        if len(request.inputs) > self._max_inputs:
            raise InputTooLarge.over("the request", len(request.inputs), self._max_inputs, "inputs", field="inputs")
        for option, known in _KNOWN.items():
            if getattr(request, option) not in known:
                raise InvalidRequest(f"unknown value {getattr(request, option)}", field=option)
        if request.HasField("chunking") and request.truncation != pb.TRUNCATION_CHUNK:
            raise InvalidRequest("chunking is for the truncation CHUNK, which was not asked for", field="chunking")

    # Planning.

    async def _plan(
        self,
        request: gateway_pb2.EmbedRequest,
        groups: Any,
        *,
        priority: pb.Priority.ValueType,
        patient: bool,
        deadline: float,
    ) -> None:
        """Choose a model for every group; a group that cannot be served gets its error as outcome."""

        async def plan(group: _Group) -> None:
            try:
                info = await self._catalog.resolve(group.modality, request.model, deadline)
                group.plan = _plan_for(
                    info, group.modality, request, priority=priority, patient=patient, deadline=deadline
                )
            except EmbedMeshError as error:
                group.outcomes = [error] * len(group.inputs)

        await _together(*(plan(group) for group in groups))
        spaces = {group.plan.info.model.space: group.modality for group in groups if group.plan is not None}
        if request.model and len(spaces) > 1:
            # Whoever names one model for several modalities means to compare the vectors.
            raise InvalidRequest(
                f"{request.model!r} puts {' and '.join(sorted(spaces.values()))} into different spaces, "
                "where vectors cannot be compared; ask for them one by one",
                field="model",
            )

    # Answering.

    async def _answer(self, group: _Group) -> None:
        plan = group.plan
        assert plan is not None  # noqa: S101  (the caller picked planned groups)
        if plan.policy == gateway_pb2.CACHE_POLICY_BYPASS:
            with self._stage("upstream").time():
                outcomes: dict[int, _Outcome] = {}
                await self._compute(plan, list(enumerate(group.inputs)), outcomes.update)
            group.outcomes = [outcomes[i] for i in range(len(group.inputs))]
            return
        keys = await cache_keys(plan.info.model, plan.modality, plan.truncation, group.inputs, plan.chunking)
        wanted: dict[bytes, Message] = {}
        for key, item in zip(keys, group.inputs, strict=True):
            wanted.setdefault(key, item)
        found = await self._obtain(plan, wanted)
        group.outcomes = [found[key] for key in keys]

    async def _obtain(self, plan: _Plan, wanted: Mapping[bytes, Message]) -> dict[bytes, _Outcome]:
        found: dict[bytes, _Outcome] = {}
        partial: dict[bytes, pb.EmbedResult] = {}
        if not plan.fresh:
            found |= self._hits(plan, wanted, self._cache.from_memory(list(wanted)), partial)
        lead: dict[bytes, Message] = {}
        follow: dict[bytes, _Flight] = {}
        for key, item in wanted.items():
            if key not in found:
                flight = self._flights.get(key)
                if flight is not None and flight.serves(plan):
                    follow[key] = flight
                else:
                    lead[key] = item
        self._looked_up("inflight", "hit").inc(len(follow))
        self._looked_up("inflight", "miss").inc(len(lead))
        parts = []
        if lead:
            loop = asyncio.get_running_loop()
            led = {key: _Flight(plan, loop.create_future()) for key in lead}
            self._flights |= led
            parts.append(self._lead(plan, lead, led, partial))
        if follow:
            parts.append(self._follow(plan, {key: wanted[key] for key in follow}, follow))
        for part in await _together(*parts):
            found |= part
        return found

    def _hits(
        self, plan: _Plan, keys: Any, payloads: Sequence[bytes | None], partial: dict[bytes, pb.EmbedResult]
    ) -> dict[bytes, _Outcome]:
        """Read cached payloads; what makes no sense is a miss, and so is what lacks a kind: that goes to `partial`."""
        hits: dict[bytes, _Outcome] = {}
        info = plan.info
        model = info.model
        for key, payload in zip(keys, payloads, strict=True):
            if payload is None:
                continue
            try:
                result = pb.EmbedResult.FromString(payload)
            except DecodeError:
                self._cache.discard(key)
                continue
            if not result.HasField("embedding") or not is_whole(result.embedding, info):
                self._cache.discard(key)
            elif _has(result.embedding, plan.kinds):
                hits[key] = Answer(result, model, cached=True)
            else:
                partial[key] = result
        return hits

    async def _lead(
        self,
        plan: _Plan,
        items: Mapping[bytes, Message],
        flights: Mapping[bytes, _Flight],
        partial: dict[bytes, pb.EmbedResult],
    ) -> dict[bytes, _Outcome]:
        found: dict[bytes, _Outcome] = {}

        def land(part: Mapping[bytes, _Outcome]) -> None:
            found.update(part)
            for key, outcome in part.items():
                self._end(key, flights[key], outcome)

        def land_computed(part: Mapping[bytes, _Outcome]) -> None:
            if partial:
                _complete(plan.info.model, part, partial)
            self._keep(plan, items, part)
            land(part)

        try:
            if not plan.fresh:
                with self._stage("cache_get").time(), self._tracing.span("cache.get") as span:
                    payloads = await self._cache.from_redis(list(items))
                    span.set(inputs=len(items), cached=len(payloads) - payloads.count(None))
                land(self._hits(plan, items, payloads, partial))
            missing = [(key, item) for key, item in items.items() if key not in found]
            if missing:
                with self._stage("upstream").time():
                    await self._compute(plan, missing, land_computed)
        finally:
            # Cancelled, or a defect: followers see to themselves.
            for key, flight in flights.items():
                if not flight.landed.done():
                    self._end(key, flight, None)
        return found

    def _end(self, key: bytes, flight: _Flight, outcome: _Outcome | None) -> None:
        if self._flights.get(key) is flight:  # a more urgent caller may have taken the place
            del self._flights[key]
        flight.landed.set_result(outcome)

    async def _follow(
        self, plan: _Plan, items: Mapping[bytes, Message], flights: Mapping[bytes, _Flight]
    ) -> dict[bytes, _Outcome]:
        left = plan.deadline - asyncio.get_running_loop().time()
        with self._tracing.span("inflight.wait") as span:
            span.set(inputs=len(items))
            await asyncio.wait(
                {flight.landed for flight in flights.values()}, timeout=None if left == float("inf") else max(0.0, left)
            )
        found: dict[bytes, _Outcome] = {}
        again: dict[bytes, Message] = {}
        for key, flight in flights.items():
            if not flight.landed.done():
                found[key] = DeadlineExceeded("the deadline passed while the vector was being computed")
                continue
            outcome = flight.landed.result()
            # The leader's haste and deadline are not ours.
            if (
                outcome is None
                or isinstance(outcome, DeadlineExceeded)
                or (plan.patient and isinstance(outcome, Overloaded))
            ):
                again[key] = items[key]
            else:
                found[key] = outcome
        return found | await self._obtain(plan, again) if again else found

    async def _compute(self, plan: _Plan, items: Sequence[tuple[Any, Message]], land: Any) -> None:
        """Send items to the encoders, split into calls; `land` gets each call's outcomes as they come."""
        room = self._upstreams[plan.modality].max_message_bytes - _MESSAGE_SLACK
        most = _most(items, plan, room)
        calls, refused = _split(items, plan, most, room)
        if refused:
            land(refused)

        async def call(part: Sequence[tuple[Any, Message]]) -> None:
            outcomes = await self._call(plan, [item for _, item in part], most)
            land({key: outcome for (key, _), outcome in zip(part, outcomes, strict=True)})

        await _together(*(call(part) for part in calls))

    async def _call(self, plan: _Plan, inputs: Sequence[Message], most: int) -> Sequence[_Outcome]:
        loop = asyncio.get_running_loop()
        terms = Terms(
            plan.model,
            tuple(sorted(plan.fetched)),
            plan.truncation,
            plan.priority,
            (plan.chunking.units, plan.chunking.overlap),
        )
        while True:
            try:
                answers = await self._calls[plan.modality].embed(inputs, terms, most=most, deadline=plan.deadline)
            except Overloaded as error:
                pause = error.retry_after or 0.1
                if not plan.patient or loop.time() + pause >= plan.deadline:
                    return [error] * len(inputs)
                await asyncio.sleep(pause)
            except EmbedMeshError as error:
                return [error] * len(inputs)
            else:
                return [self._verified(plan, answer) for answer in answers]

    def _verified(self, plan: _Plan, answer: Answer) -> Answer:
        """Hold an encoder's answer against the catalog."""
        if answer.result.HasField("error"):
            return answer
        if answer.model != plan.info.model:
            # A rolling upgrade: replicas disagree. The vector is right, it only belongs to another key.
            self._catalog.refresh(plan.modality)
            if "@" in plan.model:
                return broken(plan.modality, f"gave revision {answer.model.revision} instead of the one asked for")
        elif not is_whole(answer.result.embedding, plan.info):
            return broken(plan.modality, "gave a vector of the wrong width")
        if not _has(answer.result.embedding, plan.kinds):
            return broken(plan.modality, "left out a kind of vector that was asked for")
        return answer

    def _keep(self, plan: _Plan, items: Mapping[bytes, Message], outcomes: Mapping[bytes, _Outcome]) -> None:
        with self._stage("cache_set").time(), self._tracing.span("cache.set") as span:
            kept: list[tuple[bytes, bytes]] = []
            for key, outcome in outcomes.items():
                if isinstance(outcome, EmbedMeshError) or outcome.result.HasField("error"):
                    continue
                made_by = outcome.model
                if made_by.revision != plan.info.model.revision or made_by.space != plan.info.model.space:
                    key = cache_key(  # noqa: PLW2901
                        made_by, plan.modality, plan.truncation, items[key], plan.chunking
                    )
                kept.append((key, outcome.result.SerializeToString()))
            span.set(inputs=len(kept))
            self._cache.set_many(kept)

    # Assembling.

    def _assemble(self, request: gateway_pb2.EmbedRequest, groups: Sequence[_Group]) -> gateway_pb2.EmbedResponse:
        _raise_if_nothing_was_tried([outcome for group in groups for outcome in group.outcomes], len(request.inputs))
        with self._stage("finish").time():
            response = gateway_pb2.EmbedResponse()
            results = [response.results.add() for _ in request.inputs]
            models = _Models(response)
            for group in groups:
                for place, outcome in zip(group.places, group.outcomes, strict=True):
                    if isinstance(outcome, EmbedMeshError):
                        results[place].error.CopyFrom(to_status(outcome))
                        continue
                    result = results[place]
                    result.CopyFrom(outcome.result)
                    if result.HasField("embedding"):
                        result.model_index = models.index(outcome.model)
                        if outcome.cached:
                            result.cached = True
                if group.plan is not None:
                    _finish(group.plan, [results[place] for place in group.places])
                    if pb.EMBEDDING_KIND_MULTI_VECTOR in group.plan.kinds or _with_spans(group.inputs):
                        self._fit([results[place] for place in group.places])
                self._count(response, [(place, results[place]) for place in group.places], group.modality)
            answered = sum(len(group.places) for group in groups)
            if answered < len(results):
                nothing = [(i, result) for i, result in enumerate(results) if result.WhichOneof("outcome") is None]
                for place, result in nothing:
                    error = InvalidRequest("the input holds no text, image or audio", field=f"inputs[{place}]")
                    result.error.CopyFrom(to_status(error))
                self._count(response, nothing, "none")
        return response

    def _fit(self, results: Sequence[pb.EmbedResult]) -> None:
        """Refuse, one by one, what would make the answer larger than a message may be."""
        size = 0
        for result in results:
            own = result.ByteSize()
            if size + own > self._answer_bytes:
                error = InputTooLarge.over("the answer", size + own, self._answer_bytes, "bytes", field="inputs[0]")
                error.message += "; ask for fewer inputs at once, for which the cache is ready"
                result.Clear()
                result.error.CopyFrom(to_status(error))
            else:
                size += own

    def _count(
        self, response: gateway_pb2.EmbedResponse, results: Sequence[tuple[int, pb.EmbedResult]], modality: str
    ) -> None:
        """Add the results of one modality, each with its place, to the usage and the metrics."""
        units = cached = failed = 0
        for place, result in results:
            if result.HasField("error"):
                failed += 1
                _point_at(result.error, place)
                error = from_status(result.error)
                self._answered(modality, error.reason or error.code.name).inc()
                continue
            units += result.input_units
            cached += result.cached
            if result.truncated:
                self._metrics.truncated_inputs.labels(response.models[result.model_index].name).inc()
        response.usage.input_units += units
        response.usage.cached_inputs += cached
        response.usage.failed_inputs += failed
        if failed < len(results):
            self._answered(modality, "ok").inc(len(results) - failed)


async def _together(*coroutines: Any) -> list[Any]:
    """Run coroutines at once and wait for all; cancelling cancels all. One alone needs no task."""
    if len(coroutines) == 1:
        return [await coroutines[0]]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(coroutine) for coroutine in coroutines]
    return [task.result() for task in tasks]


def _plan_for(
    info: catalog_pb2.ModelInfo,
    modality: str,
    request: gateway_pb2.EmbedRequest,
    *,
    priority: pb.Priority.ValueType,
    patient: bool,
    deadline: float,
) -> _Plan:
    """Hold the request against what the model offers.

    Raises:
        UnsupportedOutput: Kind, width or dtype is not offered.
    """
    wish = request.output
    kinds = frozenset(wish.kinds or (pb.EMBEDDING_KIND_DENSE,))
    if not kinds <= set(info.kinds):
        raise UnsupportedOutput(
            f"model {info.model.name!r} makes "
            + " and ".join(_name(pb.EmbeddingKind, kind) for kind in info.kinds)
            + ", not "
            + " or ".join(_name(pb.EmbeddingKind, kind) for kind in sorted(kinds - set(info.kinds))),
            field="output.kinds",
            metadata={"option": "kinds"},
        )
    require_shape_of_kinds(kinds, wish)
    widths = {0, info.dimensions, *info.truncatable_dimensions}
    if wish.dimensions not in widths:
        raise UnsupportedOutput(
            f"model {info.model.name!r} gives {', '.join(map(str, sorted(widths - {0})))} dimensions, "
            f"not {wish.dimensions}",
            field="output.dimensions",
            metadata={"option": "dimensions"},
        )
    full = wish.dimensions in (0, info.dimensions)
    normalize = wish.normalize if wish.HasField("normalize") else info.normalized
    return _Plan(
        modality=modality,
        info=info,
        # An unset model stays unset, so that replicas with another default answer with theirs.
        model=request.model if "@" in request.model else info.model.name if request.model else "",
        kinds=kinds,
        output=DenseOutput(0 if full else wish.dimensions, normalize, wish.dtype or pb.DTYPE_FLOAT32),
        untouched=full and normalize == info.normalized and wish.dtype in (pb.DTYPE_UNSPECIFIED, pb.DTYPE_FLOAT32),
        truncation=request.truncation or pb.TRUNCATION_END,
        chunking=request.chunking,
        policy=request.cache,
        priority=priority,
        patient=patient,
        deadline=deadline,
    )


def _name(enum: Any, value: int) -> str:
    return str(enum.Name(value)) if value in enum.values() else str(value)


def _most(items: Sequence[tuple[Any, Message]], plan: _Plan, room: int) -> int:
    """Give how many inputs like these a call may carry, so that the response fits into `room` bytes."""
    info = plan.info
    answer = 4 * info.dimensions + 256
    if _with_spans([item for _, item in items]):
        answer *= 1 + info.limits.get("text_spans", 0)
    if pb.EMBEDDING_KIND_SPARSE in plan.fetched:
        answer += 8 * info.sparse_dimensions
    if pb.EMBEDDING_KIND_MULTI_VECTOR in plan.fetched:
        answer += 4 * (info.multi_vector_dimensions or info.dimensions) * info.max_input_units
        if plan.truncation == pb.TRUNCATION_CHUNK or any(getattr(item, "instructions", ()) for _, item in items):
            answer = room  # rows of several passes, whose number the encoder knows
    return max(1, min(info.max_inputs or _DEFAULT_MAX_INPUTS, room // answer))


def _split(
    items: Sequence[tuple[Any, Message]], plan: _Plan, most: int, room: int
) -> tuple[list[list[tuple[Any, Message]]], dict[Any, _Outcome]]:
    """Split into calls of at most `most` inputs whose requests fit into `room` bytes.

    Returns:
        The calls, and the outcomes of inputs that belong into none.
    """
    info = plan.info
    calls: list[list[tuple[Any, Message]]] = []
    refused: dict[Any, _Outcome] = {}
    size = 0
    for key, item in items:
        own = item.ByteSize() + 16
        error: EmbedMeshError | None = None
        if own > room:
            error = InputTooLarge.over("the input", own, room, "bytes", field="inputs[0]")
        elif (
            isinstance(item, image_pb2.ImageInput)
            and (item.text or item.instruction)
            and not info.reads_text_with_images
        ):
            # An encoder of an earlier version would not see the text, and give the vector of the picture alone.
            error = InvalidRequest(
                f"model {info.model.name!r} reads no text with pictures",
                field=f"inputs[0].{'text' if item.text else 'instruction'}",
            )
        if error:
            refused[key] = Answer(pb.EmbedResult(error=to_status(error)), pb.ModelRef())
            continue
        if not calls or len(calls[-1]) >= most or size + own > room:
            calls.append([])
            size = 0
        calls[-1].append((key, item))
        size += own
    return calls, refused


def _with_spans(inputs: Iterable[Message]) -> bool:
    return any(isinstance(item, text_pb2.TextInput) and item.HasField("late_chunking") for item in inputs)


def _has(embedding: pb.Embedding, kinds: Iterable[pb.EmbeddingKind.ValueType]) -> bool:
    for kind in kinds:  # noqa: SIM110  (several times as fast as all() for one kind, and every hit comes here)
        if not embedding.HasField(_FIELDS[kind]):
            return False
    return True


def _complete(model: pb.ModelRef, outcomes: Mapping[bytes, _Outcome], partial: Mapping[bytes, pb.EmbedResult]) -> None:
    """Add the kinds that the cache held of `model` to those it made now, so that callers keep each other's."""
    for key, known in partial.items():
        outcome = outcomes.get(key)
        # During an upgrade another revision may have answered.
        if isinstance(outcome, Answer) and outcome.result.HasField("embedding") and outcome.model == model:
            for kind in _FIELDS.values():
                if known.embedding.HasField(kind) and not outcome.result.embedding.HasField(kind):
                    getattr(outcome.result.embedding, kind).CopyFrom(getattr(known.embedding, kind))


def _raise_if_nothing_was_tried(outcomes: Sequence[_Outcome], expected: int) -> None:
    """Fail the call when every input failed with its call to an encoder, and all for the same reason."""
    failures = [outcome for outcome in outcomes if isinstance(outcome, EmbedMeshError)]
    if not failures or len(failures) < expected or len({(e.code, e.reason) for e in failures}) > 1:
        return
    raise max(failures, key=lambda error: error.retry_after or 0)


def _point_at(status: status_pb2.Status, place: int) -> None:
    """Make an error of an encoder, which counts inputs in its own call, point at the caller's input."""
    violations = error_details_pb2.BadRequest()
    for detail in status.details:
        if detail.Is(violations.DESCRIPTOR):
            detail.Unpack(violations)
            for violation in violations.field_violations:
                violation.field = _FIRST_INDEX.sub(f"inputs[{place}]", violation.field)
            detail.Pack(violations)


def _finish(plan: _Plan, results: Sequence[pb.EmbedResult]) -> None:
    """Leave what the caller asked for of each result: kinds, then width, normalisation and dtype."""
    unwanted = plan.unwanted()
    if not unwanted and plan.untouched:
        return
    good = [result for result in results if result.HasField("embedding")]
    for kind in unwanted:
        for result in good:
            result.embedding.ClearField(_FIELDS[kind])
            if kind == pb.EMBEDDING_KIND_DENSE:
                result.embedding.ClearField("spans")
    if plan.output.dtype == pb.DTYPE_FLOAT16:
        for result in good:
            _finish_others(result.embedding, plan.output.dtype)
    if not plan.untouched and pb.EMBEDDING_KIND_DENSE in plan.kinds:
        by_width: dict[int, list[pb.EmbedResult]] = {}
        for result in good:
            by_width.setdefault(len(result.embedding.dense.data), []).append(result)
        for size, alike in by_width.items():
            _finish_dense(plan, alike, size // 4)


def _finish_others(embedding: pb.Embedding, dtype: pb.Dtype.ValueType) -> None:
    if embedding.HasField("sparse"):
        sparse = embedding.sparse
        full = decode(sparse.indices), decode(sparse.values), sparse.dimensions
        sparse.Clear()
        finish_sparse(*full, dtype, sparse)
    if embedding.HasField("multi_vector"):
        rows = decode(embedding.multi_vector)
        embedding.multi_vector.Clear()
        finish_multi_vector(rows, dtype, embedding.multi_vector)


def _finish_dense(plan: _Plan, results: Sequence[pb.EmbedResult], width: int) -> None:
    found: list[tuple[pb.EmbedResult, pb.Embedding | pb.Span]] = []
    for result in results:
        found.append((result, result.embedding))
        found += [(result, span) for span in result.embedding.spans]
    rows = np.frombuffer(b"".join([holder.dense.data for _, holder in found]), "<f4").reshape(-1, width)
    norms = np.array([holder.dense_norm for _, holder in found], np.float32) if plan.info.normalized else None
    tensors = [holder.dense for _, holder in found]
    for tensor in tensors:
        tensor.Clear()
    finish_dense(rows, norms, plan.output, tensors)
    if norms is not None and not plan.output.normalize:
        for (result, _), row, norm in zip(found, rows, norms, strict=True):
            if norm == 0 and row.any():
                result.CopyFrom(broken(plan.modality, "did not tell the norm, so it cannot be undone").result)
