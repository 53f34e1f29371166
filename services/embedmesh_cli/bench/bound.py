"""The bound: one model in this process with nothing around it, no queue, no gRPC, no event loop.

What the mesh gives is read against it, because it is what the hardware and the model leave to be had: the same
backend, batches of the encoder's own budget, made with all inputs in sight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from embedmesh.v1 import embedding_pb2 as pb
from embedmesh_cli.bench.measure import Latencies
from embedmesh_cli.local import LocalModel
from embedmesh_encoder.backend import best_lanes
from embedmesh_encoder.modalities import MODALITIES
from embedmesh_encoder.model import load_spec
from embedmesh_encoder.preparation import Prepared
from embedmesh_encoder.text.preparer import fill_rows

__all__ = ["Bound", "Pass", "until_over"]

Batch = Sequence[Prepared]


@dataclass(frozen=True, slots=True)
class Pass:
    """One measurement of the bound.

    Attributes:
        seconds: It took.
        inputs: Inputs embedded.
        units: Their tokens, patches or frames.
        padding: Share of the computed units that was padding.
        cpu_seconds: CPU that it took.
    """

    seconds: float
    inputs: int
    units: int
    padding: float
    cpu_seconds: float

    @property
    def vectors(self) -> float:
        """Vectors a second."""
        return self.inputs / self.seconds

    @property
    def units_rate(self) -> float:
        """Units a second."""
        return self.units / self.seconds

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {
            "seconds": self.seconds,
            "vectors_per_second": self.vectors,
            "units_per_second": self.units_rate,
            "padding_share": self.padding,
            "cpu_ms_per_vector": self.cpu_seconds * 1e3 / self.inputs,
        }


class Bound:
    """Runs one model on prepared inputs. Its methods block: call them in a thread."""

    def __init__(self, folder: Path, modality: str) -> None:
        kind = MODALITIES[modality]
        self._item = kind.item
        self.spec = load_spec(folder)
        settings = kind.defaults(self.spec)
        self.budget = settings.batch_cost
        self._most_items = settings.batch_items
        self._lanes = best_lanes(self.spec)
        self._model = LocalModel(self.spec)
        # Apart, because what is made for several lanes may be slower alone (openvino).
        self._in_lanes = LocalModel(self.spec, lanes=self._lanes) if self._lanes > 1 else self._model
        self._preparer = self._model.preparer

    @property
    def about(self) -> str:
        """What runs the model."""
        return f"{self._model.backend.name}, {self._model.backend.precision}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for model in {self._model, self._in_lanes}:
            model.close()

    def prepare(self, inputs: Sequence[Any]) -> list[Prepared]:
        """Make arrays of texts, or of the bytes of pictures or sounds."""
        return [self._preparer.prepare(self._item(each), pb.TRUNCATION_END) for each in inputs]

    def vectors(self, batch: Batch) -> NDArray[np.float32]:
        """Embed one batch: float32 [n, d], as the encoder answers."""
        return self._model.embed(batch, unit=False)

    def best(self, prepared: Batch, seconds: float) -> Pass:
        """The bound: batches within the encoder's budget, chosen with all inputs in sight, in as many lanes."""
        run = partial(self._in_lanes.embed, unit=False)
        return self._timed(list(self._batches(prepared)), run, seconds, self._units, lanes=self._lanes)

    def one_batch_at_a_time(self, prepared: Batch, seconds: float) -> Pass:
        """The same batches one after the other, each with all cores."""
        return self._timed(list(self._batches(prepared)), self.vectors, seconds, self._units)

    def one_by_one(self, prepared: Batch, seconds: float) -> Pass:
        """Each input alone."""
        return self._timed([[one] for one in prepared], self.vectors, seconds, self._units)

    def as_they_come(self, prepared: Batch, seconds: float, size: int) -> Pass:
        """Batches of `size` texts in order of arrival, each text padded to the longest: what most servers do."""
        batches = [prepared[i : i + size] for i in range(0, len(prepared), size)]

        def run(batch: Batch) -> None:
            self._model.backend.run(self._padded(batch))

        def units(batch: Batch) -> int:
            return len(batch) * max(one.units for one in batch)

        return self._timed(batches, run, seconds, units)

    def with_preparation(self, inputs: Sequence[Any], seconds: float, size: int) -> Pass:
        """Prepare and embed batches of `size` one after the other: a loop that anybody would write first."""
        batches = [inputs[i : i + size] for i in range(0, len(inputs), size)]
        sizes: list[Prepared] = []

        def run(batch: Sequence[Any]) -> None:
            prepared = self.prepare(batch)
            sizes.extend(prepared)
            for part in self._batches(prepared):
                self.vectors(part)

        started, cpu = time.perf_counter(), time.process_time()
        for batch in until_over(batches, seconds):
            run(batch)
        elapsed, used = time.perf_counter() - started, time.process_time() - cpu
        return Pass(elapsed, len(sizes), sum(one.units for one in sizes), float("nan"), used)

    def alone(self, inputs: Sequence[Any], seconds: float) -> Latencies:
        """Seconds from an input to its vector, one after the other, nobody else."""
        taken = []
        for each in until_over(inputs, seconds):
            started = time.perf_counter()
            self.vectors(self.prepare([each]))
            taken.append(time.perf_counter() - started)
        return Latencies(taken)

    def _units(self, batch: Batch) -> int:
        units = [one.units for one in batch]
        return len(units) * max(units) if self._preparer.padded else sum(units)

    def _batches(self, prepared: Batch) -> Iterator[Batch]:
        """Packed: full rows; padded: like lengths together. An input over the budget goes alone."""
        if not self._preparer.padded:
            for row in fill_rows([one.units for one in prepared], self.budget):
                for start in range(0, len(row), self._most_items):
                    yield [prepared[i] for i in row[start : start + self._most_items]]
            return
        batch: list[Prepared] = []
        for one in sorted(prepared, key=lambda each: each.units):
            if batch and (one.units * (len(batch) + 1) > self.budget or len(batch) == self._most_items):
                yield batch
                batch = []
            batch.append(one)
        yield batch

    def _padded(self, batch: Batch) -> Mapping[str, NDArray[Any]]:
        if self.spec.graph.layout != "packed":
            return self._preparer.collate(batch)
        # A packed graph pads, too, when each text gets a row of its own.
        shape = (len(batch), max(one.units for one in batch))
        feeds = {name: np.zeros(shape, np.int64) for name in ("input_ids", "position_ids", "segment_ids")}
        feeds["segment_ids"][:] = -1
        for i, one in enumerate(batch):
            feeds["input_ids"][i, : one.units] = one.data
            feeds["position_ids"][i, : one.units] = np.arange(one.units)
            feeds["segment_ids"][i, : one.units] = i
        return feeds

    def _timed(
        self,
        batches: Sequence[Batch],
        run: Callable[[Batch], object],
        seconds: float,
        units: Callable[[Batch], int],
        *,
        lanes: int = 1,
    ) -> Pass:
        done: list[Batch] = []

        def work(lane: int) -> None:
            for batch in until_over(batches, seconds, seed=lane):
                run(batch)
                done.append(batch)

        started, cpu = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(lanes) as threads:
            list(threads.map(work, range(lanes)))
        elapsed, used = time.perf_counter() - started, time.process_time() - cpu
        real = sum(one.units for batch in done for one in batch)
        return Pass(elapsed, sum(map(len, done)), real, 1 - real / sum(map(units, done)), used)


def until_over(batches: Sequence[Any], seconds: float, *, seed: int = 0) -> Iterator[Any]:
    """Give batches until the time is up, again and again, in a mixed order: those that ran stand for the rest."""
    order = np.random.default_rng(seed).permutation(len(batches))
    end = time.perf_counter() + seconds
    while True:
        for i in order:
            yield batches[i]
            if time.perf_counter() >= end:
                return
