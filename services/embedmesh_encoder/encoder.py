"""One served model: inputs in, vectors out, each input with an outcome of its own.

prepare   in a few threads, a slice of time at a turn, so that no request holds up another; a long request
          takes all threads; an input may take several passes of the model, each an entry of the queue
queue     `batcher.py`
infer     in the batcher's threads: collate, run, pool, normalise, check
join      the vectors of an input's passes become one
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, product
from operator import length_hint
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from embedmesh.errors import (
    DeadlineExceeded,
    EmbedMeshError,
    InferenceFailed,
    InputTooLarge,
    InternalError,
    NotReady,
    Overloaded,
    ServerFault,
)
from embedmesh.v1 import embedding_pb2 as pb
from embedmesh.vectors import l2_norms, normalized
from embedmesh_encoder.backend import Backend
from embedmesh_encoder.batcher import Batcher, BatchPolicy, Priority
from embedmesh_encoder.model import ModelError, ModelSpec
from embedmesh_encoder.pooling import largest
from embedmesh_encoder.preparation import DENSE, KindsPreparer, Others, Prepared, Preparer, SpansPreparer
from embedmesh_server.interceptor import request_id
from embedmesh_server.metrics import EncoderMetrics
from embedmesh_server.tracing import NO_TRACING, Tracing

__all__ = ["Encoded", "Encoder", "EncoderOptions"]

_log = logging.getLogger(__name__)

# How long one request may hold a thread before the next one has its turn.
_SLICE_SECONDS: Final = 0.005

# A vector, float32 [d], the norm it was pooled with, and what else the input gave.
Row = tuple[NDArray[np.float32], float, Others | None]

_NO_VECTOR: Final = np.empty(0, np.float32)
# Of the multi-vector that several passes give: an answer must fit into a message.
_MULTI_VECTOR_BYTES: Final = 32 * 2**20


@dataclass(frozen=True, slots=True)
class EncoderOptions:
    """How one model is served.

    Attributes:
        batch_cost: See `BatchPolicy.max_cost`.
        batch_items: See `BatchPolicy.max_items`.
        aging_seconds: See `BatchPolicy.aging_seconds`.
        max_queue_cost: Most units that may wait, for each priority; over it requests are refused.
        lanes: Batches that run at the same time.
        prepare_threads: Threads that turn inputs into arrays.
    """

    batch_cost: int = 256
    batch_items: int = 128
    aging_seconds: float = 5.0
    max_queue_cost: int = 65_536
    lanes: int = 1
    prepare_threads: int = 2


@dataclass(frozen=True, slots=True)
class Encoded:
    """The vectors of one input, always finite.

    Attributes:
        vector: float32 [d], as the model's reference library gives it: normalised when
            `ModelSpec.normalized`, else as pooled. Empty when only other kinds were wanted.
        norm: L2 norm of the vector as pooled.
        units: See `Prepared`.
        original_units: See `Prepared`.
        truncated: See `Prepared`.
        others: The other kinds that were wanted; None when none were.
        offsets: Where its spans lie, if there are any; see `Prepared`.
    """

    vector: NDArray[np.float32] = field(repr=False)
    norm: float
    units: int
    original_units: int
    truncated: bool
    others: Others | None = field(default=None, repr=False)
    offsets: NDArray[np.int64] | None = field(default=None, repr=False)


class _NotFinite(InferenceFailed):
    """The model's vector holds NaN or infinity."""


class Encoder:
    """Serves one model. `warm_up` first, `close` last; use it from one event loop."""

    def __init__(
        self,
        spec: ModelSpec,
        preparer: Preparer,
        backend: Backend,
        metrics: EncoderMetrics,
        options: EncoderOptions | None = None,
        *,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        options = options or EncoderOptions()
        self.spec = spec
        self.limits = preparer.limits
        self.ready = False
        self._preparer = preparer
        # None where there is nothing but dense vectors to take out of a batch.
        self._others = preparer if set(spec.kinds) != DENSE and isinstance(preparer, KindsPreparer) else None
        self._backend = backend
        self._metrics = metrics
        self._tracing = tracing
        self._prepare_threads = options.prepare_threads
        self._executor = ThreadPoolExecutor(options.prepare_threads, thread_name_prefix=f"prepare-{spec.name}")
        self._batcher: Batcher[Prepared, Row] = Batcher(
            partial(self._infer, alone=False),
            policy=BatchPolicy(
                max_cost=options.batch_cost,
                max_items=options.batch_items,
                padded=preparer.padded,
                aging_seconds=options.aging_seconds,
            ),
            lanes=options.lanes,
            run_alone=self._infer if backend.run_beside else None,
            max_queue_cost=options.max_queue_cost,
            metrics=metrics,
            model=spec.name,
            tracing=tracing,
        )
        self._prepare_seconds = metrics.stage_seconds.labels(spec.name, "prepare")
        self._truncated = metrics.truncated_inputs.labels(spec.name)
        self._nonfinite = metrics.nonfinite_vectors.labels(spec.name)
        described = (spec.name, spec.revision, spec.space, spec.modality, backend.name, backend.precision)
        self._shown = [
            metrics.show(metrics.model_info, described, lambda: True, any),
            metrics.show(metrics.model_ready, (spec.name,), lambda: self.ready, any),
        ]
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __repr__(self) -> str:
        return f"<Encoder {self.spec.name}@{self.spec.revision} ready={self.ready} {self._batcher!r}>"

    @property
    def stalled_seconds(self) -> float:
        """How long every lane has been held by the same batch; a backend that hangs shows here."""
        return self._batcher.stalled_seconds

    @property
    def batch_seconds(self) -> float:
        """What the batch that ended last took; 0 before there was one."""
        return self._batcher.batch_seconds

    async def warm_up(self, items: Sequence[Any]) -> None:
        """Run inputs, so that the first call is as fast as any and a broken model shows.

        Args:
            items: Each runs alone, and the first two together.

        Raises:
            ModelError: The model cannot embed them.
        """

        def warm() -> None:
            batch = [
                _wanting(prepared, frozenset(self.spec.kinds))
                for item in items
                for prepared in self._preparer.prepare(item, pb.TRUNCATION_END).passes
            ]
            ways = (True, False) if self._backend.run_beside else (True,)
            for part, alone in product((*([prepared] for prepared in batch), batch[:2]), ways):
                for outcome in self._infer(part, alone=alone):
                    if isinstance(outcome, EmbedMeshError):
                        raise outcome

        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, warm)
        except Exception as error:
            raise ModelError(
                f'model "{self.spec.name}" in {self.spec.folder} is loaded but cannot embed: {error}'
            ) from error
        self.ready = True

    async def embed(
        self,
        items: Sequence[Any],
        *,
        kinds: frozenset[pb.EmbeddingKind.ValueType] = DENSE,
        truncation: pb.Truncation.ValueType = pb.TRUNCATION_END,
        priority: Priority = Priority.INTERACTIVE,
        deadline: float = math.inf,
    ) -> list[Encoded | EmbedMeshError]:
        """Embed the inputs of one request; outcomes in order of the inputs.

        Args:
            items: What the preparer takes, for text `TextItem`; one that is an error already is its own outcome.
            kinds: Kinds of vector wanted, all of them made by the model.
            truncation: What to do with inputs that are too long.
            priority: Who waits.
            deadline: When nobody waits any more, absolute seconds of the event loop's clock.

        Cancelling it takes what still waits out of the queue.

        Raises:
            Overloaded: The queue has no room for this request.
            NotReady: The node shuts down and made no vector.
            DeadlineExceeded: The deadline passed and no vector was made.
        """
        self._calls += 1
        self._idle.clear()
        try:
            outcomes = await self._embed(items, kinds, truncation, priority, deadline)
            for kind in (DeadlineExceeded, NotReady):
                # The same for all of them: that is an outcome of the call.
                if outcomes and all(isinstance(outcome, kind) for outcome in outcomes):
                    raise outcomes[0]  # type: ignore[misc]  # (isinstance above)
        except (DeadlineExceeded, NotReady, Overloaded) as error:
            self._count(error, len(items))
            raise
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()
        for index, outcome in enumerate(outcomes):
            self._finish(index, outcome)
        return outcomes

    async def drain(self) -> None:
        """Wait until no call is in flight: for when none can come any more."""
        await self._idle.wait()

    async def close(self, within: float = 0.0) -> bool:
        """Finish queued work within so many seconds, fail the rest with NotReady, give the model back.

        Returns:
            False when the backend hangs, in a thread that cannot be ended.
        """
        self.ready = False
        stopped = await self._batcher.close(within)
        self._executor.shutdown(wait=False)
        if stopped:
            self._backend.close()
        for end in self._shown:
            end()
        return stopped

    async def _embed(
        self,
        items: Sequence[Any],
        kinds: frozenset[pb.EmbeddingKind.ValueType],
        truncation: pb.Truncation.ValueType,
        priority: Priority,
        deadline: float,
    ) -> list[Encoded | EmbedMeshError]:
        loop = asyncio.get_running_loop()
        # Decoding pictures that are then refused would make an overload worse.
        self._batcher.require_room(len(items), priority)
        started = time.perf_counter()
        with self._tracing.span("prepare"):
            prepared = await self._prepare(items, truncation, deadline)
        self._prepare_seconds.observe(time.perf_counter() - started)
        good = [_wanting(one, kinds) for each in prepared if isinstance(each, Prepared) for one in each.passes]
        futures = self._batcher.submit(
            good,
            [each.units for each in good],
            [each.group for each in good],
            priority=priority,
            deadline=deadline,
            request=self._tracing.current(),
        )
        rows = iter(futures)
        waiting = [list(islice(rows, len(each.passes))) if isinstance(each, Prepared) else [] for each in prepared]
        for passes in waiting:
            if len(passes) > 1:
                for future in passes:
                    future.add_done_callback(partial(_drop_rest, passes))
        try:
            if futures:
                left = None if math.isinf(deadline) else deadline - loop.time()
                await asyncio.wait(futures, timeout=left)
        finally:
            # On return all are done, unless the time is up; when the caller left, none is wanted.
            for future in futures:
                future.cancel()
        return [
            self._outcome(each, passes) if isinstance(each, Prepared) else each
            for each, passes in zip(prepared, waiting, strict=True)
        ]

    def _outcome(self, prepared: Prepared, futures: Sequence[asyncio.Future[Row]]) -> Encoded | EmbedMeshError:
        """Give what became of one input."""
        errors = [future.exception() for future in futures if not future.cancelled()]
        for error in errors:
            if error is not None:
                assert isinstance(error, EmbedMeshError)  # noqa: S101  (the batcher's futures raise nothing else)
                return error
        if len(errors) < len(futures):
            return DeadlineExceeded("the deadline passed before this input was embedded")
        row = futures[0].result() if len(futures) == 1 else self._joined(prepared, [f.result() for f in futures])
        if isinstance(row, EmbedMeshError):
            return row
        vector, norm, others = row
        return Encoded(
            vector,
            norm,
            sum(each.units for each in prepared.passes),
            sum(each.original_units for each in prepared.passes),
            any(each.truncated for each in prepared.passes),
            others,
            prepared.offsets,
        )

    def _joined(self, prepared: Prepared, rows: Sequence[Row]) -> Row | EmbedMeshError:
        """Make one vector of each kind of those that the passes gave."""
        vector, norm = _NO_VECTOR, 0.0
        if rows[0][0].size:
            # As pooled: the mean of normalised vectors would be another one.
            scales = [norm if self.spec.normalized else 1.0 for _, norm, _ in rows]
            weights = np.array([each.weight for each in prepared.passes]) * scales
            pooled = (weights @ np.stack([vector for vector, _, _ in rows])).astype(np.float32)[None]
            norms = l2_norms(pooled)
            norm = float(norms[0])
            if not math.isfinite(norm):
                return _NotFinite("the vector of this input is not finite")
            vector = (normalized(pooled, norms) if self.spec.normalized else pooled)[0]
        found = [others for _, _, others in rows if others]
        sparse = [others.sparse for others in found if others.sparse]
        parts = [others.multi_vector for others in found if others.multi_vector is not None]
        if (size := sum(part.nbytes for part in parts)) > _MULTI_VECTOR_BYTES:
            return InputTooLarge.over("the multi-vector", size, _MULTI_VECTOR_BYTES, "bytes")
        others = Others(largest(sparse) if sparse else None, np.concatenate(parts) if parts else None)
        return vector, norm, others if found else None

    async def _prepare(
        self, items: Sequence[Any], truncation: pb.Truncation.ValueType, deadline: float
    ) -> list[Prepared | EmbedMeshError]:
        loop = asyncio.get_running_loop()
        outcomes: dict[int, Prepared | EmbedMeshError] = {}
        # Threads take turns at it: each place is given out once.
        waiting = iter(range(len(items)))

        async def turn() -> None:
            if loop.time() >= deadline:
                raise DeadlineExceeded("the deadline passed while the inputs were prepared")
            try:
                await loop.run_in_executor(self._executor, self._prepare_slice, items, waiting, outcomes, truncation)
            except RuntimeError:  # the executor is shut down
                raise NotReady("the node is shutting down", retry_after=1.0) from None

        async def turns() -> None:
            while length_hint(waiting):
                await turn()

        if self._preparer.is_quick(items):
            self._prepare_slice(items, waiting, outcomes, truncation)
        elif items:
            # A few texts are done in one turn; what takes longer is worth more threads.
            await turn()
        await asyncio.gather(*(turns() for _ in range(min(self._prepare_threads, length_hint(waiting)))))
        return [outcomes[place] for place in range(len(items))]

    def _prepare_slice(
        self,
        items: Sequence[Any],
        waiting: Iterator[int],
        outcomes: dict[int, Prepared | EmbedMeshError],
        truncation: pb.Truncation.ValueType,
    ) -> None:
        """Prepare one input, and then as many as the slice of time allows."""
        until = time.perf_counter() + _SLICE_SECONDS
        for place in waiting:
            item = items[place]
            try:
                outcomes[place] = item if isinstance(item, EmbedMeshError) else self._preparer.prepare(item, truncation)
            except EmbedMeshError as error:
                outcomes[place] = error
            except Exception as error:  # noqa: BLE001  (one bad input never fails its neighbours)
                defect = InternalError("this input could not be prepared")
                defect.__cause__ = error
                outcomes[place] = defect
            if time.perf_counter() >= until:
                break

    def _infer(self, batch: Sequence[Prepared], *, alone: bool = True) -> list[Row | EmbedMeshError]:
        run = (not alone and self._backend.run_beside) or self._backend.run
        feeds = self._preparer.collate(batch)
        if self._others is None:
            return self._dense(run(feeds), batch)
        wanted = frozenset[pb.EmbeddingKind.ValueType]().union(*(prepared.kinds for prepared in batch))
        names = [name for kind, name in self.spec.outputs.items() if kind in wanted]
        outputs = run(feeds, list(dict.fromkeys(names)))
        dense: list[Row | EmbedMeshError] = [(_NO_VECTOR, 0.0, None)] * len(batch)
        if pb.EMBEDDING_KIND_DENSE in wanted:
            found = self._dense(outputs, batch)
            dense = [
                row if pb.EMBEDDING_KIND_DENSE in prepared.kinds else nothing
                for row, nothing, prepared in zip(found, dense, batch, strict=True)
            ]
        with np.errstate(all="ignore"):  # as for dense ones
            others = self._others.split_others(outputs, batch)
        return [_with_others(row, other) for row, other in zip(dense, others, strict=True)]

    def _dense(self, outputs: Mapping[str, NDArray[Any]], batch: Sequence[Prepared]) -> list[Row | EmbedMeshError]:
        rows = self._preparer.split(outputs, batch)
        expected = (len(batch), self.spec.dimensions)
        if rows.shape != expected:
            raise RuntimeError(f"the model gave an array of shape {rows.shape}, expected {expected}")
        rows = rows.astype(np.float32, copy=False)
        with np.errstate(all="ignore"):  # what is not finite is an outcome here, not a warning
            norms = l2_norms(rows)
            vectors = normalized(rows, norms) if self.spec.normalized else rows
        # A norm is finite only when every element is.
        found: list[Row | EmbedMeshError] = [
            (vector, float(norm), None) if math.isfinite(norm) else _NotFinite("the vector of this input is not finite")
            for vector, norm in zip(vectors, norms, strict=True)
        ]
        for place, (row, prepared) in enumerate(zip(found, batch, strict=True)):
            if prepared.spans is not None and not isinstance(row, EmbedMeshError):
                found[place] = self._with_spans(row, outputs, place, prepared)
        return found

    def _with_spans(
        self, row: Row, outputs: Mapping[str, NDArray[Any]], place: int, prepared: Prepared
    ) -> Row | EmbedMeshError:
        assert isinstance(self._preparer, SpansPreparer)  # noqa: S101  (it said which spans)
        with np.errstate(all="ignore"):  # as for the text's own vector
            rows = self._preparer.split_spans(outputs, place, prepared)
            norms = l2_norms(rows)
        if not np.isfinite(norms).all():
            return _NotFinite("a vector of this input is not finite")
        return row[0], row[1], Others(spans=(normalized(rows, norms) if self.spec.normalized else rows, norms))

    def _finish(self, index: int, outcome: Encoded | EmbedMeshError) -> None:
        """Count one outcome; log what the caller is not told."""
        self._count(outcome, 1)
        if isinstance(outcome, Encoded):
            if outcome.truncated:
                self._truncated.inc()
        elif isinstance(outcome, ServerFault):
            if isinstance(outcome, _NotFinite):
                self._nonfinite.inc()
            call = request_id()
            outcome.metadata["request_id"] = call
            _log.error(
                "input failed",
                exc_info=outcome.__cause__,
                extra={"request_id": call, "model": self.spec.name, "input": index, "detail": outcome.message},
            )

    def _count(self, outcome: Encoded | EmbedMeshError, inputs: int) -> None:
        name = "ok" if isinstance(outcome, Encoded) else outcome.reason or outcome.code.name
        self._metrics.inputs.labels(self.spec.name, name).inc(inputs)


def _drop_rest(passes: Sequence[asyncio.Future[Row]], done: asyncio.Future[Row]) -> None:
    """Take the other passes of an input out of the queue when one of them failed."""
    if not done.cancelled() and done.exception() is not None:
        for future in passes:
            future.cancel()


def _wanting(prepared: Prepared, kinds: frozenset[pb.EmbeddingKind.ValueType]) -> Prepared:
    return prepared if kinds == prepared.kinds else replace(prepared, kinds=kinds)


def _with_others(row: Row | EmbedMeshError, others: Others) -> Row | EmbedMeshError:
    if isinstance(row, EmbedMeshError):
        return row
    values = (others.sparse[1] if others.sparse else _NO_VECTOR, others.multi_vector)
    if not all(value is None or np.isfinite(value).all() for value in values):
        return _NotFinite("a vector of this input is not finite")
    return (row[0], row[1], replace(others, spans=row[2].spans) if row[2] else others)
